"""Costs of spread tables against numbers worked out by hand, and against drawn batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrec.sharding import sizing
from distrec.sharding.plan import TablePlan
from distrec.sharding.sizing import RowChances, TableCost


def runs(*parts: tuple[int, int, float]) -> RowChances:
    first, number, chances = zip(*parts, strict=True)
    return RowChances(np.array(first), np.array(number), np.array(chances, dtype=float))


def test_expected_rows_by_owner() -> None:
    # rows 2, 3, 4, 5 with one half, row 6 for certain; on three ranks row 6 is rank 0's
    rows = runs((2, 4, 0.5), (6, 1, 1.0))
    assert rows.expected() == 3.0
    assert rows.expected_on(3).tolist() == [1.5, 0.5, 1.0]
    # without rows 2 and 3
    assert rows.expected(start=4) == 2.0
    assert rows.expected_on(3, start=4).tolist() == [1.0, 0.5, 0.5]
    assert rows.expected_on(3, start=7).tolist() == [0.0, 0.0, 0.0]


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=15, unique=True),
    st.integers(1, 5),
    st.integers(0, 45),
)
def test_runs_count_every_row_once(ids: list[int], world_size: int, start: int) -> None:
    ids = sorted(ids)
    chances = np.array([1 / (1 + row // 8) for row in ids])
    rows = RowChances.from_ids(np.array(ids), chances)
    by_rank = [
        sum(chance for row, chance in zip(ids, chances, strict=True)
            if row % world_size == rank and row >= start)
        for rank in range(world_size)
    ]  # fmt: skip
    assert rows.expected_on(world_size, start) == pytest.approx(by_rank)
    assert rows.expected(start) == pytest.approx(sum(by_rank))


def test_chance_of_events() -> None:
    found = sizing.chance_of_events(np.array([0, 1, 2, 3]), 0.5)
    assert found == pytest.approx([0, 0.5, 0.75, 0.875])
    assert sizing.chance_of_events(np.array([0, 1]), 1.0).tolist() == [0, 1]


def test_expected_rows_are_those_of_drawn_batches() -> None:
    # Zipf-like events; batches of 200 of 5,000 events, drawn as an epoch deals them
    random = np.random.default_rng(0)
    events = np.minimum(random.zipf(1.3, 5_000), 2_000)
    counts = np.bincount(events)
    rows = RowChances.from_ids(
        np.arange(len(counts)), sizing.chance_of_events(counts, 200 / len(events))
    )
    drawn = []
    for _ in range(40):
        shuffled = random.permutation(events)
        drawn += [len(np.unique(shuffled[start : start + 200])) for start in range(0, 5_000, 200)]
    assert rows.expected() == pytest.approx(np.mean(drawn), rel=0.01)


def plan(placement: str, rows: int = 10) -> TablePlan:
    return TablePlan("t", rows, 4, placement, 16, 4)  # type: ignore[arg-type]


def test_bytes_of_spread_rows_are_counted_three_times_and_ids_once() -> None:
    # rows 0 and 3 certain: rank 0 of 3 has both, so the others ask it for both
    cost = sizing.table_cost(plan("row_wise"), runs((0, 1, 1.0), (3, 1, 1.0)), 3)
    ids, row = sizing.ID_BYTES, 4 * 4
    # rank 0 answers two others with two rows; they send it two numbers and two gradients each
    assert cost.sent_bytes.tolist() == [2 * 2 * row, 2 * (ids + row), 2 * (ids + row)]
    assert cost.served_bytes.tolist() == [3 * 2 * row, 0, 0]
    assert cost.distinct_rows == 2


def test_replicated_and_single_ranks() -> None:
    rows = runs((0, 3, 1.0))
    # the gradient of every row, whatever was looked up
    cost = sizing.table_cost(plan("replicated"), rows, 4)
    assert cost.sent_bytes.tolist() == [10 * 16] * 4
    assert cost.served_bytes.tolist() == [0] * 4
    assert sizing.table_cost(plan("row_wise"), rows, 1).sent_bytes.tolist() == [0]
    # four flags and a count a width for each of three others, 8 bytes each
    assert sizing.header_bytes([plan("row_wise"), plan("row_wise")], 4) == 3 * 5 * 8
    assert sizing.header_bytes([plan("replicated")], 4) == 3 * 4 * 8
    assert sizing.header_bytes([plan("row_wise")], 1) == 0


def test_shares_and_rings() -> None:
    costs = {
        "a": TableCost(np.zeros(2), np.array([30.0, 10.0]), 1.0),
        "b": TableCost(np.zeros(2), np.array([0.0, 40.0]), 1.0),
    }
    assert sizing.shares(costs, 2).tolist() == [0.375, 0.625]
    assert sizing.shares({}, 4).tolist() == [0.25] * 4
    # each of four ranks sends three quarters of the numbers twice
    assert sizing.wire_bytes_of_allreduce(1000, 4) == 1500
    assert sizing.wire_bytes_of_allreduce(1000, 1) == 0
