"""Moved rows: how far, which, where to, and what the objective and the tables make of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distrec.batch import Batch, Jagged
from distrec.config import LossConfig, ShardingConfig
from distrec.model import Objective, UnifiedModel
from distrec.model.adversarial import perturbed_rows
from distrec.sharding.collectives import OneProcess
from distrec.sharding.plan import plan_tables
from distrec.sharding.tables import EmbeddingTables
from tests.unit.test_model import InMemoryTables, make_batch, make_catalogue, make_model

ALL_TOWERS = ("cf", "autoencoder", "sequence", "deep", "content")
KINDS = ("softmax", "sampled_softmax", "binary")


def timed_batch() -> Batch:
    batch = make_batch([2, 3, 5, 1], [2, 4, 7, 3], [[3, 4], [], [2, 3, 5, 6], [5]])
    times = Jagged(torch.arange(7), batch.history.offsets)
    return replace(batch, history_times=times, time=torch.full((4,), 99))


def make_objective(model: UnifiedModel, size: float, kind: str = "softmax") -> Objective:
    config = LossConfig.model_validate(
        {"kind": kind, "num_negatives": 5, "l2": 0.0, "adversarial": size}
    )
    return Objective(model, make_catalogue(model.spec), config, 1)


def loss_of(objective: Objective, tables: InMemoryTables, batch: Batch) -> Tensor:
    return objective.loss_sum(batch, tables(objective.requests(batch, 0)), 0)[0]


def test_each_example_moves_its_own_rows_by_the_size_up_its_gradient() -> None:
    batch = timed_batch()
    generator = torch.Generator().manual_seed(0)
    # the last of user.id is the unknown row; a history has a row an event
    shapes = {"user.id": 5, "user.sequence": 7, "item.item": 3}
    rows = {
        name: torch.randn(count, 4, generator=generator).requires_grad_()
        for name, count in shapes.items()
    }
    slopes = {name: torch.randn(row.shape, generator=generator) for name, row in rows.items()}
    slopes["user.id"][0], slopes["user.sequence"][:2] = 0.0, 0.0
    loss = torch.stack([(rows[name] * slopes[name]).sum() for name in rows]).sum()
    moved = perturbed_rows(loss, batch, rows, {"user.sequence"}, 0.6)
    assert set(moved) == {"user.id", "user.sequence"}
    assert torch.equal(moved["user.id"][4], rows["user.id"][4])
    # nothing to move the first example
    assert torch.equal(moved["user.id"][0], rows["user.id"][0])
    for example in (1, 2, 3):
        events = batch.history.bag_of_value == example
        step = torch.cat([
            (moved["user.id"] - rows["user.id"])[example],
            (moved["user.sequence"] - rows["user.sequence"])[events].flatten(),
        ])  # fmt: skip
        slope = torch.cat([slopes["user.id"][example], slopes["user.sequence"][events].flatten()])
        torch.testing.assert_close(step, 0.6 * slope / slope.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_doubles_the_loss_and_a_step_raises_it(kind: str) -> None:
    # draws of both passes are the same
    model = make_model(towers=ALL_TOWERS, dropout=0.4, id_dropout=0.4)
    batch, found = timed_batch(), []
    for size in (0.0, 1e-7, 0.2):
        tables = InMemoryTables(model)
        model.zero_grad()
        torch.manual_seed(5)
        loss = loss_of(make_objective(model, size, kind), tables, batch)
        # as the trainer divides it
        (loss / 3.0).backward()
        gradients = [one.grad.clone() for one in tables.weights.values()]
        gradients += [one.grad.clone() for one in model.parameters() if one.grad is not None]
        found.append((loss.item(), gradients))
    (plain, gradients), (twice, doubled), (raised, _) = found
    assert twice == pytest.approx(2 * plain, rel=1e-4)
    torch.testing.assert_close(doubled, [2 * one for one in gradients], rtol=1e-3, atol=1e-5)
    assert raised > 2.02 * plain


def test_rows_are_updated_once_and_as_the_sum_of_both_passes_says() -> None:
    batch = timed_batch()
    model = make_model(towers=("cf", "autoencoder"))
    config = ShardingConfig(optimizer="sgd", learning_rate=0.1)
    tables = EmbeddingTables(
        plan_tables(model.table_specs(), config, 1), OneProcess(torch.device("cpu")), config, 1,
        torch.device("cpu"),
    )  # fmt: skip
    plain = InMemoryTables(model)
    before = {}
    with torch.no_grad():
        for name, weight in plain.weights.items():
            before[name] = tables.local_rows(name)[1].clone()
            weight.copy_(before[name])
    objective = make_objective(model, 0.3)
    loss_of(objective, plain, batch).backward()
    loss = objective.loss_sum(batch, tables(objective.requests(batch, 0)), 0)[0]
    for name, rows in before.items():
        # the first pass has not updated anything
        assert torch.equal(tables.local_rows(name)[1], rows)
    loss.backward()
    for name, weight in plain.weights.items():
        expected = before[name] - 0.1 * weight.grad
        expected[0] = before[name][0]
        torch.testing.assert_close(tables.local_rows(name)[1], expected)


def test_a_rank_without_rows_takes_part() -> None:
    model = make_model(towers=ALL_TOWERS)
    tables = InMemoryTables(model)
    loss = loss_of(make_objective(model, 0.3), tables, make_batch([], [], []))
    loss.backward()
    assert loss.item() == 0.0
    assert all(not one.grad.any() for one in tables.weights.values())
