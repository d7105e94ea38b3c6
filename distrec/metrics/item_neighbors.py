"""Which items are alike, by who has had them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from distrec.columns import FIRST_INDEX, TRAIN
from distrec.dataset import DatasetManifest
from distrec.metrics.evaluation import rows_per_block
from distrec.metrics.events import Indexes, positive_events
from distrec.metrics.top_k import top_k


def binary(rows: Indexes, columns: Indexes, shape: tuple[int, int]) -> sparse.csr_matrix:
    """1 where there is an event, however many there are."""
    ones = np.ones(len(rows), np.float32)
    matrix = sparse.coo_matrix((ones, (rows, columns)), shape=shape).tocsr()
    matrix.data[:] = 1.0
    return matrix


def user_items(
    directory: Path, manifest: DatasetManifest, splits: Sequence[str] = (TRAIN,)
) -> sparse.csr_matrix:
    """Which user has had which item: float32 zeros and ones, (users, M).

    Those who share UNKNOWN_INDEX are not one user, and are left out.
    """
    parts: list[tuple[Indexes, Indexes]] = [(np.empty(0, np.int32),) * 2]
    for users, items in positive_events(directory, manifest, splits):
        kept = users >= FIRST_INDEX
        columns = items[kept] - FIRST_INDEX
        parts.append((users[kept].astype(np.int32), columns.astype(np.int32)))
    users, items = (np.concatenate(column) for column in zip(*parts, strict=True))
    shape = (int(users.max(initial=0)) + 1, manifest.num_items - FIRST_INDEX)
    return binary(users, items, shape)


def item_neighbors(matrix: sparse.csr_matrix, num_neighbors: int) -> sparse.csr_matrix:
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


def similar_items(directory: Path, manifest: DatasetManifest, num_neighbors: int) -> Tensor:
    """The neighbours of each item in train: int64, (num_items, num_neighbors).

    An item that has fewer stands in their places itself, as do padding and the unknown one.
    """
    nearest = item_neighbors(user_items(directory, manifest), num_neighbors)
    found = np.repeat(np.arange(manifest.num_items)[:, None], num_neighbors, axis=1)
    row = np.repeat(np.arange(nearest.shape[0]), np.diff(nearest.indptr))
    found[row + FIRST_INDEX, np.arange(len(row)) - nearest.indptr[row]] = (
        nearest.indices + FIRST_INDEX
    )
    return torch.from_numpy(found)
