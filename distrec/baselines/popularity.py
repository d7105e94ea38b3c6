"""Popularity: everybody gets what most events are of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distrec.batch import QueryBatch
from distrec.columns import FIRST_INDEX, TRAIN
from distrec.dataset import DatasetManifest
from distrec.metrics.events import positive_events


class Popularity:
    """Every user gets the items with the most positive events.

    Args:
        counts: int64, (num_items - FIRST_INDEX,).
    """

    def __init__(self, counts: Tensor) -> None:
        self._scores = counts.float().unsqueeze(0)

    @classmethod
    def fit(
        cls, directory: Path, manifest: DatasetManifest, splits: Sequence[str] = (TRAIN,)
    ) -> Popularity:
        """Count the events of a dataset."""
        counts = np.zeros(manifest.num_items, np.int64)
        for _, items in positive_events(directory, manifest, splits):
            counts += np.bincount(items, minlength=manifest.num_items)
        return cls(torch.from_numpy(counts[FIRST_INDEX:]))

    def __call__(self, queries: QueryBatch) -> Tensor:
        """float32, (B, M)."""
        return self._scores.expand(queries.batch.batch_size, -1)
