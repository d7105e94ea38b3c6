"""Queries of a split and the items of the catalogue, each read once and in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from distrec import columns as c
from distrec import pulse
from distrec.batch import ItemBatch, QueryBatch
from distrec.dataset import DatasetManifest, FeatureSpec
from distrec.errors import DataError
from distrec.reader import plan
from distrec.reader.decode import Rows, decode, no_rows, to_items, to_queries
from distrec.reader.files import SplitFile, open_split
from distrec.reader.layout import Layout, item_layout, query_layout
from distrec.reader.petastorm_adapter import RowGroupReader
from distrec.world import World


def read_queries(
    directory: str | Path,
    manifest: DatasetManifest,
    split: str,
    world: World,
    batch_size: int,
) -> Iterator[QueryBatch]:
    """This rank's share of the queries of a split, in the split's order.

    Args:
        directory: Of the dataset.
        manifest: Of the dataset.
        split: columns.VALID_QUERIES, TEST_QUERIES or USERS; users have no targets.
        world: This rank.
        batch_size: Queries of a batch of this rank.

    Returns:
        Equally many batches on every rank, the last of them with fewer or zero rows. Over the ranks
        every query is there once.

    Raises:
        DataError: The files are not those of the manifest: at once, not with the first batch.
    """
    assert batch_size > 0, batch_size
    layout = query_layout(manifest.features, manifest.event_types, targets=split != c.USERS)
    files = open_split(directory, manifest, split, layout)
    return _query_batches(files, layout, manifest.features, world, batch_size)


def read_items(directory: str | Path, manifest: DatasetManifest, split: str = c.VALID) -> ItemBatch:
    """All items of the catalogue, FIRST_INDEX first.

    Args:
        directory: Of the dataset.
        manifest: Of the dataset.
        split: columns.VALID, TEST or USERS: what was recent before it.

    Raises:
        DataError: The files are not those of the manifest, or an index is missing, stands twice or
            out of order.
    """
    layout = item_layout(manifest.features, manifest.recent_column(split))
    files = open_split(directory, manifest, c.ITEMS, layout)
    parts = list(_rows(files, layout, 0, sum(file.num_rows for file in files)))
    items = to_items(parts or [no_rows(layout)], manifest.features)
    expected = torch.arange(c.FIRST_INDEX, manifest.num_items)
    if not torch.equal(items.item_index, expected):
        shared = min(len(expected), len(items.item_index))
        differs = (items.item_index[:shared] != expected[:shared]).nonzero()
        row = int(differs[0]) if len(differs) else shared
        found = items.item_index[row : row + 1].tolist() or "the end"
        raise DataError(
            f"items are {c.FIRST_INDEX} to {manifest.num_items - 1}, ascending, without a gap. "
            f"Received: {len(items.item_index)} items, at row {row} {found} where "
            f"{row + c.FIRST_INDEX} is expected ({Path(directory) / c.ITEMS}). Run prepare again."
        )
    return items


def _query_batches(
    files: Sequence[SplitFile],
    layout: Layout,
    features: Sequence[FeatureSpec],
    world: World,
    batch_size: int,
) -> Iterator[QueryBatch]:
    num_rows = sum(file.num_rows for file in files)
    start, stop = plan.query_range(world.rank, world.world_size, num_rows)
    waiting: list[Rows] = []
    source = _rows(files, layout, start, stop)
    for _ in range(plan.num_query_batches(world.world_size, num_rows, batch_size)):
        missing = batch_size
        parts: list[Rows] = []
        while missing > 0:
            rows = waiting.pop() if waiting else next(source, None)
            if rows is None:
                break
            size = len(rows.dense)
            parts.append(rows.slice(0, min(size, missing)))
            if size > missing:
                waiting.append(rows.slice(missing, size))
            missing -= len(parts[-1].dense)
        yield to_queries(parts or [no_rows(layout)], features)


def _rows(files: Sequence[SplitFile], layout: Layout, start: int, stop: int) -> Iterator[Rows]:
    """Rows [start, stop) of the files one after the other, a row group at a time."""
    reader = RowGroupReader(files, layout.columns, cache_mib=0)
    row_groups = [file.row_groups for file in files]
    before = 0
    for index, file in enumerate(files):
        first, last = max(start - before, 0), min(stop - before, file.num_rows)
        before += file.num_rows
        if first >= last:
            continue
        part = plan.RowRange(index, first, last)
        for block in plan.lane_blocks([part], row_groups, plan.Order()):
            pulse.beat()
            table = reader.read(index, block.row_group)
            yield decode(table, layout, str(file.path)).slice(block.start, block.stop)
