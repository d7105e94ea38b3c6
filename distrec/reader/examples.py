"""Examples of one split as batches: this rank's share of every step, made in the background."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path

import pyarrow as pa

from distrec.batch import Batch
from distrec.config import ReaderConfig
from distrec.dataset import DatasetManifest
from distrec.errors import DataError
from distrec.reader import plan
from distrec.reader.decode import Rows, decode, no_rows, to_batch
from distrec.reader.files import SplitFile, open_split
from distrec.reader.layout import Layout, example_layout
from distrec.reader.petastorm_adapter import RowGroupReader
from distrec.reader.prefetch import Prefetcher
from distrec.world import World

# row groups that are read before they are needed; the thread holds one more in its hand
_ROW_GROUPS_AHEAD = 1


class ExampleReader:
    """Batches of train, valid or test for one rank.

    Everything is checked in the constructor, on every rank alike, before a thread or a collective
    starts. One thread reads row groups ahead, another one shuffles and joins them to batches.
    Memory: the cache, two row groups read ahead, and of each lane of this rank the block that is
    being taken, at most a row group.

    Args:
        directory: Of the dataset.
        manifest: Of the dataset.
        split: columns.TRAIN, VALID or TEST.
        world: This rank.
        reader_config: The section [reader].
        global_batch_size: Rows of a step over all ranks.
        seed: Of the run.
        lanes: Of the checkpoint, when a run is resumed; else by reader_config.

    Raises:
        DataError: The files are not those of the manifest.
        ConfigError: Fewer lanes than ranks.
    """

    def __init__(
        self,
        directory: str | Path,
        manifest: DatasetManifest,
        split: str,
        world: World,
        reader_config: ReaderConfig,
        global_batch_size: int,
        seed: int,
        lanes: int | None = None,
    ) -> None:
        assert global_batch_size > 0, global_batch_size
        self.lanes = plan.resolve_lanes(reader_config, world.world_size) if lanes is None else lanes
        plan.check_lanes(self.lanes, world.world_size)
        self.num_rows = manifest.splits[split].num_rows if split in manifest.splits else 0
        self.rows_read = 0
        self._features = manifest.features
        self._split = split
        self._world = world
        self._config = reader_config
        self._global_batch_size = global_batch_size
        self._seed = seed
        self._layout: Layout = example_layout(
            manifest.features, manifest.tasks, manifest.event_types
        )
        self._files: tuple[SplitFile, ...] = open_split(directory, manifest, split, self._layout)
        self._row_groups = RowGroupReader(
            self._files, self._layout.columns, reader_config.cache_mib
        )

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch, on every rank."""
        return plan.num_steps(self.num_rows, self._global_batch_size)

    def rows_planned(self, start_step: int = 0) -> int:
        """Rows of all ranks together from `start_step` to the end of an epoch."""
        return self.num_rows - self._rows_before(start_step)

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches of this rank from `start_step` on: steps_per_epoch - start_step of them.

        Made ahead by threads, which end with the iteration. Only one iteration of a reader
        at a time counts right: `rows_read` starts from 0 with each.

        Raises:
            DataError: A file cannot be read, breaks the contract, or the rows that came are not
                as many as planned.
        """
        self.rows_read = 0
        prefetcher = Prefetcher(
            self._make(epoch, start_step), self._config.prefetch_batches, f"join-{self._split}"
        )
        for batch in prefetcher:
            self.rows_read += batch.batch_size
            yield batch
        expected = sum(
            self._lane_position(lane, self.steps_per_epoch) - self._lane_position(lane, start_step)
            for lane in self._own_lanes
        )
        if self.rows_read != expected:
            raise DataError(
                f"an epoch reads every row of {self._split} once. Received: {self.rows_read} rows "
                f"on rank {self._world.rank} in epoch {epoch}, expected {expected}. Run prepare "
                "again, and report it if it happens again."
            )

    @property
    def _own_lanes(self) -> range:
        return plan.lanes_of_rank(self._world.rank, self._world.world_size, self.lanes)

    def _order(self, epoch: int) -> plan.Order:
        return plan.Order(self._seed, epoch, self._config.shuffle)

    def _rows_before(self, step: int) -> int:
        return plan.rows_before_step(step, self.num_rows, self._global_batch_size)

    def _lane_position(self, lane: int, step: int) -> int:
        return plan.lane_position(lane, self.lanes, self._rows_before(step))

    def _cuts(self, epoch: int, start_step: int) -> Iterator[list[plan.Cut]]:
        """What this rank takes in each step from `start_step` on."""
        order = self._order(epoch)
        ranges = plan.lane_ranges([file.num_rows for file in self._files], self.lanes, order)
        row_groups = [file.row_groups for file in self._files]
        lanes = {
            lane: plan.Lane(lane, plan.lane_blocks(ranges[lane], row_groups, order))
            for lane in self._own_lanes
        }
        for number, lane in lanes.items():
            lane.skip(self._lane_position(number, start_step))
        for step in range(start_step, self.steps_per_epoch):
            yield [
                cut
                for number, lane in lanes.items()
                for cut in lane.take(
                    self._lane_position(number, step + 1) - self._lane_position(number, step)
                )
            ]

    def _tables(self, epoch: int, start_step: int) -> Generator[pa.Table, None, None]:
        """Row groups in the order in which their first rows are taken."""
        for cuts in self._cuts(epoch, start_step):
            for cut in cuts:
                if cut.is_first:
                    yield self._row_groups.read(cut.block.file, cut.block.row_group)

    def _decode(self, table: pa.Table, block: plan.Block, epoch: int) -> Rows:
        """A block of a row group, its rows in the order of this epoch."""
        rows = plan.block_rows(block, self._order(epoch))
        return decode(table, self._layout, str(self._files[block.file].path), rows)

    def _make(self, epoch: int, start_step: int) -> Generator[Batch, None, None]:
        reading = Prefetcher(
            self._tables(epoch, start_step), _ROW_GROUPS_AHEAD, f"read-{self._split}"
        )
        loaded: dict[int, Rows] = {}
        with closing(iter(reading)) as tables:
            for cuts in self._cuts(epoch, start_step):
                parts = []
                for cut in cuts:
                    if cut.is_first:
                        loaded[cut.lane] = self._decode(next(tables), cut.block, epoch)
                    parts.append(loaded[cut.lane].slice(cut.start, cut.stop))
                yield to_batch(parts or [no_rows(self._layout)], self._features)
