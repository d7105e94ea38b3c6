"""What a recommender shows, right or wrong: coverage, popularity and diversity of its lists.

- ``coverage``: distinct items recommended to anybody / items of the catalogue;
- ``popularity``: mean count in train of the recommended items;
- ``diversity``: mean over users of 1 - mean cosine of all pairs of the list, by item vectors that
  do not depend on the model (``metrics.item_vectors``). Lists of one item are left out.

Source: Ziegler et al. 2005, doi:10.1145/1060745.1060754 (intra-list similarity).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distrec.columns import FIRST_INDEX
from distrec.metrics.names import BEYOND_ACCURACY, metric_names


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
        # free indexes have a count below zero, and are no items
        self._is_item = item_counts >= 0
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
        items = shown[:, self._is_item]
        coverage = (items > 0).double().mean(1) if items.shape[1] else items.sum(1)
        popularity = (shown @ self._item_counts) / shown.sum(1).clamp(min=1.0)
        rows = [coverage, popularity]
        if self._vectors is not None:
            rows.append(self._diversity[0] / self._diversity[1].clamp(min=1.0))
        names = metric_names(self.ks, BEYOND_ACCURACY[: len(rows)])
        return dict(zip(names, torch.cat(rows).tolist(), strict=True))
