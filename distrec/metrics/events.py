"""The positive events of a dataset, read some at a time, for what needs no features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distrec.columns import (
    FIRST_INDEX,
    HISTORY,
    HISTORY_TIMES,
    ITEM_INDEX,
    LABEL,
    NUM_EVENTS,
    PADDING_INDEX,
    TIME,
    TRAIN,
    USER_INDEX,
)
from distrec.dataset import DatasetManifest
from distrec.errors import DataError

Indexes = npt.NDArray[np.integer[Any]]
_ROWS_PER_READ = 1 << 18
_OF_WINDOWS = (USER_INDEX, ITEM_INDEX, TIME, NUM_EVENTS, HISTORY, HISTORY_TIMES)


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
    for users, items, _ in _positives(directory, manifest, splits, with_previous=False):
        yield users, items


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
    for _, items, previous in _positives(directory, manifest, splits, with_previous=True):
        _require_items(previous, manifest, directory)
        known = previous >= FIRST_INDEX
        yield previous[known], items[known]


def _positives(
    directory: Path, manifest: DatasetManifest, splits: Sequence[str], with_previous: bool
) -> Iterator[tuple[Indexes, Indexes, Indexes]]:
    """Users, items of known index, and the items before them: padding without one, or unasked."""
    for entry in (entry for split in splits for entry in manifest.splits[split].files):
        path = directory / entry.path
        are_windows = manifest.train_rows == "windows" and entry in manifest.splits[TRAIN].files
        names = [USER_INDEX, ITEM_INDEX, *([LABEL] if manifest.has_labels else [])]
        names += [HISTORY] if with_previous else []
        try:
            with pq.ParquetFile(path) as file:
                columns = list(_OF_WINDOWS) if are_windows else names
                for batch in file.iter_batches(_ROWS_PER_READ, columns=columns):
                    users, items, previous = _of_windows(batch) if are_windows else _of_rows(batch)
                    _require_items(items, manifest, path)
                    kept = items >= FIRST_INDEX
                    if manifest.has_labels:
                        kept &= batch[LABEL].to_numpy() > 0
                    yield users[kept], items[kept], previous[kept]
        # pyarrow's own errors are subclasses of these
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} cannot be read: {error}. Run prepare again.") from error


def _of_rows(batch: pa.RecordBatch) -> tuple[Indexes, Indexes, Indexes]:
    """User, item and what the history ends with, where it was read, of each row."""
    users, items = batch[USER_INDEX].to_numpy(), batch[ITEM_INDEX].to_numpy()
    previous = np.full(len(items), PADDING_INDEX)
    if HISTORY in batch.schema.names:
        ends = batch[HISTORY].offsets.to_numpy()
        has_history = ends[1:] > ends[:-1]
        previous[has_history] = batch[HISTORY].values.to_numpy()[ends[1:][has_history] - 1]
    return users, items, previous


def _of_windows(batch: pa.RecordBatch) -> tuple[Indexes, Indexes, Indexes]:
    """User, item and the last item of an earlier time in the window, of each event of windows."""
    offsets = batch[HISTORY].offsets.to_numpy().astype(np.int64)
    lengths = np.diff(offsets)
    # each window's item behind its history
    ends = np.cumsum(lengths + 1)
    starts = ends - lengths - 1
    rows = np.repeat(np.arange(len(lengths)), lengths + 1)
    is_item = np.zeros(len(rows), bool)
    is_item[ends - 1] = True
    items, times = np.empty((2, len(rows)), np.int64)
    for values, history, own in ((items, HISTORY, ITEM_INDEX), (times, HISTORY_TIMES, TIME)):
        values[~is_item] = batch[history].values.to_numpy()[offsets[0] : offsets[-1]]
        values[is_item] = batch[own].to_numpy()
    place = np.arange(len(rows))
    is_new = place == starts[rows]
    is_new[1:] |= times[1:] != times[:-1]
    first_of_time = np.maximum.accumulate(np.where(is_new, place, 0))
    previous = np.where(first_of_time > starts[rows], items[first_of_time - 1], PADDING_INDEX)
    # the first event of a later window's history is the item of the window before
    is_shared = (place == starts[rows]) & (batch[NUM_EVENTS].to_numpy() > lengths)[rows]
    kept = ~is_shared
    return batch[USER_INDEX].to_numpy()[rows][kept], items[kept], previous[kept]


def _require_items(items: Indexes, manifest: DatasetManifest, path: Path) -> None:
    if len(items) and items.max() >= manifest.num_items:
        raise DataError(
            f"an item index lies below {manifest.num_items}. Received: {items.max()} in {path}. "
            "Run prepare again."
        )
