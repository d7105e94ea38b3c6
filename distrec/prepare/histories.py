"""What is known of a user at a time: the last positive events, strictly earlier, oldest first."""

from __future__ import annotations

from collections.abc import Mapping

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from distrec import columns as c


def last(values: Column, number: Column | int) -> Column:
    """The last `number` elements, or all when there are fewer."""
    count = F.lit(number) if isinstance(number, int) else number
    kept = F.least(F.size(values), count)
    return F.slice(values, F.size(values) - kept + 1, kept)


def history_columns(events: DataFrame) -> dict[str, str]:
    """Columns of the contract, each with what it tells of an event: the kind where it is known."""
    columns = {c.HISTORY: c.ITEM_INDEX, c.HISTORY_TIMES: c.TIME}
    if c.EVENT_TYPE in events.columns:
        columns[c.HISTORY_TYPES] = c.EVENT_TYPE
    return columns


def _kind(events: DataFrame) -> list[str]:
    """Where histories tell the kind, it also orders one user's events of one time and item."""
    return [c.EVENT_TYPE] if c.EVENT_TYPE in events.columns else []


def _split_history(past: Column, told: Mapping[str, str]) -> list[Column]:
    """Event structs to the columns of the contract."""

    def each(part: str) -> Column:
        return F.transform(past, lambda event: event[part])

    return [each(part).alias(name) for name, part in told.items()]


def _without_item_id(events: Column, told: Mapping[str, str]) -> Column:
    """What orders events inside a time need not be carried on."""
    return F.transform(
        events, lambda event: F.struct(*(event[part].alias(part) for part in told.values()))
    )


def _positives(pool: DataFrame) -> DataFrame:
    event = F.struct(c.TIME, c.ITEM_ID, c.ITEM_INDEX, *_kind(pool))
    return pool.filter(F.col(c.LABEL) > 0).select(c.USER_ID, c.TIME, event.alias("event"))


def attach_before(examples: DataFrame, pool: DataFrame, length: int) -> DataFrame:
    """Give each example the user's positives in the pool with an earlier time.

    Events of the same time are not in each other's history. A user's events are grouped by time;
    the frame of a group reaches back over the `length` groups with positives before it, which hold
    at least the last `length` positives, so that no row carries a user's whole past. Inside a group
    the order is by item id.

    Args:
        examples: user_id, time and anything else.
        pool: user_id, time, item_id, item_index, label; event_type, where histories tell it.
        length: L.

    Returns:
        The examples with history, history_times and num_events, and history_types where the pool
        has event_type.
    """
    told = history_columns(pool)
    columns = examples.columns
    packed = examples.select(
        c.USER_ID,
        c.TIME,
        F.lit(None).cast(_positives(pool).schema["event"].dataType).alias("event"),
        F.struct(*columns).alias("example"),
    )
    positives = _positives(pool).withColumn(
        "example", F.lit(None).cast(packed.schema["example"].dataType)
    )
    # one shuffle by user serves the grouping and both windows
    together = packed.unionByName(positives).repartition(c.USER_ID)
    groups = together.groupBy(c.USER_ID, c.TIME).agg(
        F.sort_array(F.collect_list("event")).alias("events"),
        F.collect_list("example").alias("examples"),
    )
    groups = groups.withColumn("number", F.size("events"))
    user = Window.partitionBy(c.USER_ID).orderBy(c.TIME)
    earlier = F.sum("number").over(user.rowsBetween(Window.unboundedPreceding, -1))
    through = F.count_if(F.col("number") > 0).over(
        user.rowsBetween(Window.unboundedPreceding, Window.currentRow)
    )
    # the place among the groups with positives; a group without any stands where the next one will
    place = F.when(F.col("number") > 0, through).otherwise(through + 1).cast("long")
    tail = _without_item_id(last(F.col("events"), length), told)
    groups = groups.select(
        c.USER_ID,
        "examples",
        F.coalesce(earlier, F.lit(0)).cast("long").alias(c.NUM_EVENTS),
        place.alias("place"),
        # collect_list passes over nulls
        F.when(F.col("number") > 0, tail).alias("tail"),
    )
    before = Window.partitionBy(c.USER_ID).orderBy("place").rangeBetween(-length, -1)
    groups = groups.withColumn("past", F.flatten(F.collect_list("tail").over(before)))
    # only now drop the groups that are there for others
    groups = groups.filter(F.size("examples") > 0).withColumn("past", last(F.col("past"), length))
    exploded = groups.select(
        F.explode("examples").alias("example"), c.NUM_EVENTS, *_split_history(F.col("past"), told)
    )
    return exploded.select("example.*", c.NUM_EVENTS, *told)


