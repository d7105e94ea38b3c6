"""Scores to Parquet, by Spark: each partition of users scored by an executor, then a manifest."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from py4j.protocol import Py4JJavaError
from pydantic import BaseModel, ConfigDict, Field
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from distrec import columns as c
from distrec import errors
from distrec.dataset import FileEntry
from distrec.errors import DataError, DistrecError
from distrec.files import describe_files, uri
from distrec.scoring.partition import ScoreTask, score_batches
from distrec.scoring.users import Users

FORMAT_VERSION = 1
PARQUET_DIRECTORY = "top_k"
_SPARK_SCHEMA = (
    f"{c.USER_ID} string, {c.RANK} int, {c.ITEM_ID} string, {c.SCORE} float, "
    f"{c.REASONS} map<string, float>, {c.MODEL_VERSION} string"
)
# beyond it a task that dies takes too much work with it
_USERS_PER_TASK = 100_000
_OWN_ERROR = re.compile(r"distrec\.errors\.(\w+): (.+)")


class ScoreManifest(BaseModel):
    """What a scores directory holds; written last."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format_version: int = FORMAT_VERSION
    created_at: str
    """UTC, ISO 8601."""
    model_version: str
    """As in every row."""
    checkpoint: str
    """Name of the checkpoint."""
    dataset_hash: str
    """DatasetManifest.content_hash."""
    k: int
    """Items a user, at most."""
    num_users: int = Field(ge=0)
    """Users scored, those included for whom nothing was left."""
    num_rows: int = Field(ge=0)
    files: tuple[FileEntry, ...]
    """Parquet files, relative to the directory."""


def write_scores(
    spark: SparkSession, users: Users, task: ScoreTask, num_files: int, root: Path
) -> tuple[FileEntry, ...]:
    """Score all users into ``<root>/top_k/``.

    The same users and the same number of partitions give the same files: a user's partition is the
    hash of their id, and partitions are sorted.

    Args:
        spark: The session.
        users: Whom to score.
        task: How.
        num_files: Files written; 0: as many as there are partitions with users.
        root: Directory that exists.

    Raises:
        DataError: An executor does not see the files, the disk is full, a score is NaN.
    """
    partitions = num_partitions(spark, users.num_users, task.user_block, num_files)
    placed = users.frame.repartition(partitions, c.USER_ID).sortWithinPartitions(c.USER_ID)
    schema = _SPARK_SCHEMA
    if task.has_probabilities:
        schema += f", {c.PROBABILITIES} map<string, float>"
    scored = placed.mapInArrow(partial(score_batches, task), schema)
    if 0 < num_files < partitions:
        scored = scored.repartition(num_files, c.USER_ID).sortWithinPartitions(c.USER_ID, c.RANK)
    directory = root / PARQUET_DIRECTORY
    with executor_errors():
        scored.write.option("compression", "zstd").parquet(uri(directory))
        return describe_files(spark, root, _named(directory))


def num_partitions(spark: SparkSession, num_users: int, user_block: int, num_files: int) -> int:
    """Partitions of users: work for every core, none that takes hours, none for a few users only.

    As many as Spark's shuffles have, but for less than a block of users in each no more than there
    are cores; and at least num_files.
    """
    shuffle = int(spark.conf.get("spark.sql.shuffle.partitions", "200") or 200)
    filled = max(-(-num_users // user_block), spark.sparkContext.defaultParallelism)
    most = max(min(shuffle, filled), -(-num_users // _USERS_PER_TASK), num_files)
    return max(1, min(most, max(num_users, num_files)))


@contextmanager
def executor_errors() -> Iterator[None]:
    """Raise on the driver what an executor has raised, without Spark's two pages around it."""
    try:
        yield
    except (PySparkException, Py4JJavaError) as error:
        text = f"{error}\n{getattr(error, '_stackTrace', '')}"
        own = _own_error(text)
        if own is None:
            raise
        raise own from error


def _own_error(text: str) -> DistrecError | None:
    match = _OWN_ERROR.search(text)
    kind = getattr(errors, match.group(1), None) if match else None
    if match is None or not isinstance(kind, type) or not issubclass(kind, DistrecError):
        return None
    return kind(match.group(2).strip())


def _named(directory: Path) -> list[str]:
    """Short names for Spark's files; its markers and checksums go."""
    if not directory.is_dir():
        raise DataError(
            "the executors write where the driver looks. Received: Spark has written, and there "
            f"is no {directory}. Put output on a file system that all hosts share."
        )
    names: list[str] = []
    for path in sorted(directory.iterdir()):
        if path.suffix != ".parquet" or path.name.startswith("."):
            path.unlink()
            continue
        name = f"part-{len(names):05d}.parquet"
        path.rename(directory / name)
        names.append(f"{directory.name}/{name}")
    return names
