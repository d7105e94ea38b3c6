"""Every known user and item: its index, its count in train, its raw features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from distrec import columns as c
from distrec.prepare.features import TRAIN_COUNT
from distrec.prepare.rank import with_rank
from distrec.prepare.vocabulary import FittedVocabulary, fit_vocabulary
from distrec.prepare.workspace import Workspace


@dataclass(frozen=True)
class Entities:
    """The known users or items.

    Args:
        vocabulary: Those with a row of their own in the tables.
        frame: The id, its index, TRAIN_COUNT, title (items) and the raw features, null where the
            catalogue does not have the id.
        num_rows: Of the frame.
    """

    vocabulary: FittedVocabulary
    frame: DataFrame
    num_rows: int


def _train_counts(events: DataFrame, id_column: str, workspace: Workspace) -> DataFrame:
    train = events.filter(F.col(c.SPLIT) == c.TRAIN)
    counts = train.groupBy(F.col(id_column).alias(c.VALUE)).agg(F.count("*").alias(c.COUNT))
    return workspace.materialize(counts, f"train-{id_column}")


def _described(known: DataFrame, table: DataFrame | None, raw: Sequence[str]) -> DataFrame:
    if table is None:
        return known.withColumn(c.TITLE, F.lit(""))
    described = known.join(table.select(c.ID, c.TITLE, *raw), c.ID, "left")
    return described.withColumn(c.TITLE, F.coalesce(c.TITLE, F.lit("")))


def find_users(
    events: DataFrame,
    table: DataFrame | None,
    raw: Sequence[str],
    min_count: int,
    workspace: Workspace,
) -> Entities:
    """Users of any split and of the user table; those that train has not have UNKNOWN_INDEX.

    Args:
        events: With split.
        table: Checked user table: id, title, raw features.
        raw: Names of the raw features.
        min_count: Users with fewer train events share UNKNOWN_INDEX.
    """
    counts = _train_counts(events, c.USER_ID, workspace)
    vocabulary = fit_vocabulary(counts, c.USER_ID, min_count, workspace)
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
        *(raw if table is not None else ()),
    )
    frame = workspace.materialize(frame, "users")
    return Entities(vocabulary, frame, frame.count())


def find_items(
    events: DataFrame,
    table: DataFrame | None,
    raw: Sequence[str],
    min_count: int,
    workspace: Workspace,
) -> Entities:
    """Items of train and of the catalogue; those without a row of their own come last, by id.

    An item that occurs in valid or test only, and in no catalogue, is not known.

    Args:
        events: With split.
        table: Checked catalogue: id, title, raw features.
        raw: Names of the raw features.
        min_count: Items with fewer train events are cold.
    """
    counts = _train_counts(events, c.ITEM_ID, workspace)
    vocabulary = fit_vocabulary(counts, c.ITEM_ID, min_count, workspace)
    trained = vocabulary.frame.select(
        F.col(c.VALUE).alias(c.ID), F.col(c.ID).alias(c.ITEM_INDEX), F.col(c.COUNT)
    )
    known = counts.select(F.col(c.VALUE).alias(c.ID))
    if table is not None:
        known = known.unionByName(table.select(c.ID)).distinct()
    cold = known.join(trained, c.ID, "left_anti")
    cold = workspace.materialize(cold, "cold")
    num_cold = cold.count()
    ranked = with_rank(cold, [F.asc(c.ID)], "__rank", num_cold, workspace)
    cold_counts = ranked.join(counts.withColumnRenamed(c.VALUE, c.ID), c.ID, "left")
    numbered = trained.unionByName(
        cold_counts.select(
            c.ID,
            (F.col("__rank") + vocabulary.num_embeddings).alias(c.ITEM_INDEX),
            F.coalesce(c.COUNT, F.lit(0)).cast("long").alias(c.COUNT),
        )
    )
    described = _described(numbered, table, raw)
    frame = described.select(
        F.col(c.ID).alias(c.ITEM_ID),
        c.ITEM_INDEX,
        F.col(c.COUNT).alias(TRAIN_COUNT),
        c.TITLE,
        *(raw if table is not None else ()),
    )
    frame = workspace.materialize(frame, "items")
    return Entities(vocabulary, frame, vocabulary.num_values + num_cold)
