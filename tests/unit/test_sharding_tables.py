"""Embedding tables of one process: pooling, fused optimizers, first values, rows in and out."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distrec.batch import Jagged
from distrec.config import LaunchConfig, ShardingConfig
from distrec.errors import CheckpointError, ConfigError, DataError, LaunchError, TrainingError
from distrec.sharding import collectives
from distrec.sharding.dense import DenseGradients
from distrec.sharding.initial import initial_rows
from distrec.sharding.kernels import CpuTable
from distrec.sharding.lookup import Pooling, Request, gather_and_pool, pool
from distrec.sharding.plan import TableSpec, plan_tables
from distrec.sharding.tables import EmbeddingTables

SPECS = (TableSpec("wide", 9, 8), TableSpec("narrow", 6, 4), TableSpec("other", 7, 8))
BAGS = st.lists(st.lists(st.integers(0, 5), max_size=6), max_size=6)
CPU = torch.device("cpu")


def make_tables(seed: int = 3, **section: Any) -> EmbeddingTables:
    config = ShardingConfig.model_validate({"init_scale": 0.5, "learning_rate": 0.1} | section)
    alone = collectives.OneProcess(CPU)
    return EmbeddingTables(plan_tables(SPECS, config, 1), alone, config, seed, CPU)


@settings(deadline=None)
@given(BAGS, st.sampled_from(["sum", "mean"]))
def test_pool_equals_embedding_bag(bags: list[list[int]], pooling: Pooling) -> None:
    """Forward and gradient, both forms; torch leaves its padding row out of the mean too."""
    ids = Jagged.from_lists(bags)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 4, generator=generator)
    weight[0] = 0
    bag = nn.EmbeddingBag.from_pretrained(
        weight, freeze=False, mode=pooling, include_last_offset=True, padding_idx=0
    )
    factors = torch.randn(len(bags), 4, generator=generator)
    expected = bag(ids.values, ids.offsets)
    (expected * factors).sum().backward()
    assert bag.weight.grad is not None
    for gathered in (True, False):
        rows = weight.clone().requires_grad_()
        if gathered:
            found = gather_and_pool(rows, ids.values, ids, pooling)
        else:
            found = pool(rows[ids.values], ids, pooling)
        torch.testing.assert_close(found, expected)
        (found * factors).sum().backward()
        assert rows.grad is not None
        # the padding row's gradient is dropped where rows are fetched
        torch.testing.assert_close(rows.grad[1:], bag.weight.grad[1:])
    assert pool(weight[ids.values], ids, "none").shape == (len(ids.values), 4)


def step_by_hand(
    weights: torch.Tensor, state: torch.Tensor, gradient: torch.Tensor, optimizer: str, eps: float
) -> None:
    """One exact step at 0.1, in place: the textbook formula of each optimizer."""
    if optimizer == "sgd":
        weights -= 0.1 * gradient
        return
    squared = gradient.square()
    state += squared.mean(dim=1, keepdim=True) if optimizer == "rowwise_adagrad" else squared
    weights -= 0.1 * gradient / (state.sqrt() + eps)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(BAGS, BAGS, BAGS), min_size=1, max_size=3),
    st.sampled_from(["rowwise_adagrad", "adagrad", "sgd"]),
)
def test_rows_are_updated_once_with_the_summed_gradient(steps: list[Any], optimizer: str) -> None:
    eps = 1e-4
    tables = make_tables(optimizer=optimizer, eps=eps)
    names = [spec.name for spec in SPECS]
    expected = {name: [part.clone() for part in tables.local_rows(name)[1:]] for name in names}
    for bags in steps:
        requests = {name: Request(name, Jagged.from_lists(bags[k]), "sum")
                    for k, name in enumerate(names)}  # fmt: skip
        # the same table once more, so that gradients of two requests meet
        requests["again"] = Request("wide", Jagged.from_lists(bags[1]), "none")
        rows = tables(requests)
        sum(value.square().sum() for value in rows.values()).backward()  # type: ignore[union-attr]
        for name in names:
            weights, state = expected[name]
            plain = weights.clone().requires_grad_()
            loss = torch.zeros(())
            for request in (r for r in requests.values() if r.table == name):
                used = plain[request.ids.values] * (request.ids.values > 0).unsqueeze(1)
                if request.pooling == "sum":
                    used = torch.zeros(request.ids.batch_size, used.shape[1]).index_add(
                        0, request.ids.bag_of_value, used
                    )
                loss = loss + used.square().sum()
            loss.backward()
            gradient = torch.zeros_like(weights) if plain.grad is None else plain.grad
            step_by_hand(weights, state, gradient, optimizer, eps)
    for name in names:
        _, weights, state = tables.local_rows(name)
        torch.testing.assert_close(weights, expected[name][0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(state, expected[name][1], rtol=1e-5, atol=1e-6)


def test_learning_rate_and_looking_without_learning() -> None:
    tables = make_tables(optimizer="sgd")
    request = {"x": Request("narrow", Jagged.from_lists([[2, 2, 3]]), "sum")}
    before = tables.local_rows("narrow")[1].clone()
    with torch.no_grad():
        tables(request)
    # a graph that is thrown away changes nothing either
    tables(request)
    assert torch.equal(tables.local_rows("narrow")[1], before)
    tables.set_learning_rate(0.5)
    tables(request)["x"].sum().backward()
    change = tables.local_rows("narrow")[1] - before
    expected = torch.zeros(6, 1)
    expected[2], expected[3] = -1.0, -0.5
    torch.testing.assert_close(change, expected.expand(6, 4))


def test_first_values_are_uniform_and_their_own() -> None:
    rows = initial_rows("user", np.arange(20_000), 16, seed=5, scale=0.25)
    assert rows.dtype == np.float32
    assert np.all(rows[0] == 0)
    values = rows[1:].ravel().astype(np.float64)
    # 320,000 draws: the standard error of the mean is 0.00026, of a decile's share 0.0005
    assert abs(values.mean()) < 0.0013
    assert abs(values.std() - 0.25 / 3**0.5) < 0.001
    shares = np.histogram(values, bins=10, range=(-0.25, 0.25))[0] / len(values)
    assert shares.sum() == 1
    assert np.abs(shares - 0.1).max() < 0.0027
    for left, right in ((rows[1:-1], rows[2:]), (rows[1:, :-1], rows[1:, 1:])):
        assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 0.01
    # any row alone, in any order; another table and another seed have others
    chosen = np.array([17, 3, 19_999])
    assert np.array_equal(initial_rows("user", chosen, 16, 5, 0.25), rows[chosen])
    for other in (
        initial_rows("item", chosen, 16, 5, 0.25),
        initial_rows("user", chosen, 16, 6, 1),
    ):
        assert abs(np.corrcoef(other.ravel(), rows[chosen].ravel())[0, 1]) < 0.6
    # fixed for ever: the formula in plain integers
    key = int.from_bytes(hashlib.sha256(b"5 user").digest()[:8], "little")
    for row, column in ((1, 0), (19_999, 15)):
        mixed = splitmix(((row + 1) * GOLDEN) % 2**64 ^ key)
        bits = splitmix((mixed + (column + 1) * GOLDEN) % 2**64) >> 40
        assert rows[row, column] == pytest.approx((bits / 2**24 * 2 - 1) * 0.25, abs=1e-8)


GOLDEN = 0x9E3779B97F4A7C15


def splitmix(state: int) -> int:
    """The reference in plain integers."""
    mask = 2**64 - 1
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
def test_rows_go_out_and_come_in(precision: str, optimizer: str) -> None:
    """Tables filled from another's rows go on exactly as it does."""
    first = make_tables(optimizer=optimizer, precision=precision)
    second = make_tables(seed=4, optimizer=optimizer, precision=precision)
    request = {
        "x": Request("wide", Jagged.from_lists([[1, 4, 0], [4, 8]]), "mean"),
        "y": Request("other", Jagged.from_lists([[6], [2]]), "none"),
    }

    def learn(tables: EmbeddingTables) -> None:
        sum(rows.exp().sum() for rows in tables(request).values()).backward()  # type: ignore[union-attr]

    learn(first)
    assert not torch.equal(first.local_rows("wide")[1], second.local_rows("wide")[1])
    for spec in SPECS:
        row_ids, weights, state = first.local_rows(spec.name)
        assert row_ids.tolist() == list(range(spec.num_embeddings))
        assert weights.dtype == (torch.float16 if precision == "fp16" else torch.float32)
        assert state.dtype == torch.float32
        width = {"rowwise_adagrad": 1, "adagrad": spec.embedding_dim, "sgd": 0}[optimizer]
        assert state.shape == (spec.num_embeddings, width)
        # in two parts, in another order
        order = row_ids.flip(0)
        for part in (order[:2], order[2:]):
            second.load_rows(spec.name, part, weights[part], state[part])
    learn(first)
    learn(second)
    for spec in SPECS:
        for left, right in zip(
            first.local_rows(spec.name), second.local_rows(spec.name), strict=True
        ):
            assert torch.equal(left, right)


