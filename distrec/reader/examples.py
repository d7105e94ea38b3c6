"""Examples of one split as batches: this rank's share of every step, made in the background."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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


class _Lane:
    """Reads one lane of one epoch from a position on, each block when it is reached."""

    def __init__(self, blocks: list[plan.Block], reader: ExampleReader, epoch: int) -> None:
        self._blocks = blocks
        self._reader = reader
        self._epoch = epoch
        self._index = 0
        self._row = 0
        self._loaded: Rows | None = None

    def skip(self, num_rows: int) -> None:
        """Go past rows without reading them."""
        self._row += num_rows
        while self._index < len(self._blocks) and self._row >= self._blocks[self._index].num_rows:
            self._row -= self._blocks[self._index].num_rows
            self._index += 1
            self._loaded = None

    def take(self, num_rows: int) -> list[Rows]:
        """The next rows, as views of the blocks they lie in."""
        parts = []
        while num_rows > 0:
            block = self._blocks[self._index]
            if self._loaded is None:
                self._loaded = self._reader.load(block, self._epoch)
            size = min(num_rows, block.num_rows - self._row)
            parts.append(self._loaded.slice(self._row, self._row + size))
            self.skip(size)
            num_rows -= size
        return parts


class ExampleReader:
    """Batches of train, valid or test for one rank.

    Everything is checked in the constructor, on every rank alike, before a thread or a collective
    starts. Memory: the cache, and of each lane of this rank the block being read, at most a row
    group.

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
        self._layout: Layout = example_layout(manifest.features)
        self._files: tuple[SplitFile, ...] = open_split(
            directory, manifest, split, self._layout, reader_config.verify
        )
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

        Made ahead by a thread, which ends with the iteration. Only one iteration of a reader
        at a time counts right: `rows_read` starts from 0 with each.

        Raises:
            DataError: A file cannot be read, breaks the contract, or the rows that came are not
                as many as planned.
        """
        self.rows_read = 0
        prefetcher = Prefetcher(
            self._make(epoch, start_step), self._config.prefetch_batches, f"read-{self._split}"
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

    def load(self, block: plan.Block, epoch: int) -> Rows:
        """Read and decode a block, its rows in the order of this epoch."""
        table = self._row_groups.read(block.file, block.row_group)
        rows = decode(table, self._layout, str(self._files[block.file].path))
        if not self._config.shuffle:
            return rows.slice(block.start, block.stop)
        return rows.take(plan.block_rows(block, self._order(epoch)))

    @property
    def _own_lanes(self) -> range:
        return plan.lanes_of_rank(self._world.rank, self._world.world_size, self.lanes)

    def _order(self, epoch: int) -> plan.Order:
        return plan.Order(self._seed, epoch, self._config.shuffle)

    def _rows_before(self, step: int) -> int:
        return plan.rows_before_step(step, self.num_rows, self._global_batch_size)

    def _lane_position(self, lane: int, step: int) -> int:
        return plan.lane_position(lane, self.lanes, self._rows_before(step))

    def _open_lanes(self, epoch: int) -> dict[int, _Lane]:
        order = self._order(epoch)
        ranges = plan.lane_ranges([file.num_rows for file in self._files], self.lanes, order)
        row_groups = [file.row_groups for file in self._files]
        return {
            lane: _Lane(plan.lane_blocks(ranges[lane], row_groups, order), self, epoch)
            for lane in self._own_lanes
        }

    def _make(self, epoch: int, start_step: int) -> Iterator[Batch]:
        lanes = self._open_lanes(epoch)
        for number, lane in lanes.items():
            lane.skip(self._lane_position(number, start_step))
        for step in range(start_step, self.steps_per_epoch):
            parts = [
                part
                for number, lane in lanes.items()
                for part in lane.take(
                    self._lane_position(number, step + 1) - self._lane_position(number, step)
                )
            ]
            yield to_batch(parts or [no_rows(self._layout)], self._features)
