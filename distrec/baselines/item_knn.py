"""Nearest neighbours of items, by the cosine of who has had them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from distrec.baselines.profiles import products, profiles, user_items
from distrec.batch import QueryBatch
from distrec.columns import TRAIN
from distrec.dataset import DatasetManifest
from distrec.metrics.evaluation import rows_per_block
from distrec.metrics.top_k import top_k


class ItemKNN:
    """An item scores the sum of its similarities to those of its neighbours that the user has had.

    The similarity of two items is the cosine of their columns in the binary user-item matrix; an
    item's neighbours are the num_neighbors most similar ones. Items that no neighbour speaks for
    score 0 and so follow in order of index, which is that of popularity.

    Args:
        matrix: float32 zeros and ones, (users, M).
        num_neighbors: Neighbours kept of an item.
        use_history: As `profiles` has it.

    Source: Deshpande and Karypis 2004, doi:10.1145/963770.963776.
    """

    def __init__(
        self, matrix: sparse.csr_matrix, num_neighbors: int, use_history: bool = False
    ) -> None:
        self.use_history = use_history
        self._similar = _neighbors(matrix, num_neighbors).T.tocsr()

    @classmethod
    def fit(
        cls,
        directory: Path,
        manifest: DatasetManifest,
        num_neighbors: int,
        splits: Sequence[str] = (TRAIN,),
    ) -> ItemKNN:
        """Learn from a dataset; see `fit.check_baselines` for its limits."""
        matrix = user_items(directory, manifest, splits)
        return cls(matrix, num_neighbors, use_history=manifest.has_labels)

    def __call__(self, queries: QueryBatch) -> Iterator[Tensor]:
        """float32, (B, M), in blocks of rows."""
        had = profiles(queries, self._similar.shape[1], self.use_history)
        return products(had, self._similar)


def _neighbors(matrix: sparse.csr_matrix, num_neighbors: int) -> sparse.csr_matrix:
    """Row i: the cosines of item i with its neighbours. (M, M), at most num_neighbors a row."""
    num_items = matrix.shape[1]
    by_item = matrix.T.tocsr()
    counts = np.diff(by_item.indptr).astype(np.float32)
    inverse = 1.0 / np.sqrt(np.maximum(counts, 1.0))
    block = rows_per_block(num_items)
    parts = []
    for start in range(0, num_items, block):
        stop = min(start + block, num_items)
        cosine = (by_item[start:stop] @ matrix).toarray()
        cosine *= inverse[start:stop, None] * inverse
        own = np.arange(stop - start)
        cosine[own, own + start] = 0.0
        cosine[cosine == 0.0] = -np.inf
        chosen = top_k(torch.from_numpy(cosine), num_neighbors).numpy()
        row, place = (chosen >= 0).nonzero()
        column = chosen[row, place]
        values = cosine[row, column]
        parts.append(sparse.coo_matrix((values, (row, column)), shape=(stop - start, num_items)))
    return sparse.vstack(parts, format="csr")
