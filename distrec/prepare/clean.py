"""From checked rows to the events that count: rejects, kinds of event, duplicates, ratings."""

from __future__ import annotations

from dataclasses import dataclass, field

from pyspark.sql import DataFrame, Row, Window
from pyspark.sql import functions as F

from distrec import columns as c
from distrec.config import PrepareConfig, TableConfig
from distrec.errors import DataError
from distrec.prepare.read import PLACE
from distrec.prepare.workspace import Workspace

MORE_THAN_ONCE = "id stands more than once"
_TIMES = "__times"
_EXAMPLE_CHARACTERS = 300


@dataclass
class Audit:
    """What was read and what was rejected, over all sources.

    Args:
        max_share: Of a source's rows that may be rejected.
    """

    max_share: float
    num_read: dict[str, int] = field(default_factory=dict)
    num_rejected: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    rejected: list[DataFrame] = field(default_factory=list)
    num_excluded: dict[str, int] = field(default_factory=dict)

    def split_off(self, checked: DataFrame, source: str) -> DataFrame:
        """Keep the rejected rows here; the others come back without the columns about rejecting.

        Args:
            checked: With reason, raw_row and PLACE; read several times, so it is materialised.

        Raises:
            DataError: The source has no rows, or too many of them are rejected.
        """
        found = checked.groupBy(c.REASON).agg(
            F.count("*").alias("rows"), F.min(c.RAW_ROW).alias("example")
        )
        # as many rows as there are rules
        rows = found.orderBy(F.desc("rows"), c.REASON).collect()
        total = sum(row["rows"] for row in rows)
        if not total:
            raise DataError(f"{source} must have rows. Received: none. Check the paths.")
        broken = [row for row in rows if row[c.REASON] is not None]
        num_broken = sum(row["rows"] for row in broken)
        self.num_read[source], self.num_rejected[source] = total, num_broken
        self.reasons |= {f"{source}: {row[c.REASON]}": row["rows"] for row in broken}
        if num_broken > self.max_share * total:
            raise DataError(_too_many(source, total, num_broken, self.max_share, broken))
        if broken:
            rejects = checked.filter(F.col(c.REASON).isNotNull())
            self.rejected.append(rejects.select(F.lit(source).alias(c.SOURCE), c.REASON, c.RAW_ROW))
        return checked.filter(F.col(c.REASON).isNull()).drop(c.REASON, c.RAW_ROW, PLACE)


def _too_many(source: str, total: int, broken: int, share: float, rows: list[Row]) -> str:
    told = "; ".join(
        f"{row['rows']} x {row[c.REASON]}, for example {row['example'][:_EXAMPLE_CHARACTERS]}"
        for row in rows
    )
    return (
        f"at most {share:.2%} of a source's rows may break the contract "
        f"(prepare.max_reject_share). Received: {broken} of {total} rows of {source}: {told}. Mend "
        "the rows, or raise max_reject_share."
    )


def one_row_an_id(checked: DataFrame, source: TableConfig, name: str) -> DataFrame:
    """Mark the rows of a catalogue whose id stood before, or refuse them.

    Raises:
        DataError: An id stands twice and duplicates = "error".
    """
    good = F.col(c.REASON).isNull()
    window = Window.partitionBy(c.ID, good).orderBy(PLACE)
    numbered = checked.withColumn(_TIMES, F.row_number().over(window))
    repeated = good & (F.col(_TIMES) > 1)
    if source.duplicates == "error":
        found = numbered.filter(repeated).agg(
            F.countDistinct(c.ID).alias("ids"), F.min(c.ID).alias("example")
        )
        row = found.collect()[0]
        if row["ids"]:
            raise DataError(
                f"an id stands once in {name}. Received: {row['ids']} ids that stand more than "
                f"once, for example {row['example']!r} (column {source.id!r}). Remove the other "
                f'rows, or set prepare.{name}.duplicates = "first".'
            )
    whole = F.to_json(F.struct(*(F.col(column) for column in checked.columns if column != PLACE)))
    return numbered.select(
        *(column for column in checked.columns if column not in (c.REASON, c.RAW_ROW)),
        F.when(repeated, F.lit(MORE_THAN_ONCE)).otherwise(F.col(c.REASON)).alias(c.REASON),
        F.when(repeated, whole).otherwise(F.col(c.RAW_ROW)).alias(c.RAW_ROW),
    )


def events_that_count(
    events: DataFrame, num_events: int, config: PrepareConfig, workspace: Workspace
) -> tuple[DataFrame, dict[str, int]]:
    """Filter kinds of event, make duplicates one, then filter by rating and set the label.

    The order matters: a purchase must not be lost because a later view of the same item is not of
    a kind that is kept, and the latest rating of an item is the one that counts.

    Args:
        events: Typed and checked.
        num_events: Of them.

    Returns:
        user_id, item_id, time, label, weight, split, tasks and the raw context columns; event_type,
        its number, where histories tell it; and the rows that each step took away:
        other_event_type, duplicates, below_min_rating.
    """
    kinds = F.lit(True)
    if config.event_types:
        kinds = F.coalesce(F.col(c.EVENT_TYPE).isin(*config.event_types), F.lit(False))
    kept = _without_duplicates(events.filter(kinds), config)
    above = F.lit(True)
    if config.min_rating is not None:
        above = F.col(c.RATING) >= config.min_rating
    label = F.coalesce(F.col(c.LABEL), F.lit(1.0))
    if config.label_from_rating:
        label = above.cast("double")
    if config.predict_ratings:
        label = F.col(c.RATING)
    kept = kept.withColumn("__above", above).withColumn(c.LABEL, label)
    kept = workspace.materialize(kept, "unique")
    sums = kept.agg(F.count("*").alias("rows"), F.count_if("__above").alias("above")).collect()[0]
    num_of_kind = events.filter(kinds).count() if config.event_types else num_events
    counts = {
        "other_event_type": num_events - num_of_kind,
        "duplicates": num_of_kind - sums["rows"],
        "below_min_rating": 0,
    }
    if config.min_rating is not None and not config.label_from_rating:
        counts["below_min_rating"] = sums["rows"] - sums["above"]
        kept = kept.filter("__above")
    kept = kept.drop("__above", c.RATING)
    if not config.told_event_types:
        return kept.drop(c.EVENT_TYPE), counts
    kinds = F.array(*map(F.lit, config.told_event_types))
    # array_position counts from 1
    number = F.array_position(kinds, F.col(c.EVENT_TYPE)) + (c.FIRST_INDEX - 1)
    return kept.withColumn(c.EVENT_TYPE, number.cast("long")), counts


def _without_duplicates(events: DataFrame, config: PrepareConfig) -> DataFrame:
    """One row a user and item (and split, where it is given), or one of each equal rows.

    Of rows at the same time, the order of their other columns decides, so that the result does not
    depend on the order of the input.
    """
    if config.duplicates == "keep_all":
        return events.dropDuplicates()
    keys = [c.USER_ID, c.ITEM_ID]
    if config.split.method == "given":
        keys.append(c.SPLIT)
    rest = [column for column in events.columns if column not in (*keys, c.TIME)]
    row = F.struct(c.TIME, *rest)
    chosen = F.max(row) if config.duplicates == "keep_last" else F.min(row)
    grouped = events.groupBy(*keys).agg(chosen.alias("__row"))
    return grouped.select(*keys, "__row.*").select(*events.columns)
