"""What the steps of prepare work in: the growing dataset, intermediate tables, timed stages."""

from __future__ import annotations

import itertools
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyspark.sql import DataFrame, SparkSession

from distrec.files import uri

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
