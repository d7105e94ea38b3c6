"""The best items of each user over a catalogue that is scored block by block.

The rule is that of `metrics.top_k`: best score first, equal scores by ascending item, so that
neither the size of the blocks nor their number shows in the result.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distrec.batch import Jagged
from distrec.columns import FIRST_INDEX
from distrec.errors import DataError
from distrec.metrics.top_k import top_k


class RunningTopK:
    """The k best columns of each row of a matrix that comes in blocks of columns, left to right.

    Attributes:
        scores: float32, (B, k), best first; -inf where there are fewer than k columns.
        columns: int64, (B, k), of the whole matrix; -1 where there are fewer.
    """

    def __init__(self, num_rows: int, k: int) -> None:
        self.k = k
        self.scores = torch.full((num_rows, k), -torch.inf)
        self.columns = torch.full((num_rows, k), -1, dtype=torch.int64)

    def add(self, block: Tensor, start: int) -> None:
        """Merge the columns start, start + 1, ... of the matrix.

        Args:
            block: float32, (B, m); -inf marks what may not be taken.
            start: The column that block[:, 0] is; not below any column that came before.

        Raises:
            DataError: A score is NaN.
        """
        scores, columns = _pick(block, top_k(block, min(self.k, block.shape[1])))
        columns = torch.where(columns < 0, columns, columns + start)
        if start == 0 and block.shape[1] >= self.k:
            self.scores, self.columns = scores, columns
            return
        # earlier columns stand first and each part is ordered by the rule, so among equal scores
        # the place in the concatenation ascends with the column
        merged_scores = torch.cat([self.scores, scores], dim=1)
        merged_columns = torch.cat([self.columns, columns], dim=1)
        self.scores, places = _pick(merged_scores, top_k(merged_scores, self.k))
        self.columns = _take(merged_columns, places, -1)


def _pick(scores: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The scores at the columns, -inf at column -1; and the columns."""
    return _take(scores, columns, -torch.inf), columns


def _take(values: Tensor, columns: Tensor, missing: float) -> Tensor:
    taken = values.gather(1, columns.clamp(min=0))
    return taken.masked_fill(columns < 0, missing)


class BlockMask:
    """What may not be recommended to each user, cut into the blocks of the catalogue.

    Args:
        seen: Item indexes, B bags, in any order; padding and unknown are passed over.
        num_columns: Items of the catalogue; the item of column j has index j + FIRST_INDEX.

    Raises:
        DataError: An index lies outside the catalogue.
    """

    def __init__(self, seen: Jagged, num_columns: int) -> None:
        columns = seen.values - FIRST_INDEX
        if len(columns) and int(columns.max()) >= num_columns:
            raise DataError(
                f"a seen item index lies in [0, {num_columns + FIRST_INDEX}). Received: "
                f"{int(seen.values.max())}. The users and the item matrix are not of one dataset: "
                "run prepare and train again."
            )
        known = columns >= 0
        order = torch.argsort(columns[known])
        self._columns = columns[known][order]
        self._rows = seen.bag_of_value[known][order]

    def apply(self, block: Tensor, start: int) -> None:
        """Set the seen items among columns start, start + 1, ... to -inf, in place."""
        bounds = torch.tensor([start, start + block.shape[1]])
        first, last = torch.searchsorted(self._columns, bounds).tolist()
        if first < last:
            block[self._rows[first:last], self._columns[first:last] - start] = -torch.inf


def blocks(num_columns: int, block: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive blocks.

    Example:
        >>> list(blocks(5, 2))
        [(0, 2), (2, 4), (4, 5)]
    """
    for start in range(0, num_columns, block):
        yield start, min(start + block, num_columns)


def blocked_top_k(
    users: Tensor,
    items: Tensor,
    k: int,
    block: int,
    seen: Jagged | None,
    blocked: Tensor | None,
) -> RunningTopK:
    """The k best items of each user by inner product, holding one block of scores at a time.

    Args:
        users: float32, (B, W).
        items: float32, (M, W); may be memory-mapped.
        k: Items a user.
        block: Columns of one matrix product.
        seen: Item indexes to leave out, B bags; None leaves nothing out.
        blocked: bool, (M,): items that nobody gets.

    Returns:
        Scores and columns (item index - FIRST_INDEX), (B, k).

    Raises:
        DataError: A score is NaN, or `seen` holds an index outside the catalogue.
    """
    num_users, num_items = len(users), len(items)
    mask = BlockMask(seen, num_items) if seen is not None else None
    best = RunningTopK(num_users, k)
    # one buffer for all blocks: fresh pages for each would cost as much as the product
    buffer = torch.empty(num_users * min(block, num_items))
    for start, stop in blocks(num_items, block):
        scores = buffer[: num_users * (stop - start)].view(num_users, stop - start)
        torch.mm(users, items[start:stop].T, out=scores)
        if mask is not None:
            mask.apply(scores, start)
        if blocked is not None:
            scores.masked_fill_(blocked[start:stop], -torch.inf)
        best.add(scores, start)
    return best
