"""The positive events of train, read with pyarrow some at a time, for what needs no features."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from distrec.columns import FIRST_INDEX, ITEM_INDEX, LABEL, TRAIN, USER_INDEX
from distrec.dataset import DatasetManifest
from distrec.errors import DataError

Indexes = npt.NDArray[np.integer[Any]]
_ROWS_PER_READ = 1 << 18


def positive_events(
    directory: Path, manifest: DatasetManifest
) -> Iterator[tuple[Indexes, Indexes]]:
    """User and item indexes of the positive train events whose item is known, some at a time.

    Args:
        directory: Of the dataset.
        manifest: Of the dataset.

    Yields:
        int64, (n,) twice. The user may be UNKNOWN_INDEX.

    Raises:
        DataError: A file is damaged, or an item lies outside the catalogue.
    """
    names = [USER_INDEX, ITEM_INDEX, *([LABEL] if manifest.has_labels else [])]
    for entry in manifest.splits[TRAIN].files:
        path = directory / entry.path
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(_ROWS_PER_READ, columns=names):
                    users, items = (batch[name].to_numpy() for name in names[:2])
                    if len(items) and items.max() >= manifest.num_items:
                        raise DataError(
                            f"an item index lies below {manifest.num_items}. Received: "
                            f"{items.max()} in {path}. Run prepare again."
                        )
                    kept = items >= FIRST_INDEX
                    if manifest.has_labels:
                        kept &= batch[LABEL].to_numpy() > 0
                    yield users[kept], items[kept]
        # pyarrow's own errors are subclasses of these
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} cannot be read: {error}. Run prepare again.") from error
