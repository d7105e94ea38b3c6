"""Vectors that tell which items are alike, the same for every model: for intra-list diversity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from distrec.batch import ItemBatch
from distrec.columns import FIRST_INDEX
from distrec.dataset import DatasetManifest
from distrec.metrics.events import positive_events

EXACT_WIDTH = 256
"""Up to this many distinct values, vectors are exact; beyond, they are count sketches."""
_VECTOR_BYTES = 1 << 30
# odd, of well mixed bits: 2 ** 64 / golden ratio, as a signed number
_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)

Entries = tuple[Tensor, Tensor, Tensor]
"""Of a sparse matrix: rows int64, keys (columns) int64, weights float32, (nnz,) each."""


def item_vectors(directory: Path, manifest: DatasetManifest, items: ItemBatch) -> Tensor:
    """From the features of the items, or where they have none from the users who took them.

    Args:
        directory: Of the dataset.
        manifest: Of the dataset.
        items: The whole catalogue, FIRST_INDEX first.

    Returns:
        float32, (M, F), rows of length one, or zero for an item of which nothing is known.
    """
    vectors = feature_vectors(items)
    return user_vectors(directory, manifest) if vectors is None else vectors


def feature_vectors(items: ItemBatch) -> Tensor | None:
    """Item vectors from the features of the items: each feature has the same weight.

    The ids of a feature are a 0/1 vector of length one; the numbers and vectors together are one
    more feature. The cosine of two items is so the mean over the features that both have.

    Args:
        items: The whole catalogue, FIRST_INDEX first.

    Returns:
        float32, (M, F), rows of length one, or zero for an item without any value; None where the
        items have no features.
    """
    num_items = len(items.item_index)
    entries: list[Entries] = []
    num_keys = 0
    for name in sorted(items.ids):
        bags = items.ids[name]
        is_value = bags.values >= FIRST_INDEX
        row = bags.bag_of_value[is_value]
        size = torch.bincount(row, minlength=num_items).float()
        entries.append((row, bags.values[is_value] + num_keys, size[row].rsqrt()))
        num_keys += int(bags.values.max()) + 1 if len(bags.values) else 0
    if items.dense.shape[1]:
        dense = functional.normalize(items.dense.float(), dim=1)
        row, column = dense.nonzero(as_tuple=True)
        entries.append((row, column + num_keys, dense[row, column]))
        num_keys += dense.shape[1]
    return sketch(num_items, max(num_keys, 1), entries) if entries else None


def user_vectors(directory: Path, manifest: DatasetManifest) -> Tensor:
    """Item vectors from co-occurrence: items are alike when the same users took them in train."""

    def entries() -> Iterator[Entries]:
        for users, items in positive_events(directory, manifest):
            kept = users >= FIRST_INDEX
            keys = torch.from_numpy(users[kept])
            yield torch.from_numpy(items[kept]) - FIRST_INDEX, keys, torch.ones(len(keys))

    return sketch(manifest.num_items - FIRST_INDEX, manifest.num_users, entries())


def sketch(num_rows: int, num_keys: int, entries: Iterable[Entries]) -> Tensor:
    """Rows of a sparse matrix as short dense vectors of length one.

    With few keys each has its own column and cosines are exact. With many, a key has a column and
    a sign drawn by hashing: inner products are then right on average.

    Args:
        num_rows: M.
        num_keys: Columns of the sparse matrix.
        entries: Of the matrix, in any parts; what stands twice is added.

    Returns:
        float32, (M, F), F <= EXACT_WIDTH.

    Source: Charikar, Chen and Farach-Colton 2002, doi:10.1007/3-540-45465-9_59 (count sketch).
    """
    width = min(num_keys, EXACT_WIDTH, max(16, _VECTOR_BYTES // (4 * max(num_rows, 1))))
    cells = torch.zeros(num_rows * width)
    for rows, keys, weights in entries:
        if width < num_keys:
            hashed = (keys + 1) * _MULTIPLIER
            hashed = (hashed ^ (hashed >> 32)) * _MULTIPLIER
            weights = torch.where(hashed < 0, -weights, weights)
            keys = ((hashed >> 20) & 0x7FFFFFFF) % width
        cells.index_add_(0, rows * width + keys, weights)
    return functional.normalize(cells.view(num_rows, width), dim=1)
