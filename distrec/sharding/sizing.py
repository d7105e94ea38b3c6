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

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

# of a row number, and of a number of a row or of its gradient, as the exchange sends them; row
# numbers of tables with more than 2^31 rows on a rank take 8
ID_BYTES = 4
NUMBER_BYTES = 4
# what goes before the row numbers for one rank: four flags, and a count a width, of 8 bytes each
_HEADER_FLAGS = 4
_HEADER_BYTES = 8


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
class TableCost:
    """What one table costs a step.

    Args:
        sent_bytes: By rank, on average over ranks' batches: float64, (N,).
        served_bytes: By rank, the rows that it sends as their owner, its own included: its work.
        distinct_rows: Expected on one rank.
    """

    sent_bytes: Floats
    served_bytes: Floats
    distinct_rows: float


def table_cost(plan: TablePlan, rows: RowChances, world_size: int) -> TableCost:
    """Bytes that ranks hand to alltoall and allreduce for one table in a training step.

    Rows that a rank owns itself are not sent. A rank sends the numbers of the rows that it needs
    to their owners, its own rows to the N - 1 others, and gradients back. Of a replicated table it
    sends the gradient of every row.

    Args:
        plan: Of the table.
        rows: Of one rank's part of the step.
        world_size: N.
    """
    width_bytes = plan.embedding_dim * NUMBER_BYTES
    distinct = rows.expected()
    if world_size == 1:
        return TableCost(np.zeros(1), np.full(1, distinct * width_bytes), distinct)
    if plan.placement == "replicated":
        sent = np.full(world_size, float(plan.num_embeddings * width_bytes))
        return TableCost(sent, np.zeros(world_size), distinct)
    owned = rows.expected_on(world_size)
    foreign = owned.sum() - owned
    sent = foreign * (ID_BYTES + width_bytes) + (world_size - 1) * owned * width_bytes
    return TableCost(sent, owned * world_size * width_bytes, distinct)


def header_bytes(plans: Sequence[TablePlan], world_size: int) -> int:
    """Bytes a rank and step that go before the row numbers, whatever is looked up."""
    if world_size == 1 or not plans:
        return 0
    widths = {plan.embedding_dim for plan in plans if plan.placement == "row_wise"}
    return (world_size - 1) * (_HEADER_FLAGS + len(widths)) * _HEADER_BYTES


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
