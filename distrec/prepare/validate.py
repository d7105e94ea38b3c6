"""Casts and checks: raw columns to typed ones, and for each row the first rule that it breaks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import (
    ArrayType,
    DateType,
    DoubleType,
    FloatType,
    NumericType,
    TimestampNTZType,
    TimestampType,
)

from distrec import columns as c
from distrec.config import EventsConfig, FeatureConfig, Source, TableConfig
from distrec.errors import ConfigError
from distrec.prepare.read import CORRUPT, PLACE

SPLITS = (c.TRAIN, c.VALID, c.TEST)

# a decimal number as people and programs write it; Java's parser also takes 1d and 0x1p3
_NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"
_NOT_A_NUMBER = r"^\s*[nN][aA][nN]\s*$"
_LONGEST_ID = 1000
_REPLACEMENT = "�"
_BROKEN_RULE = "__broken_rule"
HIDDEN = "(hidden: prepare.hash_users)"


def raw_column(side: str, name: str) -> str:
    """Column of a feature that is validated and not yet encoded."""
    return f"raw_{c.feature_column(side, name)}"


def _quoted(column: str) -> Column:
    return F.col("`" + column.replace("`", "``") + "`")


@dataclass
class Checks:
    """Typed columns of one source, and the rules that its rows must keep.

    Args:
        frame: As read_source gives it.
        source: Its configuration.
    """

    frame: DataFrame
    source: Source
    rules: list[tuple[Column, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        broken = F.col(CORRUPT)
        self._reject_undecoded(broken)
        wrong = "wrong number of columns" if self.source.format == "csv" else "line is not JSON"
        self.reject(broken.isNotNull(), wrong)

    def reject(self, condition: Column, reason: str) -> None:
        """Rows for which the condition holds are rejected, unless an earlier rule has done it."""
        self.rules.append((condition, reason))

    def _reject_undecoded(self, text: Column) -> None:
        """Bytes of another encoding: a decoder has replaced them, or nobody has looked at them."""
        broken = text.contains(_REPLACEMENT) | ~F.is_valid_utf8(text)
        self.reject(broken, f"bytes that are not {self.source.encoding}")

    @property
    def reason(self) -> Column:
        """The first rule that a row breaks, or null."""
        return F.coalesce(*(F.when(condition, F.lit(text)) for condition, text in self.rules))

    def _type(self, column: str) -> object:
        return self.frame.schema[column].dataType

    def text(self, column: str) -> Column:
        """A single value as text; null when empty."""
        kind, value = self._type(column), _quoted(column)
        if isinstance(kind, ArrayType):
            value = F.concat_ws("|", value.cast("array<string>"))
        elif isinstance(kind, FloatType | DoubleType):
            # whole numbers that a missing value made floats: 196.0 is the id 196
            whole = (value == F.floor(value)) & (F.abs(value) < 2.0**53)
            value = F.when(whole, value.cast("long").cast("string")).otherwise(value.cast("string"))
        else:
            value = value.cast("string")
            self._reject_undecoded(value)
        return F.when(F.trim(value) != "", value)

    def number(self, column: str, called: str = "a number") -> Column:
        """A finite float64; null when missing, that is empty or NaN."""
        kind, value = self._type(column), _quoted(column)
        reason = f"column {column!r} is not {called}"
        if isinstance(kind, NumericType):
            value = F.nanvl(value.cast("double"), F.lit(None).cast("double"))
        else:
            text = self.text(column)
            readable = text.rlike(_NUMBER)
            self.reject(~readable & ~text.rlike(_NOT_A_NUMBER), reason)
            value = F.when(readable, text.try_cast("double"))
        self.reject(F.abs(value) == float("inf"), reason)
        return value

    def values(self, column: str, separator: str) -> Column:
        """Several values as array<string>, trimmed, without the empty ones; null when missing."""
        if isinstance(self._type(column), ArrayType):
            cells = _quoted(column).cast("array<string>")
        else:
            text = self.text(column)
            cells = F.split(text, "\\Q" + separator + "\\E")
            if self.source.format == "json":
                parsed = F.from_json(text, "array<string>")
                cells = F.when(text.startswith("["), F.coalesce(parsed, cells)).otherwise(cells)
        trimmed = F.transform(cells, lambda cell: F.trim(cell))
        return F.filter(trimmed, lambda cell: cell.isNotNull() & (cell != ""))

    def time(self, column: str, time_format: str, latest: int) -> Column:
        """Unix seconds, int64; a row without a time, or of the future, is rejected."""
        kind, value = self._type(column), _quoted(column)
        if isinstance(kind, TimestampType | TimestampNTZType | DateType):
            seconds = F.unix_seconds(value.cast("timestamp"))
        elif time_format in ("unix_seconds", "unix_milliseconds"):
            divisor = 1000 if time_format == "unix_milliseconds" else 1
            seconds = F.floor(self.number(column, "a time") / divisor)
        else:
            seconds = F.unix_seconds(F.try_to_timestamp(self.text(column), F.lit(time_format)))
        self.reject(seconds.isNull(), f"column {column!r} is not a time")
        self.reject(seconds > latest, f"column {column!r} lies in the future")
        return seconds

    def feature(self, feature: FeatureConfig) -> Column:
        """Typed and not yet encoded: string, array<string>, double or array<double>."""
        column = feature.column
        if feature.kind in ("categorical", "text", "hashed"):
            return self.text(column)
        if feature.kind == "multi_categorical":
            distinct = F.array_distinct(self.values(column, feature.separator))
            return F.slice(distinct, 1, feature.max_values)
        if feature.kind == "number":
            value = self.number(column)
        else:
            value = self._vector(feature)
        if feature.missing == "reject":
            self.reject(value.isNull(), f"column {column!r} is empty")
        return value

    def _vector(self, feature: FeatureConfig) -> Column:
        column = feature.column
        cells = self.values(column, feature.separator)
        cells = F.when(F.size(cells) > 0, cells)
        vector = F.transform(cells, lambda cell: cell.try_cast("double"))
        readable = F.forall(
            vector,
            lambda x: x.isNotNull() & ~F.isnan(x) & (F.abs(x) < float("inf")),
        )
        wrong = cells.isNotNull() & (F.size(cells) != feature.dim)
        self.reject(wrong, f"column {column!r} has not {feature.dim} values")
        self.reject(~readable, f"column {column!r} is not a list of numbers")
        return vector

    def finish(self, typed: dict[str, Column], hidden: str | None = None) -> DataFrame:
        """The typed columns, PLACE, and for rejected rows why and what.

        Args:
            typed: Column -> value.
            hidden: Column of the source that is shown of no rejected row.
        """
        left_out = (CORRUPT, PLACE, hidden)
        raw = [_quoted(name) for name in self.frame.columns if name not in left_out]
        # a line that is no row may have anything anywhere
        line = F.col(CORRUPT) if hidden is None else F.lit(HIDDEN)
        whole = F.when(
            F.col(CORRUPT).isNotNull(), F.to_json(F.struct(line.alias("line")))
        ).otherwise(F.to_json(F.struct(*raw)) if raw else F.lit("{}"))
        # under a name that no source has: a column "reason" may be a feature
        checked = self.frame.withColumn(_BROKEN_RULE, self.reason)
        return checked.select(
            *(value.alias(name) for name, value in typed.items()),
            F.col(PLACE),
            F.col(_BROKEN_RULE).alias(c.REASON),
            F.when(F.col(_BROKEN_RULE).isNotNull(), whole).alias(c.RAW_ROW),
        )


def _require_id(checks: Checks, column: str) -> Column:
    value = checks.text(column)
    checks.reject(value.isNull(), f"column {column!r} is empty")
    # a quote that is never closed makes one cell of the rest of its line
    checks.reject(
        F.length(value) > _LONGEST_ID, f"column {column!r} is longer than {_LONGEST_ID} letters"
    )
    return value


def typed_events(
    frame: DataFrame,
    source: EventsConfig,
    latest: int,
    rating_required: bool,
    hidden: str | None = None,
) -> DataFrame:
    """Events with their types.

    Args:
        frame: As read_source gives it.
        source: Its configuration.
        latest: Unix seconds; what is later is rejected.
        rating_required: Whether a row without a rating is rejected.
        hidden: Column that is shown of no rejected row.

    Returns:
        user_id, item_id string; time long (0 without a time column); rating, label, weight double
        (null where there is no such column); one column a task, double, null where it is not known;
        event_type, split string; one raw column a context feature; PLACE, reason, raw_row.
    """
    checks = Checks(frame, source)
    typed = {
        c.USER_ID: _require_id(checks, source.user),
        c.ITEM_ID: _require_id(checks, source.item),
        c.TIME: F.lit(0).cast("long"),
    }
    if source.time:
        typed[c.TIME] = checks.time(source.time, source.time_format, latest)
    for role, column in ((c.RATING, source.rating), (c.LABEL, source.label)):
        typed[role] = checks.number(column) if column else F.lit(None).cast("double")
    if source.rating and rating_required:
        checks.reject(typed[c.RATING].isNull(), f"column {source.rating!r} is empty")
    if source.label:
        allowed = F.coalesce(typed[c.LABEL].isin(0.0, 1.0), F.lit(False))
        checks.reject(~allowed, f"column {source.label!r} is not 0 or 1")
    for task in source.tasks:
        known = checks.number(task)
        checks.reject(~known.isin(0.0, 1.0), f"column {task!r} is not 0, 1 or empty")
        typed[c.task_column(task)] = known
    typed[c.WEIGHT] = F.lit(1.0)
    if source.weight:
        typed[c.WEIGHT] = checks.number(source.weight)
        checks.reject(typed[c.WEIGHT].isNull(), f"column {source.weight!r} is empty")
        checks.reject(typed[c.WEIGHT] < 0, f"column {source.weight!r} is negative")
    for role, column in ((c.EVENT_TYPE, source.event_type), (c.SPLIT, source.split)):
        typed[role] = checks.text(column) if column else F.lit(None).cast("string")
    if source.split:
        allowed = F.coalesce(typed[c.SPLIT].isin(*SPLITS), F.lit(False))
        checks.reject(~allowed, f"column {source.split!r} is not train, valid or test")
    for feature in source.context:
        typed[raw_column("context", feature.feature_name)] = checks.feature(feature)
    return checks.finish(typed, hidden)


def typed_table(
    frame: DataFrame, source: TableConfig, side: str, hidden: str | None = None
) -> DataFrame:
    """A catalogue with its types.

    Args:
        frame: As read_source gives it.
        source: Its configuration.
        side: item or user.
        hidden: Column that is shown of no rejected row.

    Returns:
        id string, title string (empty where there is none), one raw column a feature; PLACE,
        reason, raw_row.
    """
    checks = Checks(frame, source)
    typed = {c.ID: _require_id(checks, source.id), c.TITLE: F.lit("")}
    if source.title:
        typed[c.TITLE] = F.coalesce(checks.text(source.title), F.lit(""))
    for feature in source.features:
        typed[raw_column(side, feature.feature_name)] = checks.feature(feature)
    return checks.finish(typed, hidden)


def check_time_format(spark: SparkSession, time_format: str) -> None:
    """Refuse a pattern that Spark does not know.

    Raises:
        ConfigError: It cannot be used.
    """
    if time_format in ("unix_seconds", "unix_milliseconds"):
        return
    pattern = time_format.replace("'", "''")
    try:
        spark.sql(f"SELECT date_format(timestamp_seconds(0), '{pattern}')").collect()
    except (PySparkException, ValueError) as error:
        raise ConfigError(
            "prepare.events.time_format must be unix_seconds, unix_milliseconds or a Spark pattern "
            f"such as yyyy-MM-dd HH:mm:ss. Received: {time_format!r}: {str(error)[:200]}."
        ) from error


def feature_columns(side: str, features: Sequence[FeatureConfig]) -> list[str]:
    """Raw columns of a side, in order."""
    return [raw_column(side, feature.feature_name) for feature in features]
