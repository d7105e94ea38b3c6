"""What a step of spread tables costs, from how often each row is looked up; pure arithmetic.

A step looks up each distinct row once, so what counts is the chance that a row is among a rank's
look-ups: 1 - (1 - p) ** n for n draws that each hit the row with chance p. Ids are popularity
ranks, so neighbours are alike and most of a table is a few runs of rows with one chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distrec.sharding.plan import TablePlan
from distrec.sharding.wire import Precision, gradient_bytes

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

NUMBER_BYTES = 4
_SENT_NUMBER_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
# what goes before the row numbers for one rank, as int64: four flags, a count a spread and a hot
# group of tables
_HEADER_FLAGS, _HEADER_BYTES = 4, 8


@dataclass(frozen=True)
class RowChances:
    """The chance of each row of a table to be among one rank's look-ups of a step.

    Run k stands for the rows first_ids[k] to first_ids[k] + num_ids[k] - 1; rows in no run are
    never looked up.

    Args:
        first_ids: int64, (R,), ascending; runs do not overlap.
        num_ids: int64, (R,), at least 1.
        chances: float64, (R,), in [0, 1].
    """

    first_ids: Integers
    num_ids: Integers
    chances: Floats

    @classmethod
    def from_ids(cls, ids: Integers, chances: Floats) -> RowChances:
        """From ids, ascending and each once, with their chances; equal neighbours become one run.

        Example:
            >>> import numpy as np
            >>> found = RowChances.from_ids(np.array([1, 2, 3, 7]), np.array([1, 0.5, 0.5, 0.5]))
            >>> found.first_ids.tolist(), found.num_ids.tolist()
            ([1, 2, 7], [1, 2, 1])
        """
        starts = np.ones(len(ids), dtype=bool)
        starts[1:] = (np.diff(ids) != 1) | (chances[1:] != chances[:-1])
        first = np.flatnonzero(starts)
        lengths = np.diff(np.append(first, len(ids)))
        return cls(ids[first], lengths.astype(np.int64), chances[first])

    def expected(self, start: int = 0) -> float:
        """Distinct rows that a step is expected to look up, of the rows from `start` on."""
        return float((self._ids_from(start) * self.chances).sum())

    def expected_on(self, world_size: int, start: int = 0) -> Floats:
        """The same by owner, the rank that holds the row: float64, (N,). Row i is on i mod N."""
        first = np.maximum(self.first_ids, start)
        stop = np.maximum(self.first_ids + self.num_ids, first)
        result = np.empty(world_size)
        for rank in range(world_size):
            # ids below x that are rank mod N: (x - rank + N - 1) div N
            shift = world_size - 1 - rank
            ids = (stop + shift) // world_size - (first + shift) // world_size
            result[rank] = (ids * self.chances).sum()
        return result

    def _ids_from(self, start: int) -> Integers:
        stop = self.first_ids + self.num_ids
        return np.maximum(stop - np.maximum(self.first_ids, start), 0)


def chance_of_events(counts: Integers, share: float) -> Floats:
    """Chance of a row that `counts` events use, when each is in a rank's part with chance `share`.

    Events are drawn without replacement, which for the sum over a table is this to first order:
    (1 - share) ** count, with the event's chance in place of the draw's.

    Args:
        counts: int64, (R,).
        share: In [0, 1]: a rank's part of a batch over all rows that were counted.
    """
    return -np.expm1(log_absence_of_events(counts, share))


def log_absence_of_events(counts: Integers, share: float) -> Floats:
    """Logarithm of what `chance_of_events` takes from 1; adds up over reasons to look a row up."""
    assert 0 <= share <= 1, share
    if share == 1:
        return np.where(counts > 0, -np.inf, 0.0)
    return counts * np.log1p(-share)


@dataclass(frozen=True)
class Wire:
    """How things travel.

    Args:
        id_bytes: Of a row number.
        precision: Of rows and row gradients; what is summed or replicated stays float32.
    """

    id_bytes: int = 4
    precision: Precision = "fp32"

    def row_bytes(self, embedding_dim: int) -> int:
        """Of a row."""
        return embedding_dim * _SENT_NUMBER_BYTES[self.precision]

    def gradient_bytes(self, embedding_dim: int) -> int:
        """Of the gradient of a row."""
        return gradient_bytes(embedding_dim, self.precision)

    def used_bytes(self, embedding_dim: int) -> int:
        """Of a hot row that is sent to everybody: its number and its gradient."""
        return self.id_bytes + self.gradient_bytes(embedding_dim)


@dataclass(frozen=True)
class TableCost:
    """What one table costs a step.

    Args:
        sent_bytes: By rank, on average over ranks' batches, as EmbeddingTables.exchanged_bytes
            counts them: float64, (N,).
        network_bytes: The same as the network sees them: a ring sends what is summed 2 (N - 1) / N
            times.
        served_bytes: By rank, the rows that it sends as their owner, its own included: its work.
        distinct_rows: Expected on one rank.
    """

    sent_bytes: Floats
    network_bytes: Floats
    served_bytes: Floats
    distinct_rows: float


def table_cost(
    plan: TablePlan, rows: RowChances, world_size: int, wire: Wire, gathers: bool = False
) -> TableCost:
    """Bytes of one table in a training step.

    Rows that a rank owns itself are not sent. A rank sends the numbers of the rows that it needs
    to their owners, its own rows to the N - 1 others, and gradients back. Of a replicated table or
    a hot tier it sends the gradient of every row; or of a hot tier that gathers, of each row that
    it used, to every other rank.

    Args:
        plan: Of the table.
        rows: Of one rank's part of the step.
        world_size: N.
        wire: How things travel.
        gathers: Whether the hot rows that were used are sent, see `gathering_widths`.
    """
    width, others, distinct = plan.embedding_dim, world_size - 1, rows.expected()
    if world_size == 1:
        none = np.zeros(1)
        return TableCost(none, none, np.full(1, distinct * wire.row_bytes(width)), distinct)
    if plan.placement == "replicated":
        hot, gathers = plan.num_embeddings, False
        owned = np.zeros(world_size)
    else:
        hot = plan.hot_on(world_size)
        owned = rows.expected_on(world_size, start=hot)
    foreign = owned.sum() - owned
    spread = foreign * wire.used_bytes(width) + others * owned * wire.row_bytes(width)
    summed = hot_sent = 0.0
    if gathers:
        hot_sent = others * (distinct - rows.expected(hot)) * wire.used_bytes(width)
    else:
        summed = float(hot * width * NUMBER_BYTES)
    return TableCost(
        sent_bytes=spread + hot_sent + summed,
        network_bytes=spread + hot_sent + wire_bytes_of_allreduce(summed, world_size),
        served_bytes=owned * world_size * wire.row_bytes(width),
        distinct_rows=distinct,
    )


def wire_of(plans: Sequence[TablePlan], world_size: int, precision: Precision) -> Wire:
    """How the rows of these tables travel: row numbers as int32 where every rank's rows fit."""
    num_rows: dict[tuple[int, str], int] = {}
    for plan in plans:
        owners = world_size if plan.placement == "row_wise" else 1
        key = (plan.embedding_dim, plan.placement)
        num_rows[key] = num_rows.get(key, 0) + -(-plan.num_embeddings // owners)
    return Wire(4 if all(number < 2**31 for number in num_rows.values()) else 8, precision)


def gathering_widths(
    plans: Sequence[TablePlan], rows: Mapping[str, RowChances], world_size: int, wire: Wire
) -> frozenset[int]:
    """Widths whose hot rows are sent where they were used; of the others all are summed.

    All ranks together, a sum sends every number 2 (N - 1) times, each used row goes out N - 1
    times.
    """
    saved: dict[int, float] = {}
    for plan in plans:
        hot, width = plan.hot_on(world_size), plan.embedding_dim
        if hot:
            chances = rows[plan.name]
            used = world_size * (chances.expected() - chances.expected(hot))
            saved[width] = saved.get(width, 0.0) + 2 * hot * width * NUMBER_BYTES
            saved[width] -= used * wire.used_bytes(width)
    return frozenset(width for width, number in saved.items() if number > 0)


def best_hot_rows(plan: TablePlan, rows: RowChances, world_size: int, wire: Wire) -> int:
    """H with which the network sees the fewest bytes of a row-wise table, over all ranks.

    With fp32 a spread row costs little more than a row that is summed, and a row that is sent to
    all N ranks more, so H stops where rows are no longer used by nearly every rank in every step.

    Args:
        plan: Of the table; its own hot tier plays no part.
        rows: Of one rank's part of the step.
        world_size: N.
        wire: How things travel.
    """
    if world_size == 1 or plan.placement != "row_wise":
        return 0
    width = plan.embedding_dim
    # between the ends of runs the cost is a straight line
    ends = np.append(0, rows.first_ids + rows.num_ids)
    used = np.append(0.0, np.cumsum(rows.num_ids * rows.chances))
    # of one rank, all over (N - 1) / N
    summed = 2 * ends * width * NUMBER_BYTES
    gathered = world_size * used * wire.used_bytes(width)
    spread = (used[-1] - used) * (wire.used_bytes(width) + wire.row_bytes(width))
    return int(ends[np.argmin(np.minimum(summed, gathered) + spread)])


def header_bytes(plans: Sequence[TablePlan], world_size: int) -> int:
    """Bytes a rank and step that go before the row numbers, whatever is looked up."""
    if world_size == 1 or not plans:
        return 0
    spread = {plan.embedding_dim for plan in plans if plan.placement == "row_wise"}
    hot = {plan.embedding_dim for plan in plans if plan.hot_on(world_size)}
    return (world_size - 1) * (_HEADER_FLAGS + len(spread) + len(hot)) * _HEADER_BYTES


def shares(costs: Mapping[str, TableCost], world_size: int) -> Floats:
    """Each rank's share of the rows that are served, by bytes: float64, (N,), sums to 1.

    1 / N for every rank is even. Without spread tables it is even too.
    """
    served = np.zeros(world_size)
    for cost in costs.values():
        served += cost.served_bytes
    total = served.sum()
    return served / total if total > 0 else np.full(world_size, 1 / world_size)


def wire_bytes_of_allreduce(payload: float, world_size: int) -> float:
    """Bytes that a rank sends to sum `payload` bytes over N ranks in a ring: 2 (N - 1) / N times.

    Source: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
    workstations".
    """
    return payload * 2 * (world_size - 1) / world_size
