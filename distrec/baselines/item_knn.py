"""Nearest neighbours of items, by the cosine of who has had them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from scipy import sparse
from torch import Tensor

from distrec.baselines.profiles import products, profiles
from distrec.batch import QueryBatch
from distrec.columns import TRAIN
from distrec.dataset import DatasetManifest
from distrec.metrics.item_neighbors import item_neighbors, user_items


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
        self._similar = item_neighbors(matrix, num_neighbors).T.tocsr()

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
