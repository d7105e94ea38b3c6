"""Divide events into train, valid and test; "known" is what is known of a user who is held out.

With split.new_items_share, "withheld" are the events of train that are nobody's history and nothing
to learn from, and yet not to be recommended again.
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from distrec import columns as c
from distrec.config import SplitConfig
from distrec.errors import ConfigError, DataError
from distrec.prepare.rank import with_rank
from distrec.prepare.workspace import Workspace

KNOWN = "known"
# events of new items: only that the user has had them already is known
WITHHELD = "withheld"

# percentile_approx is exact up to as many distinct values, and off by 1 / ACCURACY in rank above
ACCURACY = 100_000

# splits whose queries come after everything that is known of the user
BY_TIME = frozenset({"leave_one_out", "temporal", "held_out_users"})


def split_events(
    events: DataFrame, split: SplitConfig, seed: int, has_time: bool, workspace: Workspace
) -> DataFrame:
    """Set the column split to train, valid, test or known; train events of new items: withheld.

    Args:
        events: user_id, item_id, time, split (filled in only where it is given), any other column.
        split: Method and shares.
        seed: Of the random methods.
        has_time: Whether times mean something; without, events are in order of item id.

    Raises:
        DataError: The split leaves nothing in train or test.
    """
    if split.method == "leave_one_out":
        chosen = _leave_one_out(events, split)
    elif split.method == "temporal":
        chosen = _temporal(events, split)
    elif split.method == "random":
        chosen = _random(events, split, seed)
    elif split.method == "held_out_users":
        chosen = _held_out_users(events, split, seed, workspace)
    else:
        chosen = events
    if split.new_items_share:
        is_new = _uniform(seed, "new", c.ITEM_ID) < split.new_items_share
        of_train = F.col(c.SPLIT) == c.TRAIN
        chosen = chosen.withColumn(
            c.SPLIT, F.when(of_train & is_new, F.lit(WITHHELD)).otherwise(F.col(c.SPLIT))
        )
    return workspace.materialize(chosen, "split")


def require_rows(num_rows: dict[str, int], split: SplitConfig) -> None:
    """Refuse a split without train or test rows."""
    for name in (c.TRAIN, c.TEST):
        if not num_rows.get(name):
            raise DataError(
                f"prepare.split must leave rows in train and in test. Received: {num_rows} with "
                f"method = {split.method!r}: none in {name}. Use another method, other shares or "
                "times, or more data."
            )


def _leave_one_out(events: DataFrame, split: SplitConfig) -> DataFrame:
    user = Window.partitionBy(c.USER_ID)
    # events of one time are ordered by item id, then by whatever else tells them apart
    others = sorted(set(events.columns) - {c.USER_ID, c.ITEM_ID, c.TIME, c.SPLIT})
    order = [F.desc(column) for column in (c.TIME, c.ITEM_ID, *others)]
    from_last = F.row_number().over(user.orderBy(*order))
    enough = F.count("*").over(user) >= 3
    before_last = c.VALID if split.valid_share else c.TRAIN
    return events.withColumn(
        c.SPLIT,
        F.when(enough & (from_last == 1), F.lit(c.TEST))
        .when(enough & (from_last == 2), F.lit(before_last))
        .otherwise(F.lit(c.TRAIN)),
    )


def _temporal(events: DataFrame, split: SplitConfig) -> DataFrame:
    valid_start, test_start = temporal_cuts(events, split)
    return events.withColumn(
        c.SPLIT,
        F.when(F.col(c.TIME) >= test_start, F.lit(c.TEST))
        .when(F.col(c.TIME) >= valid_start, F.lit(c.VALID))
        .otherwise(F.lit(c.TRAIN)),
    )


def temporal_cuts(events: DataFrame, split: SplitConfig) -> tuple[int, int]:
    """Times, in Unix seconds, at which valid and test start.

    A share that is not given as a time ends at the last time at or below its quantile, so that
    events of one time are never divided.

    Raises:
        ConfigError: valid would start after test.
    """
    test_start = split.test_time
    if test_start is None:
        test_start = _quantile(events, 1 - split.test_share) + 1
    valid_start = split.valid_time
    if valid_start is None:
        rest = events.filter(F.col(c.TIME) < test_start)
        share = split.valid_share / (1 - split.test_share)
        valid_start = _quantile(rest, 1 - share) + 1 if split.valid_share else test_start
    if valid_start > test_start:
        raise ConfigError(
            "prepare.split.valid_time must not lie after test_time. Received: valid starts at "
            f"{valid_start}, test at {test_start}. Exchange them."
        )
    return valid_start, test_start


def _quantile(events: DataFrame, share: float) -> int:
    # 1 - 0.1 / 0.9 is not exactly 8 / 9: a hair below keeps the rank that is meant
    quantile = F.percentile_approx(c.TIME, max(0.0, share - 1e-9), ACCURACY)
    value = events.agg(quantile).collect()[0][0]
    return int(value) if value is not None else 0


def _uniform(seed: int, salt: str, *keys: str) -> Column:
    """In [0, 1), a pure function of the seed and the keys."""
    hashed = F.xxhash64(F.lit(seed), F.lit(salt), *(F.col(key) for key in keys))
    return F.pmod(hashed, F.lit(1 << 52)).cast("double") / float(1 << 52)


def _random(events: DataFrame, split: SplitConfig, seed: int) -> DataFrame:
    """Shares of each user's events; what a share leaves of a whole event is drawn by lot."""
    user = Window.partitionBy(c.USER_ID)
    others = sorted(set(events.columns) - {c.SPLIT})
    drawn = F.row_number().over(
        user.orderBy(F.xxhash64(F.lit(seed), F.lit("event"), *others), *others)
    )
    number = F.count("*").over(user)
    # 10 * 0.1 must be one event, whatever the binary fractions say
    num_test = F.floor(number * split.test_share + 1e-9 + _uniform(seed, "test", c.USER_ID))
    num_valid = F.floor(number * split.valid_share + 1e-9 + _uniform(seed, "valid", c.USER_ID))
    # one event always stays in train
    num_test = F.least(num_test, number - 1)
    num_valid = F.least(num_valid, number - 1 - num_test)
    if not split.valid_share:
        num_valid = F.lit(0)
    return events.withColumn(
        c.SPLIT,
        F.when(drawn <= num_test, F.lit(c.TEST))
        .when(drawn <= num_test + num_valid, F.lit(c.VALID))
        .otherwise(F.lit(c.TRAIN)),
    )


