"""From ids to who holds their rows: the layout of the tables and the route of one look-up; pure.

Tables of one width that lie in the same way lie one after the other in one physical table, their
group. All groups together make one space of keys, width by width, group by group and, inside a
group, owner by owner; so one sort gives the distinct rows, already in the order in which they are
sent, and those of one width side by side.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distrec.columns import PADDING_INDEX
from distrec.sharding.kernels import run_starts
from distrec.sharding.lookup import Gather, Request
from distrec.sharding.plan import TablePlan
from distrec.world import World

Kind = Literal["spread", "hot", "replicated"]
_KINDS: tuple[Kind, ...] = ("spread", "hot", "replicated")
# row numbers below this travel as int32
_INT32_ROWS = 2**31


@dataclass(frozen=True)
class Group:
    """Tables, or parts of tables, of one width that lie in the same way.

    Args:
        embedding_dim: D.
        kind: spread: each row is on one rank. hot and replicated: every rank keeps the same rows.
        num_owners: Ranks that the rows are spread over: N, or 1 when this rank has them all.
        num_rows: Rows on each owner.
        first_key: Key of the first row of the first owner.
    """

    embedding_dim: int
    kind: Kind
    num_owners: int
    num_rows: int
    first_key: int


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a table in one group.

    Args:
        group: Which.
        start: First row of the table that is in this part.
        stop: The one after the last.
        first_row: Row of the physical table where it begins, the same on every owner. Row i of the
            table is on owner i mod num_owners, at first_row + (i - start) // num_owners.
    """

    group: int
    start: int
    stop: int
    first_row: int


@dataclass(frozen=True)
class Place:
    """Where a table lies: in one part, or with a hot tier in two, the hot one first."""

    plan: TablePlan
    number: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class BadId:
    """An id outside its table, the first one that was found."""

    table: int
    id: int
    position: int
    example: int


@dataclass(frozen=True)
class Route:
    """Which rows one look-up needs from whom.

    Args:
        rows: For each group the distinct rows, by owner and then by number: int64, (U_g,).
        counts: For each group how many of them each owner holds.
        lengths: For each request how many rows its ids have; requests of one width follow one
            another.
        gathers: For each width, for each of those: 0 for padding, else 1 + the row's place among
            the `rows` of all groups of the width, one group after the other.
        bad_id: The ids were not looked at any further.
    """

    rows: list[Tensor]
    counts: list[list[int]]
    lengths: dict[str, int]
    gathers: dict[int, Gather]
    bad_id: BadId | None = None


