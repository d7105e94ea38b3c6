"""The variational autoencoder: what is drawn, what it costs, and when that counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distrec.batch import Batch, Jagged
from distrec.config import LossConfig
from distrec.model import Objective
from distrec.model.autoencoder import VariationalTower
from tests.unit.test_model import InMemoryTables, make_batch, make_catalogue, make_model

SETTINGS = {"autoencoder_kl": 0.4, "autoencoder_kl_steps": 8, "autoencoder_hidden": (6,)}


def timed_batch(size: int = 1) -> Batch:
    batch = make_batch([2, 3] * size, [7, 4] * size, [[3, 4, 5], [6]] * size)
    times = Jagged(torch.arange(4 * size), batch.history.offsets)
    return replace(batch, history_times=times, time=torch.full((2 * size,), 99))


def test_vectors_are_drawn_as_the_network_says_and_their_mean_is_scored() -> None:
    model = make_model(towers=("autoencoder",), **SETTINGS)
    tower = model.towers["autoencoder"]
    assert isinstance(tower, VariationalTower)
    with torch.no_grad():
        tower.network.layers[-1].weight.mul_(20.0)
        tower.network.layers[-1].bias[8:].fill_(-1.0)
    tables = InMemoryTables(model)
    batch = timed_batch(4000)
    torch.manual_seed(0)
    drawn = model.encode_users(batch, tables(model.user_requests(batch)))[:, :-3].detach()
    cost = tower.take_divergence().detach()
    model.eval()
    scored = model.encode_users(batch, tables(model.user_requests(batch)))[:, :-3].detach()
    table = tables.weights["item_history"].detach()
    for row, bag in enumerate(([3, 4, 5], [6])):
        scaled = table[bag].sum(dim=0) / len(bag) ** 0.5
        shift, log_variance = tower.network(scaled).detach().chunk(2)
        torch.testing.assert_close(scored[row], scaled + shift)
        own = drawn[row::2]
        torch.testing.assert_close(own.mean(dim=0), scored[row], atol=0.06, rtol=0)
        deviation = (log_variance / 2).exp()
        torch.testing.assert_close(own.std(dim=0), deviation, atol=0, rtol=0.06)
        expected = torch.distributions.kl_divergence(
            torch.distributions.Normal(scaled + shift, deviation), torch.distributions.Normal(0, 1)
        )
        torch.testing.assert_close(cost[row], expected.sum())


@pytest.mark.parametrize("train_rows", ["events", "windows"])
def test_divergence_counts_more_from_step_to_step(train_rows: str) -> None:
    model = make_model(towers=("cf", "autoencoder", "content"), **SETTINGS)
    tables = InMemoryTables(model)
    objective = Objective(model, make_catalogue(), LossConfig(kind="softmax"), 1, train_rows)
    batch, totals = timed_batch(), {}
    for step in (0, 3, 7, 50):
        torch.manual_seed(1)
        total, parts = objective.loss_sum(batch, tables(objective.requests(batch, step)), step)
        totals[step] = total.item() - parts["loss"] - parts["l2"]
    # two examples of weights 1 and 2; of windows the first has 4 targets, the other 2
    objective.model.eval()
    tower = model.towers["autoencoder"]
    tower.train()
    positions = objective._inputs(batch).targets.positions
    rows = tables(model.user_requests(batch, positions))
    tower.encode_users(batch, rows, None, positions)
    weights = objective._inputs(batch).targets.weights
    assert len(weights) == (2 if train_rows == "events" else 6)
    whole = 0.4 * float((weights * tower.take_divergence()).sum().detach())
    assert totals[0] == pytest.approx(whole / 8, rel=1e-3)
    assert totals[3] == pytest.approx(whole / 2, rel=1e-3)
    assert totals[7] == totals[50] == pytest.approx(whole, rel=1e-3)


def test_no_divergence_without_it() -> None:
    model = make_model(towers=("cf", "autoencoder"))
    batch = timed_batch()
    model.encode_users(batch, InMemoryTables(model)(model.user_requests(batch)))
    assert model.take_divergence() is None
