"""The two halves of a look-up over ranks: rows come on the way forward, gradients go back.

Forward: one alltoall of row numbers for all widths, then one of rows a width. Backward: one of row
gradients a width to the owners, whose fused optimizer then sees the sum over all ranks; and one
allreduce a width for replicated tables. All are under way at the same time. Each rank makes every
call, in a look-up without ids too.

Source: Mudigere et al. 2022, "Software-hardware co-design for fast and scalable training of deep
learning recommendation models", arXiv:2104.05158, section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from distrec.errors import DataError
from distrec.sharding.collectives import Collectives, Exchanged
from distrec.sharding.kernels import FusedTable
from distrec.sharding.plan import TablePlan
from distrec.sharding.routing import BadId, Layout, Route

# table + 1 (0: no bad id), id, position, example
_NUM_FLAGS = 4


@dataclass
class Exchange:
    """What a look-up works on.

    Args:
        layout: Where the tables lie.
        kernels: The physical table of each group.
        collectives: The ranks.
        sent_bytes: Bytes that this rank has handed to other ranks' alltoall and to allreduce.
    """

    layout: Layout
    kernels: Sequence[FusedTable]
    collectives: Collectives
    sent_bytes: int = 0

    def alltoall(self, tensor: Tensor, counts: Sequence[int], name: str) -> Callable[[], Exchanged]:
        """Start one, and count its bytes."""
        row_bytes = tensor.element_size() * (tensor.numel() // max(len(tensor), 1))
        own = counts[self.collectives.world.rank]
        self.sent_bytes += (len(tensor) - own) * row_bytes
        return self.collectives.start_alltoall(tensor, counts, name)

    def ask(self, route: Route) -> tuple[list[Tensor], list[list[int]]]:
        """Tell every owner the rows that this rank needs.

        Returns:
            For each spread group the rows asked of this rank, asking rank by asking rank, and how
            many each asks for.

        Raises:
            DataError: On every rank, when any rank has an id that is out of range.
        """
        world = self.collectives.world
        spread = range(self.layout.num_spread)
        flags = [0] * _NUM_FLAGS
        if route.bad_id is not None:
            flags = list(astuple(route.bad_id))
            flags[0] += 1
        parts, sizes = [], []
        starts = [0 for _ in spread]
        for owner in range(world.world_size):
            counts = [route.counts[group][owner] for group in spread]
            header = torch.tensor([*flags, *counts], device=self.collectives.device)
            asked = [
                route.rows[group][starts[group] : starts[group] + counts[group]] for group in spread
            ]
            starts = [start + count for start, count in zip(starts, counts, strict=True)]
            parts += [header, *asked]
            sizes.append(len(header) + sum(counts))
        received, lengths = self.alltoall(torch.cat(parts), sizes, "row numbers of a look-up")()
        return self._read_questions(received, lengths)

    def _read_questions(
        self, received: Tensor, lengths: list[int]
    ) -> tuple[list[Tensor], list[list[int]]]:
        num_groups = self.layout.num_spread
        rows: list[list[Tensor]] = [[] for _ in range(num_groups)]
        counts: list[list[int]] = [[] for _ in range(num_groups)]
        for rank, part in enumerate(received.split(lengths)):
            header = part[: _NUM_FLAGS + num_groups].tolist()
            if header[0]:
                bad_id = BadId(header[0] - 1, *header[1:_NUM_FLAGS])
                raise DataError(_bad_id_message(bad_id, self._plan(bad_id.table), rank))
            asked = part[_NUM_FLAGS + num_groups :].split(header[_NUM_FLAGS:])
            for group, numbers in enumerate(asked):
                rows[group].append(numbers)
                counts[group].append(len(numbers))
        return [torch.cat(numbers) for numbers in rows], counts

    def _plan(self, number: int) -> TablePlan:
        plans = (place.plan for place in self.layout.places.values() if place.number == number)
        return next(plans)


class FetchRows(torch.autograd.Function):
    """The distinct rows of a look-up, a row of zeros before each group's; backward updates them."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, exchange: Exchange, route: Route, trains: bool
    ) -> tuple[Tensor, ...]:
        """Rows for every group: float32, (1 + U_g, D_g).

        Args:
            ctx: Of autograd.
            anchor: Empty, requires a gradient: without it autograd would see nothing to do.
            exchange: What to work on.
            route: Which rows.
            trains: Whether a backward pass may follow.
        """
        groups, kernels = exchange.layout.groups, exchange.kernels
        asked, asked_counts = exchange.ask(route)
        answers, waits = [], []
        for number, rows in enumerate(asked):
            with torch.set_grad_enabled(trains):
                answers.append(kernels[number].lookup(rows))
            name = f"rows of width {groups[number].embedding_dim}"
            waits.append(exchange.alltoall(answers[-1].detach(), asked_counts[number], name))
        fetched = [wait()[0] for wait in waits]
        for number in range(len(asked), len(groups)):
            with torch.no_grad():
                fetched.append(kernels[number].lookup(route.rows[number]))
        ctx.exchange, ctx.route = exchange, route
        ctx.answers, ctx.asked_counts = answers, asked_counts
        return tuple(torch.cat([rows.new_zeros(1, rows.shape[1]), rows]) for rows in fetched)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None, None]:
        """Bring gradients to the owners and update; gradients are (1 + U_g, D_g)."""
        exchange, route = ctx.exchange, ctx.route
        groups = exchange.layout.groups
        waits: list[Callable[[], Any]] = []
        for number, group in enumerate(groups):
            # the row of zeros is padding: it is not trained
            gradient = gradients[number][1:]
            if group.replicated:
                dense = gradient.new_zeros(group.num_rows, group.embedding_dim)
                dense[route.rows[number]] = gradient
                exchange.sent_bytes += dense.numel() * dense.element_size()
                name = f"gradients of replicated tables of width {group.embedding_dim}"
                waits.append(exchange.collectives.start_allreduce(dense, name))
            else:
                name = f"row gradients of width {group.embedding_dim}"
                waits.append(exchange.alltoall(gradient, route.counts[number], name))
        for number, group in enumerate(groups):
            if group.replicated:
                exchange.kernels[number].update_all(waits[number]())
            else:
                received, counts = waits[number]()
                assert counts == ctx.asked_counts[number], (counts, ctx.asked_counts[number])
                ctx.answers[number].backward(received)
        return None, None, None, None


def _bad_id_message(bad_id: BadId, plan: TablePlan, rank: int) -> str:
    return (
        f"ids of table {plan.name!r} lie in [0, {plan.num_embeddings}). Received: id {bad_id.id} "
        f"at position {bad_id.position} (example {bad_id.example} of the batch) on rank {rank}. "
        "The tables and the data have different vocabularies: run prepare again, and train from "
        "the start."
    )
