"""Iterative k-core: drop users and items with few events until nothing changes."""

from __future__ import annotations

import logging

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from distrec import columns as c
from distrec.config import PrepareConfig
from distrec.prepare.workspace import Workspace

logger = logging.getLogger("distrec.prepare")

_EVENTS = "events"


def k_core(events: DataFrame, config: PrepareConfig, workspace: Workspace) -> DataFrame:
    """The largest subset in which every user and every item has enough events.

    It does not depend on the order of dropping. Only (user, item, number of events) goes round; a
    round ends in Parquet, so that the plan does not grow with the number of rounds.

    Args:
        events: With user_id and item_id.
        config: user_k_core and item_k_core.
    """
    limits = {c.USER_ID: config.user_k_core, c.ITEM_ID: config.item_k_core}
    limits = {column: least for column, least in limits.items() if least > 1}
    if not limits:
        return events
    pairs = events.groupBy(c.USER_ID, c.ITEM_ID).agg(F.count("*").alias(_EVENTS))
    pairs = workspace.materialize(pairs, "pairs")
    num_pairs, rounds = pairs.count(), 0
    while True:
        for column, least in limits.items():
            enough = pairs.groupBy(column).agg(F.sum(_EVENTS).alias("__sum"))
            pairs = pairs.join(enough.filter(F.col("__sum") >= least), column, "left_semi")
        pairs = workspace.materialize(pairs, "core")
        before, num_pairs, rounds = num_pairs, pairs.count(), rounds + 1
        logger.info("k-core round %d: %d of %d user-item pairs left", rounds, num_pairs, before)
        # with one limit, a single round is the fixed point
        if num_pairs == before or len(limits) == 1:
            break
    return events.join(pairs, [c.USER_ID, c.ITEM_ID], "left_semi")
