"""Indexed events to what a dataset holds: examples, queries, and users as of now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from distrec import columns as c
from distrec.prepare.features import FittedFeature, defaults
from distrec.prepare.histories import (
    attach_all,
    attach_before,
    attach_others,
    history_columns,
    state,
    windows,
)
from distrec.prepare.split import KNOWN, WITHHELD

# what comes before a split
POOLS = {
    c.TRAIN: (c.TRAIN,),
    c.VALID: (c.TRAIN, KNOWN, WITHHELD),
    c.TEST: (c.TRAIN, KNOWN, WITHHELD, c.VALID),
}
_EXAMPLE = (c.USER_INDEX, c.ITEM_INDEX, c.TIME, c.LABEL, c.WEIGHT, c.NUM_EVENTS)
_STATE = (c.USER_ID, c.USER_INDEX, c.TIME, c.NUM_EVENTS)


@dataclass(frozen=True)
class Examples:
    """Indexed events and how histories are made of them.

    Args:
        events: user_id, user_index, item_id, item_index, time, label, weight, split, tasks and
            encoded context features; event_type, a number, where histories tell it.
        user_features: user_id and the encoded features of every known user.
        user: Fitted features of users.
        context: Fitted features of events.
        tasks: Further tasks.
        length: L.
        has_time: Whether events have times.
        by_time: Whether a history ends at the time of the example; else valid and test know all
            that the splits before them know.
    """

    events: DataFrame
    user_features: DataFrame
    user: Sequence[FittedFeature]
    context: Sequence[FittedFeature]
    tasks: tuple[str, ...]
    length: int
    has_time: bool
    by_time: bool

    @property
    def feature_columns(self) -> list[str]:
        """Encoded user and context features, in the manifest's order."""
        return [feature.spec.column for feature in (*self.user, *self.context)]

    @property
    def history_columns(self) -> list[str]:
        """What is told of a user's past events."""
        return list(history_columns(self.events))

    @property
    def example_columns(self) -> list[str]:
        """Columns of train, valid and test."""
        tasks = map(c.task_column, self.tasks)
        return [*_EXAMPLE, *self.history_columns, *tasks, *self.feature_columns]

    @property
    def query_columns(self) -> list[str]:
        """Columns of valid_queries and test_queries."""
        return [*_STATE, *self.history_columns, c.SEEN, c.TARGETS, *self.feature_columns]

    @property
    def user_columns(self) -> list[str]:
        """Columns of users."""
        return [*_STATE, *self.history_columns, c.SEEN, *self.feature_columns]

    def of(self, split: str) -> DataFrame:
        """The events of one split."""
        return self.events.filter(F.col(c.SPLIT) == split)

    def pool(self, split: str) -> DataFrame:
        """The events of the splits before it, of the users that it has."""
        pool = self.events.filter(F.col(c.SPLIT).isin(*POOLS[split]))
        if split == c.TRAIN:
            return pool
        return pool.join(self.of(split).select(c.USER_ID).distinct(), c.USER_ID, "left_semi")

    def with_histories(self, examples: DataFrame, split: str) -> DataFrame:
        """Add num_events and the histories to examples of a split."""
        pool = self.pool(split)
        if split == c.TRAIN and not self.has_time:
            return attach_others(examples, pool, self.length)
        if split == c.TRAIN or self.by_time:
            return attach_before(examples, pool, self.length)
        return attach_all(examples, state(pool, self.length))

    def windows(self) -> DataFrame:
        """The events of train as stretches of a user's events, each a row."""
        return windows(self.of(c.TRAIN), self.length)

    def with_user_features(self, frame: DataFrame) -> DataFrame:
        """Add the encoded user features."""
        if not self.user:
            return frame
        return frame.join(self.user_features, c.USER_ID, "inner")

    def queries(self, examples: DataFrame, split: str) -> DataFrame:
        """One row a user with a positive withheld event; features of users are still to be added.

        Args:
            examples: Of the split, with histories.
        """
        context = [feature.spec.column for feature in self.context]
        first = F.struct(
            c.TIME, c.ITEM_ID, c.USER_INDEX, c.NUM_EVENTS, *self.history_columns, *context
        )
        withheld = F.collect_set(F.when(F.col(c.LABEL) > 0, F.struct(c.ITEM_ID, c.ITEM_INDEX)))
        grouped = examples.groupBy(c.USER_ID).agg(
            F.min(first).alias("first"), withheld.alias("withheld")
        )
        states = state(self.pool(split), self.length).select(c.USER_ID, c.SEEN, "last_time")
        joined = grouped.filter(F.size("withheld") > 0).join(states, c.USER_ID, "left")
        return joined.select(
            c.USER_ID,
            "first.*",
            F.coalesce(c.SEEN, F.array().cast("array<bigint>")).alias(c.SEEN),
            F.sort_array(F.transform("withheld", lambda item: item[c.ITEM_INDEX])).alias(c.TARGETS),
            "last_time",
        ).withColumn(c.TIME, self._cut())

    def _cut(self) -> Column:
        """First withheld event, or just after all that is known when the split is not by time."""
        if self.by_time or not self.has_time:
            return F.col(c.TIME)
        return F.greatest(F.col(c.TIME), F.col("last_time") + 1)

    def longest_wait(self) -> int:
        """Seconds between two events of a user in train, at most; at least 1."""
        user = Window.partitionBy(c.USER_ID).orderBy(c.TIME)
        wait = F.col(c.TIME) - F.lag(c.TIME).over(user)
        found = self.of(c.TRAIN).select(wait.alias("wait")).agg(F.max("wait")).first()
        return max(1, int(found[0] or 0)) if found else 1

    def users_now(self, users: DataFrame, latest: int) -> DataFrame:
        """Every known user with all of their events, just after the last event of anybody.

        The model sees how long a user has been away. It has seen nobody away for longer than any
        user of train: who is counts as away for so long.

        Args:
            users: user_id and user_index.
            latest: Time of the last event of anybody.
        """
        none = F.array().cast("array<bigint>")
        joined = users.select(c.USER_ID, c.USER_INDEX).join(
            state(self.events, self.length), c.USER_ID, "left"
        )
        now = F.lit(0)
        if self.has_time:
            # least passes over the null of a user without events
            away = F.col("last_time") + self.longest_wait()
            now = F.least(F.lit(latest) + 1, away)
        rows = joined.select(
            c.USER_ID,
            c.USER_INDEX,
            now.cast("long").alias(c.TIME),
            F.coalesce(c.NUM_EVENTS, F.lit(0)).cast("long").alias(c.NUM_EVENTS),
            *(F.coalesce(name, none).alias(name) for name in (*self.history_columns, c.SEEN)),
            *defaults(self.context),
        )
        return self.with_user_features(rows)