def test_refusals() -> None:
    tables = make_tables()
    for wrong in (9, -1, -2):
        bags = Jagged.from_lists([[1], [], [wrong, 2]])
        with pytest.raises(DataError) as caught:
            tables({"x": Request("wide", bags, "sum")})
        assert (
            f"ids of table 'wide' lie in [0, 9). Received: id {wrong} at position 1 (example 2 of "
            "the batch) on rank 0."
        ) in str(caught.value)
    with pytest.raises(ConfigError, match=r"no embedding table 'wid'. Did you mean 'wide'"):
        tables({"x": Request("wid", Jagged.from_lists([[1]]), "sum")})
    with pytest.raises(CheckpointError, match=r"Received: \(1, 8\) and \(1, 8\)"):
        tables.load_rows("wide", torch.tensor([1]), torch.zeros(1, 8), torch.zeros(1, 8))
    with pytest.raises(CheckpointError, match=r"range\(0, 9\) of table 'wide'. Received: row 9"):
        tables.load_rows("wide", torch.tensor([9]), torch.zeros(1, 8), torch.zeros(1, 1))
    alone = collectives.start(LaunchConfig(device="cpu"), distributed=False)
    with pytest.raises(LaunchError, match="sends every row once, to one of 1 ranks"):
        alone.alltoall(torch.zeros(3), [2], "x")
    if not torch.cuda.is_available():
        with pytest.raises(LaunchError, match=r"needs a GPU of its own. Received: local rank 0, 0"):
            collectives.start(LaunchConfig(device="cuda"), distributed=False)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_both_kernels_update_alike(optimizer: str, precision: str) -> None:
    """FBGEMM's table, which GPUs use, and the one of the CPU: rows repeated, some, and all."""
    from distrec.sharding.fbgemm import FbgemmTable  # seconds

    config = ShardingConfig.model_validate(
        {"optimizer": optimizer, "precision": precision, "learning_rate": 0.1}
    )
    generator = torch.Generator().manual_seed(5)
    tables = (FbgemmTable(7, 8, config, CPU, True), CpuTable(7, 8, config, CPU))
    start = torch.randn(7, 8, generator=generator)
    for table in tables:
        table.weights()[:] = start
        table.rows_were_written()
    # one rounding more or less
    near = {"atol": 1e-5, "rtol": 1e-5} if precision == "fp32" else {"atol": 2e-3, "rtol": 2e-3}
    rows = torch.tensor([4, 1, 4, 6, 4, 1])
    gradient, whole = torch.randn(2, 7, 8, generator=generator)
    for _ in range(2):
        found = [table.lookup(rows) for table in tables]
        torch.testing.assert_close(*found, **near)
        for answer, table in zip(found, tables, strict=True):
            answer.backward(gradient[:6])
            table.update(rows[1:3], gradient[5:])
            table.update_all(whole)
            table.set_learning_rate(0.02)
    torch.testing.assert_close(tables[0].weights(), tables[1].weights(), **near)
    torch.testing.assert_close(tables[0].state(), tables[1].state(), **near)
    assert not torch.equal(tables[1].weights().float(), start.to(tables[1].weights().dtype).float())


def test_dense_gradients_are_complete_while_those_of_rows_travel() -> None:
    """What is computed before the look-up gets its gradient after it: that is refused."""
    tables = make_tables()
    factor = nn.Parameter(torch.ones(8))
    optimizer = torch.optim.SGD([factor], lr=1.0)
    request = {"a": Request("wide", Jagged.from_lists([[1, 2]]), "sum")}
    seen: list[torch.Tensor | None] = []
    for computed in ("before", "while rows travel", "after"):
        optimizer.zero_grad()
        dense = DenseGradients([factor], tables.collectives)

        def meanwhile(dense: DenseGradients = dense) -> None:
            seen.append(factor.grad)
            dense.start()

        early = factor * 2
        wait = tables.start(request, meanwhile=meanwhile)
        during = factor * 2
        rows = wait()["a"]
        scale = {"before": early, "while rows travel": during, "after": factor * 2}[computed]
        (rows * scale).sum().backward()
        if computed == "before":
            with pytest.raises(TrainingError, match="started before anything"):
                dense.step(optimizer)
        else:
            norm = dense.step(optimizer)
            assert norm == pytest.approx(float(2 * rows.detach().norm()))
    assert seen[0] is None
    assert seen[1] is not None
    assert seen[2] is not None
