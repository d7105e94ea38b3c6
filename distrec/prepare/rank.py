"""Numbering the rows of a frame of any size in a given order, without one task that sees them all.

Range partitioning puts the rows in order over the partitions; each partition's first number is the
sum of the sizes before it (a frame as small as the number of partitions); inside a partition
row_number goes on from there. The partitions come from sampling, so they are written down before
they are counted: a second evaluation might cut them elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from distrec.prepare.workspace import Workspace

ROWS_PER_TASK = 1_000_000

_PART = "__part"
_OFFSET = "__offset"


def with_rank(
    frame: DataFrame, order: Sequence[Column], name: str, num_rows: int, workspace: Workspace
) -> DataFrame:
    """Add the 0-based place of each row in the order.

    Args:
        frame: Any size.
        order: Sort expressions that together tell every two rows apart.
        name: Of the new column, int64.
        num_rows: Of the frame: small ones take the short way.
    """
    parts = max(1, -(-num_rows // ROWS_PER_TASK))
    ranged = frame.repartitionByRange(parts, *order).withColumn(_PART, F.spark_partition_id())
    if parts > 1:
        ranged = workspace.materialize(ranged, f"rank-{name}")
    return number(ranged, order, name, _PART, parts).drop(_PART)


def number(
    frame: DataFrame, order: Sequence[Column], name: str, part: str, num_parts: int
) -> DataFrame:
    """Add 0-based numbers that go through the parts in ascending order.

    Args:
        frame: With a column `part`, int, in [0, num_parts), that goes along with the order.
        order: Inside a part.
    """
    inside = F.row_number().over(Window.partitionBy(part).orderBy(*order)).cast("long") - 1
    if num_parts == 1:
        return frame.withColumn(name, inside)
    sizes = frame.groupBy(part).agg(F.count("*").alias("size"))
    # one row with as many elements as there are parts; a window over all of them would do the same
    # with a warning
    sizes = sizes.agg(F.sort_array(F.collect_list(F.struct(part, "size"))).alias("sizes"))
    offsets = sizes.select("sizes", F.posexplode("sizes").alias("place", "one")).select(
        F.col(f"one.{part}").alias(part),
        F.aggregate(
            F.slice("sizes", F.lit(1), F.col("place")),
            F.lit(0).cast("long"),
            lambda total, one: total + one["size"],
        ).alias(_OFFSET),
    )
    return (
        frame.join(F.broadcast(offsets), part, "inner")
        .withColumn(name, F.col(_OFFSET) + inside)
        .drop(_OFFSET)
    )
