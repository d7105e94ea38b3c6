"""Which rows of which files make up each step of each rank: pure arithmetic over counts and a seed.

An epoch is cut into lanes of equal length, and a global batch takes equally many rows of every
lane. Ranks own whole lanes, so the rows of a global batch are the same set on any number of ranks
that share the number of lanes. A position is (epoch, step): going there is computing it again.

Source: the canonical nodes of mosaicml/streaming, whose sample order does not depend on the number
of physical nodes either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distrec.config import ReaderConfig
from distrec.errors import ConfigError

DEFAULT_LANES = 12
# what a random stream is for: without it, file order and row order would draw the same numbers
_FILE_STREAM = 1
_BLOCK_STREAM = 2
_ROW_STREAM = 3


@dataclass(frozen=True)
class Order:
    """What the order of an epoch is a pure function of.

    Args:
        seed: Of the run.
        epoch: Counted from 0.
        shuffle: False for the order of the files, in every epoch.
    """

    seed: int = 0
    epoch: int = 0
    shuffle: bool = False

    def random(self, *purpose: int) -> np.random.Generator:
        """Random numbers for one purpose."""
        return np.random.default_rng((*purpose[:1], self.seed, self.epoch, *purpose[1:]))


@dataclass(frozen=True)
class RowRange:
    """Rows [start, stop) of the file at index `file` of the split."""

    file: int
    start: int
    stop: int


@dataclass(frozen=True)
class Block:
    """Rows [start, stop) of one row group, which are read, and shuffled, together."""

    file: int
    row_group: int
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """stop - start."""
        return self.stop - self.start


@dataclass(frozen=True)
class Cut:
    """Rows [start, stop) of a block in the order of the epoch, which one step takes.

    Args:
        lane: That the block lies in.
        block: Of the lane.
        start: Counted in the block.
        stop: Counted in the block.
        is_first: Nothing was taken of the block before.
    """

    lane: int
    block: Block
    start: int
    stop: int
    is_first: bool


class Lane:
    """Goes through the blocks of one lane of one epoch, without reading them."""

    def __init__(self, lane: int, blocks: Sequence[Block]) -> None:
        self._lane = lane
        self._blocks = blocks
        self._index = 0
        self._row = 0
        self._is_first = True

    def skip(self, num_rows: int) -> None:
        """Go past rows."""
        self._row += num_rows
        while self._index < len(self._blocks) and self._row >= self._blocks[self._index].num_rows:
            self._row -= self._blocks[self._index].num_rows
            self._index += 1
            self._is_first = True

    def take(self, num_rows: int) -> list[Cut]:
        """The next rows."""
        cuts = []
        while num_rows > 0:
            block = self._blocks[self._index]
            size = min(num_rows, block.num_rows - self._row)
            cuts.append(Cut(self._lane, block, self._row, self._row + size, self._is_first))
            self._is_first = False
            self.skip(size)
            num_rows -= size
        return cuts


def resolve_lanes(reader_config: ReaderConfig, world_size: int) -> int:
    """Number of lanes of a new run; a resumed run keeps the number in its checkpoint.

    Raises:
        ConfigError: Fewer lanes than ranks, so that some rank would have nothing to read.
    """
    lanes = reader_config.lanes
    if lanes == 0:
        lanes = DEFAULT_LANES if DEFAULT_LANES % world_size == 0 else world_size
    check_lanes(lanes, world_size)
    return lanes


def check_lanes(lanes: int, world_size: int) -> None:
    """Refuse fewer lanes than ranks.

    Raises:
        ConfigError: lanes < world_size.
    """
    if lanes < world_size:
        raise ConfigError(
            f"each rank needs a lane of its own: reader.lanes >= world_size. Received: {lanes} "
            f"lanes, {world_size} ranks. Set reader.lanes to a multiple of {world_size}, or resume "
            f"on at most {lanes} ranks."
        )


def lanes_of_rank(rank: int, world_size: int, lanes: int) -> range:
    """The lanes that a rank reads."""
    return range(rank, lanes, world_size)


def num_steps(num_rows: int, global_batch_size: int) -> int:
    """Steps of an epoch, on every rank: all full global batches and the rest."""
    return math.ceil(num_rows / global_batch_size)


def rows_before_step(step: int, num_rows: int, global_batch_size: int) -> int:
    """Rows of all ranks together that come before `step`."""
    return min(step * global_batch_size, num_rows)


def lane_position(lane: int, lanes: int, rows_before: int) -> int:
    """Rows of one lane among the first `rows_before` rows of the epoch.

    Over the lanes these sum to exactly `rows_before`, since floor((n + l) / L) over l in [0, L)
    does (Hermite's identity); and no two lanes differ by more than one. With the number of rows of
    the epoch it is the length of the lane.
    """
    return (rows_before + lane) // lanes


def lane_ranges(file_rows: Sequence[int], lanes: int, order: Order) -> list[list[RowRange]]:
    """Cut the files, one after the other in this epoch's order, into lanes.

    Args:
        file_rows: Rows of each file of the split, in the manifest's order.
        lanes: Number of lanes.
        order: Permutes the files, if it shuffles.

    Returns:
        The ranges of each lane. Lengths are equal to within one row; together they are every row
        once.
    """
    files = np.arange(len(file_rows))
    if order.shuffle:
        order.random(_FILE_STREAM).shuffle(files)
    num_rows = sum(file_rows)
    result: list[list[RowRange]] = [[] for _ in range(lanes)]
    lane, missing = 0, lane_position(0, lanes, num_rows)
    for file in files.tolist():
        start = 0
        while start < file_rows[file]:
            while missing == 0:
                lane += 1
                missing = lane_position(lane, lanes, num_rows)
            stop = min(start + missing, file_rows[file])
            result[lane].append(RowRange(file, start, stop))
            missing -= stop - start
            start = stop
    return result


def lane_blocks(
    ranges: Sequence[RowRange], row_groups: Sequence[Sequence[int]], order: Order
) -> list[Block]:
    """Cut the ranges of a lane where row groups end, and put the blocks into this epoch's order.

    Args:
        ranges: The lane, from `lane_ranges`.
        row_groups: Rows of each row group of each file.
        order: Permutes the blocks, if it shuffles.
    """
    blocks = []
    for part in ranges:
        ends = np.cumsum(row_groups[part.file])
        first = int(np.searchsorted(ends, part.start, side="right"))
        last = int(np.searchsorted(ends, part.stop, side="left"))
        for row_group in range(first, last + 1):
            begin = int(ends[row_group]) - row_groups[part.file][row_group]
            start = max(part.start, begin) - begin
            stop = min(part.stop, int(ends[row_group])) - begin
            if start < stop:
                blocks.append(Block(part.file, row_group, start, stop))
    if order.shuffle and blocks:
        random = order.random(_BLOCK_STREAM, ranges[0].file, ranges[0].start)
        blocks = [blocks[index] for index in random.permutation(len(blocks))]
    return blocks


def block_rows(block: Block, order: Order) -> NDArray[np.int64]:
    """The rows of a block inside its row group, in this epoch's order: int64, (num_rows,)."""
    rows = np.arange(block.start, block.stop, dtype=np.int64)
    if order.shuffle:
        order.random(_ROW_STREAM, block.file, block.row_group, block.start).shuffle(rows)
    return rows


def query_range(rank: int, world_size: int, num_rows: int) -> tuple[int, int]:
    """Rows [start, stop) of a query split that a rank takes, equal to within one row."""
    return num_rows * rank // world_size, num_rows * (rank + 1) // world_size


def num_query_batches(world_size: int, num_rows: int, batch_size: int) -> int:
    """Batches of a query split, on every rank: as many as the longest share needs."""
    return math.ceil(math.ceil(num_rows / world_size) / batch_size)
