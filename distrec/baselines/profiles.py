"""What the users of queries have had, as a sparse matrix."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from torch import Tensor

from distrec.batch import QueryBatch
from distrec.columns import FIRST_INDEX
from distrec.metrics.evaluation import rows_per_block
from distrec.metrics.item_neighbors import binary


def profiles(queries: QueryBatch, num_items: int, use_history: bool) -> sparse.csr_matrix:
    """What the users of the queries have had: float32 zeros and ones, (B, M).

    Args:
        queries: B users.
        num_items: M.
        use_history: From the history (the last L positives) rather than from seen, which holds
            negatives too where the data has labels.
    """
    bags = queries.batch.history if use_history else queries.seen
    bags = bags.to(torch.device("cpu"))
    known = bags.values >= FIRST_INDEX
    return binary(
        bags.bag_of_value[known].numpy(),
        (bags.values[known] - FIRST_INDEX).numpy(),
        (bags.batch_size, num_items),
    )


def products(
    left: sparse.csr_matrix, right: sparse.csr_matrix | npt.NDArray[np.float32]
) -> Iterator[Tensor]:
    """left @ right, dense, in blocks of rows.

    Args:
        left: (B, K).
        right: (K, M), sparse or dense.

    Yields:
        float32, (b, M).
    """
    rows = rows_per_block(right.shape[1])
    for start in range(0, left.shape[0], rows):
        block = left[start : start + rows] @ right
        yield torch.from_numpy(block.toarray() if sparse.issparse(block) else block)
