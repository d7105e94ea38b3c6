"""What a look-up is: bags of ids of named tables in, pooled rows out.

Whoever holds the rows is a `Lookup`: sharded tables while training, a memory map while scoring. All
pool with the functions here, so that a model cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from distrec.batch import Jagged
from distrec.columns import PADDING_INDEX

Pooling = Literal["none", "sum", "mean"]


@dataclass(frozen=True)
class Request:
    """Rows of one table, one bag an example.

    Args:
        table: Name of the table.
        ids: B bags of row ids in [0, num_embeddings), int64. Id 0 is padding: a row of zeros that
            is never trained.
        pooling: none: every id's row, in order; sum and mean: one row a bag, padding left out.
    """

    table: str
    ids: Jagged
    pooling: Pooling


Lookup = Callable[[Mapping[str, Request]], dict[str, Tensor]]
"""Requests by key to rows by the same key: float32, (B, D), or (nnz, D) for pooling "none"."""


def pool(rows: Tensor, ids: Jagged, pooling: Pooling) -> Tensor:
    """Pool one row an id into one row a bag.

    Args:
        rows: float32, (nnz, D): the row of each of `ids.values`; zeros where it is padding.
        ids: The bags.
        pooling: As in `Request`.

    Returns:
        float32, (B, D), an empty bag gives zeros; or `rows` itself for "none". Connected to `rows`
        by autograd even when B is 0.
    """
    if pooling == "none":
        return rows
    return gather_and_pool(rows, torch.arange(len(rows), device=rows.device), ids, pooling)


def gather_and_pool(rows: Tensor, index: Tensor, ids: Jagged, pooling: Pooling) -> Tensor:
    """As `pool(rows[index], ids, pooling)`, without writing rows[index] down.

    Args:
        rows: float32, (U, D): distinct rows.
        index: int64, (nnz,): which of them each of `ids.values` is.
        ids: The bags.
        pooling: As in `Request`.
    """
    if pooling == "none":
        return rows.index_select(0, index)
    # 4 times as fast, forward and backward, as index_add of the gathered rows
    total = functional.embedding_bag(index, rows, ids.offsets, mode="sum", include_last_offset=True)
    return total / _counts(ids) if pooling == "mean" else total


def _counts(ids: Jagged) -> Tensor:
    """Ids of each bag that are not padding, at least 1: float32, (B, 1)."""
    before = torch.zeros(len(ids.values) + 1, dtype=torch.int64, device=ids.values.device)
    torch.cumsum(ids.values != PADDING_INDEX, 0, out=before[1:])
    counts = before[ids.offsets[1:]] - before[ids.offsets[:-1]]
    return counts.clamp_(min=1).to(torch.float32).unsqueeze(1)
