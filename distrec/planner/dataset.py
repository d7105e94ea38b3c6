"""What the planner reads of a dataset, in pieces: a sample of train, and the catalogue."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from distrec import columns as c
from distrec import pulse
from distrec.batch import Batch, ItemBatch
from distrec.dataset import DatasetManifest
from distrec.reader.decode import Rows, decode, to_batch, to_items
from distrec.reader.files import open_split
from distrec.reader.layout import Layout, example_layout, item_layout

# ids of histories and features that a sample may hold, and items that are read at once
SAMPLE_IDS = 2**22
_ROWS_AT_ONCE = 2**14
_ITEMS_AT_ONCE = 2**16


@dataclass(frozen=True)
class Sample:
    """Rows of train; its files are shuffled, so the first ones are a fair sample.

    Args:
        batch: The rows.
        row_bytes: Bytes that a row takes once it is decoded.
    """

    batch: Batch
    row_bytes: float


def read_sample(directory: Path, manifest: DatasetManifest, least_rows: int) -> Sample:
    """Read the first rows of train, until they hold enough ids.

    Args:
        directory: Of the dataset.
        manifest: Of the dataset.
        least_rows: Read at least so many, where train has them: a rank's part of a step.

    Raises:
        DataError: The files are not those of the manifest.
    """
    layout = example_layout(manifest.features, event_types=manifest.event_types)
    parts: list[Rows] = []
    num_rows = num_ids = 0
    for rows in _stream(directory, manifest, c.TRAIN, layout, _ROWS_AT_ONCE):
        parts.append(rows)
        num_rows += len(rows.dense)
        num_ids += sum(int(lists.offsets[-1] - lists.offsets[0]) for lists in rows.lists.values())
        num_ids += len(rows.dense) * len(layout.integers)
        if num_ids >= SAMPLE_IDS and num_rows >= least_rows:
            break
    batch = to_batch(parts, manifest.features)
    num_numbers = num_rows * (len(layout.floats) + layout.num_dense)
    # a list has its offset as well
    num_integers = num_ids + num_rows * len(layout.lists)
    return Sample(batch, (num_integers * 8 + num_numbers * 4) / num_rows)


def read_catalogue(directory: Path, manifest: DatasetManifest) -> Iterator[ItemBatch]:
    """All items, item_index ascending, some thousands at a time.

    Raises:
        DataError: The files are not those of the manifest.
    """
    layout = item_layout(manifest.features, manifest.recent_column(c.VALID))
    for rows in _stream(directory, manifest, c.ITEMS, layout, _ITEMS_AT_ONCE):
        yield to_items([rows], manifest.features)


def _stream(
    directory: Path, manifest: DatasetManifest, split: str, layout: Layout, num_rows: int
) -> Iterator[Rows]:
    for file in open_split(directory, manifest, split, layout):
        parquet = pq.ParquetFile(file.path)
        for batch in parquet.iter_batches(batch_size=num_rows, columns=list(layout.columns)):
            pulse.beat()
            yield decode(pa.Table.from_batches([batch]), layout, str(file.path))
