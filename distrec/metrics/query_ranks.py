"""Where each query's targets were found, by model: what every metric of a user follows from.

``query_ranks.parquet`` beside ``metrics.json`` has one row a model and query with targets:

- split, model: string;
- query: int64, the row of the query in its split;
- user_index: int64, UNKNOWN_INDEX for a user that train does not know. No user id is kept;
- is_cold_user: bool; num_targets, num_cold_targets: int32;
- ranks: list<int32>, ascending from 1, of the targets among the first max(evaluate.ks);
- cold_ranks: list<int32>, those of ranks whose item is cold;
- num_new_targets: int32; new_ranks: list<int32>: likewise of items without an event in train.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from distrec.batch import Jagged, QueryBatch
from distrec.columns import FIRST_INDEX, USER_INDEX
from distrec.metrics.ranking import GROUPS, RankingMetrics, list_metrics

SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("model", pa.string()),
        ("query", pa.int64()),
        (USER_INDEX, pa.int64()),
        ("is_cold_user", pa.bool_()),
        ("num_targets", pa.int32()),
        ("num_cold_targets", pa.int32()),
        ("ranks", pa.list_(pa.int32())),
        ("cold_ranks", pa.list_(pa.int32())),
        ("num_new_targets", pa.int32()),
        ("new_ranks", pa.list_(pa.int32())),
    ]
)
_ROWS_PER_GROUP = 1 << 18


class QueryRanksWriter:
    """Writes the file, some queries at a time; a context manager. The caller renames it.

    Args:
        path: Of the file.
    """

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetWriter(path, SCHEMA, compression="zstd")
        self._waiting: list[pa.Table] = []

    def __enter__(self) -> QueryRanksWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._flush()
        self._file.close()

    def add(
        self,
        names: tuple[str, str],
        first: int,
        queries: QueryBatch,
        lists: Tensor,
        metrics: RankingMetrics,
    ) -> None:
        """Add the B queries of a batch.

        Args:
            names: Split and model.
            first: Row of the first query in its split.
            queries: B users.
            lists: Item indexes, int64, (B, K), as RankingMetrics.update returns them.
            metrics: Says what is cold.
        """
        self._waiting.append(_rows(names, first, queries, lists, metrics))
        if sum(len(table) for table in self._waiting) >= _ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._file.write_table(pa.concat_tables(self._waiting), _ROWS_PER_GROUP)
            self._waiting = []


def _rows(
    names: tuple[str, str], first: int, queries: QueryBatch, lists: Tensor, metrics: RankingMetrics
) -> pa.Table:
    size = queries.batch.batch_size
    bags, items = metrics.distinct_targets(queries.targets.to(torch.device("cpu")))
    # padding is no target, and nor is an item that is in no catalogue
    cells = torch.arange(size).unsqueeze(1) * metrics.num_items + lists
    hits = torch.isin(cells, (bags * metrics.num_items + items)[items >= FIRST_INDEX])
    num_targets = torch.bincount(bags, minlength=size)
    columns = [
        pa.array([names[0]] * size),
        pa.array([names[1]] * size),
        pa.array(np.arange(first, first + size)),
        pa.array(queries.batch.user_index.numpy()),
        pa.array(metrics.is_cold_user(queries.batch.num_events).numpy()),
        pa.array(num_targets.int().numpy()),
        pa.array(torch.bincount(bags[metrics.is_cold[items]], minlength=size).int().numpy()),
        _ranks(hits),
        _ranks(hits & metrics.is_cold[lists]),
        pa.array(torch.bincount(bags[metrics.is_new[items]], minlength=size).int().numpy()),
        _ranks(hits & metrics.is_new[lists]),
    ]
    table = pa.Table.from_arrays(columns, schema=SCHEMA)
    return table.filter(pa.array((num_targets > 0).numpy()))


def _ranks(hits: Tensor) -> pa.ListArray:
    """The places of the true values of each row, counted from 1."""
    offsets = torch.zeros(len(hits) + 1, dtype=torch.int32)
    offsets[1:] = hits.sum(1).cumsum(0)
    ranks = (hits.nonzero()[:, 1] + 1).int()
    return pa.ListArray.from_arrays(pa.array(offsets.numpy()), pa.array(ranks.numpy()))


class QueriesHash:
    """Tells whether two runs measured the same users on the same targets, in whatever order.

    Users whom train does not know have no index of their own: with them the order counts too.

    Args:
        vocabularies: Hashes of what the indexes stand for.
    """

    def __init__(self, vocabularies: Sequence[str]) -> None:
        self._vocabularies = list(vocabularies)
        self._users: list[Tensor] = []
        self._targets: list[Jagged] = []

    def add(self, queries: QueryBatch) -> None:
        """Add the queries of a batch."""
        self._users.append(queries.batch.user_index)
        self._targets.append(queries.targets)

    def hexdigest(self) -> str:
        """SHA-256 of everything added."""
        digest = hashlib.sha256(repr(self._vocabularies).encode())
        if self._users:
            users = torch.cat(self._users)
            lengths = torch.cat([targets.lengths for targets in self._targets])
            values = torch.cat([targets.values for targets in self._targets])
            order = torch.argsort(users, stable=True)
            # the targets of a query stay together: sorted by the place of their query
            place = torch.empty_like(order)
            place[order] = torch.arange(len(order))
            moved = torch.argsort(torch.repeat_interleave(place, lengths), stable=True)
            for part in (users[order], lengths[order], values[moved]):
                digest.update(part.numpy().tobytes())
        return digest.hexdigest()


def values_of(table: pa.Table, group: str, ks: Sequence[int]) -> npt.NDArray[np.float64]:
    """Each user's metrics over a slice, NaN for a user who is not in it.

    Args:
        table: Rows of the file, of one split and model, in any order.
        group: Of ranking.GROUPS.
        ks: Cut-offs, none above those that were measured.

    Returns:
        float64, (N, len(ACCURACY), len(ks)), in the order of `names.ACCURACY`.
    """
    assert group in GROUPS, group
    all_targets, cold_targets = _column(table, "num_targets"), _column(table, "num_cold_targets")
    hits, cold_hits = (_hits(table[name], max(ks)) for name in ("ranks", "cold_ranks"))
    new_hits, new_targets = _new(table, max(ks))
    cold_user = _column(table, "is_cold_user")
    counted, num_targets = all_targets > 0, all_targets
    if group == "cold_items":
        hits, num_targets = cold_hits, cold_targets
        counted = num_targets > 0
    elif group == "new_items":
        hits, num_targets = new_hits, new_targets
        counted = num_targets > 0
    elif group == "warm_items":
        hits, num_targets = hits & ~cold_hits, all_targets - cold_targets
        counted = num_targets > 0
    elif group != "all":
        counted = cold_user if group == "cold_users" else ~cold_user
    values = list_metrics(
        torch.from_numpy(hits), torch.from_numpy(num_targets.astype(np.int64)).clamp(min=1), ks
    ).numpy()
    values[~counted] = np.nan
    return values


def _new(table: pa.Table, width: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[Any]]:
    """Of new items; older files do not tell them."""
    if "new_ranks" not in table.column_names:
        return np.zeros((len(table), width), np.bool_), np.zeros(len(table), np.int32)
    return _hits(table["new_ranks"], width), _column(table, "num_new_targets")


def _column(table: pa.Table, name: str) -> npt.NDArray[Any]:
    return table[name].to_numpy()


def _hits(ranks: pa.ChunkedArray, width: int) -> npt.NDArray[np.bool_]:
    """bool, (N, width): whether the place has a target."""
    hits = np.zeros((len(ranks), width), np.bool_)
    # of several chunks, parents would be counted from the start of each
    whole = ranks.combine_chunks()
    rows, places = pc.list_parent_indices(whole).to_numpy(), whole.flatten().to_numpy() - 1
    kept = places < width
    hits[rows[kept], places[kept]] = True
    return hits
