"""The K best items of each user, with ties broken the same way everywhere.

``torch.topk`` leaves open which of several equal scores it takes. Here the item with the smaller
index, which is the more popular one, goes first, so that the result depends neither on the device
nor on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distrec.errors import DataError


def top_k(scores: Tensor, k: int) -> Tensor:
    """Columns of the k highest scores of each row, best first, ties by ascending column.

    Args:
        scores: float, (B, M); -inf marks what may not be taken.
        k: Number of columns, >= 1.

    Returns:
        int64, (B, k); -1 where fewer than k columns may be taken.

    Raises:
        DataError: A score is NaN.

    Example:
        >>> top_k(torch.tensor([[1.0, 3.0, 3.0, float("-inf")]]), 4).tolist()
        [[1, 2, 0, -1]]
    """
    num_rows, num_columns = scores.shape
    taken = min(k, num_columns)
    result = scores.new_full((num_rows, k), -1, dtype=torch.int64)
    if num_rows == 0 or taken == 0:
        return result
    # one more than is asked for: equal to the k-th, it shows that the choice was arbitrary
    values, chosen = torch.topk(scores, min(k + 1, num_columns), dim=1)
    # topk takes NaN for the highest of all
    if bool(values[:, 0].isnan().any()):
        row = int(values[:, 0].isnan().nonzero()[0, 0])
        raise DataError(
            f"a score is a number. Received: NaN (row {row} of a batch of {num_rows}). The model "
            "or a feature is not finite: use an earlier checkpoint, or train with a lower rate."
        )
    chosen = chosen[:, :taken].sort(dim=1).values
    if num_columns > taken:
        last, next_one = values[:, taken - 1], values[:, taken]
        tied = ((last == next_one) & ~last.isneginf()).nonzero()[:, 0]
        if len(tied):
            chosen[tied] = _first_of_ties(scores[tied], last[tied, None], taken)
    picked = scores.gather(1, chosen)
    # stable, and the columns ascend: equal scores stay in order of column
    order = torch.sort(picked, dim=1, descending=True, stable=True)
    columns = chosen.gather(1, order.indices)
    result[:, :taken] = torch.where(order.values.isneginf(), -1, columns)
    return result


def _first_of_ties(scores: Tensor, threshold: Tensor, k: int) -> Tensor:
    """All columns above the threshold (B, 1) and the first of those equal to it: (B, k) ascending.

    The threshold is the k-th highest score, so there are at least k such columns.
    """
    above = scores > threshold
    equal = scores == threshold
    room = k - above.sum(dim=1, keepdim=True)
    keep = above | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= room))
    return keep.nonzero()[:, 1].view(-1, k)
