"""Raw files to frames: every column as it stands, with what marks a broken line and its place."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Collection, Mapping, Sequence

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, AtomicType, NullType, StringType, StructField, StructType

from distrec.config import EventsConfig, Source, TableConfig
from distrec.errors import DataError
from distrec.prepare.faults import translated

logger = logging.getLogger("distrec.prepare")

# the whole text of a line that is not as its format asks
CORRUPT = "__corrupt"
# struct(file, block, number): the place of a row in its source, for "the first one"
PLACE = "__place"

_OWN_COLUMNS = (CORRUPT, PLACE, "_corrupt_record")
# a JSON source is not read as a whole to learn its columns when these have them all
_SAMPLE_LINES = 1_000
_WIDE = ("utf-16", "utf-32")


def wanted_columns(source: EventsConfig | TableConfig) -> dict[str, str]:
    """Configuration key -> column, of every column that a source names."""
    single = ("user", "item", "time", "rating", "label", "weight", "event_type", "split")
    keys = single if isinstance(source, EventsConfig) else ("id", "title")
    wanted = {key: getattr(source, key) for key in keys if getattr(source, key) is not None}
    features = source.context if isinstance(source, EventsConfig) else source.features
    if isinstance(source, EventsConfig):
        wanted |= {f"tasks.{k}": name for k, name in enumerate(source.tasks)}
    group = "context" if isinstance(source, EventsConfig) else "features"
    return wanted | {f"{group}.{k}.column": f.column for k, f in enumerate(features)}


def read_source(
    spark: SparkSession,
    source: Source,
    paths: Sequence[str],
    name: str,
    wanted: Mapping[str, str],
) -> DataFrame:
    """Read a source; nothing is cast.

    Args:
        spark: The session.
        source: Format, separator, header and so on.
        paths: Files, directories or patterns, which need not be those of `source`.
        name: Of the source, for messages: events, items, users.
        wanted: Configuration key -> column.

    Returns:
        The source's columns, CORRUPT (string) and PLACE (struct).

    Raises:
        DataError: A path matches nothing, a file is empty or damaged, a column is missing.
    """
    with translated(name):
        if source.format == "parquet":
            frame = spark.read.parquet(*paths).withColumn(CORRUPT, F.lit(None).cast("string"))
        elif source.format == "json":
            frame = _read_json(spark, source, paths, name, wanted)
        else:
            frame = _read_csv(spark, source, paths, name)
    _require_columns(frame, name, paths, wanted)
    place = F.struct(
        F.col("_metadata.file_path").alias("file"),
        F.col("_metadata.file_block_start").alias("block"),
        F.monotonically_increasing_id().alias("number"),
    )
    return frame.select("*", place.alias(PLACE))


def _read_csv(spark: SparkSession, source: Source, paths: Sequence[str], name: str) -> DataFrame:
    options = {
        "sep": source.separator,
        "quote": source.quote,
        # a quote inside quotes is doubled, as RFC 4180 has it; Spark's default is a backslash
        "escape": source.quote,
        "encoding": source.encoding,
    }
    if source.encoding.lower().startswith(_WIDE):
        options["lineSep"] = "\n"
    names = list(source.column_names)
    if source.header:
        names = spark.read.options(header=True, **options).csv(list(paths)).columns
    if not names:
        raise DataError(
            f"{name} must have rows. Received: {', '.join(paths)}, which is empty. Check the path."
        )
    fields = [StructField(column, StringType()) for column in (*names, CORRUPT)]
    return (
        spark.read.schema(StructType(fields))
        .options(
            header=source.header,
            # check the header of each file against the first one's
            enforceSchema=not source.header,
            mode="PERMISSIVE",
            columnNameOfCorruptRecord=CORRUPT,
            # with pruning, Spark no longer sees that a line has too many or too few columns
            columnPruning=False,
            **options,
        )
        .csv(list(paths))
    )


def _read_json(
    spark: SparkSession,
    source: Source,
    paths: Sequence[str],
    name: str,
    wanted: Mapping[str, str],
) -> DataFrame:
    """All wanted columns as text: numbers as they are written, lists and objects as JSON."""
    options = {"encoding": source.encoding, "columnNameOfCorruptRecord": CORRUPT}
    if source.encoding.lower() != "utf-8":
        options["lineSep"] = "\n"
    present = _sampled_keys(spark, paths)
    if not set(wanted.values()) <= set(present):
        present = spark.read.options(**options).json(list(paths)).columns
    names = told_apart(present, set(wanted.values()))
    if not names:
        raise DataError(
            f"{name} must have rows, each a line with a JSON object. Received: {', '.join(paths)}, "
            "where there is none. Check the path and format."
        )
    fields = [StructField(column, StringType()) for column in (*names, CORRUPT)]
    return spark.read.schema(StructType(fields)).options(**options).json(list(paths))


def told_apart(keys: Sequence[str], wanted: Collection[str]) -> list[str]:
    """Keys of JSON that can be columns beside the wanted ones, in their order.

    Spark does not see case, so one broken line may have a key that it takes for a wanted one; and
    halves of characters do not arrive in Java as they are.
    """
    taken = {key.lower() for key in wanted}
    kept = []
    for key in keys:
        if key not in wanted:
            if key.lower() in taken or not key.isprintable() or key in _OWN_COLUMNS:
                continue
            taken.add(key.lower())
        kept.append(key)
    return kept


def _sampled_keys(spark: SparkSession, paths: Sequence[str]) -> list[str]:
    """Keys of the first lines, in order of appearance."""
    keys: dict[str, None] = {}
    for row in spark.read.text(list(paths)).limit(_SAMPLE_LINES).collect():
        try:
            value = json.loads(row[0])
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            keys |= dict.fromkeys(value)
    return list(keys)


def _require_columns(
    frame: DataFrame, name: str, paths: Sequence[str], wanted: Mapping[str, str]
) -> None:
    present = [column for column in frame.columns if column != CORRUPT]
    for key, column in wanted.items():
        if column not in present:
            near = difflib.get_close_matches(column, present, n=1, cutoff=0.5)
            fix = f"Did you mean {near[0]!r}?" if near else f"Set prepare.{name}.{key}."
            if any(set(one) & {"\0", "\ufffd"} for one in present):
                fix = f"The text has another encoding: set prepare.{name}.encoding."
            raise DataError(
                f"prepare.{name}.{key} must name a column of {', '.join(paths)}. Received: "
                f"{column!r}; the columns there are {present}. {fix}"
            )
        kind = frame.schema[column].dataType
        element = kind.elementType if isinstance(kind, ArrayType) else kind
        if not isinstance(element, AtomicType | NullType):
            raise DataError(
                f"prepare.{name}.{key} must be a column of single values or of lists. Received: "
                f"{column!r} of type {kind.simpleString()}. Take it apart first."
            )
