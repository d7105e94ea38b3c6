"""What a recommender shows, right or wrong: coverage, popularity and diversity of its lists.

- ``coverage``: distinct items recommended to anybody / items of the catalogue;
- ``popularity``: mean count in train of the recommended items;
- ``diversity``: mean over users of 1 - mean cosine of all pairs of the list, by item vectors that
  do not depend on the model: made from the features of the items, or, where items have none, from
  the users who took them in train.

Source: Ziegler et al. 2005, doi:10.1145/1060745.1060754 (intra-list similarity).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distrec.batch import ItemBatch
from distrec.columns import FIRST_INDEX
from distrec.metrics.names import BEYOND_ACCURACY, metric_names

EXACT_WIDTH = 256
"""Up to this many feature values, item vectors are exact; beyond, they are count sketches."""
_VECTOR_BYTES = 1 << 30
_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)


class BeyondAccuracy:
    """Accumulates what was recommended.

    Args:
        ks: Cut-offs, ascending.
        num_items: Rows of the item matrix.
        item_counts: int64, (num_items - FIRST_INDEX,): events in train.
        item_vectors: float32, (num_items - FIRST_INDEX, F), rows of length one or zero; None leaves
            diversity out.
    """

    def __init__(
        self, ks: Sequence[int], num_items: int, item_counts: Tensor, item_vectors: Tensor | None
    ) -> None:
        self.ks = tuple(ks)
        self.num_items = num_items
        self._item_counts = item_counts.double()
        self._vectors = None if item_vectors is None else item_vectors.cpu().float()
        # times recommended, by K and item
        self._shown = torch.zeros(len(self.ks), num_items).double()
        # by K: sum of diversities, lists of two items and more
        self._diversity = torch.zeros(2, len(self.ks)).double()

    def update(self, lists: Tensor) -> None:
        """Add lists of item indexes, int64, (B, max(ks)), padded with 0."""
        start = 0
        counts = torch.zeros(self.num_items).double()
        for row, k in enumerate(self.ks):
            shown = lists[:, start:k].flatten()
            counts += torch.bincount(shown, minlength=self.num_items)
            self._shown[row] += counts
            start = k
        if self._vectors is not None:
            self._add_diversity(lists, self._vectors)

    def _add_diversity(self, lists: Tensor, vectors: Tensor) -> None:
        # the sum over all ordered pairs of x.y is |sum of x|^2 - sum of |x|^2
        is_item = lists >= FIRST_INDEX
        listed = vectors[(lists - FIRST_INDEX).clamp(min=0)] * is_item.unsqueeze(2)
        start = 0
        total = listed.new_zeros(len(lists), vectors.shape[1])
        own = listed.new_zeros(len(lists))
        for column, k in enumerate(self.ks):
            part = listed[:, start:k]
            total = total + part.sum(1)
            own = own + part.square().sum((1, 2))
            size = is_item[:, :k].sum(1).double()
            pairs = size * (size - 1.0)
            mean = (total.square().sum(1) - own).double() / pairs.clamp(min=1.0)
            self._diversity[0, column] += (1.0 - mean)[pairs > 0].sum()
            self._diversity[1, column] += (pairs > 0).sum()
            start = k

    def state_vector(self) -> Tensor:
        """Everything accumulated, float64, 1-D, additive."""
        return torch.cat([self._diversity.flatten(), self._shown.flatten()])

    def load_state_vector(self, state: Tensor) -> None:
        """Replace what was accumulated."""
        size = self._diversity.numel()
        self._diversity = state[:size].reshape(self._diversity.shape).clone()
        self._shown = state[size:].reshape(self._shown.shape).clone()

    def compute(self) -> dict[str, float]:
        """By name: ``coverage@10``, ``popularity@10``, and ``diversity@10`` with item vectors."""
        shown = self._shown[:, FIRST_INDEX:]
        coverage = (shown > 0).double().mean(1) if shown.shape[1] else shown.sum(1)
        popularity = (shown @ self._item_counts) / shown.sum(1).clamp(min=1.0)
        rows = [coverage, popularity]
        if self._vectors is not None:
            rows.append(self._diversity[0] / self._diversity[1].clamp(min=1.0))
        names = metric_names(self.ks, BEYOND_ACCURACY[: len(rows)])
        return dict(zip(names, torch.cat(rows).tolist(), strict=True))


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
    rows, keys, weights = [], [], []
    base = 0
    for name in sorted(items.ids):
        bags = items.ids[name]
        is_value = bags.values >= FIRST_INDEX
        row = bags.bag_of_value[is_value]
        size = torch.bincount(row, minlength=num_items).float()
        rows.append(row)
        keys.append(bags.values[is_value] + base)
        weights.append(size[row].rsqrt())
        base += int(bags.values.max()) + 1 if len(bags.values) else 0
    if items.dense.shape[1]:
        dense = torch.nn.functional.normalize(items.dense.float(), dim=1)
        row, column = dense.nonzero(as_tuple=True)
        rows.append(row)
        keys.append(column + base)
        weights.append(dense[row, column])
        base += dense.shape[1]
    if not rows:
        return None
    return sketch(num_items, torch.cat(rows), torch.cat(keys), torch.cat(weights), base)


def sketch(num_rows: int, rows: Tensor, keys: Tensor, weights: Tensor, num_keys: int) -> Tensor:
    """Rows of a sparse matrix as short dense vectors of length one.

    With few keys each has its own column and cosines are exact. With many, a key has a column and
    a sign drawn by hashing: inner products are then right on average.

    Args:
        num_rows: M.
        rows: int64, (nnz,).
        keys: int64, (nnz,), in [0, num_keys).
        weights: float32, (nnz,).
        num_keys: Columns of the sparse matrix.

    Returns:
        float32, (M, F), F <= EXACT_WIDTH.

    Source: Charikar, Chen and Farach-Colton 2002, doi:10.1007/3-540-45465-9_59 (count sketch).
    """
    width = min(num_keys, EXACT_WIDTH, max(16, _VECTOR_BYTES // (4 * max(num_rows, 1))))
    if width < num_keys:
        hashed = (keys + 1) * _MULTIPLIER
        hashed = (hashed ^ (hashed >> 32)) * _MULTIPLIER
        weights = torch.where(hashed < 0, -weights, weights)
        keys = ((hashed >> 20) & 0x7FFFFFFF) % width
    cells = torch.zeros(num_rows * width)
    cells.index_add_(0, rows * width + keys, weights)
    return torch.nn.functional.normalize(cells.view(num_rows, width), dim=1)