class Layout:
    """Groups, and the place of every table in them.

    Args:
        plans: The tables.
        world: N ranks. A single one holds everything, so it has no replicas.

    Attributes:
        groups: By width, then spread, hot, replicated.
        places: By table.
        spread: Numbers of the spread groups.
        hot: Numbers of the hot groups.
        widths: Width -> numbers of its groups, which follow one another.
        id_dtype: Of row numbers on their way: int32 where those of every group fit.
        key_dtype: Of keys: int32 where all fit.
    """

    def __init__(self, plans: Sequence[TablePlan], world: World) -> None:
        self.world = world
        pieces: dict[tuple[int, int], list[tuple[str, int, int]]] = {}
        for plan in plans:
            for kind, start, stop in _pieces(plan, world.world_size):
                key = (plan.embedding_dim, _KINDS.index(kind))
                pieces.setdefault(key, []).append((plan.name, start, stop))
        self.groups: list[Group] = []
        self.widths: dict[int, list[int]] = {}
        self._paddings: list[int] = []
        parts: dict[str, list[Part]] = {plan.name: [] for plan in plans}
        first_key = 0
        for number, ((width, kind_number), members) in enumerate(sorted(pieces.items())):
            kind = _KINDS[kind_number]
            owners = world.world_size if kind == "spread" else 1
            num_rows = 0
            for name, start, stop in members:
                parts[name].append(Part(number, start, stop, num_rows))
                num_rows += -(-(stop - start) // owners)
            if width not in self.widths:
                self._paddings.append(first_key)
                first_key += 1
            self.widths.setdefault(width, []).append(number)
            self.groups.append(Group(width, kind, owners, num_rows, first_key))
            first_key += num_rows * owners
        self.places = {
            plan.name: Place(plan, number, tuple(sorted(parts[plan.name], key=lambda p: p.start)))
            for number, plan in enumerate(plans)
        }
        self.spread = [n for n, group in enumerate(self.groups) if group.kind == "spread"]
        self.hot = [n for n, group in enumerate(self.groups) if group.kind == "hot"]
        small = all(group.num_rows < _INT32_ROWS for group in self.groups)
        self.id_dtype = torch.int32 if small else torch.int64
        self.key_dtype = torch.int32 if first_key < _INT32_ROWS else torch.int64
        # group by group, where each owner's keys begin and where the last ones end
        self._bounds = torch.tensor(
            [
                group.first_key + owner * group.num_rows
                for group in self.groups
                for owner in range(group.num_owners + 1)
            ]
        )

    def route(self, requests: Mapping[str, Request], device: torch.device) -> Route:
        """The route of a look-up, on `device`, where the ids are."""
        bad_ids = map(self._find_bad_id, requests.values())
        bad_id = next((found for found in bad_ids if found is not None), None)
        if bad_id is not None:
            none = torch.empty(0, dtype=torch.int64, device=device)
            counts = [[0] * group.num_owners for group in self.groups]
            return Route([none] * len(self.groups), counts, {}, {}, bad_id)
        lengths: dict[str, int] = {}
        keys: list[Tensor] = []
        for width, padding in zip(self.widths, self._paddings, strict=True):
            # the key of padding is always there, first of its width: so place 0 is padding, and a
            # look-up without ids works
            ids = [torch.full((1,), PADDING_INDEX, device=device)]
            own = [torch.full((1,), padding, dtype=self.key_dtype, device=device)]
            for name, request in requests.items():
                if self.width(request.table) == width:
                    ids.append(self.places[request.table].plan.row_ids(request.ids.values))
                    own.append(self._keys(request.table, ids[-1]))
                    lengths[name] = len(ids[-1])
            keys.append(torch.cat(own).masked_fill_(torch.cat(ids) == PADDING_INDEX, padding))
        ascending, order = torch.sort(torch.cat(keys) if len(keys) > 1 else keys[0], stable=True)
        starts = run_starts(ascending)
        distinct = ascending[starts[:-1]].to(torch.int64)
        bounds = torch.searchsorted(distinct, self._bounds.to(device)).tolist()
        rows, counts, firsts = [], [], []
        for group in self.groups:
            ends = bounds[: group.num_owners + 1]
            bounds = bounds[group.num_owners + 1 :]
            firsts.append(ends[0])
            row_ids = distinct[ends[0] : ends[-1]] - group.first_key
            rows.append(row_ids % group.num_rows if group.num_owners > 1 else row_ids)
            counts.append([stop - start for start, stop in itertools.pairwise(ends)])
        gathers = {}
        begins = [firsts[numbers[0]] - 1 for numbers in self.widths.values()]
        begin = 0
        for width, own_keys, first, last in zip(
            self.widths, keys, begins, [*begins[1:], len(distinct)], strict=True
        ):
            end = begin + len(own_keys)
            gathers[width] = _gather(order[begin:end] - begin, starts[first : last + 1] - begin)
            begin = end
        return Route(rows, counts, lengths, gathers)

    def width(self, table: str) -> int:
        """D of a table."""
        return self.places[table].plan.embedding_dim

    def local_index(self, part: Part, row_ids: Tensor) -> Tensor:
        """Rows of this rank's physical table at which rows of a part lie."""
        return part.first_row + (row_ids - part.start) // self.groups[part.group].num_owners

    def held_parts(self, table: str) -> list[tuple[range, Part, slice]]:
        """What this rank holds of a table: row ids, ascending, the part, and where they lie."""
        place, world = self.places[table], self.world
        held = place.plan.held_rows(world.rank, world.world_size)
        return [
            (ids, part, slice(part.first_row, part.first_row + len(ids)))
            for ids, part in zip(held, place.parts, strict=True)
        ]

    def _keys(self, table: str, row_ids: Tensor) -> Tensor:
        """The key of each row; that of padding is set later."""
        place = self.places[table]
        ids = row_ids.to(self.key_dtype)
        keys = self._part_keys(place.parts[-1], ids)
        if len(place.parts) > 1:
            hot = place.parts[0]
            keys = torch.where(ids < hot.stop, self._part_keys(hot, ids), keys)
        return keys

    def _part_keys(self, part: Part, ids: Tensor) -> Tensor:
        group = self.groups[part.group]
        first = group.first_key + part.first_row
        if group.num_owners == 1:
            return ids + (first - part.start)
        quotients = torch.div(ids, group.num_owners, rounding_mode="floor")
        owners = torch.sub(ids, quotients, alpha=group.num_owners)
        if part.start:
            quotients = torch.div(ids - part.start, group.num_owners, rounding_mode="floor")
        return torch.add(quotients, owners, alpha=group.num_rows).add_(first)

    def _find_bad_id(self, request: Request) -> BadId | None:
        place, ids = self.places[request.table], request.ids.values
        if not len(ids):
            return None
        least, most = torch.aminmax(ids)
        if int(least) >= 0 and int(most) < place.plan.num_ids:
            return None
        wrong = (ids < 0) | (ids >= place.plan.num_ids)
        position = int(wrong.nonzero()[0])
        example = int(torch.searchsorted(request.ids.offsets, position, right=True)) - 1
        return BadId(place.number, int(ids[position]), position, example)


def _pieces(plan: TablePlan, world_size: int) -> list[tuple[Kind, int, int]]:
    """How the rows of a table lie, and from which to which."""
    end = plan.num_embeddings
    if plan.placement == "replicated" and world_size > 1:
        return [("replicated", 0, end)]
    hot = plan.hot_on(world_size)
    if not hot:
        return [("spread", 0, end)]
    return [("hot", 0, hot), ("spread", hot, end)]


def _gather(order: Tensor, starts: Tensor) -> Gather:
    """From the sorted keys of a width, padding's own first, to who finds its row where.

    Args:
        order: Where each of them stood, 0 being padding's own: int64, (1 + nnz,).
        starts: Where each distinct one starts, padding first, and the end: int64, (U + 2,).
    """
    runs = torch.arange(len(starts) - 1, device=order.device)
    places = torch.empty_like(order)
    places.scatter_(0, order, torch.repeat_interleave(runs, starts.diff(), output_size=len(order)))
    paddings = int(starts[1])
    return Gather(places[1:], order[paddings:] - 1, (starts - paddings).clamp_(min=0))
