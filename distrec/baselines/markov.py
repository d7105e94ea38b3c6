"""First-order Markov chains: what followed the last items of the history."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from distrec.baselines.profiles import products
from distrec.batch import QueryBatch
from distrec.columns import FIRST_INDEX, TRAIN
from distrec.dataset import DatasetManifest
from distrec.metrics.events import Indexes, positive_transitions


class Markov:
    """An item scores the chances that it follows the last items of the history, the latest most.

    The chance that j follows i is (n_ij + smoothing * p_j) / (n_i + smoothing), with n_ij the times
    that j came right after i, n_i their sum over j, and p_j the share of j among all that came
    after something. The last `length` items of the history count with 1, decay, decay^2 ...

    Args:
        previous: int, (n,): the earlier items of the transitions, as positions from 0.
        items: int, (n,): the later items, as positions from 0.
        num_items: M.
        length: Items of the history that count.
        decay: Weight of an item beside that of the item after it, in (0, 1].
        smoothing: Transitions that each item is lent, spread as all transitions are; above 0.
    """

    def __init__(
        self,
        previous: Indexes,
        items: Indexes,
        num_items: int,
        length: int,
        decay: float,
        smoothing: float,
    ) -> None:
        self.length = length
        self.decay = decay
        self.smoothing = smoothing
        ones = np.ones(len(items), np.float32)
        shape = (num_items, num_items)
        self._counts = sparse.coo_matrix((ones, (previous, items)), shape=shape).tocsr()
        self._from = np.asarray(self._counts.sum(axis=1), np.float32)[:, 0]
        share = np.bincount(items, minlength=num_items) / max(len(items), 1)
        self._share = torch.from_numpy(share.astype(np.float32))

    @classmethod
    def fit(
        cls,
        directory: Path,
        manifest: DatasetManifest,
        length: int,
        decay: float,
        smoothing: float,
        splits: Sequence[str] = (TRAIN,),
    ) -> Markov:
        """Learn from a dataset; see `fit.check_baselines` for its limits."""
        parts: list[tuple[Indexes, Indexes]] = [(np.empty(0, np.int32),) * 2]
        for pair in positive_transitions(directory, manifest, splits):
            first, second = ((indexes - FIRST_INDEX).astype(np.int32) for indexes in pair)
            parts.append((first, second))
        previous, items = (np.concatenate(column) for column in zip(*parts, strict=True))
        return cls(previous, items, manifest.num_items - FIRST_INDEX, length, decay, smoothing)

    def __call__(self, queries: QueryBatch) -> Iterator[Tensor]:
        """float32, (B, M), in blocks of rows. Zeros where there is no history."""
        weights = self._weights(queries)
        start = 0
        for block in products(weights, self._counts):
            stop = start + len(block)
            lent = self.smoothing * weights[start:stop].sum(axis=1).A1
            yield block.addcmul_(torch.from_numpy(lent).unsqueeze(1), self._share)
            start = stop

    def _weights(self, queries: QueryBatch) -> sparse.csr_matrix:
        """decay^age / (n_i + smoothing) for the last items of each history: float32, (B, M)."""
        history = queries.batch.history.to(torch.device("cpu"))
        rows = history.bag_of_value
        age = (history.offsets[1:][rows] - 1 - torch.arange(len(rows))).numpy()
        kept = (age < self.length) & (history.values >= FIRST_INDEX).numpy()
        items = history.values.numpy()[kept] - FIRST_INDEX
        values = self.decay ** age[kept] / (self._from[items] + self.smoothing)
        shape = (history.batch_size, len(self._from))
        entries = (values.astype(np.float32), (rows.numpy()[kept], items))
        return sparse.coo_matrix(entries, shape=shape).tocsr()
