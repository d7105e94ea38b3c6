"""The plan of an epoch, without files: every row in one lane, lanes equal, cuts at row groups."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrec.config import ReaderConfig
from distrec.errors import ConfigError
from distrec.reader import plan

ORDERS = st.builds(
    plan.Order, seed=st.integers(0, 2**40), epoch=st.integers(0, 5), shuffle=st.booleans()
)
# few files, many files, empty files, files much larger than others
FILES = st.lists(st.one_of(st.just(0), st.integers(1, 9), st.integers(100, 10**7)), max_size=9)


@given(FILES, st.integers(1, 14), ORDERS)
def test_lanes_are_equal_and_hold_every_row_once(
    file_rows: list[int], lanes: int, order: plan.Order
) -> None:
    ranges = plan.lane_ranges(file_rows, lanes, order)
    assert len(ranges) == lanes
    lengths = [sum(part.stop - part.start for part in lane) for lane in ranges]
    assert max(lengths) - min(lengths) <= 1
    for file, num_rows in enumerate(file_rows):
        cuts = sorted((p.start, p.stop) for lane in ranges for p in lane if p.file == file)
        covered = 0
        for start, stop in cuts:
            assert start == covered
            assert start < stop
            covered = stop
        assert covered == num_rows


@given(st.integers(0, 5000), st.integers(1, 14), st.integers(1, 300))
def test_steps_take_a_global_batch_and_end_where_the_lanes_end(
    num_rows: int, lanes: int, global_batch_size: int
) -> None:
    steps = plan.num_steps(num_rows, global_batch_size)
    taken = [0] * lanes
    sizes = []
    for step in range(steps):
        before = plan.rows_before_step(step + 1, num_rows, global_batch_size)
        now = [plan.lane_position(lane, lanes, before) for lane in range(lanes)]
        shares = [new - old for new, old in zip(now, taken, strict=True)]
        if step + 1 < steps:
            assert max(shares) - min(shares) <= 1
        assert min(shares) >= 0
        sizes.append(sum(shares))
        taken = now
    assert sizes[:-1] == [global_batch_size] * (steps - 1 if steps else 0)
    assert sum(sizes) == num_rows
    assert steps == 0 or 0 < sizes[-1] <= global_batch_size
    lengths = [
        sum(part.stop - part.start for part in lane)
        for lane in plan.lane_ranges([num_rows], lanes, plan.Order())
    ]
    assert taken == lengths


@given(st.lists(st.lists(st.integers(0, 40), max_size=5), max_size=5), st.integers(1, 7), ORDERS)
def test_blocks_cut_lanes_at_row_groups(
    row_groups: list[list[int]], lanes: int, order: plan.Order
) -> None:
    file_rows = [sum(groups) for groups in row_groups]
    found = []
    for ranges in plan.lane_ranges(file_rows, lanes, order):
        of_lane = []
        for block in plan.lane_blocks(ranges, row_groups, order):
            assert 0 <= block.start < block.stop <= row_groups[block.file][block.row_group]
            rows = plan.block_rows(block, order).tolist()
            assert sorted(rows) == list(range(block.start, block.stop))
            before = sum(row_groups[block.file][: block.row_group])
            of_lane += [(block.file, before + row) for row in rows]
        if not order.shuffle:
            assert of_lane == [(p.file, row) for p in ranges for row in range(p.start, p.stop)]
        found += of_lane
    everything = [(file, row) for file, size in enumerate(file_rows) for row in range(size)]
    assert sorted(found) == everything


@given(st.lists(st.integers(1, 9), max_size=6), st.integers(0, 9), st.integers(1, 12))
def test_a_lane_cuts_its_blocks_and_tells_the_first_cut_of_each(
    sizes: list[int], skipped: int, step: int
) -> None:
    blocks = [plan.Block(0, group, 5, 5 + size) for group, size in enumerate(sizes)]
    lane = plan.Lane(3, blocks)
    skipped = min(skipped, sum(sizes))
    lane.skip(skipped)
    cuts = []
    for start in range(skipped, sum(sizes), step):
        taken = lane.take(min(step, sum(sizes) - start))
        assert sum(cut.stop - cut.start for cut in taken) == min(step, sum(sizes) - start)
        cuts += taken
    rows = [(cut.block, row) for cut in cuts for row in range(cut.start, cut.stop)]
    assert rows == [(block, row) for block in blocks for row in range(block.num_rows)][skipped:]
    # a block is read when its first cut comes, and so never twice
    reached = [block for block, _ in rows]
    assert [cut.block for cut in cuts if cut.is_first] == list(dict.fromkeys(reached))
    assert all(cut.lane == 3 for cut in cuts)


def test_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    def whole(order: plan.Order) -> list[tuple[int, int]]:
        groups = [[50, 50]] * 6
        lanes = plan.lane_ranges([100] * 6, 3, order)
        return [
            (block.file, block.row_group * 50 + row)
            for lane in lanes
            for block in plan.lane_blocks(lane, groups, order)
            for row in plan.block_rows(block, order).tolist()
        ]

    first = whole(plan.Order(3, 0, True))
    assert first == whole(plan.Order(3, 0, True))
    assert first != whole(plan.Order(3, 1, True))
    assert first != whole(plan.Order(4, 0, True))
    assert whole(plan.Order(3, 1, False)) == [
        (file, row) for file in range(6) for row in range(100)
    ]


def test_files_blocks_and_rows_are_each_shuffled() -> None:
    order = plan.Order(3, 0, True)
    ranges = plan.lane_ranges([100] * 8, 1, order)[0]
    assert [part.file for part in ranges] != list(range(8))
    one_file = plan.lane_ranges([800], 1, order)[0]
    blocks = plan.lane_blocks(one_file, [[100] * 8], order)
    assert [block.row_group for block in blocks] != list(range(8))
    first, second = (plan.block_rows(block, order).tolist() for block in blocks[:2])
    assert first != list(range(100))
    assert first != second


@pytest.mark.parametrize(
    ("setting", "world_size", "lanes"), [(0, 1, 12), (0, 6, 12), (0, 5, 5), (0, 24, 24), (7, 3, 7)]
)
def test_number_of_lanes(setting: int, world_size: int, lanes: int) -> None:
    assert plan.resolve_lanes(ReaderConfig(lanes=setting), world_size) == lanes
    owned = [set(plan.lanes_of_rank(rank, world_size, lanes)) for rank in range(world_size)]
    assert all(owned)
    assert sorted(lane for lanes_of_rank in owned for lane in lanes_of_rank) == list(range(lanes))


def test_fewer_lanes_than_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Received: 2 lanes, 3 ranks. Set reader.lanes"):
        plan.resolve_lanes(ReaderConfig(lanes=2), 3)