def _held_out_users(
    events: DataFrame, split: SplitConfig, seed: int, workspace: Workspace
) -> DataFrame:
    """Users with one event cannot be held out: there would be nothing known, or nothing to find."""
    users = events.groupBy(c.USER_ID).agg(F.count("*").alias("number"))
    users = workspace.materialize(users, "users")
    sums = users.agg(
        F.count("*").alias("all"), F.count_if(F.col("number") >= 2).alias("some")
    ).collect()[0]
    num_test = max(1, round(sums["all"] * split.test_share))
    num_valid = max(1, round(sums["all"] * split.valid_share)) if split.valid_share else 0
    order = [F.xxhash64(F.lit(seed), F.col(c.USER_ID)), F.col(c.USER_ID)]
    drawn = with_rank(users.filter("number >= 2"), order, "drawn", sums["some"], workspace)
    held = drawn.filter(F.col("drawn") < num_test + num_valid).select(
        c.USER_ID, F.when(F.col("drawn") < num_test, c.TEST).otherwise(c.VALID).alias("held")
    )
    user = Window.partitionBy(c.USER_ID)
    others = sorted(set(events.columns) - {c.USER_ID, c.ITEM_ID, c.TIME, c.SPLIT})
    place = F.row_number().over(user.orderBy(c.TIME, c.ITEM_ID, *others))
    number = F.count("*").over(user)
    num_known = F.least(
        F.greatest(F.round(number * split.known_share).cast("long"), F.lit(1)), number - 1
    )
    return (
        events.join(held, c.USER_ID, "left")
        .withColumn(
            c.SPLIT,
            F.when(F.col("held").isNull(), F.lit(c.TRAIN))
            .when(place <= num_known, F.lit(KNOWN))
            .otherwise(F.col("held")),
        )
        .drop("held")
    )
