"""From ids to who holds their rows: the layout of the tables and the route of one look-up; pure.

Logical tables of one width and placement lie one after the other in one physical table, their
group. All groups together make one space of keys, group by group and, inside a group, owner by
owner; so one sort gives the distinct rows, already in the order in which they are sent.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distrec.columns import PADDING_INDEX
from distrec.sharding.lookup import Request
from distrec.sharding.plan import TablePlan
from distrec.world import World


@dataclass(frozen=True)
class Group:
    """Tables of one width and placement.

    Args:
        embedding_dim: D.
        num_owners: Ranks that the rows are spread over: N, or 1 when this rank has them all.
        replicated: Whether every rank keeps the same rows.
        num_rows: Rows on each owner.
        first_key: Key of the first row of the first owner.
    """

    embedding_dim: int
    num_owners: int
    replicated: bool
    num_rows: int
    first_key: int


@dataclass(frozen=True)
class Place:
    """Where a table lies: in which group, from which of its rows on (the same on every owner)."""

    plan: TablePlan
    number: int
    group: int
    first_row: int


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
        places: For each request, for each id: 0 for padding, else 1 + its row's place in `rows` of
            the table's group.
        bad_id: The ids were not looked at any further.
    """

    rows: list[Tensor]
    counts: list[list[int]]
    places: dict[str, Tensor]
    bad_id: BadId | None = None


class Layout:
    """Groups, and the place of every table in them.

    Args:
        plans: The tables.
        world: N ranks. A single one holds everything, so it has no replicas.
    """

    def __init__(self, plans: Sequence[TablePlan], world: World) -> None:
        self.world = world
        alone = world.world_size == 1
        # spread groups first: they are the ones that are sent
        kinds = sorted(
            {(plan.placement == "replicated" and not alone, plan.embedding_dim) for plan in plans}
        )
        self.groups: list[Group] = []
        self.places: dict[str, Place] = {}
        key = 0
        for replicated, width in kinds:
            owners = 1 if replicated else world.world_size
            num_rows = 0
            for number, plan in enumerate(plans):
                if plan.embedding_dim != width:
                    continue
                if (plan.placement == "replicated" and not alone) != replicated:
                    continue
                self.places[plan.name] = Place(plan, number, len(self.groups), num_rows)
                num_rows += -(-plan.num_embeddings // owners)
            self.groups.append(Group(width, owners, replicated, num_rows, key))
            key += num_rows * owners
        self.num_spread = sum(not group.replicated for group in self.groups)

    def route(self, requests: Mapping[str, Request], device: torch.device) -> Route:
        """The route of a look-up, on `device`, where the ids are."""
        keys = [torch.full((1,), -1, device=device)]
        for request in requests.values():
            bad_id = self._find_bad_id(request)
            if bad_id is not None:
                none = torch.empty(0, dtype=torch.int64, device=device)
                counts = [[0] * group.num_owners for group in self.groups]
                return Route([none] * len(self.groups), counts, {}, bad_id)
            keys.append(self._keys(request))
        # -1 is always there, first: so place 0 is padding, and a look-up without ids works
        unique, inverse = torch.unique(torch.cat(keys), return_inverse=True)
        bounds = torch.searchsorted(unique, self._bounds().to(device)).tolist()
        rows, counts, starts = [], [], []
        for group in self.groups:
            ends = bounds[: group.num_owners + 1]
            bounds = bounds[group.num_owners :]
            starts.append(ends[0])
            rows.append((unique[ends[0] : ends[-1]] - group.first_key) % group.num_rows)
            counts.append([stop - start for start, stop in itertools.pairwise(ends)])
        places, begin = {}, 1
        for name, request in requests.items():
            end = begin + len(request.ids.values)
            start = starts[self.places[request.table].group]
            places[name] = (inverse[begin:end] - (start - 1)).clamp_(min=0)
            begin = end
        return Route(rows, counts, places)

    def local_index(self, table: str, row_ids: Tensor) -> Tensor:
        """Rows of this rank's physical table at which the rows `row_ids` of a table lie."""
        place = self.places[table]
        return place.first_row + row_ids // self.groups[place.group].num_owners

    def local_slice(self, table: str) -> slice:
        """All of a table's rows on this rank, in the order of `TablePlan.local_rows`."""
        place = self.places[table]
        num_owners = self.groups[place.group].num_owners
        num_rows = len(place.plan.local_rows(self.world.rank % num_owners, num_owners))
        return slice(place.first_row, place.first_row + num_rows)

    def _bounds(self) -> Tensor:
        """Where each owner's keys begin, group by group, and where the last ones end."""
        starts = [
            group.first_key + owner * group.num_rows
            for group in self.groups
            for owner in range(group.num_owners)
        ]
        end = self.groups[-1].first_key + self.groups[-1].num_rows * self.groups[-1].num_owners
        return torch.tensor([*starts, end])

    def _keys(self, request: Request) -> Tensor:
        place, ids = self.places[request.table], request.ids.values.to(torch.int64)
        group = self.groups[place.group]
        first = group.first_key + place.first_row
        keys = first + ids
        if group.num_owners > 1:
            owners = ids % group.num_owners
            keys = first + owners * group.num_rows + ids // group.num_owners
        return keys.masked_fill(ids == PADDING_INDEX, -1)

    def _find_bad_id(self, request: Request) -> BadId | None:
        place, ids = self.places[request.table], request.ids.values
        if not len(ids):
            return None
        least, most = torch.aminmax(ids)
        if int(least) >= 0 and int(most) < place.plan.num_embeddings:
            return None
        wrong = (ids < 0) | (ids >= place.plan.num_embeddings)
        position = int(wrong.nonzero()[0])
        example = int(torch.searchsorted(request.ids.offsets, position, right=True)) - 1
        return BadId(place.number, int(ids[position]), position, example)
