"""Where tables lie: every row on exactly one rank, refusals with their fix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distrec.batch import Jagged
from distrec.config import ShardingConfig
from distrec.errors import ConfigError
from distrec.sharding.lookup import Request
from distrec.sharding.plan import TableSpec, bytes_per_rank, plan_tables
from distrec.sharding.routing import Layout, Route
from distrec.world import World


def config(**settings: Any) -> ShardingConfig:
    return ShardingConfig.model_validate(settings)


@given(st.integers(1, 9), st.integers(9, 60))
def test_rows_are_dealt_once_and_evenly(world_size: int, num_embeddings: int) -> None:
    spec = TableSpec("t", num_embeddings, 4)
    (plan,) = plan_tables([spec], config(placement="row_wise"), world_size)
    shares = [list(plan.local_rows(rank, world_size)) for rank in range(world_size)]
    assert sorted(row for share in shares for row in share) == list(range(num_embeddings))
    assert all(row % world_size == rank for rank, share in enumerate(shares) for row in share)
    (plan,) = plan_tables([spec], config(placement="replicated"), world_size)
    assert list(plan.local_rows(world_size - 1, world_size)) == list(range(num_embeddings))


def test_auto_spreads_large_tables_and_names_go_before() -> None:
    # 4096 x 64 x 4 bytes are exactly one MiB
    specs = [TableSpec("fits", 4096, 64), TableSpec("large", 4097, 64), TableSpec("named", 8, 4)]
    plans = plan_tables(specs, config(tables={"named": "row_wise"}), 4)
    assert [plan.placement for plan in plans] == ["replicated", "row_wise", "row_wise"]
    half = plan_tables(specs[1:2], config(precision="fp16"), 4)
    assert half[0].placement == "replicated"
    # too small to be spread: auto does not ask for the impossible
    tiny = plan_tables([TableSpec("tiny", 3, 4)], config(replicate_below_mib=0), 4)
    assert tiny[0].placement == "replicated"


@pytest.mark.parametrize(
    ("optimizer", "precision", "row_bytes"),
    [
        ("rowwise_adagrad", "fp32", 8 * 4 + 4),
        ("adagrad", "fp16", 8 * 2 + 8 * 4),
        ("sgd", "fp32", 8 * 4),
    ],
)
def test_bytes_per_rank(optimizer: str, precision: str, row_bytes: int) -> None:
    section = config(
        optimizer=optimizer, precision=precision, placement="row_wise", tables={"b": "replicated"}
    )
    plans = plan_tables([TableSpec("a", 10, 8), TableSpec("b", 5, 8)], section, 3)
    assert bytes_per_rank(plans, 3) == tuple((rows + 5) * row_bytes for rows in (4, 3, 3))


@pytest.mark.parametrize(
    ("specs", "section", "message"),
    [
        (
            [TableSpec("country", 3, 4)],
            {"placement": "row_wise"},
            "row-wise sharding needs num_embeddings >= world_size. Received: num_embeddings=3 "
            "(table 'country'), world_size=8. Use placement = \"replicated\".",
        ),
        (
            [TableSpec("user", 9, 6)],
            {},
            "an embedding_dim is a multiple of 4. Received: embedding_dim=6 (table 'user'). Use 8.",
        ),
        (
            [TableSpec("user", 9, 4), TableSpec("item", 9, 4)],
            {"tables": {"usr": "row_wise"}},
            "unknown table 'usr' in sharding.tables. Did you mean 'user'?",
        ),
        (
            [TableSpec("user", 9, 4), TableSpec("item", 9, 4)],
            {"hot_rows": {"itm": 3}},
            "unknown table 'itm' in sharding.hot_rows. Did you mean 'item'?",
        ),
        ([TableSpec("user", 9, 4)] * 2, {}, "Received twice: ['user']"),
        ([TableSpec("user", 0, 4)], {}, "num_embeddings=0 (table 'user')"),
    ],
)
def test_refusals(specs: list[TableSpec], section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_tables(specs, config(**section), 8)
    assert message in str(caught.value)


def test_a_hot_tier_is_on_every_rank_beside_its_share() -> None:
    specs = [TableSpec("a", 10, 8), TableSpec("all", 5, 8)]
    section = config(placement="row_wise", optimizer="sgd", hot_rows={"a": 4, "all": 5})
    plans = plan_tables(specs, section, 3)
    # rows 0 to 3 everywhere; 6 and 9, 4 and 7, 5 and 8 on one rank each
    held = [plans[0].held_rows(rank, 3) for rank in range(3)]
    assert [list(hot) for hot, _ in held] == [[0, 1, 2, 3]] * 3
    assert [list(own) for _, own in held] == [[6, 9], [4, 7], [5, 8]]
    # what a rank saves is what it saves without the tier
    assert [list(plans[0].local_rows(rank, 3)) for rank in range(3)] == [
        [0, 3, 6, 9], [1, 4, 7], [2, 5, 8],
    ]  # fmt: skip
    # a tier of every row is a replicated table
    assert (plans[1].placement, plans[1].hot_rows) == ("replicated", 0)
    assert bytes_per_rank(plans, 3) == ((6 + 5) * 8 * 4,) * 3
    # what is left to be chosen is what was chosen, or none
    for asked in ("auto", {"a": "auto", "all": 2}):
        section = config(placement="row_wise", hot_rows=asked)
        chosen = plan_tables(specs, section, 3, {"a": 4, "all": 5})
        assert chosen[0].hot_rows == 4
        assert chosen[1].placement == ("replicated" if asked == "auto" else "row_wise")
        assert plan_tables(specs, section, 3)[0].hot_rows == 0
    # one rank keeps nothing twice
    assert plan_tables(specs[:1], config(hot_rows={"a": 4}), 1)[0].held_rows(0, 1) == (range(10),)


def owner_and_row(route_rows: torch.Tensor, counts: list[int]) -> list[tuple[int, int]]:
    owners = [owner for owner, count in enumerate(counts) for _ in range(count)]
    return list(zip(owners, route_rows.tolist(), strict=True))


def places_of(route: Route, layout: Layout, requests: dict[str, Request]) -> dict[str, list[int]]:
    found = {}
    for width, gather in route.gathers.items():
        names = [name for name in route.lengths if layout.width(requests[name].table) == width]
        parts = gather.places.split([route.lengths[name] for name in names])
        found.update(zip(names, (part.tolist() for part in parts), strict=True))
    return found


def test_routes_through_more_rows_than_int32_counts() -> None:
    """Numbers of rows of one rank fit into int32, those of all ranks do not."""
    plans = plan_tables([TableSpec("huge", 2**32 - 2, 4)], config(placement="row_wise"), 2)
    layout = Layout(plans, World(0, 2, 0, 1))
    request = Request("huge", Jagged.from_lists([[1, 2**32 - 3], [2**32 - 4]]), "sum")
    route = layout.route({"x": request}, torch.device("cpu"))
    assert route.counts == [[1, 2]]
    assert route.rows[0].tolist() == [2**31 - 2, 0, 2**31 - 2]
    assert layout.id_dtype == torch.int32


@settings(deadline=None)
@given(st.integers(1, 4), st.data())
def test_a_route_asks_each_distinct_row_once_of_its_owner(world_size: int, data: Any) -> None:
    """Rows asked for, pushed through what the owners hold, are the ids again."""
    sizes = {"a": 11, "b": 6, "c": 9, "d": 7}
    widths = {"a": 4, "b": 8, "c": 4, "d": 4}
    specs = [TableSpec(name, sizes[name], widths[name]) for name in sizes]
    hot_rows = data.draw(st.dictionaries(st.sampled_from("abcd"), st.integers(0, 12)))
    section = config(placement="row_wise", tables={"d": "replicated"}, hot_rows=hot_rows)
    plans = plan_tables(specs, section, world_size)
    layouts = [Layout(plans, World(rank, world_size, 0, 1)) for rank in range(world_size)]
    me = data.draw(st.integers(0, world_size - 1))
    # (group, owner, row of its physical table) -> (table, id), by the owners' own account
    held = {}
    for plan in plans:
        for rank, layout in enumerate(layouts):
            for row_ids, part, places in layout.held_parts(plan.name):
                owner = 0 if layout.groups[part.group].num_owners == 1 else rank
                numbers = range(places.start, places.stop)
                for number, row in zip(numbers, row_ids, strict=True):
                    assert held.setdefault((part.group, owner, number), (plan.name, row)) == (
                        plan.name,
                        row,
                    )
                    assert number < layout.groups[part.group].num_rows
                    assert layout.local_index(part, torch.tensor([row])).tolist() == [number]
    bags = {name: data.draw(st.lists(st.lists(st.integers(0, sizes[name] - 1)))) for name in sizes}
    requests = {f"of {n}": Request(n, Jagged.from_lists(bags[n]), "sum") for n in sizes}
    route = layouts[me].route(requests, torch.device("cpu"))
    assert route.bad_id is None
    asked = [
        [held[group, owner, row] for owner, row in owner_and_row(rows, counts)]
        for group, (rows, counts) in enumerate(zip(route.rows, route.counts, strict=True))
    ]
    found = [pair for group in asked for pair in group]
    wanted = {(name, row) for name in sizes for bag in bags[name] for row in bag if row}
    assert len(found) == len(set(found))
    assert set(found) == wanted
    for name in sizes:
        side_by_side = [pair for g in layouts[me].widths[widths[name]] for pair in asked[g]]
        places = places_of(route, layouts[me], requests)[f"of {name}"]
        ids = [row for bag in bags[name] for row in bag]
        assert [side_by_side[p - 1] if p else (name, 0) for p in places] == [
            (name, row) for row in ids
        ]
