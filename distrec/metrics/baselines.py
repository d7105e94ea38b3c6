"""Two baselines that any model has to beat: popularity, and the nearest neighbours of items.

Both learn from the positive events of train alone, read in batches with pyarrow, and give scores
for queries like any model, so that they are measured by the same code.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from distrec.batch import QueryBatch
from distrec.columns import FIRST_INDEX, TRAIN
from distrec.dataset import DatasetManifest
from distrec.errors import ConfigError
from distrec.metrics.evaluation import rows_per_block
from distrec.metrics.events import Indexes, positive_events
from distrec.metrics.top_k import top_k

MAX_ITEMS = 200_000
"""item_knn: largest catalogue; it looks at every pair of items."""
MAX_EVENTS = 100_000_000
"""item_knn: most train rows; it holds them all in memory."""


class Popularity:
    """Every user gets the items with the most positive events in train.

    Args:
        counts: int64, (num_items - FIRST_INDEX,).
    """

    def __init__(self, counts: Tensor) -> None:
        self._scores = counts.float().unsqueeze(0)

    @classmethod
    def fit(cls, directory: Path, manifest: DatasetManifest) -> Popularity:
        """Count the events of a dataset."""
        counts = np.zeros(manifest.num_items, np.int64)
        for _, items in positive_events(directory, manifest):
            counts += np.bincount(items, minlength=manifest.num_items)
        return cls(torch.from_numpy(counts[FIRST_INDEX:]))

    def __call__(self, queries: QueryBatch) -> Tensor:
        """float32, (B, M)."""
        return self._scores.expand(queries.batch.batch_size, -1)


def check_item_knn(manifest: DatasetManifest) -> None:
    """Refuse what item_knn cannot hold in one process.

    Raises:
        ConfigError: The catalogue or train is too large.
    """
    num_items, num_events = manifest.num_items - FIRST_INDEX, manifest.splits[TRAIN].num_rows
    if num_items > MAX_ITEMS or num_events > MAX_EVENTS:
        raise ConfigError(
            f"the baseline item_knn takes up to {MAX_ITEMS:,} items and {MAX_EVENTS:,} train rows, "
            f"for it compares every pair of items in one process. Received: {num_items:,} items, "
            f'{num_events:,} rows. Set evaluate.baselines = ["popularity"].'
        )


class ItemKNN:
    """An item scores the sum of its similarities to those of its neighbours that the user has had.

    The similarity of two items is the cosine of their columns in the binary user-item matrix of
    train; an item's neighbours are the num_neighbors most similar ones. Items that no neighbour
    speaks for score 0 and so follow in order of index, which is that of popularity.

    Args:
        users: int, (nnz,): users of the events, >= FIRST_INDEX.
        items: int, (nnz,): items of the events, as positions from 0.
        num_items: M.
        num_neighbors: Neighbours kept of an item.
        use_history: Score from the query's history (its last L positives) rather than from seen.

    Source: Deshpande and Karypis 2004, doi:10.1145/963770.963776.
    """

    def __init__(
        self,
        users: Indexes,
        items: Indexes,
        num_items: int,
        num_neighbors: int,
        use_history: bool = False,
    ) -> None:
        self.num_items = num_items
        self.use_history = use_history
        matrix = _binary(users, items, (int(users.max(initial=0)) + 1, num_items))
        self._similar = _neighbors(matrix, num_neighbors).T.tocsr()

    @classmethod
    def fit(cls, directory: Path, manifest: DatasetManifest, num_neighbors: int) -> ItemKNN:
        """Learn from a dataset.

        Raises:
            ConfigError: See `check_item_knn`.
        """
        check_item_knn(manifest)
        parts: list[tuple[Indexes, Indexes]] = [(np.empty(0, np.int32),) * 2]
        for users, items in positive_events(directory, manifest):
            # those who share the unknown index are not one user
            kept = users >= FIRST_INDEX
            columns = items[kept] - FIRST_INDEX
            parts.append((users[kept].astype(np.int32), columns.astype(np.int32)))
        users, items = (np.concatenate(column) for column in zip(*parts, strict=True))
        num_items = manifest.num_items - FIRST_INDEX
        # seen holds negatives too where there are labels
        return cls(users, items, num_items, num_neighbors, use_history=manifest.has_labels)

    def __call__(self, queries: QueryBatch) -> Iterator[Tensor]:
        """float32, (B, M), in blocks of rows."""
        bags = queries.batch.history if self.use_history else queries.seen
        bags = bags.to(torch.device("cpu"))
        known = bags.values >= FIRST_INDEX
        had = _binary(
            bags.bag_of_value[known].numpy(),
            (bags.values[known] - FIRST_INDEX).numpy(),
            (bags.batch_size, self.num_items),
        )
        rows = rows_per_block(self.num_items)
        for start in range(0, bags.batch_size, rows):
            yield torch.from_numpy((had[start : start + rows] @ self._similar).toarray())


def _binary(rows: Indexes, columns: Indexes, shape: tuple[int, int]) -> sparse.csr_matrix:
    """1 where there is an event, however many there are."""
    ones = np.ones(len(rows), np.float32)
    matrix = sparse.coo_matrix((ones, (rows, columns)), shape=shape).tocsr()
    matrix.data[:] = 1.0
    return matrix


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
