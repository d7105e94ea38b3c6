"""Costs of spread tables against numbers worked out by hand, and against drawn batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrec.sharding import sizing
from distrec.sharding.plan import TablePlan
from distrec.sharding.sizing import RowChances, TableCost, Wire


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


FP32, FP16 = Wire(4, "fp32"), Wire(4, "fp16")


def plan(placement: str, rows: int = 10, hot_rows: int = 0) -> TablePlan:
    return TablePlan("t", rows, 4, placement, 16, 4, hot_rows)  # type: ignore[arg-type]


def test_bytes_of_spread_rows_are_counted_three_times_and_ids_once() -> None:
    # rows 0 and 3 certain: rank 0 of 3 has both, so the others ask it for both
    cost = sizing.table_cost(plan("row_wise"), runs((0, 1, 1.0), (3, 1, 1.0)), 3, FP32)
    ids, row = 4, 4 * 4
    # rank 0 answers two others with two rows; they send it two numbers and two gradients each
    assert cost.sent_bytes.tolist() == [2 * 2 * row, 2 * (ids + row), 2 * (ids + row)]
    assert cost.network_bytes.tolist() == cost.sent_bytes.tolist()
    assert cost.served_bytes.tolist() == [3 * 2 * row, 0, 0]
    assert cost.distinct_rows == 2
    # half the bytes a number; fp16 gradients have an exponent of 2 bytes a row
    cost = sizing.table_cost(plan("row_wise"), runs((0, 1, 1.0)), 2, FP16)
    assert cost.sent_bytes.tolist() == [8, 4 + 8 + 2]


def test_replicated_and_single_ranks() -> None:
    rows = runs((0, 3, 1.0))
    # the gradient of every row, whatever was looked up; in a ring of four once and a half
    cost = sizing.table_cost(plan("replicated"), rows, 4, FP16)
    assert cost.sent_bytes.tolist() == [10 * 16] * 4
    assert cost.network_bytes.tolist() == [10 * 16 * 1.5] * 4
    assert cost.served_bytes.tolist() == [0] * 4
    assert sizing.table_cost(plan("row_wise"), rows, 1, FP32).sent_bytes.tolist() == [0]
    # four flags and a count a width for each of three others, 8 bytes each
    assert sizing.header_bytes([plan("row_wise"), plan("row_wise")], 4) == 3 * 5 * 8
    assert sizing.header_bytes([plan("replicated")], 4) == 3 * 4 * 8
    assert sizing.header_bytes([plan("row_wise", hot_rows=2)], 4) == 3 * 6 * 8
    assert sizing.header_bytes([plan("row_wise")], 1) == 0


def test_row_numbers_are_int32_where_they_fit() -> None:
    large = plan("row_wise", rows=2**32)
    assert sizing.wire_of([large], 3, "fp32").id_bytes == 4
    assert sizing.wire_of([large], 2, "fp32").id_bytes == 8
    # tables of one width lie one after the other; a replicated one is whole on every rank
    half = plan("row_wise", rows=2**31)
    assert sizing.wire_of([half], 2, "fp32").id_bytes == 4
    assert sizing.wire_of([half, half], 2, "fp32").id_bytes == 8
    assert sizing.wire_of([plan("replicated", rows=2**31)], 2, "fp32").id_bytes == 8


def test_a_hot_tier_is_summed_or_sent_where_it_is_used() -> None:
    # rows 0 and 1 are hot, row 2 is rank 0's; each with one half
    table, rows = plan("row_wise", hot_rows=2), runs((0, 3, 0.5))
    summed = sizing.table_cost(table, rows, 2, FP32)
    assert summed.sent_bytes.tolist() == [2 * 16 + 0.5 * 16, 2 * 16 + 0.5 * 20]
    gathered = sizing.table_cost(table, rows, 2, FP32, gathers=True)
    # one row used on average, with its number
    assert gathered.sent_bytes.tolist() == [20 + 0.5 * 16, 20 + 0.5 * 20]
    # over two ranks 2 rows x 20 bytes go out, of 2 x 2 x 16 that a sum takes
    assert sizing.gathering_widths([table], {"t": rows}, 2, FP32) == {4}
    # four rows x 20 bytes are more than 64
    assert sizing.gathering_widths([table], {"t": rows}, 4, FP32) == frozenset()
    assert sizing.gathering_widths([plan("row_wise")], {"t": rows}, 2, FP32) == frozenset()
    # tables of one width decide together: 24 bytes saved here, 8 lost by a row that is always used
    other = replace(plan("row_wise", hot_rows=1), name="u")
    both = {"t": rows, "u": runs((0, 1, 1.0))}
    assert sizing.gathering_widths([other], both, 2, FP32) == frozenset()
    assert sizing.gathering_widths([table, other], both, 2, FP32) == {4}


def test_the_best_hot_tier_is_that_of_trying_all() -> None:
    chances = np.array([0.0, *[1.0] * 20, 0.95, 0.7, 0.2, 0.1])
    rows = RowChances.from_ids(np.arange(25), chances)
    for world_size in (2, 3, 8):
        for wire in (FP32, FP16):
            totals = []
            for hot in range(25):
                tried = plan("row_wise", 25, hot)
                gathers = 4 in sizing.gathering_widths([tried], {"t": rows}, world_size, wire)
                cost = sizing.table_cost(tried, rows, world_size, wire, gathers)
                totals.append(cost.network_bytes.sum())
            best = sizing.best_hot_rows(plan("row_wise", 25), rows, world_size, wire)
            assert totals[best] == pytest.approx(min(totals))
    # a row in a sum takes 2 x 16 bytes, spread 36 with its number: 20 rows of 36 and one of 34.2
    # pay for 22 of 32, the padding among them, and the row with 0.7 does not
    assert sizing.best_hot_rows(plan("row_wise", 25), rows, 8, FP32) == 22
    assert sizing.best_hot_rows(plan("row_wise", 25), rows, 8, FP16) == 0
    assert sizing.best_hot_rows(plan("replicated", 25), rows, 8, FP32) == 0


def test_shares_and_rings() -> None:
    costs = {
        "a": TableCost(np.zeros(2), np.zeros(2), np.array([30.0, 10.0]), 1.0),
        "b": TableCost(np.zeros(2), np.zeros(2), np.array([0.0, 40.0]), 1.0),
    }
    assert sizing.shares(costs, 2).tolist() == [0.375, 0.625]
    assert sizing.shares({}, 4).tolist() == [0.25] * 4
    # each of four ranks sends three quarters of the numbers twice
    assert sizing.wire_bytes_of_allreduce(1000, 4) == 1500
    assert sizing.wire_bytes_of_allreduce(1000, 1) == 0
