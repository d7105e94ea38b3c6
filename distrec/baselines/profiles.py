"""Who has had what, as sparse matrices: of the users of a dataset, and of queries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from torch import Tensor

from distrec.batch import QueryBatch
from distrec.columns import FIRST_INDEX, TRAIN
from distrec.dataset import DatasetManifest
from distrec.metrics.evaluation import rows_per_block
from distrec.metrics.events import Indexes, positive_events


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
