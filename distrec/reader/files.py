"""Checks of a dataset's files against its manifest, before anything starts and on every rank.

Parquet itself notices a lost footer, but mostly not a flipped byte, and pyarrow reads past drifted
types; so sizes, checksums, row counts, schema and nulls are compared with the manifest first. A job
checks the bytes of all files once, with `check_files`; whoever opens a split checks what its
footers say.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from distrec import columns as c
from distrec.dataset import DatasetManifest, FileEntry
from distrec.errors import DataError
from distrec.files import sha256
from distrec.reader.layout import Layout
from distrec.untrusted import plain_size
from distrec.world import World

Verify = Literal["size", "sampled", "sha256"]
# of a split's files, one in so many is read again by "sampled"
_SAMPLED_IN = 10
FORBIDDEN_FILES = ("_common_metadata", "_metadata")


@dataclass(frozen=True)
class SplitFile:
    """One checked file: its path and the rows of each of its row groups."""

    path: Path
    row_groups: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Rows of the file."""
        return sum(self.row_groups)


def check_files(
    directory: str | Path, manifest: DatasetManifest, verify: Verify, world: World | None = None
) -> None:
    """Refuse a dataset whose files are not those of its manifest; rejects are nobody's input.

    Every rank looks at all names and sizes, and reads its part of what is read for checksums.

    Args:
        directory: Of the dataset.
        manifest: Of the dataset.
        verify: size: read nothing. sampled: of each split and vocabulary one file in ten, others
            each time, and at least one. sha256: every file.
        world: This rank; one process by default.

    Raises:
        DataError: With the file, what was expected and what is there.
    """
    directory = Path(directory)
    world = World() if world is None else world
    groups = [split.files for name, split in manifest.splits.items() if name != c.REJECTS]
    for one in manifest.vocabularies.values():
        groups += [one.files, one.free_files, one.reused_files]
    _check_folders(directory, [entry for group in groups for entry in group])
    for group in groups:
        for entry in group:
            _check_size(directory, entry)
    read = [entry for group in groups for entry in _chosen(group, verify)]
    for entry in read[world.rank :: world.world_size] if verify == "sha256" else read:
        _check_sum(directory, entry)


def _chosen(files: Sequence[FileEntry], verify: Verify) -> Sequence[FileEntry]:
    if verify == "sampled":
        # each rank and each run takes others
        return random.sample(files, -(-len(files) // _SAMPLED_IN))
    return files if verify == "sha256" else ()


def open_split(
    directory: str | Path,
    manifest: DatasetManifest,
    split: str,
    layout: Layout,
) -> tuple[SplitFile, ...]:
    """Check the files of a split and give their row groups, in the manifest's order.

    Args:
        directory: Of the dataset.
        manifest: Of the dataset.
        split: Such as columns.TRAIN.
        layout: The columns that will be read.

    Raises:
        DataError: With the file, the column, what was expected and what is there.
    """
    directory = Path(directory)
    if split not in manifest.splits or split not in manifest.schemas:
        raise DataError(
            f"a split is one of {sorted(manifest.schemas)}. Received: {split!r} ({directory})."
        )
    expected = manifest.schemas[split]
    for column, kind in layout.types.items():
        if expected.get(column) != kind:
            raise DataError(
                f"{split} needs column {column!r} of type {kind}. Received: "
                f"{expected.get(column, 'no such column')} (schemas.{split} of the manifest in "
                f"{directory}). Run prepare again."
            )
    entries = manifest.splits[split].files
    _check_folders(directory, entries)
    return tuple(_open_file(directory, entry, expected) for entry in entries)


def type_name(kind: pa.DataType) -> str:
    """An Arrow type as the manifest spells it: without names and nullability of list elements."""
    if pa.types.is_list(kind):
        return f"list<{type_name(kind.value_type)}>"
    return str(kind)


def _check_folders(directory: Path, entries: Sequence[FileEntry]) -> None:
    for folder in {directory, *((directory / entry.path).parent for entry in entries)}:
        for name in FORBIDDEN_FILES:
            if (folder / name).exists():
                raise DataError(
                    f"a dataset holds no {name}: readers unpickle it, which runs code. Received: "
                    f"{folder / name}. Delete it if you know where it comes from, or run prepare "
                    "again."
                )


def _open_file(directory: Path, entry: FileEntry, expected: dict[str, str]) -> SplitFile:
    path = directory / entry.path
    _check_size(directory, entry)
    try:
        footer = pq.read_metadata(path)
        schema = footer.schema.to_arrow_schema()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{path} is not a whole Parquet file: {error}. Copy it again, or run prepare again."
        ) from error
    _check_schema(path, schema, expected)
    if footer.num_rows != entry.num_rows:
        raise DataError(
            f"a file has the number of rows that the manifest gives. Received: {path} with "
            f"{footer.num_rows} rows, expected {entry.num_rows}. Run prepare again."
        )
    groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
    for group in groups:
        _check_nulls(path, group)
    return SplitFile(path, tuple(group.num_rows for group in groups))


def _check_size(directory: Path, entry: FileEntry) -> None:
    size = plain_size(directory, entry.path, DataError)
    if size != entry.num_bytes:
        raise DataError(
            f"a file has the size that the manifest gives. Received: {directory / entry.path} with "
            f"{size} bytes, expected {entry.num_bytes}. Copy it again, or run prepare again."
        )


def _check_sum(directory: Path, entry: FileEntry) -> None:
    received = sha256(directory / entry.path)
    if received != entry.sha256:
        raise DataError(
            "a file has the SHA-256 that the manifest gives. Received: "
            f"{directory / entry.path} with {received}, expected {entry.sha256}. Copy it again, or "
            "run prepare again."
        )


def _check_schema(path: Path, schema: pa.Schema, expected: dict[str, str]) -> None:
    received = {field.name: type_name(field.type) for field in schema}
    for column in {**expected, **received}:
        wanted = expected.get(column, "no such column")
        found = received.get(column, "no such column")
        if wanted != found:
            raise DataError(
                f"a file has the columns and types that the manifest gives. Received: column "
                f"{column!r} of {path}: {found}, expected: {wanted}. Run prepare again; do not "
                "mix files of two datasets."
            )


def _check_nulls(path: Path, group: pq.RowGroupMetaData) -> None:
    for index in range(group.num_columns):
        column = group.column(index)
        if "." in column.path_in_schema:
            # of a list the count includes empty lists: nulls in it are found when it is decoded
            continue
        statistics = column.statistics
        if statistics is not None and statistics.has_null_count and statistics.null_count:
            raise DataError(
                f"a dataset has no nulls. Received: {statistics.null_count} nulls in column "
                f"{column.path_in_schema!r} of {path}. Run prepare again."
            )
