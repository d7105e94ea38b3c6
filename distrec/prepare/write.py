"""Frames to Parquet files: of equal row counts, in a repeatable order, under names of ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, DataType, FloatType, LongType, StringType

from distrec.files import uri
from distrec.prepare.rank import ROWS_PER_TASK, number
from distrec.prepare.workspace import Workspace

# so that every number of ranks that divides 12 gets whole files
FILES_MULTIPLE = 12

POSITION = "__position"
_FILE = "__file"
_KEY = "__key"
_BUCKET = "__bucket"

# row groups small enough that a reader holds several of them
_ROW_GROUP_BYTES = 32 * 1024 * 1024

# integers tried for each file, until one hashes to each partition: e^-40 of them find none
_KEYS_PER_FILE = 40


@dataclass
class Written:
    """What lies in one directory of the dataset.

    Args:
        schema: Column -> Arrow type.
        num_rows: In order of the files.
        paths: Relative to the dataset.
    """

    schema: dict[str, str]
    num_rows: list[int] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


def num_train_files(num_rows: int, num_files: int, rows_per_file: int) -> int:
    """Files of train: as asked for, or a multiple of 12; never more than rows.

    Example:
        >>> num_train_files(100_000, 0, 1_000_000), num_train_files(13_000_000, 0, 1_000_000)
        (12, 24)
    """
    if not num_files:
        least = -(-num_rows // rows_per_file)
        num_files = -(-least // FILES_MULTIPLE) * FILES_MULTIPLE
    return min(num_files, num_rows)


def shuffled(frame: DataFrame, keys: Sequence[str], seed: int, num_rows: int) -> DataFrame:
    """Add POSITION, 0-based: an order that is random, and the same for the same rows and seed.

    The hash of a row says its bucket and its place in there; buckets are small enough for one task
    each.

    Args:
        keys: Columns that tell rows apart; rows equal in all of them may change places.
    """
    hashed = F.xxhash64(F.lit(seed), *keys)
    buckets = max(1, -(-num_rows // ROWS_PER_TASK))
    bucketed = frame.withColumn(_BUCKET, F.pmod(hashed, F.lit(buckets)))
    order = [hashed, *(F.col(key) for key in keys)]
    return number(bucketed, order, POSITION, _BUCKET, buckets).drop(_BUCKET)


def write_files(
    frame: DataFrame,
    name: str,
    columns: Sequence[str | Column],
    num_rows: int,
    num_files: int,
    workspace: Workspace,
    *,
    contiguous: bool = False,
) -> Written:
    """Write a split.

    Args:
        frame: With POSITION, 0-based and without a gap.
        name: Directory inside the dataset.
        columns: Output columns, in order.
        num_rows: Of the frame.
        num_files: At most num_rows; row counts of two files differ by at most one.
        contiguous: Whether files follow one another in order of POSITION; else its rows are dealt.
    """
    if num_rows == 0:
        return Written(arrow_schema(frame.select(*columns)))
    if num_files == 1:
        placed = frame.repartition(1)
    else:
        place = F.col(POSITION) % num_files
        if contiguous:
            place = _contiguous(F.col(POSITION), num_rows, num_files)
        placed = _exactly_placed(frame.withColumn(_FILE, place.cast("int")), num_files)
    chosen = placed.sortWithinPartitions(POSITION).select(*columns)
    directory = workspace.root / name
    (
        chosen.write.option("compression", "zstd")
        .option("parquet.block.size", _ROW_GROUP_BYTES)
        .option("mapreduce.fileoutputcommitter.marksuccessfuljobs", "false")
        .parquet(uri(directory))
    )
    written = Written(arrow_schema(chosen))
    low, more = divmod(num_rows, num_files)
    for place_of_file, path in enumerate(_renamed(directory)):
        written.paths.append(f"{name}/{path.name}")
        written.num_rows.append(low + (place_of_file < more))
    assert len(written.paths) == num_files, (name, len(written.paths), num_files)
    return written


def _contiguous(position: Column, num_rows: int, num_files: int) -> Column:
    """File of a position when files follow one another, the first ones a row longer."""
    low, more = divmod(num_rows, num_files)
    longer = more * (low + 1)
    return F.when(position < longer, F.floor(position / (low + 1))).otherwise(
        F.floor((position - longer) / low) + more
    )


def _exactly_placed(frame: DataFrame, num_files: int) -> DataFrame:
    """Send the rows of file f to partition f.

    repartition() places a row by the hash of its key modulo the number of partitions, so each file
    needs a key whose hash is its own number.
    """
    keys = frame.sparkSession.range(num_files * _KEYS_PER_FILE).select(
        F.col("id").cast("int").alias(_KEY)
    )
    keys = keys.groupBy(F.pmod(F.hash(_KEY), F.lit(num_files)).alias(_FILE)).agg(
        F.min(_KEY).alias(_KEY)
    )
    return frame.join(F.broadcast(keys), _FILE, "inner").repartition(num_files, _KEY)


def _renamed(directory: Path) -> list[Path]:
    """Give Spark's part files names that are the same every time; drop what is no data."""
    paths = []
    for path in sorted(directory.iterdir()):
        match = re.fullmatch(r"part-(\d+)-.*\.parquet", path.name)
        if match is None:
            path.unlink()
            continue
        paths.append(path.rename(directory / f"part-{int(match[1]):05d}.parquet"))
    return paths


def arrow_schema(frame: DataFrame) -> dict[str, str]:
    """Column -> Arrow type as pyarrow prints it, without the names of list elements."""
    return {field.name: _arrow_type(field.dataType) for field in frame.schema.fields}


def _arrow_type(kind: DataType) -> str:
    if isinstance(kind, ArrayType):
        return f"list<{_arrow_type(kind.elementType)}>"
    names = {LongType: "int64", FloatType: "float", StringType: "string"}
    return names[type(kind)]
