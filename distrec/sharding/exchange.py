"""What ranks send each other for a look-up: rows come on the way forward, gradients go back.

Forward: one alltoall of row numbers for all widths, which may be under way long before, then one of
rows a width. Backward: one of row gradients a width to the owners, whose fused optimizer then sees
the sum over all ranks; one allreduce a width for replicated tables; and for the hot rows of a width
an allreduce of all of them or an allgather of those that were used, whichever sends fewer bytes.
All are under way at the same time. Each rank makes every call, in a look-up without ids too.

Source: Mudigere et al. 2022, "Software-hardware co-design for fast and scalable training of deep
learning recommendation models", arXiv:2104.05158, section 4.2.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor

from distrec.errors import DataError
from distrec.sharding import wire
from distrec.sharding.collectives import Collectives, Exchanged
from distrec.sharding.kernels import FusedTable
from distrec.sharding.plan import TablePlan
from distrec.sharding.routing import BadId, Layout, Route
from distrec.sharding.wire import Precision

# table + 1 (0: no bad id), id, position, example
_NUM_FLAGS = 4


@dataclass(frozen=True)
class Questions:
    """What all ranks have asked of this one.

    Args:
        rows: For each spread group the rows asked for, asking rank by asking rank: int64.
        counts: For each spread group how many each rank asks for.
        hot_counts: For each hot group how many rows each rank uses, all ranks together.
    """

    rows: list[Tensor]
    counts: list[list[int]]
    hot_counts: list[int]


@dataclass(frozen=True)
class Asked:
    """A look-up whose questions are on their way.

    Args:
        route: Of this rank.
        wait: Gives the questions; raises DataError on every rank where any rank has a bad id.
        fetch: Gives the rows, where those are on their way too.
    """

    route: Route
    wait: Callable[[], Questions]
    fetch: Callable[[], Fetched] | None = None


Update = Callable[[], tuple[Tensor | None, Tensor]]


@dataclass(frozen=True)
class Fetched:
    """Rows of one look-up.

    Args:
        rows: For each group the distinct rows of this rank: float32, (U_g, D_g).
        answers: For each spread group what its owner looked up; their backward pass updates it.
            None for rows that were fetched ahead.
    """

    rows: list[Tensor]
    answers: list[Tensor | None]


@dataclass
class Exchange:
    """What a look-up works on.

    Args:
        layout: Where the tables lie.
        kernels: The physical table of each group.
        collectives: The ranks.
        precision: Of rows and row gradients on their way.
        sent_bytes: Bytes that this rank has sent to others by alltoall and allgather, and handed to
            allreduce.
    """

    layout: Layout
    kernels: Sequence[FusedTable]
    collectives: Collectives
    precision: Precision = "fp32"
    sent_bytes: int = 0

    def alltoall(self, tensor: Tensor, counts: Sequence[int], name: str) -> Callable[[], Exchanged]:
        """Start one, and count its bytes."""
        row_bytes = tensor.element_size() * (tensor.numel() // max(len(tensor), 1))
        own = counts[self.collectives.world.rank]
        self.sent_bytes += (len(tensor) - own) * row_bytes
        return self.collectives.start_alltoall(tensor, counts, name)

    def allreduce(self, tensor: Tensor, name: str) -> Callable[[], Tensor]:
        """Start one that may overwrite the tensor, and count what is handed to it."""
        self.sent_bytes += tensor.numel() * tensor.element_size()
        return self.collectives.start_allreduce(tensor, name, in_place=True)

    def ask(self, route: Route, name: str) -> Asked:
        """Tell every owner the rows that this rank needs; returns at once.

        Args:
            route: Of this rank.
            name: Of the exchange, other than those of look-ups that are under way.
        """
        flags = [0] * _NUM_FLAGS
        if route.bad_id is not None:
            flags = list(astuple(route.bad_id))
            flags[0] += 1
        hot_counts = [route.counts[group][0] for group in self.layout.hot]
        starts = dict.fromkeys(self.layout.spread, 0)
        parts, sizes = [], []
        for owner in range(self.collectives.world.world_size):
            counts = [route.counts[group][owner] for group in self.layout.spread]
            # a wrong id may be any number: the header is int64, cut into words of id_dtype
            header = torch.tensor([*flags, *counts, *hot_counts], device=self.collectives.device)
            parts.append(header.view(self.layout.id_dtype))
            for group, count in zip(self.layout.spread, counts, strict=True):
                rows = route.rows[group][starts[group] : starts[group] + count]
                parts.append(rows.to(self.layout.id_dtype))
                starts[group] += count
            sizes.append(len(parts[-1 - len(counts)]) + sum(counts))
        wait = self.alltoall(torch.cat(parts), sizes, name)
        return Asked(route, lambda: self._read_questions(*wait()))

    def _read_questions(self, received: Tensor, lengths: list[int]) -> Questions:
        num_spread, num_hot = len(self.layout.spread), len(self.layout.hot)
        words = torch.int64.itemsize // self.layout.id_dtype.itemsize
        length = words * (_NUM_FLAGS + num_spread + num_hot)
        rows: list[list[Tensor]] = [[] for _ in range(num_spread)]
        counts: list[list[int]] = [[] for _ in range(num_spread)]
        hot_counts = [0] * num_hot
        for rank, part in enumerate(received.split(lengths)):
            # a copy: the view needs words at even places
            header = part[:length].clone().view(torch.int64).tolist()
            if header[0]:
                bad_id = BadId(header[0] - 1, *header[1:_NUM_FLAGS])
                raise DataError(_bad_id_message(bad_id, self._plan(bad_id.table), rank))
            asked = part[length:].split(header[_NUM_FLAGS : _NUM_FLAGS + num_spread])
            for group, numbers in enumerate(asked):
                rows[group].append(numbers)
                counts[group].append(len(numbers))
            hot_counts = [
                count + more
                for count, more in zip(hot_counts, header[_NUM_FLAGS + num_spread :], strict=True)
            ]
        return Questions(
            [torch.cat(numbers).to(torch.int64) for numbers in rows], counts, hot_counts
        )

    def _plan(self, number: int) -> TablePlan:
        plans = (place.plan for place in self.layout.places.values() if place.number == number)
        return next(plans)

    def fetch_ahead(self, asked: Asked) -> Asked:
        """Wait for the questions and send the rows as they are now; returns then."""
        questions = asked.wait()
        fetch = self.fetch(asked.route, questions, trains=False, suffix=" of the next look-up")
        return replace(asked, wait=lambda: questions, fetch=fetch)

    def fetch(
        self, route: Route, questions: Questions, trains: bool, suffix: str = ""
    ) -> Callable[[], Fetched]:
        """Look up and send the rows of every group.

        Args:
            route: Of this rank.
            questions: Of all ranks.
            trains: Whether a backward pass through what this rank answered is to update it.
            suffix: Of the exchanges' names, other than that of a look-up that is under way.
        """
        groups = self.layout.groups
        fetched: dict[int, Tensor] = {}
        answers: list[Tensor] = []
        waits = {}
        for number, rows, counts in zip(
            self.layout.spread, questions.rows, questions.counts, strict=True
        ):
            with torch.set_grad_enabled(trains):
                answers.append(self.kernels[number].lookup(rows))
            packed = wire.pack_rows(answers[-1].detach(), self.precision)
            name = f"rows of width {groups[number].embedding_dim}{suffix}"
            waits[number] = self.alltoall(packed, counts, name)
        with torch.no_grad():
            for number, group in enumerate(groups):
                if group.kind != "spread":
                    fetched[number] = self.kernels[number].lookup(route.rows[number])

        def wait_all() -> Fetched:
            for number, wait in waits.items():
                fetched[number] = wire.unpack_rows(wait()[0])
            rows = [fetched[number] for number in range(len(groups))]
            return Fetched(rows, [*answers] if trains else [None] * len(answers))

        return wait_all

    def send_gradient(self, number: int, gradient: Tensor, route: Route, hot_count: int) -> Update:
        """Start bringing a group's gradient, (U_g, D), to all who keep its rows.

        Args:
            number: Of the group.
            gradient: Of the distinct rows of this rank, in their order.
            route: Of the look-up.
            hot_count: Of a hot group: rows that each rank uses, all ranks together.

        Returns:
            Waits, and gives the sum over ranks: for a spread group the gradients of the rows that
            were asked of this rank, in their order; else row numbers (None: all) and gradients.
        """
        group = self.layout.groups[number]
        width, rows = group.embedding_dim, route.rows[number]
        if group.kind == "spread":
            packed = wire.pack_gradients(gradient, self.precision)
            spread = self.alltoall(packed, route.counts[number], f"row gradients of width {width}")
            return lambda: (None, wire.unpack_gradients(spread()[0], self.precision))
        if group.kind == "hot" and not hot_count:
            return lambda: (rows, gradient)
        if group.kind == "hot" and self.gathers(number, hot_count):
            return self._gather_hot(number, gradient, rows)
        dense = gradient.new_zeros(group.num_rows, width)
        dense[rows] = gradient
        reduced = self.allreduce(dense, f"gradients of {group.kind} tables of width {width}")
        return lambda: (None, reduced())

    def gathers(self, number: int, hot_count: int) -> bool:
        """Whether sending the hot rows that were used takes fewer bytes than summing all of them.

        All ranks together, an allreduce sends every number 2 (N - 1) times, an allgather each used
        row N - 1 times.
        """
        group = self.layout.groups[number]
        row_bytes = self.layout.id_dtype.itemsize
        row_bytes += wire.gradient_bytes(group.embedding_dim, self.precision)
        return hot_count * row_bytes < 2 * group.num_rows * group.embedding_dim * 4

    def _gather_hot(self, number: int, gradient: Tensor, rows: Tensor) -> Update:
        group, id_dtype = self.layout.groups[number], self.layout.id_dtype
        packed = wire.pack_numbered(rows.to(id_dtype), gradient, self.precision)
        others = self.collectives.world.world_size - 1
        self.sent_bytes += packed.numel() * packed.element_size() * others
        name = f"gradients of hot rows of width {group.embedding_dim}"
        gathered = self.collectives.start_allgather(packed, name)

        def wait() -> tuple[Tensor, Tensor]:
            row_ids, gradients = wire.unpack_numbered(gathered(), id_dtype, self.precision)
            distinct, places = torch.unique(row_ids, return_inverse=True)
            total = gradients.new_zeros(len(distinct), group.embedding_dim)
            # rank by rank, in which a row stands once: every rank, on any device, adds in one order
            starts = [0, *(1 + (row_ids.diff() <= 0).nonzero().flatten()).tolist(), len(row_ids)]
            for start, stop in itertools.pairwise(starts):
                total[places[start:stop]] += gradients[start:stop]
            return distinct, total

        return wait


def _bad_id_message(bad_id: BadId, plan: TablePlan, rank: int) -> str:
    return (
        f"ids of table {plan.name!r} lie in [0, {plan.num_ids}). Received: id {bad_id.id} "
        f"at position {bad_id.position} (example {bad_id.example} of the batch) on rank {rank}. "
        "The tables and the data have different vocabularies: run prepare again, and train from "
        "the start."
    )
