"""What an executor does: users in, their best items out, as Arrow batches, without a row loop.

Each Python worker opens the model and maps the tables and the item matrix once; workers of one host
share the pages. The checkpoint and the export therefore lie where every executor can read them
under the same path.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from distrec import columns as c
from distrec.dataset import MANIFEST
from distrec.errors import DataError
from distrec.reader import decode_queries
from distrec.scoring.export import (
    map_tensor,
    open_item_ids,
    open_item_matrix,
    read_export_manifest,
)
from distrec.scoring.model import ScoringModel, open_model
from distrec.scoring.top_k import blocked_top_k

BIAS = "bias"
SCHEMA = pa.schema(
    [
        (c.USER_ID, pa.string()),
        (c.RANK, pa.int32()),
        (c.ITEM_ID, pa.string()),
        (c.SCORE, pa.float32()),
        (c.REASONS, pa.map_(pa.string(), pa.float32())),
        (c.MODEL_VERSION, pa.string()),
    ]
)
_PROBABILITIES = pa.field(c.PROBABILITIES, pa.map_(pa.string(), pa.float32()))
# numbers held at once while scores are explained: 16 MiB
_NUMBERS_PER_CHUNK = 1 << 22


@dataclass(frozen=True)
class ScoreTask:
    """All that an executor needs to know; small, for it travels with every task.

    Args:
        checkpoint: Directory of the checkpoint.
        export: Directory of the encoded catalogue.
        export_identity: Of the export's manifest.
        blocked: .npy file of bool, (M,): items that nobody gets; "" for none.
        model_version: Written beside every row.
        k: Items a user.
        exclude_seen: Leave out what the user has already had.
        user_block: Users in one matrix product.
        item_block: Items in one matrix product.
        has_probabilities: Whether the model is of several tasks, and each task's is written.
    """

    checkpoint: str
    export: str
    export_identity: str
    blocked: str
    model_version: str
    k: int
    exclude_seen: bool
    user_block: int
    item_block: int
    has_probabilities: bool


@dataclass(frozen=True)
class _Opened:
    model: ScoringModel
    items: Tensor
    item_ids: pa.LargeStringArray
    blocked: Tensor | None


def score_batches(task: ScoreTask, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The best items of every user, for DataFrame.mapInArrow.

    Args:
        task: What to do.
        batches: user_id, and the columns of users/ as `reader.decode_queries` reads them.

    Returns:
        Batches of SCHEMA, with the column of probabilities if there is one: rows of one user stand
        together, by ascending rank.

    Raises:
        DataError: This host does not see the files, or a score is NaN.
    """
    # Spark runs a worker on every core: more threads would only get in each other's way
    torch.set_num_threads(1)
    opened = _open(task)
    for batch in batches:
        for start in range(0, batch.num_rows, task.user_block):
            yield _score(task, opened, batch.slice(start, task.user_block))


@functools.lru_cache(maxsize=1)
def _open(task: ScoreTask) -> _Opened:
    checkpoint, export = Path(task.checkpoint), Path(task.export)
    for path in (checkpoint / MANIFEST, export / MANIFEST, Path(task.blocked or task.export)):
        if not path.exists():
            raise _not_shared(f"no {path}")
    if read_export_manifest(export).identity != task.export_identity:
        raise _not_shared(f"another catalogue in {export}")
    item_ids = open_item_ids(export)
    return _Opened(
        model=open_model(checkpoint),
        items=open_item_matrix(export),
        item_ids=item_ids,
        blocked=_blocked(task, item_ids),
    )


def _blocked(task: ScoreTask, item_ids: pa.LargeStringArray) -> Tensor | None:
    """Items that nobody gets: those of the block list, and indexes without an item."""
    blocked = map_tensor(Path(task.blocked)) if task.blocked else None
    is_free = torch.from_numpy(
        pc.equal(pc.binary_length(item_ids), 0).to_numpy(zero_copy_only=False)
    )
    if not bool(is_free.any()):
        return blocked
    return is_free if blocked is None else blocked | is_free


def _not_shared(received: str) -> DataError:
    return DataError(
        "every executor reads the checkpoint and the encoded catalogue under the path that the "
        f"driver has. Received: {received} on host {socket.gethostname()}. Put output on a file "
        "system that all hosts share, mounted at the same path."
    )


def _score(task: ScoreTask, opened: _Opened, batch: pa.RecordBatch) -> pa.RecordBatch:
    spec = opened.model.manifest.model_spec
    queries = decode_queries(batch, spec.features, spec.event_types)
    users = opened.model.encode_users(queries.batch)
    seen = queries.seen if task.exclude_seen else None
    best = blocked_top_k(users, opened.items, task.k, task.item_block, seen, opened.blocked)
    # row-major: the users in their order, each one's items by rank; a short list ends early
    rows, places = (best.columns >= 0).nonzero(as_tuple=True)
    columns = best.columns[rows, places]
    count = len(rows)
    version = pa.repeat(pa.scalar(task.model_version, pa.string()), count)
    arrays = [
        batch.column(c.USER_ID).take(pa.array(rows.numpy())),
        pa.array((places + 1).numpy().astype(np.int32)),
        opened.item_ids.take(pa.array(columns.numpy())).cast(pa.string()),
        pa.array(best.scores[rows, places].numpy()),
        _reasons(opened, users, rows, columns),
        version,
    ]
    if not task.has_probabilities:
        return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)
    arrays.append(_probabilities(opened, users, rows, columns))
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA.append(_PROBABILITIES))


def _reasons(opened: _Opened, users: Tensor, rows: Tensor, columns: Tensor) -> pa.MapArray:
    """Each tower's share of the score and the item's bias, by name: they add up to the score."""
    model = opened.model.model
    names = (*model.tower_names, BIAS)
    width = model.vector_width
    return _by_name(names, width, model.tower_scores, opened, users, rows, columns)


def _probabilities(opened: _Opened, users: Tensor, rows: Tensor, columns: Tensor) -> pa.MapArray:
    """What the head of several tasks says of each listed item, by task."""
    model = opened.model
    names, width = (c.LABEL, *model.model.tasks), model.model.num_pair_activations
    return _by_name(names, width, model.probabilities, opened, users, rows, columns)


def _by_name(
    names: Sequence[str],
    width: int,
    compute: Callable[[Tensor, Tensor], Tensor],
    opened: _Opened,
    users: Tensor,
    rows: Tensor,
    columns: Tensor,
) -> pa.MapArray:
    """A map of numbers for each listed item.

    Args:
        names: Of the N numbers.
        width: Numbers that a pair takes while they are computed.
        compute: Of vectors of n users and n items, (n, N).
        opened: With the items.
        users: float32, (B, W).
        rows: Of the users, int64, (n,).
        columns: Of the items, int64, (n,).
    """
    chunk = max(1, _NUMBERS_PER_CHUNK // width)
    numbers = torch.empty(len(rows), len(names))
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        numbers[part] = compute(users[rows[part]], opened.items[columns[part]])
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * len(names)
    keys = pa.array(names).take(pa.array(np.tile(np.arange(len(names)), len(rows))))
    return pa.MapArray.from_arrays(pa.array(offsets), keys, pa.array(numbers.flatten().numpy()))
