"""What becomes of users before anything of theirs is written: left out, or under a hashed id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from distrec.config import PrepareConfig
from distrec.people import read_people
from distrec.user_key import hashed, read_user_key

_ID = "__excluded_id"
EXCLUDED = "__excluded"


def hashed_column(value: Column, key: bytes) -> Column:
    """The hashed id of each value; null where there is none.

    The key goes to the executors inside of the function: as a literal of SQL it would stand in
    plans and in Spark's event log.
    """

    @F.pandas_udf("string")  # type: ignore[call-overload, untyped-decorator, unused-ignore]
    def hash_each(values: pd.Series) -> pd.Series:
        return values.map(lambda one: hashed(one, key), na_action="ignore")

    return hash_each(value)  # type: ignore[no-any-return, unused-ignore]


@dataclass(frozen=True)
class Door:
    """What rows of users pass through.

    Args:
        key: Their ids are hashed with it; None: they stay.
        excluded: Raw ids of those who are left out.
    """

    key: bytes | None = None
    excluded: frozenset[str] = frozenset()

    def hidden(self, column: str) -> str | None:
        """A raw column of users, where it must not be shown."""
        return None if self.key is None else column

    def passed(self, typed: DataFrame, column: str) -> DataFrame:
        """Rows with EXCLUDED, bool: whether they are left out; `column` has the ids."""
        if self.excluded:
            names = sorted(self.excluded)
            listed = typed.sparkSession.createDataFrame([(one,) for one in names], f"{_ID} string")
            listed = F.broadcast(listed)
            typed = typed.join(listed, F.col(column) == F.col(_ID), "left")
            typed = typed.withColumn(EXCLUDED, F.col(_ID).isNotNull()).drop(_ID)
        else:
            typed = typed.withColumn(EXCLUDED, F.lit(False))
        if self.key is None:
            return typed
        return typed.withColumn(column, hashed_column(F.col(column), self.key))


def door_of(prepare: PrepareConfig) -> Door:
    """As the configuration says.

    Raises:
        ConfigError: There is no usable key.
        DataError: The list of excluded users cannot be read.
    """
    excluded = frozenset[str]()
    if prepare.exclude_users is not None:
        excluded = read_people(Path(prepare.exclude_users), prepare.events.user)
    return Door(read_user_key(prepare), excluded)
