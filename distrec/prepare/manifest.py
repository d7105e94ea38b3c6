"""The manifest of a dataset: checksums by the executors, then one file, written last."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlparse

import pyarrow.parquet as pq
from pyspark.sql import functions as F

from distrec.dataset import MANIFEST, DatasetManifest, FileEntry, Split
from distrec.errors import DataError
from distrec.prepare.workspace import Workspace, uri
from distrec.prepare.write import Written

# Spark hashes a file as one value, which is an array of the JVM
_LARGEST_FILE = 2**31 - 1024


def checksums(workspace: Workspace, paths: list[str]) -> dict[str, str]:
    """SHA-256 of each file, computed where the tasks run.

    Raises:
        DataError: A file is too large to be hashed at once.
    """
    for path in paths:
        size = (workspace.root / path).stat().st_size
        if size > _LARGEST_FILE:
            raise DataError(
                f"a file of a dataset is smaller than 2 GiB. Received: {path} with {size} bytes. "
                "Lower prepare.rows_per_file, or raise num_files."
            )
    files = workspace.spark.read.format("binaryFile").load(
        [uri(workspace.root / path) for path in paths]
    )
    rows = files.select("path", F.sha2("content", 256).alias("sha256")).collect()
    root = workspace.root.absolute()
    return {
        Path(unquote(urlparse(row["path"]).path)).relative_to(root).as_posix(): row["sha256"]
        for row in rows
    }


def entries(
    workspace: Workspace, written: Mapping[str, Written]
) -> dict[str, tuple[FileEntry, ...]]:
    """The files of every directory; their row counts are checked against the Parquet footers."""
    paths = [path for one in written.values() for path in one.paths]
    hashes = checksums(workspace, paths)
    found = {}
    for name, one in written.items():
        files = []
        for path, num_rows in zip(one.paths, one.num_rows, strict=True):
            full = workspace.root / path
            in_file = pq.read_metadata(full).num_rows
            assert in_file == num_rows, (path, in_file, num_rows)
            files.append(
                FileEntry(
                    path=path,
                    num_rows=num_rows,
                    num_bytes=full.stat().st_size,
                    sha256=hashes[path],
                )
            )
        found[name] = tuple(files)
    return found


def as_split(files: tuple[FileEntry, ...]) -> Split:
    """A directory's files with their sum."""
    return Split(num_rows=sum(file.num_rows for file in files), files=files)


def write_manifest(manifest: DatasetManifest, root: Path) -> None:
    """Write it under another name first: a manifest that is there is whole."""
    path = root / MANIFEST
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(manifest.model_dump(mode="json"), stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
