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
from distrec.sharding.compression import Composition

Pooling = Literal["none", "sum", "mean"]


@dataclass(frozen=True)
class Request:
    """Rows of one table, one bag an example.

    Args:
        table: Name of the table.
        ids: B bags of ids in [0, num_ids) of the table, int64. Id 0 is padding: a row of zeros
            that is never trained.
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


@dataclass(frozen=True)
class Gather:
    """Which of some distinct rows each of many ids finds.

    Args:
        places: int64, (nnz,): row of each id.
        order: int64, (m,): positions in `places` in the order of their rows. Positions may be left
            out: their rows get no gradient from them.
        starts: int64, (U + 1,): where each row's positions start in `order`, and the end.
    """

    places: Tensor
    order: Tensor
    starts: Tensor

    @classmethod
    def of(cls, places: Tensor, num_rows: int) -> Gather:
        """Of ids whose rows are known."""
        ascending, order = torch.sort(places, stable=True)
        starts = torch.searchsorted(ascending, torch.arange(num_rows + 1, device=places.device))
        return cls(places, order, starts)


def gather_and_pool(
    rows: Tensor,
    places: Tensor,
    ids: Jagged,
    pooling: Pooling,
    composition: Composition | None = None,
) -> Tensor:
    """As `pool(rows[places], ids, pooling)`, without writing rows[places] down.

    Args:
        rows: float32, (U, D): distinct rows.
        places: int64, (nnz * K,): which of them are those of each of `ids.values`.
        ids: The bags.
        pooling: As in `Request`.
        composition: How K rows make up an id's vector; None: K is 1.
    """
    gather = Gather.of(places, len(rows))
    return gather_and_pool_all(rows, gather, [ids], [pooling], [composition])[0]


def gather_and_pool_all(
    rows: Tensor,
    gather: Gather,
    ids: Sequence[Jagged],
    poolings: Sequence[Pooling],
    compositions: Sequence[Composition | None],
) -> list[Tensor]:
    """As `gather_and_pool` for every k of the lists, in one kernel each way.

    One by one, each would make a gradient of the size of `rows`.

    Args:
        rows: float32, (U, D): distinct rows.
        gather: For `ids[k].values`, one k after the other, their rows, K each.
        ids: The bags.
        poolings: As in `Request`.
        compositions: As in `gather_and_pool`.
    """
    lengths = [
        _num_rows(bags, pooling, composition)
        for bags, pooling, composition in zip(ids, poolings, compositions, strict=True)
    ]
    all_lengths = torch.cat(lengths)
    offsets = torch.zeros(len(all_lengths) + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(all_lengths, 0, out=offsets[1:])
    pooled = _SumBags.apply(rows, gather, offsets)
    results = []
    parts = pooled.split([len(part) for part in lengths])
    for part, bags, pooling, composition in zip(parts, ids, poolings, compositions, strict=True):
        if _is_product(composition):
            quotients, remainders = part.unflatten(0, (-1, 2)).unbind(1)
            results.append(pool(quotients * (1 + remainders), bags, pooling))
        else:
            results.append(part / _counts(bags) if pooling == "mean" else part)
    return results


def _is_product(composition: Composition | None) -> bool:
    return composition is not None and composition.operation == "product"


def _num_rows(ids: Jagged, pooling: Pooling, composition: Composition | None) -> Tensor:
    """How many rows make up each sum: a bag's, an id's, or one where rows are multiplied first."""
    rows_per_id = 1 if composition is None else composition.rows_per_id
    if _is_product(composition):
        return ids.values.new_ones(len(ids.values) * rows_per_id)
    if pooling == "none":
        # a sum of its own for every id: faster both ways than index_select
        return ids.values.new_full((len(ids.values),), rows_per_id)
    return ids.lengths * rows_per_id


class _SumBags(torch.autograd.Function):
    """Sum rows by bag; the gradient is the same sum over the transposed bags.

    On CPU that is several times as fast as embedding_bag's own gradient, which has no vectorised
    kernel; and its order of summation is fixed.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gather: Gather, offsets: Tensor) -> Tensor:
        """rows (U, D), and bags of ids that gather them, to (B, D)."""
        ctx.gather, ctx.offsets = gather, offsets
        return _sum_bags(rows, gather.places, offsets)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """gradient (B, D) to (U, D): a row's is the sum over the bags that it is in."""
        bags = Jagged(ctx.gather.places, ctx.offsets).bag_of_value[ctx.gather.order]
        return _sum_bags(gradient.contiguous(), bags, ctx.gather.starts), None, None


def _sum_bags(rows: Tensor, places: Tensor, offsets: Tensor) -> Tensor:
    return functional.embedding_bag(places, rows, offsets, mode="sum", include_last_offset=True)


def _counts(ids: Jagged) -> Tensor:
    """Ids of each bag that are not padding, at least 1: float32, (B, 1)."""
    before = torch.zeros(len(ids.values) + 1, dtype=torch.int64, device=ids.values.device)
    torch.cumsum(ids.values != PADDING_INDEX, 0, out=before[1:])
    counts = before[ids.offsets[1:]] - before[ids.offsets[:-1]]
    return counts.clamp_(min=1).to(torch.float32).unsqueeze(1)
