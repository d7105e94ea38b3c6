"""Protocols with given negatives: each user's targets are ranked among a list of items, not all.

Figures of such a protocol are far above those of the whole catalogue, and order models otherwise
(Krichene and Rendle 2020, "On Sampled Metrics for Item Recommendation"): they are for comparing
with published ones alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from distrec import columns as c
from distrec.batch import Jagged, QueryBatch
from distrec.dataset import DatasetManifest
from distrec.errors import DataError
from distrec.files import sha256
from distrec.user_key import hashed

logger = logging.getLogger("distrec.evaluate")


class GivenCandidates:
    """The items among which each user's targets are ranked.

    Args:
        path: Parquet or CSV file (by its ending) with columns user_id and item_id, raw values.
        directory: Of the dataset.
        manifest: Of the dataset.
        user_key: With which its users are hashed; None: they are not.

    Attributes:
        sha256: Of the file.

    Raises:
        DataError: The file is not there, lacks a column, or names no pair of the dataset.
    """

    def __init__(
        self,
        path: Path,
        directory: Path,
        manifest: DatasetManifest,
        user_key: bytes | None = None,
    ) -> None:
        table = _read(path, user_key)
        self.sha256 = sha256(path)
        users = _indexes(table[c.USER_ID], directory / "vocab" / c.USER_ID, "value", "id")
        items = _indexes(table[c.ITEM_ID], directory / c.ITEMS, c.ITEM_ID, c.ITEM_INDEX)
        known = (users >= c.FIRST_INDEX) & (items >= c.FIRST_INDEX)
        if not known.any():
            raise DataError(
                "candidates are users and items of the dataset. Received: none of the "
                f"{len(users)} pairs of {path} is known. Check that its ids are the raw ones."
            )
        if not known.all():
            logger.info("candidates: %d of %d pairs are not known", (~known).sum(), len(known))
        users, items = users[known], items[known]
        order = np.argsort(users, kind="stable")
        counts = np.bincount(users, minlength=manifest.vocabularies[c.USER_ID].num_embeddings)
        lengths = torch.from_numpy(counts)
        self._bags = Jagged.from_lengths(torch.from_numpy(items[order]), lengths)

    def restrict(self, queries: QueryBatch) -> QueryBatch:
        """The queries, those of users without candidates without targets: they are left out."""
        counted = self._bags.lengths[queries.batch.user_index] > 0
        return replace(queries, targets=_emptied(queries.targets, counted))

    def among(self, scores: Tensor | Iterable[Tensor], queries: QueryBatch) -> Iterator[Tensor]:
        """The scores, minus infinity for all that is neither candidate nor target.

        Args:
            scores: Of B queries, (B, M), or that in blocks of rows, as a Scorer gives them.
            queries: B queries.
        """
        own = self._bags.select(queries.batch.user_index)
        start = 0
        for block in [scores] if isinstance(scores, Tensor) else scores:
            rows = range(start, start + len(block))
            start += len(block)
            kept = torch.full_like(block, float("-inf"))
            for bags in (own, queries.targets):
                part = bags.select(torch.arange(rows.start, rows.stop))
                known = part.values >= c.FIRST_INDEX
                places = part.bag_of_value[known], part.values[known] - c.FIRST_INDEX
                places = places[0].to(block.device), places[1].to(block.device)
                kept[places] = block[places]
            yield kept


def _emptied(bags: Jagged, kept: Tensor) -> Jagged:
    return Jagged.from_lengths(bags.values[kept[bags.bag_of_value]], bags.lengths * kept)


def _read(path: Path, user_key: bytes | None) -> pa.Table:
    """user_id, as the dataset has it, and item_id, both as text."""
    wanted = [c.USER_ID, c.ITEM_ID]
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path)
        else:
            types = csv.ConvertOptions(column_types=dict.fromkeys(wanted, pa.string()))
            table = csv.read_csv(path, convert_options=types)
        table = table.select(wanted).cast(pa.schema([(name, pa.string()) for name in wanted]))
    except (OSError, pa.ArrowException, KeyError) as error:
        raise DataError(
            f"evaluate.test_candidates is a Parquet or CSV file with columns {' and '.join(wanted)}"
            f". Received: {path}: {error}. Check the path and the header."
        ) from error
    if user_key is None:
        return table
    users = [one and hashed(one, user_key) for one in table[c.USER_ID].to_pylist()]
    return table.set_column(0, c.USER_ID, pa.array(users, pa.string()))


def _indexes(values: pa.ChunkedArray, known: Path, key: str, index: str) -> NDArray[np.int64]:
    """Indexes of raw values in a table of the dataset, UNKNOWN_INDEX for those it lacks: int64."""
    table = pq.read_table(known, columns=[key, index])
    places = pc.index_in(values, table[key].combine_chunks())
    indexes = pc.take(table[index].combine_chunks(), places)
    found: NDArray[np.int64] = pc.fill_null(indexes, c.UNKNOWN_INDEX).to_numpy()
    return found
