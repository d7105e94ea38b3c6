"""Every known user and item: its index, its count in train, its raw features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from distrec import columns as c
from distrec.prepare.extend import Continuation
from distrec.prepare.features import TRAIN_COUNT
from distrec.prepare.rank import with_rank
from distrec.prepare.vocabulary import NEW, FittedVocabulary, fit_vocabulary
from distrec.prepare.workspace import Workspace


@dataclass(frozen=True)
class Recent:
    """Since when events are recent.

    Args:
        after: Each of c.RECENT_POOLS -> Unix seconds; empty where events have no times.
        hides_new: Whether items without an event in train stand for ones that nobody has had.
    """

    after: Mapping[str, int]
    hides_new: bool = False


NO_TIMES = Recent({})


@dataclass(frozen=True)
class Entities:
    """The known users or items.

    Args:
        vocabulary: Those with a row of their own in the tables.
        frame: The id, its index, TRAIN_COUNT, title (items) and the raw features, null where the
            catalogue does not have the id.
        num_rows: Of the frame; of items, the free indexes among them.
    """

    vocabulary: FittedVocabulary
    frame: DataFrame
    num_rows: int


def _train_counts(
    events: DataFrame, id_column: str, workspace: Workspace, continuation: Continuation
) -> DataFrame:
    """Events in train by id; with continuation.tracks_time also those of no train event."""
    value = F.col(id_column).alias(c.VALUE)
    in_train = F.col(c.SPLIT) == c.TRAIN
    if continuation.tracks_time:
        counts = events.groupBy(value).agg(
            F.count_if(in_train).alias(c.COUNT), F.max(c.TIME).alias(c.LAST_TIME)
        )
    else:
        counts = events.filter(in_train).groupBy(value).agg(F.count("*").alias(c.COUNT))
    return workspace.materialize(counts, f"train-{id_column}")


def _times(continuation: Continuation) -> list[str]:
    return [c.LAST_TIME] if continuation.tracks_time else []


def _described(known: DataFrame, table: DataFrame | None, raw: Sequence[str]) -> DataFrame:
    if table is None:
        return known.withColumn(c.TITLE, F.lit(""))
    described = known.join(table.select(c.ID, c.TITLE, *raw), c.ID, "left")
    return described.withColumn(c.TITLE, F.coalesce(c.TITLE, F.lit("")))


def _with_recent(numbered: DataFrame, events: DataFrame, recent: Recent) -> DataFrame:
    """Add a column of what was recent for each of c.RECENT_POOLS, if events have times.

    Args:
        numbered: id, count.
        events: With split.
        recent: What is.
    """
    if not recent.after:
        return numbered
    columns = {split: c.recent_column(split) for split in recent.after}
    late = F.col(c.TIME) > min(recent.after.values())
    counted = events.filter((F.col(c.LABEL) > 0) & late).groupBy(F.col(c.ITEM_ID).alias("__id"))
    sums = counted.agg(
        *(
            F.count_if(
                F.col(c.SPLIT).isin(*c.RECENT_POOLS[split]) & (F.col(c.TIME) > recent.after[split])
            ).alias(column)
            for split, column in columns.items()
        )
    )
    joined = numbered.join(sums, F.col(c.ID) == F.col("__id"), "left").drop("__id")
    # what is withheld to be new has not sold yet
    counts = F.col(c.COUNT) >= (1 if recent.hides_new else 0)
    return joined.withColumns(
        {
            column: F.when(counts, F.coalesce(column, F.lit(0))).otherwise(0).cast("long")
            for column in columns.values()
        }
    )


def find_users(
    events: DataFrame,
    table: DataFrame | None,
    raw: Sequence[str],
    min_count: int,
    workspace: Workspace,
    continuation: Continuation = NEW,
) -> Entities:
    """Users of any split and of the user table; those that train has not have UNKNOWN_INDEX.

    Args:
        events: With split.
        table: Checked user table: id, title, raw features.
        raw: Names of the raw features.
        min_count: Users with fewer train events share UNKNOWN_INDEX.
        continuation: What is extended, and what is too old.
    """
    counts = _train_counts(events, c.USER_ID, workspace, continuation)
    vocabulary = fit_vocabulary(counts, c.USER_ID, min_count, workspace, continuation)
    known = events.select(F.col(c.USER_ID).alias(c.ID))
    if table is not None:
        known = known.unionByName(table.select(c.ID))
    ids = vocabulary.frame.select(F.col(c.VALUE).alias("__v"), F.col(c.ID).alias(c.USER_INDEX))
    numbered = known.distinct().join(ids, F.col(c.ID) == F.col("__v"), "left").drop("__v")
    numbered = numbered.join(
        counts.withColumnsRenamed({c.VALUE: "__v", c.COUNT: TRAIN_COUNT}),
        F.col(c.ID) == F.col("__v"),
        "left",
    )
    described = _described(numbered, table, raw)
    frame = described.select(
        F.col(c.ID).alias(c.USER_ID),
        F.coalesce(c.USER_INDEX, F.lit(c.UNKNOWN_INDEX)).cast("long").alias(c.USER_INDEX),
        F.coalesce(TRAIN_COUNT, F.lit(0)).cast("long").alias(TRAIN_COUNT),
        *_times(continuation),
        *(raw if table is not None else ()),
    )
    frame = workspace.materialize(frame, "users")
    return Entities(vocabulary, frame, frame.count())


def find_items(
    events: DataFrame,
    table: DataFrame | None,
    dropped: DataFrame | None,
    raw: Sequence[str],
    min_count: int,
    workspace: Workspace,
    continuation: Continuation = NEW,
    recent: Recent = NO_TIMES,
) -> Entities:
    """Items of train and of the catalogue; those without a row of their own come last, by lot.

    An item that occurs in valid or test only, and in no catalogue, is not known, nor is one of the
    catalogue that the k-core has dropped. Items of the previous dataset are known as long as they
    have an id; a free id stands for no item.

    Args:
        events: With split.
        table: Checked catalogue: id, title, raw features.
        dropped: item_id of the items out of the k-core; None drops none.
        raw: Names of the raw features.
        min_count: Items with fewer train events are cold.
        continuation: What is extended, and what is too old.
        recent: What is counted as recent.
    """
    counts = _train_counts(events, c.ITEM_ID, workspace, continuation)
    vocabulary = fit_vocabulary(counts, c.ITEM_ID, min_count, workspace, continuation)
    trained = vocabulary.frame.select(
        F.col(c.VALUE).alias(c.ID), F.col(c.ID).alias(c.ITEM_INDEX), F.col(c.COUNT)
    )
    known = counts.filter(F.col(c.COUNT) > 0).select(F.col(c.VALUE).alias(c.ID))
    if table is not None:
        listed = table.select(c.ID)
        if dropped is not None:
            listed = listed.join(dropped, F.col(c.ID) == F.col(c.ITEM_ID), "left_anti")
        known = known.unionByName(listed).distinct()
    cold = workspace.materialize(known.join(trained, c.ID, "left_anti"), "cold")
    num_cold = cold.count()
    numbered = trained.unionByName(
        _by_lot(cold, num_cold, counts, vocabulary.num_embeddings, workspace)
    )
    if vocabulary.growth is not None:
        numbered = numbered.unionByName(
            vocabulary.growth.free.select(
                F.lit("").alias(c.ID),
                F.col(c.ID).alias(c.ITEM_INDEX),
                F.lit(c.FREE_COUNT).cast("long").alias(c.COUNT),
            )
        )
    if continuation.tracks_time:
        times = counts.select(F.col(c.VALUE).alias(c.ID), c.LAST_TIME)
        numbered = numbered.join(times, c.ID, "left")
    described = _described(_with_recent(numbered, events, recent), table, raw)
    frame = described.select(
        F.col(c.ID).alias(c.ITEM_ID),
        c.ITEM_INDEX,
        F.col(c.COUNT).alias(TRAIN_COUNT),
        c.TITLE,
        *map(c.recent_column, recent.after),
        *_times(continuation),
        *(raw if table is not None else ()),
    )
    frame = workspace.materialize(frame, "items")
    num_indexes = vocabulary.num_embeddings - c.FIRST_INDEX
    return Entities(vocabulary, frame, num_indexes + num_cold)


def _by_lot(
    cold: DataFrame, num_cold: int, counts: DataFrame, first_index: int, workspace: Workspace
) -> DataFrame:
    """Indexes, from `first_index` on, and train counts of the items without a row of their own.

    In an order that says nothing: ids often tell age or popularity, and what scores alike is listed
    by index.
    """
    order = [F.xxhash64(c.ID), F.asc(c.ID)]
    ranked = with_rank(cold, order, "__rank", num_cold, workspace)
    return ranked.join(counts.withColumnRenamed(c.VALUE, c.ID), c.ID, "left").select(
        c.ID,
        (F.col("__rank") + first_index).alias(c.ITEM_INDEX),
        F.coalesce(c.COUNT, F.lit(0)).cast("long").alias(c.COUNT),
    )
