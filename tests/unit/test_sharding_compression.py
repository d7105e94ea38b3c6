"""Compressed tables: which rows an id is composed of, how it is pooled, what a plan makes of it."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from distrec.batch import Jagged
from distrec.config import ShardingConfig
from distrec.errors import ConfigError, DataError
from distrec.sharding.collectives import OneProcess
from distrec.sharding.compression import Composition
from distrec.sharding.lookup import Pooling, Request, gather_and_pool
from distrec.sharding.plan import TablePlan, TableSpec, bytes_per_rank, plan_tables
from distrec.sharding.tables import EmbeddingTables
from tests.unit.test_sharding_tables import GOLDEN, splitmix

NUM_IDS = 40
SPEC = TableSpec("item", NUM_IDS, 4)
SECTIONS: dict[str, dict[str, Any]] = {
    "one hash": {"method": "hash", "num_buckets": 9, "num_hashes": 1, "own_rows": 0},
    "three hashes": {"method": "hash", "num_buckets": 9, "num_hashes": 3, "own_rows": 5},
    "sum": {"method": "quotient_remainder", "num_buckets": 6, "own_rows": 3},
    "product": {
        "method": "quotient_remainder", "num_buckets": 6, "operation": "product", "own_rows": 3,
    },
}  # fmt: skip
CPU = torch.device("cpu")


def config_of(section: dict[str, Any], **more: Any) -> ShardingConfig:
    return ShardingConfig.model_validate({"compress": {"item": section}, **more})


def plan_of(section: dict[str, Any], num_ids: int = NUM_IDS) -> TablePlan:
    (plan,) = plan_tables([TableSpec("item", num_ids, 4)], config_of(section), 1)
    return plan


def composition_of(section: dict[str, Any], num_ids: int = NUM_IDS) -> Composition:
    composition = plan_of(section, num_ids).composition
    assert composition is not None
    return composition


def rows_by_hand(table: str, number: int, section: dict[str, Any]) -> list[int]:
    """Rows of an id, in plain integers; fewer where it has a row of its own."""
    own, size = 2 + section["own_rows"], section["num_buckets"]
    if number < own:
        return [number]
    if section["method"] == "quotient_remainder":
        quotient, remainder = divmod(number - own, size)
        return [own + size + quotient, own + remainder]
    rows = []
    for k in range(section["num_hashes"]):
        key = int.from_bytes(hashlib.sha256(f"{table} {k}".encode()).digest()[:8], "little")
        rows.append(own + (splitmix(((number + 1) * GOLDEN) % 2**64 ^ key) >> 1) % size)
    return rows


@pytest.mark.parametrize("name", SECTIONS)
def test_rows_of_an_id_are_fixed_for_ever(name: str) -> None:
    section, ids = SECTIONS[name], [*range(NUM_IDS), 2**33 + 7]
    composition = composition_of(section, 2**34 if section["method"] == "hash" else NUM_IDS)
    ids = [number for number in ids if number < composition.num_ids]
    for table in ("item", "item_history"):
        found = composition.row_ids(table, torch.tensor(ids)).tolist()
        for number, rows in zip(ids, found, strict=True):
            expected = rows_by_hand(table, number, section)
            assert rows == expected + [0] * (composition.rows_per_id - len(expected))


def test_hashes_spread_evenly_and_tell_ids_apart() -> None:
    """100,000 ids over 1,000 buckets: what chance gives, by each of two functions."""
    section = {"method": "hash", "num_buckets": 1000, "num_hashes": 2, "own_rows": 0}
    rows = composition_of(section, 100_002).row_ids("item", torch.arange(2, 100_002))
    for column in rows.unbind(1):
        counts = torch.bincount(column - 2, minlength=1000).double()
        assert counts.shape == (1000,)
        # chi squared over its 999 degrees of freedom: 1 within five standard deviations
        assert abs(float(((counts - 100) ** 2 / 100).sum()) / 999 - 1) < 5 * (2 / 999) ** 0.5
    # 5e9 pairs of ids, of which one in a million shares both rows, in their order
    shared = 100_000 - len(torch.unique(rows, dim=0))
    assert 4000 < shared < 6000


def test_no_two_ids_share_quotient_and_remainder() -> None:
    composition = composition_of(SECTIONS["sum"])
    rows = composition.row_ids("item", torch.arange(NUM_IDS))
    assert len(torch.unique(rows, dim=0)) == NUM_IDS
    # every row is somebody's, and there are no others
    assert set(rows.flatten().tolist()) == set(range(composition.num_embeddings))


@pytest.mark.parametrize("name", SECTIONS)
def test_a_vocabulary_that_grows_keeps_the_rows_of_its_ids(name: str) -> None:
    old, new = composition_of(SECTIONS[name]), composition_of(SECTIONS[name], 55)
    ids = torch.arange(NUM_IDS)
    assert torch.equal(old.row_ids("item", ids), new.row_ids("item", ids))
    assert new.num_embeddings >= old.num_embeddings
    assert new.continues(old)
    assert not old.continues(new)
    assert not new.continues(old.model_copy(update={"num_own": old.num_own + 1}))


def plain(weight: Tensor, section: dict[str, Any], bags: list[list[int]], pooling: str) -> Tensor:
    """id by id, bag by bag; padding is zeros and no id of a mean."""
    vectors = []
    for bag in bags:
        of_bag = [weight[0] * 0]
        for number in (number for number in bag if number):
            rows = [weight[row] for row in rows_by_hand("item", number, section)]
            if section.get("operation") == "product" and len(rows) == 2:
                of_bag.append(rows[0] * (1 + rows[1]))
            else:
                of_bag.append(sum(rows[1:], rows[0]))
        divisor = max(len(of_bag) - 1, 1) if pooling == "mean" else 1
        vectors.append(torch.stack(of_bag).sum(dim=0) / divisor)
    return torch.stack(vectors)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, NUM_IDS - 1), max_size=6), min_size=1, max_size=5),
    st.sampled_from(sorted(SECTIONS)),
    st.sampled_from(["sum", "mean", "none"]),
)
def test_pooling_equals_id_by_id(bags: list[list[int]], name: str, pooling: Pooling) -> None:
    if pooling == "none":
        bags = [[number] for bag in bags for number in bag] or [[0]]
    composition, ids = composition_of(SECTIONS[name]), Jagged.from_lists(bags)
    weight = torch.randn(composition.num_embeddings, 4, generator=torch.Generator().manual_seed(1))
    weight[0] = 0
    ours, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    places = composition.row_ids("item", ids.values).flatten()
    found = gather_and_pool(ours, places, ids, pooling, composition)
    expected = plain(theirs, SECTIONS[name], bags, pooling)
    torch.testing.assert_close(found, expected)
    factors = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (found * factors).sum().backward()
    (expected * factors).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    # the gradient of padding is dropped by the tables
    torch.testing.assert_close(ours.grad[1:], theirs.grad[1:])


def test_a_plan_has_the_rows_and_bytes_that_are_kept() -> None:
    specs = [SPEC, TableSpec("user", 30, 8)]
    section = config_of(
        SECTIONS["sum"], optimizer="sgd", placement="row_wise", hot_rows={"item": 4}
    )
    plans = plan_tables(specs, section, 3)
    # 2 + 3 of their own, 6 remainders and 35 / 6 quotients
    assert (plans[0].num_embeddings, plans[0].num_ids) == (2 + 3 + 6 + 6, 40)
    assert (plans[1].num_embeddings, plans[1].num_ids) == (30, 30)
    rows = [4 + 4, 4 + 5, 4 + 4]
    assert bytes_per_rank(plans, 3) == tuple(number * 16 + 10 * 32 for number in rows)
    # the bound of what is replicated holds for the rows
    large = TableSpec("item", 10**7, 64)
    hashed = {"method": "hash", "num_buckets": 4000}
    assert plan_tables([large], config_of(hashed), 2)[0].placement == "replicated"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"item": {"method": "hash", "num_buckets": 38}},
            "a compressed table has fewer rows than ids. Received: sharding.compress.item with 40 "
            "rows for 40 ids. Lower num_buckets or own_rows, or leave the table as it is.",
        ),
        (
            {"item": {"method": "quotient_remainder", "num_buckets": 2, "own_rows": 34}},
            "sharding.compress.item with 40 rows for 40 ids",
        ),
        (
            {"itm": {"method": "hash", "num_buckets": 3}},
            "unknown table 'itm' in sharding.compress. Did you mean 'item'?",
        ),
    ],
)
def test_refused_by_the_plan(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_tables([SPEC], ShardingConfig.model_validate({"compress": section}), 1)
    assert message in str(caught.value)


def test_ids_outside_the_vocabulary_are_told_as_ids() -> None:
    """Not as rows, of which there are fewer, and into which a hash would bring any number."""
    config = config_of(SECTIONS["three hashes"])
    tables = EmbeddingTables(plan_tables([SPEC], config, 1), OneProcess(CPU), config, 1, CPU)
    good = {"x": Request("item", Jagged.from_lists([[NUM_IDS - 1]]), "sum")}
    assert tables(good)["x"].abs().max() > 0
    for wrong in (NUM_IDS, -1):
        bad = {"x": Request("item", Jagged.from_lists([[3], [2, wrong]]), "sum")}
        with pytest.raises(DataError) as caught:
            tables(bad)
        assert str(caught.value).startswith(
            f"ids of table 'item' lie in [0, 40). Received: id {wrong} at position 2 (example 1 of "
            "the batch) on rank 0."
        )


def test_a_product_starts_about_as_large_as_a_row() -> None:
    """A plain product of two small numbers would hardly learn."""
    config = config_of(SECTIONS["product"], init_scale=0.05)
    tables = EmbeddingTables(plan_tables([SPEC], config, 1), OneProcess(CPU), config, 1, CPU)
    ids = Jagged.singles(torch.arange(10, NUM_IDS))
    with torch.no_grad():
        vectors = tables({"x": Request("item", ids, "none")})["x"]
    assert 0.6 < float(vectors.std()) / (0.05 / 3**0.5) < 1.4


def test_updates_go_to_the_rows_that_are_shared() -> None:
    """One step of plain SGD on the physical rows, as torch does it."""
    for name, section in SECTIONS.items():
        config = config_of(section, optimizer="sgd", learning_rate=0.5, init_scale=0.5)
        tables = EmbeddingTables(plan_tables([SPEC], config, 1), OneProcess(CPU), config, 1, CPU)
        weight = nn.Parameter(tables.local_rows("item")[1].clone())
        bags = [[5, 9, 9, 0], [], [39, 2, 20]]
        target = torch.arange(12.0).reshape(3, 4)
        rows = tables({"x": Request("item", Jagged.from_lists(bags), "mean")})["x"]
        (rows - target).square().sum().backward()
        (plain(weight, section, bags, "mean") - target).square().sum().backward()
        assert weight.grad is not None
        expected = weight.detach() - 0.5 * weight.grad
        torch.testing.assert_close(tables.local_rows("item")[1], expected, msg=name)
