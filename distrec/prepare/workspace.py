"""The directory that a dataset grows in: beside its place, and moved there when it is whole."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyspark.sql import DataFrame, SparkSession

from distrec.errors import DataError

logger = logging.getLogger("distrec.prepare")

_WORK = "work"

# enough that the small stages of one output do not leave the cores to wait
_THREADS = 4


@dataclass
class Workspace:
    """A staging directory, and in it the intermediate tables of the job.

    Intermediate tables are Parquet files rather than cached frames where many later steps read
    them: they survive lost executors, and each later query plan starts short.
    """

    spark: SparkSession
    root: Path
    counter: Iterator[int] = field(default_factory=itertools.count)

    def materialize(self, frame: DataFrame, name: str) -> DataFrame:
        """Write a frame once; what is returned reads the files and depends on nothing else."""
        path = uri(self.root / _WORK / f"{next(self.counter):02d}-{name}")
        frame.write.option("compression", "snappy").parquet(path)
        return self.spark.read.schema(frame.schema).parquet(path)

    def drop_work(self) -> None:
        """Remove the intermediate tables."""
        shutil.rmtree(self.root / _WORK, ignore_errors=True)


def uri(path: Path) -> str:
    """For Spark, whose default file system need not be the local one."""
    return path.absolute().as_uri()


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Log how long a stage took."""
    started = time.monotonic()
    logger.info("%s ...", name)
    yield
    logger.info("%s: %.1f s", name, time.monotonic() - started)


def concurrently(*functions: Callable[[], Any]) -> list[Any]:
    """Call functions that start Spark jobs and do not depend on one another.

    Returns:
        Their results, in order. The first error, in order, is raised when all have ended.
    """
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        futures = [pool.submit(function) for function in functions]
    return [future.result() for future in futures]


@contextmanager
def staging(spark: SparkSession, target: Path) -> Iterator[Workspace]:
    """Give a workspace and remove it at the end, unless commit() has moved it.

    Raises:
        DataError: The directory above `target` cannot be written.
    """
    parent = target.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _clear(target)
        root = parent / f".{target.name}-{uuid.uuid4().hex[:12]}"
        root.mkdir()
    except OSError as error:
        raise DataError(
            f"the dataset's directory must be writable. Received: {target}: {error}. Set output "
            "to a directory that this job may write."
        ) from error
    try:
        yield Workspace(spark, root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _leftovers(target: Path, kind: str) -> list[Path]:
    digit = "[0-9a-f]"
    return sorted(target.absolute().parent.glob(f".{target.name}-{kind}{digit * 12}"))


def _clear(target: Path) -> None:
    """Undo what a killed job left: one prepare at a time is assumed."""
    for old in _leftovers(target, "old-"):
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            # killed between the two renames of commit(): the old dataset is whole
            old.rename(target)
    for rest in _leftovers(target, ""):
        shutil.rmtree(rest, ignore_errors=True)


def commit(root: Path, target: Path) -> None:
    """Move a whole dataset into its place; an older one is moved aside and then removed."""
    target = target.absolute()
    for path in root.rglob("*"):
        _sync(path)
    _sync(root)
    old = target.parent / f".{target.name}-old-{uuid.uuid4().hex[:12]}"
    if target.exists():
        target.rename(old)
    try:
        root.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