def windows(events: DataFrame, length: int) -> DataFrame:
    """Cut each user's events into stretches of `length`, the newest one whole.

    Args:
        events: user_id, time, item_id, item_index, event_type where histories tell it, and anything
            else; all of them positive.
        length: L.

    Returns:
        One row a stretch: its last event, with the events before it as history, history_times,
        history_types where there is event_type, and num_events. Where an earlier stretch exists,
        the history begins with its last event, so that a history holds at most L. Events of one
        time are in order of item id, and in each other's history.
    """
    told = history_columns(events)
    order = [c.TIME, c.ITEM_ID, *_kind(events)]
    example = F.struct(*order, *sorted(set(events.columns) - set(order)))
    user = Window.partitionBy(c.USER_ID)
    by_time = user.orderBy(*order)
    numbered = events.select(
        c.USER_ID,
        example.alias("example"),
        F.row_number().over(by_time).alias("place"),
        F.count("*").over(user).alias("number"),
    )
    # counted from the end
    stretch = F.floor((F.col("number") - F.col("place")) / length)
    rows = (
        numbered.groupBy(c.USER_ID, stretch.alias("stretch"))
        .agg(
            F.sort_array(F.collect_list("example")).alias("examples"),
            (F.max("place") - 1).cast("long").alias(c.NUM_EVENTS),
        )
        .withColumn("example", F.element_at("examples", -1))
    )
    before = F.lag("example").over(user.orderBy(F.desc("stretch")))
    past = F.concat(
        F.when(before.isNull(), F.array().cast(rows.schema["examples"].dataType)).otherwise(
            F.array(before)
        ),
        F.slice("examples", 1, F.size("examples") - 1),
    )
    joined = rows.withColumn("past", past)
    return joined.select("example.*", c.NUM_EVENTS, *_split_history(F.col("past"), told))


def state(pool: DataFrame, length: int) -> DataFrame:
    """One row a user: all that the pool knows of them.

    Args:
        pool: user_id, time, item_id, item_index, label; event_type, where histories tell it.
        length: L.

    Returns:
        user_id, num_events, history, history_times, history_types where the pool has event_type;
        seen (item indexes of all events, negative ones too, ascending, without unknown items);
        last_time of any event.
    """
    told = history_columns(pool)
    parts = [c.TIME, c.ITEM_ID, c.ITEM_INDEX, *_kind(pool)]
    event = F.struct(*parts)
    is_positive = F.col(c.LABEL) > 0
    known = F.col(c.ITEM_INDEX) >= c.FIRST_INDEX
    # of a user with a hundred thousand events no more than these are held at once
    newest = Window.partitionBy(c.USER_ID).orderBy(
        is_positive.desc(), *(F.desc(name) for name in parts)
    )
    is_last = is_positive & (F.row_number().over(newest) <= length)
    grouped = (
        pool.withColumn("event", F.when(is_last, event))
        .groupBy(c.USER_ID)
        .agg(
            F.sort_array(F.collect_list("event")).alias("events"),
            F.count_if(is_positive).alias(c.NUM_EVENTS),
            F.sort_array(F.collect_set(F.when(known, F.col(c.ITEM_INDEX)))).alias(c.SEEN),
            F.max(c.TIME).alias("last_time"),
        )
    )
    return grouped.select(
        c.USER_ID,
        c.NUM_EVENTS,
        *_split_history(F.col("events"), told),
        c.SEEN,
        "last_time",
    )


def attach_all(examples: DataFrame, states: DataFrame) -> DataFrame:
    """Give each example all that `states` knows of its user, whatever the time."""
    none = F.array().cast("array<bigint>")
    filled = {c.NUM_EVENTS: F.coalesce(c.NUM_EVENTS, F.lit(0).cast("long"))}
    for name in (c.HISTORY, c.HISTORY_TIMES, c.HISTORY_TYPES):
        if name in states.columns:
            filled[name] = F.coalesce(name, none)
    joined = examples.join(states.select(c.USER_ID, *filled), c.USER_ID, "left")
    return joined.withColumns(filled)


def attach_others(examples: DataFrame, pool: DataFrame, length: int) -> DataFrame:
    """Give each example the user's other positive items, where there is no time.

    Items are distinct and in order of item id. L + 1 of them are enough to have L others.

    Args:
        examples: user_id, item_id and anything else.
        pool: user_id, item_id, item_index, label.
        length: L.
    """
    items = (
        pool.filter(F.col(c.LABEL) > 0)
        .groupBy(c.USER_ID)
        .agg(F.sort_array(F.collect_set(F.struct(c.ITEM_ID, c.ITEM_INDEX))).alias("items"))
    )
    items = items.select(
        c.USER_ID, F.size("items").alias("number"), last(F.col("items"), length + 1).alias("tail")
    )
    positive = (
        pool.filter(F.col(c.LABEL) > 0)
        .select(c.USER_ID, c.ITEM_ID, F.lit(1).alias("own"))
        .distinct()
    )
    joined = examples.join(positive, [c.USER_ID, c.ITEM_ID], "left").join(items, c.USER_ID, "left")
    empty = F.array().cast(items.schema["tail"].dataType)
    others = F.filter(F.coalesce("tail", empty), lambda item: item[c.ITEM_ID] != F.col(c.ITEM_ID))
    kept = last(others, length)
    number = F.coalesce("number", F.lit(0)) - F.coalesce("own", F.lit(0))
    return joined.select(
        *examples.columns,
        number.cast("long").alias(c.NUM_EVENTS),
        F.transform(kept, lambda item: item[c.ITEM_INDEX]).alias(c.HISTORY),
        F.transform(kept, lambda item: F.lit(0).cast("long")).alias(c.HISTORY_TIMES),
    )
