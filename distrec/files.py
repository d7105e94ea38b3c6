"""Files and directories that appear whole or not at all; checksums of Parquet taken by Spark."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from distrec import pulse
from distrec.dataset import FileEntry
from distrec.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_HEX_DIGITS = 12
# of a file at once
_HASHED_BYTES = 2**20
_PARQUET_END = struct.Struct("<I4s")
# Spark reads a path as a pattern
_PATTERN_CHARACTERS = frozenset("*?[]{}\\")


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """Give an empty directory beside `target`; what `commit` has not moved is removed at the end.

    What a killed job left there is cleared first, so one writer at a time is assumed.

    Raises:
        ConfigError: Spark cannot read from a path like this one.
        DataError: The directory above `target` cannot be written.
    """
    target = target.absolute()
    refused = sorted(_PATTERN_CHARACTERS & set(str(target)))
    if refused:
        raise ConfigError(
            f"the path of the output must be without {' '.join(sorted(_PATTERN_CHARACTERS))}: to "
            f"Spark they make a pattern. Received: {target}. Set output to another directory."
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear(target)
        root = target.parent / f".{target.name}-{_token()}"
        root.mkdir()
    except OSError as error:
        raise DataError(
            f"the directory of the output must be writable. Received: {target}: {error}. Set "
            "output to a directory that this job may write."
        ) from error
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def commit(root: Path, target: Path) -> None:
    """Move a finished directory into its place; an older one is moved aside, then removed."""
    target = target.absolute()
    for path in (*root.rglob("*"), root):
        fsync(path)
    old = target.parent / f".{target.name}-old-{_token()}"
    if target.exists():
        target.rename(old)
    try:
        root.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def fsync(path: Path) -> None:
    """Make a file, or the entries of a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write and fsync a small file."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def replace_text(path: Path, text: str) -> None:
    """Put a file in place of another at one stroke.

    Raises:
        DataError: The disk is full, or the directory cannot be written. The old file is as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_text(partial, text)
        partial.rename(path)
        fsync(path.parent)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error}. Free space, or set output to another directory."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def uri(path: Path) -> str:
    """For Spark, whose default file system need not be the local one.

    Unescaped, as Hadoop takes it: to it a %20 is three letters of a name, not a space.
    """
    return f"file://{path.absolute()}"


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    return _digests(path, 0)[1]


def parquet_sha256(path: Path) -> tuple[str, str]:
    """SHA-256, in hex, of a Parquet file without its footer, and of the whole; read once."""
    with path.open("rb") as stream:
        # its length, and the letters PAR1, are the last of the file
        stream.seek(-_PARQUET_END.size, os.SEEK_END)
        length = _PARQUET_END.unpack(stream.read())[0]
    return _digests(path, path.stat().st_size - _PARQUET_END.size - length)


def _digests(path: Path, first_bytes: int) -> tuple[str, str]:
    """SHA-256 of the first bytes of a file, and of all of it."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_HASHED_BYTES))
    with path.open("rb", buffering=0) as stream:
        left = first_bytes
        while left > 0 and (count := stream.readinto(buffer[:left])):
            pulse.beat()
            digest.update(buffer[:count])
            left -= count
        first = digest.hexdigest()
        while count := stream.readinto(buffer):
            pulse.beat()
            digest.update(buffer[:count])
    return first, digest.hexdigest()


def describe_files(spark: SparkSession, root: Path, names: Sequence[str]) -> tuple[FileEntry, ...]:
    """Rows, bytes and checksums of Parquet files of any size, each read by one Spark task.

    Args:
        spark: The session; its executors see `root`.
        root: The paths in the result are relative to it.
        names: Relative paths, with forward slashes.

    Returns:
        One entry a file, in the order of `names`.
    """
    if not names:
        return ()
    context = spark.sparkContext
    slices = min(len(names), max(context.defaultParallelism, 1) * 4)
    function = partial(describe_file, root.absolute())
    return tuple(context.parallelize(list(names), slices).map(function).collect())


def describe_file(root: Path, name: str) -> FileEntry:
    """Rows, bytes and checksums of one Parquet file; its path is relative to `root`."""
    path = root / name
    pages, whole = parquet_sha256(path)
    return FileEntry(
        path=name,
        num_rows=pq.read_metadata(path).num_rows,
        num_bytes=path.stat().st_size,
        sha256=whole,
        pages_sha256=pages,
    )


def _token() -> str:
    return uuid.uuid4().hex[:_HEX_DIGITS]


def _leftovers(target: Path, kind: str) -> list[Path]:
    return sorted(target.parent.glob(f".{target.name}-{kind}{'[0-9a-f]' * _HEX_DIGITS}"))


def _clear(target: Path) -> None:
    for old in _leftovers(target, "old-"):
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            # killed between the two renames of commit(): the old directory is whole
            old.rename(target)
    for rest in _leftovers(target, ""):
        shutil.rmtree(rest, ignore_errors=True)
