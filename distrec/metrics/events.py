"""The positive events of a dataset, read some at a time, for what needs no features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distrec.columns import FIRST_INDEX, HISTORY, ITEM_INDEX, LABEL, TRAIN, USER_INDEX
from distrec.dataset import DatasetManifest
from distrec.errors import DataError

Indexes = npt.NDArray[np.integer[Any]]
_ROWS_PER_READ = 1 << 18


def positive_events(
    directory: Path, manifest: DatasetManifest, splits: Sequence[str] = (TRAIN,)
) -> Iterator[tuple[Indexes, Indexes]]:
    """User and item indexes of the positive events whose item is known, some at a time.

    Args:
        directory: Of the dataset.
        manifest: Of the dataset.
        splits: Of train, valid and test: where the events are.

    Yields:
        int64, (n,) twice. The user may be UNKNOWN_INDEX.

    Raises:
        DataError: A file is damaged, or an item lies outside the catalogue.
    """
    for batch, kept in _positive_rows(directory, manifest, splits, USER_INDEX):
        yield batch[USER_INDEX].to_numpy()[kept], batch[ITEM_INDEX].to_numpy()[kept]


def positive_transitions(
    directory: Path, manifest: DatasetManifest, splits: Sequence[str] = (TRAIN,)
) -> Iterator[tuple[Indexes, Indexes]]:
    """The item of each positive event and, before it, the item that the user's history ends with.

    Events without a history, and those where one of the two items is unknown, are left out.

    Args:
        directory: Of the dataset.
        manifest: Of the dataset.
        splits: Of train, valid and test: where the events are.

    Yields:
        int64, (n,) twice: the earlier item, the later item.

    Raises:
        DataError: A file is damaged, or an item lies outside the catalogue.
    """
    for batch, kept in _positive_rows(directory, manifest, splits, HISTORY):
        history = batch[HISTORY]
        ends = history.offsets.to_numpy()
        kept = kept & (ends[1:] > ends[:-1])
        previous = history.values.to_numpy()[ends[1:][kept] - 1]
        _require_items(previous, manifest, directory)
        known = previous >= FIRST_INDEX
        yield previous[known], batch[ITEM_INDEX].to_numpy()[kept][known]


def _positive_rows(
    directory: Path, manifest: DatasetManifest, splits: Sequence[str], column: str
) -> Iterator[tuple[pa.RecordBatch, npt.NDArray[np.bool_]]]:
    """Rows with ITEM_INDEX and `column`, and which of them are positives of a known item."""
    names = [column, ITEM_INDEX, *([LABEL] if manifest.has_labels else [])]
    for entry in (entry for split in splits for entry in manifest.splits[split].files):
        path = directory / entry.path
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(_ROWS_PER_READ, columns=names):
                    items = batch[ITEM_INDEX].to_numpy()
                    _require_items(items, manifest, path)
                    kept = items >= FIRST_INDEX
                    if manifest.has_labels:
                        kept &= batch[LABEL].to_numpy() > 0
                    yield batch, kept
        # pyarrow's own errors are subclasses of these
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} cannot be read: {error}. Run prepare again.") from error


def _require_items(items: Indexes, manifest: DatasetManifest, path: Path) -> None:
    if len(items) and items.max() >= manifest.num_items:
        raise DataError(
            f"an item index lies below {manifest.num_items}. Received: {items.max()} in {path}. "
            "Run prepare again."
        )
