"""The file of one shard of a table: where it lies, and whether it holds what it must."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from distrec.checkpoint.files import StoredRows, check_tensors, open_tensors
from distrec.checkpoint.manifest import TableEntry, table_directory
from distrec.errors import CheckpointError

# row numbers of a delta at once
_CHECKED_ROWS = 2**20
WEIGHT_TYPES = {"fp32": torch.float32, "fp16": torch.float16}


def shard_path(path: Path, name: str, table: TableEntry, index: int) -> Path:
    """Of a shard of the checkpoint at `path`."""
    return path / table_directory(name) / table.shards[index].path


def open_shard(
    path: Path, name: str, table: TableEntry, index: int, is_delta: bool = False
) -> dict[str, Tensor]:
    """``weights`` (rows, D) and ``state`` (rows, S) of one shard, mapped into memory.

    Args:
        path: The checkpoint's directory.
        name: Of the table.
        table: Its entry.
        index: Of the shard.
        is_delta: Then there are ``row_ids`` (rows,), ascending, as well.
    """
    return open_tensors(shard_path(path, name, table, index), _held(table, index, is_delta))


def stored_rows(
    path: Path, name: str, table: TableEntry, index: int, is_delta: bool = False
) -> dict[str, StoredRows]:
    """The same, as `open_shard`, to be read and not mapped."""
    file, held = shard_path(path, name, table, index), _held(table, index, is_delta)
    check_tensors(file, held)
    return {key: StoredRows(file, key) for key in held}


def _held(
    table: TableEntry, index: int, is_delta: bool
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every tensor of a shard."""
    rows = table.shards[index].num_rows
    held: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "weights": ((rows, table.embedding_dim), WEIGHT_TYPES[table.precision]),
        "state": ((rows, table.state_dim), torch.float32),
    }
    if is_delta:
        held["row_ids"] = ((rows,), torch.int64)
    return held


def check_row_ids(path: Path, name: str, table: TableEntry, index: int, row_ids: Tensor) -> None:
    """Refuse row numbers of a delta's shard that are not its own, or not in ascending order.

    Raises:
        CheckpointError: With the file.
    """
    if not len(row_ids):
        return
    is_right = int(row_ids[0]) >= 0 and int(row_ids[-1]) < table.num_embeddings
    for start in range(0, len(row_ids), _CHECKED_ROWS):
        # one more, so that pairs across the border are seen
        part = row_ids[start : start + _CHECKED_ROWS + 1]
        is_right = is_right and bool((part.diff() > 0).all())
        is_right = is_right and bool((part % len(table.shards) == index).all())
    if not is_right:
        raise CheckpointError(
            f"the row numbers of shard {index} of {len(table.shards)} ascend, lie below "
            f"{table.num_embeddings} and leave {index} when divided. Received: others in "
            f"{shard_path(path, name, table, index)}. Use another checkpoint."
        )
