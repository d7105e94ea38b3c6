"""Rows taken out of Parquet files, row group by row group; a file without any is linked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from distrec.errors import DataError

Change = Callable[[pa.Table], pa.Table]
"""A row group to what is kept of it; what is given back is the same object where nothing goes."""

Ids = NDArray[np.int64]
NO_IDS: Ids = np.zeros(0, np.int64)


def row_groups(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Row groups of a file, one at a time.

    Raises:
        DataError: The file is missing or damaged.
    """
    try:
        with pq.ParquetFile(path) as file:
            for index in range(file.num_row_groups):
                yield file.read_row_group(index, columns=columns, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}. Copy it again.") from error


def without(table: pa.Table, gone: NDArray[np.bool_]) -> pa.Table:
    """The rows that are not marked; the table itself when none is."""
    return table.filter(pa.array(~gone)) if gone.any() else table


def change_file(source: Path, target: Path, change: Change) -> bool:
    """Write `target` with what `change` leaves of each row group of `source`.

    Returns:
        Whether anything has changed; else `target` is a hard link to `source`, or a copy.
    """
    changed = [change(group) is not group for group in row_groups(source)]
    target.parent.mkdir(parents=True, exist_ok=True)
    if not any(changed):
        link(source, target)
        return False
    schema = pq.read_schema(source)
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        for group in row_groups(source):
            kept = change(group)
            if len(kept):
                writer.write_table(kept, row_group_size=len(kept))
    return True


def link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no second names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def integers(table: pa.Table, name: str) -> Ids:
    """A column of int64 without nulls."""
    return np.asarray(table.column(name).to_numpy(), dtype=np.int64)


def among(table: pa.Table, name: str, values: frozenset[str]) -> NDArray[np.bool_]:
    """Which texts of a column are among `values`."""
    texts = table.column(name).to_pylist()
    return np.fromiter((text in values for text in texts), np.bool_, len(texts))


def flat_integers(table: pa.Table, name: str) -> Ids:
    """The numbers of a column of int64, or of all its lists."""
    column = table.column(name)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = pa.chunked_array([chunk.flatten() for chunk in column.chunks], pa.int64())
    return np.asarray(column.to_numpy(), dtype=np.int64)
