"""The two lists that a user may hand in: whom to score, and what to recommend to nobody."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from distrec import columns as c
from distrec.config import TableConfig
from distrec.dataset import DatasetManifest
from distrec.errors import DataError
from distrec.files import uri
from distrec.prepare.faults import translated
from distrec.prepare.read import read_source
from distrec.prepare.validate import Checks

logger = logging.getLogger("distrec.score")

_CSV_ENDINGS = (".csv", ".csv.gz")
_EXAMPLE_CHARACTERS = 300


def open_list(spark: SparkSession, path: str, key: str, column: str) -> Checks:
    """A list as it stands in its file; nothing but its columns is read yet.

    Args:
        spark: The session.
        path: CSV (ending in .csv or .csv.gz, or a directory of such files) or else Parquet.
        key: Of the configuration, for messages: score.users, score.block_list.
        column: That it must have.

    Raises:
        DataError: The file is not there, or has no such column.
    """
    folder = Path(path)
    names = [inner.name for inner in folder.iterdir()] if folder.is_dir() else [path]
    is_csv = any(name.endswith(_CSV_ENDINGS) for name in names)
    source = TableConfig(paths=(path,), format="csv" if is_csv else "parquet", id=column)
    frame = read_source(spark, source, source.paths, key, {})
    if column not in frame.columns:
        raise DataError(
            f"{key} must have a column {column!r}. Received: {path} with the columns "
            f"{[name for name in frame.columns if not name.startswith('__')]}. Rename its column."
        )
    checks = Checks(frame, source)
    checks.reject(checks.text(column).isNull(), f"column {column!r} is empty")
    return checks


def accepted(spark: SparkSession, checked: DataFrame, path: str, key: str, work: Path) -> DataFrame:
    """Write a checked list down and refuse it when a row breaks a rule: it is short, so mend it.

    Args:
        spark: The session.
        checked: From `Checks.finish`.
        path: Of the list, for messages.
        key: Of the configuration.
        work: Directory for intermediate tables.

    Raises:
        DataError: A row breaks a rule.
    """
    with translated(key):
        stored = materialize(spark, checked, work / key)
    reasons = stored.filter(F.col(c.REASON).isNotNull()).groupBy(c.REASON)
    counts = reasons.agg(F.count("*").alias("rows"), F.min(c.RAW_ROW).alias("example"))
    worst = counts.orderBy(F.desc("rows"), c.REASON).first()
    if worst is not None:
        raise DataError(
            f"every row of {key} must be usable. Received: {worst['rows']} rows of {path} where "
            f"{worst[c.REASON]}, such as {worst['example'][:_EXAMPLE_CHARACTERS]}. Mend or remove "
            "them."
        )
    return stored


def materialize(spark: SparkSession, frame: DataFrame, path: Path) -> DataFrame:
    """Write a frame to Parquet once; what comes back only reads the files."""
    frame.write.parquet(uri(path))
    return spark.read.schema(frame.schema).parquet(uri(path))


def read_split(
    spark: SparkSession, directory: Path, manifest: DatasetManifest, split: str
) -> DataFrame:
    """A split of the dataset: the files that its manifest names, and no others."""
    entries = manifest.splits[split].files
    return spark.read.parquet(*(uri(directory / entry.path) for entry in entries))


def write_block_list(
    spark: SparkSession, checks: Checks, path: str, items: DataFrame, num_items: int, work: Path
) -> Path:
    """Mark the items of a block list.

    Args:
        spark: The session.
        checks: From `open_list`.
        path: Of the list, for messages.
        items: item_id and item_index of the catalogue.
        num_items: M, items of the catalogue.
        work: Directory for intermediate files.

    Returns:
        A .npy file of bool, (M,).

    Raises:
        DataError: A row has no id, or nothing is left to recommend.
    """
    key = "score.block_list"
    ids = {c.ITEM_ID: checks.text(c.ITEM_ID)}
    listed = accepted(spark, checks.finish(ids), path, key, work).select(c.ITEM_ID).distinct()
    placed = materialize(spark, listed.join(items, c.ITEM_ID, "left"), work / "blocked")
    known = placed.filter(F.col(c.ITEM_INDEX).isNotNull())
    # at most as many as the catalogue has, which is one byte each here
    indexes = known.select(c.ITEM_INDEX).toArrow().column(0).to_numpy()
    blocked = np.zeros(num_items, dtype=bool)
    blocked[indexes - c.FIRST_INDEX] = True
    logger.info(
        "block list: %d items; %d ids are in no catalogue and block nothing",
        len(indexes),
        placed.count() - len(indexes),
    )
    if blocked.all():
        raise DataError(
            f"a block list leaves something to recommend. Received: {path}, which names all "
            f"{num_items} items. Shorten it, or unset score.block_list."
        )
    target = work / "blocked.npy"
    np.save(target, blocked)
    return target
