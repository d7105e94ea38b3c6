"""What a look-up is: bags of ids of named tables in, pooled rows out.

Whoever holds the rows is a `Lookup`: sharded tables while training, a memory map while scoring. All
pool with the functions here, so that a model cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
    places = torch.arange(len(rows), device=rows.device)
    return gather_and_pool(rows, places, ids, pooling)


def gather_and_pool(rows: Tensor, places: Tensor, ids: Jagged, pooling: Pooling) -> Tensor:
    """As `pool(rows[places], ids, pooling)`, without writing rows[places] down.

    Args:
        rows: float32, (U, D): distinct rows.
        places: int64, (nnz,): which of them each of `ids.values` is.
        ids: The bags.
        pooling: As in `Request`.
    """
    return gather_and_pool_all(rows, [places], [ids], [pooling])[0]


def gather_and_pool_all(
    rows: Tensor, places: Sequence[Tensor], ids: Sequence[Jagged], poolings: Sequence[Pooling]
) -> list[Tensor]:
    """As `gather_and_pool` for every k of the lists, in one kernel each way.

    One by one, each would make a gradient of the size of `rows`.

    Args:
        rows: float32, (U, D): distinct rows.
        places: int64, (nnz,) each: which of the rows each of `ids[k].values` is.
        ids: The bags.
        poolings: As in `Request`.
    """
    # without pooling, every id is a bag of its own: faster both ways than index_select
    lengths = [
        torch.ones_like(index) if pooling == "none" else bags.lengths
        for index, bags, pooling in zip(places, ids, poolings, strict=True)
    ]
    bags = Jagged.from_lengths(torch.cat(list(places)), torch.cat(lengths))
    pooled = _SumBags.apply(rows, bags)
    results = []
    parts = pooled.split([len(part) for part in lengths])
    for part, bags, pooling in zip(parts, ids, poolings, strict=True):
        results.append(part / _counts(bags) if pooling == "mean" else part)
    return results


class _SumBags(torch.autograd.Function):
    """Sum rows by bag; the gradient is the same sum over the transposed bags.

    On CPU that is several times as fast as embedding_bag's own gradient, which has no vectorised
    kernel; and its order of summation is fixed.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, bags: Jagged) -> Tensor:
        """rows (U, D), and bags of places in it, to (B, D)."""
        ctx.bags, ctx.num_rows = bags, len(rows)
        return _sum_bags(rows, bags)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """gradient (B, D) to (U, D): a row's is the sum over the bags that it is in."""
        bags = ctx.bags
        places, order = torch.sort(bags.values, stable=True)
        counts = torch.bincount(places, minlength=ctx.num_rows)
        transposed = Jagged.from_lengths(bags.bag_of_value[order], counts)
        return _sum_bags(gradient.contiguous(), transposed), None


def _sum_bags(rows: Tensor, bags: Jagged) -> Tensor:
    return functional.embedding_bag(
        bags.values, rows, bags.offsets, mode="sum", include_last_offset=True
    )


def _counts(ids: Jagged) -> Tensor:
    """Ids of each bag that are not padding, at least 1: float32, (B, 1)."""
    before = torch.zeros(len(ids.values) + 1, dtype=torch.int64, device=ids.values.device)
    torch.cumsum(ids.values != PADDING_INDEX, 0, out=before[1:])
    counts = before[ids.offsets[1:]] - before[ids.offsets[:-1]]
    return counts.clamp_(min=1).to(torch.float32).unsqueeze(1)
