"""The losses against numbers worked out by hand, and what the objective feeds them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from distrec.batch import Batch, ItemBatch, Jagged
from distrec.config import LossConfig
from distrec.dataset import TrainRows
from distrec.errors import ConfigError, DataError
from distrec.metrics.evaluation import ModelScorer
from distrec.model import ModelSpec, Objective, UnifiedModel, losses, resolve_loss_kind
from distrec.model.losses import (
    LeftOut,
    binary_loss,
    calibration_exponent,
    pairwise_loss,
    sampled_binary_loss,
    sampled_loss_sum,
    sampled_softmax_loss,
    softmax_loss_sum,
    squared_loss,
)
from distrec.model.positions import Positions, window_targets
from distrec.model.sampling import Negatives, NegativeSampler
from distrec.model.step_inputs import select_items
from tests.unit.test_model import (
    BATCH,
    SPEC,
    InMemoryTables,
    make_batch,
    make_catalogue,
    make_model,
)

OF_CATALOGUE = ("softmax", "sampled_softmax", "sampled_binary", "bpr")
KINDS = (*OF_CATALOGUE, "binary")


def make_objective(model: UnifiedModel, kind: str, **settings: object) -> Objective:
    config = LossConfig.model_validate({"kind": kind, "num_negatives": 5, "l2": 0.0, **settings})
    return Objective(model, make_catalogue(model.spec), config, seed=1)


def loss_of(objective: Objective, tables: InMemoryTables, batch: Batch, step: int = 0) -> Tensor:
    rows = tables(objective.requests(batch, step))
    return objective.loss_sum(batch, rows, step)[0]


# --- the losses by hand --------------------------------------------------------------------------


def test_softmax_by_hand() -> None:
    # e^s = 1, 2, 5, of which the positive is the 2: 2 / 8
    users = torch.ones(1, 1)
    items = torch.log(torch.tensor([[1.0], [2.0], [5.0]]))
    positive, weight = torch.tensor([1]), torch.tensor([3.0])
    loss = softmax_loss_sum(users, items, positive, weight).item()
    assert loss == pytest.approx(3 * math.log(4))
    smooth = softmax_loss_sum(users, items, positive, weight, label_smoothing=0.3).item()
    # p = 1/8, 2/8, 5/8; target 0.1, 0.8, 0.1
    by_hand = -(0.1 * math.log(1 / 8) + 0.8 * math.log(2 / 8) + 0.1 * math.log(5 / 8))
    assert smooth == pytest.approx(3 * by_hand, rel=1e-5)


# of five users: one item twice, the positive itself, none, one that is no candidate
LEFT_OUT = LeftOut(
    columns=torch.tensor([1, 0, 1, 4, 3, 2, -1]),
    starts=torch.tensor([0, 3, 5, 5, 3]),
    lengths=torch.tensor([3, 2, 0, 2, 1]),
)
LEFT_OUT_BY_HAND = [{0, 1}, {3, 4}, set(), {2}, {4}]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("left_out", [None, LEFT_OUT])
def test_softmax_in_blocks_is_torchs_own_with_its_gradients(
    smoothing: float, left_out: LeftOut | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    # blocks of two users and a rest of one
    monkeypatch.setattr(losses, "SCORES_PER_BLOCK", 17)
    monkeypatch.setattr(losses, "_FEWEST_ROWS", 1)
    users = torch.randn(5, 4, generator=generator, requires_grad=True)
    items = torch.randn(7, 4, generator=generator, requires_grad=True)
    positives, weights = torch.tensor([0, 3, 6, 2, 3]), torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0])
    parts = []
    none = LEFT_OUT_BY_HAND if left_out is not None else [set()] * 5
    for user, positive, out in zip(users, positives.tolist(), none, strict=True):
        rest = [item for item in range(7) if item == positive or item not in out]
        target = torch.tensor(rest.index(positive))
        parts.append(
            functional.cross_entropy(items[rest] @ user, target, label_smoothing=smoothing)
        )
    expected = (weights * torch.stack(parts)).sum()
    found = softmax_loss_sum(users, items, positives, weights, smoothing, left_out)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected / 3, (users, items))
    torch.testing.assert_close(torch.autograd.grad(found / 3, (users, items)), wanted)


def test_binary_by_hand() -> None:
    scores = torch.tensor([math.log(3.0), math.log(3.0)])  # a probability of 3/4
    losses = binary_loss(scores, torch.tensor([1.0, 0.0]))
    np.testing.assert_allclose(losses, [-math.log(3 / 4), -math.log(1 / 4)], rtol=1e-6)
    smooth = binary_loss(scores[:1], torch.ones(1), label_smoothing=0.2).item()
    assert smooth == pytest.approx(-(0.9 * math.log(3 / 4) + 0.1 * math.log(1 / 4)), rel=1e-5)


def test_squared_by_hand() -> None:
    # ratings 3, 4 and 6, which is not on the scale
    found = squared_loss(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([5.0, 3.5, 5.0]), (1.0, 5.0))
    np.testing.assert_allclose(found, [4.0, 0.25, 1.0], rtol=1e-6)


def test_sampled_softmax_by_hand_leaves_accidental_hits_out() -> None:
    positive = torch.log(torch.tensor([2.0]))
    negatives = torch.log(torch.tensor([[1.0, 2.0, 5.0]]))
    log_weights = torch.log(torch.tensor([3.0, 7.0, 0.5]))
    is_positive = torch.tensor([[False, True, False]])
    loss = sampled_softmax_loss(positive, negatives, log_weights, is_positive)
    # 2 / (2 + 3 * 1 + 0.5 * 5); the item drawn by accident does not count
    assert loss.item() == pytest.approx(-math.log(2 / 7.5), rel=1e-5)


def test_sampled_binary_by_hand() -> None:
    # probabilities 3/4 of the positive; 1/2, 9/10 and 1/5 of the negatives, of which 9/10 is itself
    positive = torch.log(torch.tensor([3.0]))
    negatives = torch.log(torch.tensor([[1.0, 9.0, 0.25]]))
    times = torch.tensor([2.0, 5.0, 1.0])
    is_positive = torch.tensor([[False, True, False]])
    loss = sampled_binary_loss(positive, negatives, times, is_positive, beta=0.3).item()
    by_hand = -(0.3 * math.log(3 / 4) + 2 * math.log(1 / 2) + math.log(4 / 5))
    assert loss == pytest.approx(by_hand, rel=1e-5)


def test_sampled_binary_is_torchs_own_cross_entropy_at_beta_one() -> None:
    scores = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(6, 5)
    labels[:, 0] = 1.0
    found = sampled_binary_loss(
        scores[:, 0], scores[:, 1:], torch.ones(4), torch.zeros(6, 4, dtype=torch.bool)
    )
    plain = torch.nn.BCEWithLogitsLoss(reduction="none")(scores, labels).sum(dim=1)
    torch.testing.assert_close(found, plain)


def test_calibration_exponent_by_hand() -> None:
    assert calibration_exponent(256, 3417, 0.0) == 1.0
    assert calibration_exponent(256, 3417, 1.0) == pytest.approx(256 / 3416)
    rate = 256 / 3416
    # as the paper writes it
    expected = rate * (0.75 * (1 - 1 / rate) + 1 / rate)
    assert calibration_exponent(256, 3417, 0.75) == pytest.approx(expected)
    assert calibration_exponent(256, 100, 0.75) == 1.0


def test_calibration_takes_back_what_sampling_does_to_probabilities() -> None:
    """One user, whose events are of item 0 with 3/10: the best scores give its share."""
    share, num_items = torch.tensor([0.3, 0.2, 0.25, 0.15, 0.1]), 5
    found = {}
    for t in (0.0, 1.0):
        scores = torch.zeros(num_items, requires_grad=True)
        optimizer = torch.optim.Adam([scores], lr=0.05)
        beta = calibration_exponent(1, num_items, t)
        for _ in range(1500):
            optimizer.zero_grad()
            # one negative of the four others, in expectation
            others = (~torch.eye(num_items, dtype=torch.bool)).float() / 4
            positive = beta * torch.nn.functional.softplus(-scores)
            losses = positive + others @ torch.nn.functional.softplus(scores)
            (share * losses).sum().backward()
            optimizer.step()
        found[t] = torch.sigmoid(scores).detach()
    torch.testing.assert_close(found[1.0], share, atol=1e-3, rtol=0)
    assert float(found[0.0][0]) == pytest.approx(0.3 / (0.3 + 0.7 / 4), abs=1e-3)


def test_bpr_by_hand() -> None:
    positive = torch.log(torch.tensor([4.0, 4.0]))
    negatives = torch.log(torch.tensor([[1.0, 2.0], [1.0, 2.0]]))
    is_positive = torch.tensor([[False, False], [True, True]])
    losses = pairwise_loss(positive, negatives, torch.tensor([1.0, 3.0]), is_positive)
    # chances 4/5 and, three times, 4/6; the second example has accidental hits only
    by_hand = [-(math.log(4 / 5) + 3 * math.log(4 / 6)) / 4, 0.0]
    np.testing.assert_allclose(losses, by_hand, rtol=1e-6)


@pytest.mark.parametrize("left_out", [None, LEFT_OUT])
def test_a_sampled_loss_in_blocks_is_that_of_all_scores_with_its_gradients(
    left_out: LeftOut | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    # blocks of two users and a rest of one
    monkeypatch.setattr(losses, "SCORES_PER_BLOCK", 7)
    monkeypatch.setattr(losses, "_FEWEST_ROWS", 1)
    users = torch.randn(5, 4, generator=generator, requires_grad=True)
    items = torch.randn(6, 4, generator=generator, requires_grad=True)
    positives, negatives = torch.tensor([0, 3, 5, 2, 3]), torch.tensor([1, 3, 4, 0, 2])
    weights = torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0])
    times = torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0])

    def loss(own: Tensor, others: Tensor, hits: Tensor) -> Tensor:
        return sampled_binary_loss(own, others, times, hits, beta=0.5)

    own = (users * items[positives]).sum(dim=1)
    hits = positives.unsqueeze(1) == negatives
    if left_out is not None:
        for user, places in enumerate(LEFT_OUT_BY_HAND):
            hits[user, list(places)] = True
    expected = (weights * loss(own, users @ items[negatives].T, hits)).sum()
    found = sampled_loss_sum(loss, users, items, positives, negatives, weights, left_out)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected / 3, (users, items))
    torch.testing.assert_close(torch.autograd.grad(found / 3, (users, items)), wanted)


def test_sampling_every_item_as_often_as_expected_is_the_full_softmax() -> None:
    scores = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    positives = torch.tensor([0, 3, 6, 2, 3])
    is_positive = positives.unsqueeze(1) == torch.arange(7)
    own = scores.gather(1, positives.unsqueeze(1)).squeeze(1)
    sampled = sampled_softmax_loss(own, scores, torch.zeros(7), is_positive)
    torch.testing.assert_close(
        sampled, torch.nn.CrossEntropyLoss(reduction="none")(scores, positives)
    )


def test_sampled_partition_function_is_right_in_expectation() -> None:
    counts = torch.tensor([100, 30, 10, 3, 1, 0])
    sampler = NegativeSampler(counts, "popularity", power=0.75, num_negatives=8, seed=5)
    scores = np.array([0.5, -0.2, 1.0, 0.3, 0.1, -1.0])
    estimates = []
    for step in range(4000):
        drawn = sampler.draw(step)
        loss = sampled_softmax_loss(
            torch.tensor([scores[2]]),
            torch.from_numpy(scores)[drawn.places].unsqueeze(0),
            drawn.log_weights.double(),
            (drawn.places == 2).unsqueeze(0),
        )
        estimates.append(math.exp(loss.item() + scores[2]))
    assert np.mean(estimates) == pytest.approx(np.exp(scores).sum(), rel=0.02)


def test_negatives_follow_the_counts_and_only_the_seed_and_the_step_decide() -> None:
    counts = torch.tensor([15, 0, 80])
    settings = {"source": "popularity", "power": 0.5, "num_negatives": 10_000}
    sampler = NegativeSampler(counts, **settings, seed=2)
    drawn = sampler.draw(7)
    expected = np.array([4.0, 1.0, 9.0]) / 14  # roots of count + 1
    times = np.exp(drawn.log_weights.numpy()) * 10_000 * expected
    assert drawn.places.tolist() == [0, 1, 2]
    np.testing.assert_allclose(drawn.times, times, rtol=1e-4)
    assert times.sum() == pytest.approx(10_000, rel=1e-4)
    np.testing.assert_allclose(times / 10_000, expected, atol=0.015)
    again = NegativeSampler(counts, **settings, seed=2).draw(7)
    torch.testing.assert_close(again.log_weights, drawn.log_weights, rtol=0, atol=0)
    assert not torch.equal(sampler.draw(8).log_weights, drawn.log_weights)
    other = NegativeSampler(counts, **settings, seed=3).draw(7)
    assert not torch.equal(other.log_weights, drawn.log_weights)


def test_negatives_by_source_by_hand() -> None:
    counts = torch.tensor([6, 3, 1])
    targets = torch.tensor([1, 0, 0, 0, 1])

    def draw(source: str) -> Negatives:
        return NegativeSampler(counts, source, 1.0, 9000, seed=2).draw(0, targets)

    uniform = draw("uniform")
    np.testing.assert_allclose(uniform.times / 9000, [1 / 3] * 3, atol=0.02)
    np.testing.assert_allclose(uniform.log_weights, np.log(uniform.times / 3000), atol=1e-6)
    in_batch = draw("in_batch")
    assert in_batch.places.tolist() == [0, 1]
    assert in_batch.times.tolist() == [3.0, 2.0]
    # four others, whose targets are events
    np.testing.assert_allclose(in_batch.log_weights, np.log([3 / 2.4, 2 / 1.2]), rtol=1e-6)
    mixed = draw("mixed")
    assert (mixed.times - uniform.times).tolist() == [3.0, 2.0, 0.0]
    expected = np.log(mixed.times.numpy() / [3002.4, 3001.2, 3000.4])
    np.testing.assert_allclose(mixed.log_weights, expected, atol=1e-6)
    lonely = NegativeSampler(counts, "in_batch", 1.0, 9, seed=2).draw(0, targets[:1])
    assert bool(lonely.log_weights.isfinite().all())


@pytest.mark.parametrize("source", ["in_batch", "mixed"])
def test_partition_function_with_the_targets_of_others_is_right_in_expectation(source: str) -> None:
    counts = torch.tensor([100, 30, 10, 3, 1])
    sampler = NegativeSampler(counts, source, 0.75, num_negatives=4, seed=5)
    scores = np.array([0.5, -0.2, 1.0, 0.3, 0.1])
    generator = np.random.default_rng(0)
    estimates = []
    for step in range(4000):
        others = generator.choice(5, size=7, p=counts.numpy() / 144)
        drawn = sampler.draw(step, torch.from_numpy(np.append(others, 2)))
        loss = sampled_softmax_loss(
            torch.tensor([scores[2]]),
            torch.from_numpy(scores)[drawn.places].unsqueeze(0),
            drawn.log_weights.double(),
            (drawn.places == 2).unsqueeze(0),
        )
        estimates.append(math.exp(loss.item() + scores[2]))
    # the standard error is 1.5 %
    assert np.mean(estimates) == pytest.approx(np.exp(scores).sum(), rel=0.05)


# --- the objective -------------------------------------------------------------------------------


def test_softmax_objective_against_numpy() -> None:
    model = make_model(towers=("cf",))
    tables = InMemoryTables(model)
    objective = make_objective(model, "softmax", l2=0.1, table_l2={"user": 0.3, "item_bias": 0.2})
    # a positive, a negative, an unknown item, a cold item, a positive; weights 1 to 5
    batch = make_batch(
        [2, 3, 4, 5, 3], [2, 4, 1, 9, 7], [[], [3], [], [4], [2]], [1.0, 0.0, 1.0, 1.0, 1.0]
    )
    rows = tables(objective.requests(batch, 0))
    total, parts = objective.loss_sum(batch, rows, 0)
    user, item, bias = (
        tables.weights[name].detach().numpy().astype(np.float64)
        for name in ("user", "item", "item_bias")
    )
    loss = l2 = 0.0
    for u, i, weight in ((2, 2, 1.0), (3, 7, 5.0)):
        scores = user[u] @ item[2:8].T + bias[2:8].sum(axis=1)  # trained items only
        loss += weight * (np.log(np.exp(scores).sum()) - scores[i - 2])
        norms = 0.3 * (user[u] ** 2).sum() + 0.1 * (item[i] ** 2).sum() + 0.2 * (bias[i] ** 2).sum()
        l2 += weight * norms
    assert parts["loss"] == pytest.approx(loss, rel=1e-5)
    assert parts["l2"] == pytest.approx(l2, rel=1e-5)
    assert total.item() == pytest.approx(loss + l2, rel=1e-5)
    assert objective.weight_sum(batch).item() == 6.0


def test_binary_objective_learns_from_negatives_and_cold_items() -> None:
    model = make_model(towers=("cf",))
    tables = InMemoryTables(model)
    objective = make_objective(model, "binary")
    batch = make_batch([2, 3, 4], [2, 9, 1], [[], [], []], [1.0, 0.0, 1.0])
    user, item, bias = (
        tables.weights[name].detach().numpy() for name in ("user", "item", "item_bias")
    )
    expected = 0.0
    for u, row, label, weight in ((2, 2, 1, 1.0), (3, 1, 0, 2.0)):  # 9 is cold, 1 has no place
        score = float(user[u] @ item[row] + bias[row].sum())
        chance = 1 / (1 + math.exp(-score))
        expected -= weight * math.log(chance if label else 1 - chance)
    assert loss_of(objective, tables, batch).item() == pytest.approx(expected, rel=1e-5)
    assert objective.weight_sum(batch).item() == 3.0


def test_squared_objective_has_a_bias_of_the_user_and_learns_from_cold_items() -> None:
    spec = SPEC.model_copy(update={"rating_scale": (1.0, 5.0)})
    model = make_model(spec, towers=("cf",))
    tables = InMemoryTables(model)
    objective = make_objective(model, "auto")
    assert objective.kind == "squared"
    batch = make_batch([2, 3, 4], [2, 9, 1], [[], [], []], [4.5, 1.0, 2.0])
    user, item, bias, user_bias = (
        tables.weights[name].detach().numpy() for name in ("user", "item", "item_bias", "user_bias")
    )
    expected = 0.0
    for u, row, rating, weight in ((2, 2, 4.5, 1.0), (3, 1, 1.0, 2.0)):  # 9 is cold, 1 no item
        score = float(user[u] @ item[row] + bias[row].sum() + user_bias[u].sum())
        expected += weight * (3.0 + score - rating) ** 2
    assert loss_of(objective, tables, batch).item() == pytest.approx(expected, rel=1e-5)
    assert objective.weight_sum(batch).item() == 3.0


def test_the_pair_head_is_as_small_as_it_is_asked_to_be() -> None:
    spec = SPEC.model_copy(update={"has_labels": True})
    model = make_model(spec, pair_crosses=1, pair_cross_rank=3, pair_hidden=())
    width = 2 * model.vector_width
    # two maps of rank 3 with a bias, then one linear map
    assert (
        sum(part.numel() for part in model.pair_head.parameters()) == 2 * 3 * width + 2 * width + 1
    )


def test_the_pair_head_counts_in_the_loss_of_labels_and_in_no_other() -> None:
    spec = SPEC.model_copy(update={"has_labels": True})
    model = make_model(spec, pair_crosses=2)
    tables = InMemoryTables(model)
    objective = make_objective(model, "binary")
    batch = make_batch([2, 3, 4], [2, 9, 5], [[3], [], [2]], [1.0, 0.0, 1.0])
    catalogue = make_catalogue(spec)
    rows = tables({**model.user_requests(batch), **model.item_requests(catalogue)})
    users = model.encode_users(batch, rows)
    items = model.encode_items(catalogue, rows)[batch.item_index - 2]
    inputs = crossed = torch.cat([users, items], dim=1)
    for layer in model.pair_head.crosses.layers:
        crossed = inputs * (crossed @ layer.weight.T + layer.bias) + crossed
    added = model.pair_head.network(crossed)[:, 0]
    assert float(added.detach().abs().min()) > 1e-5
    scores = (users * items).sum(dim=1) + added
    plain = torch.nn.BCEWithLogitsLoss(weight=batch.weights, reduction="sum")
    expected = plain(scores, batch.labels[:, 0])
    loss = loss_of(objective, tables, batch)
    torch.testing.assert_close(loss, expected.reshape(1))
    loss.backward()
    assert all(part.grad.abs().sum() > 0 for part in model.pair_head.parameters())
    measured, is_known = ModelScorer(
        model, tables, model.encode_items(catalogue, rows).detach()
    ).score_examples(batch)
    torch.testing.assert_close(measured[:, 0], scores)
    assert is_known.tolist() == [True] * 3
    with pytest.raises(ConfigError, match=r"Received: pair_crosses = 2 with softmax. Set it to 0"):
        make_objective(model, "softmax")


def test_squared_loss_of_data_without_ratings_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs ratings. Received: a dataset without"):
        resolve_loss_kind(SPEC, LossConfig(kind="squared"))


def test_sampled_objective_masks_the_positive_among_the_negatives() -> None:
    spec = SPEC.model_copy(update={"num_trained_items": 3, "num_items": 4})
    model = make_model(spec)
    batch = make_batch([2, 3], [2, 2], [[2], []])
    # the one trained item is everybody's positive, so every negative is an accident
    loss = loss_of(make_objective(model, "sampled_softmax"), InMemoryTables(model), batch)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_sampled_objective_meets_the_full_one_with_many_negatives() -> None:
    model = make_model()
    tables = InMemoryTables(model)
    full = loss_of(make_objective(model, "softmax"), tables, BATCH).item()
    sampled = make_objective(model, "sampled_softmax", num_negatives=400_000)
    assert loss_of(sampled, tables, BATCH).item() == pytest.approx(full, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_a_free_index_is_no_candidate(kind: str) -> None:
    """The index 5 stands for no item: the loss does not know its row or its place."""
    model = make_model()
    tables = InMemoryTables(model)
    catalogue = make_catalogue(model.spec)
    counts = torch.where(catalogue.item_index == 5, -1, catalogue.count)
    config = LossConfig.model_validate({"kind": kind, "num_negatives": 400_000, "l2": 0.0})
    objective = Objective(model, replace(catalogue, count=counts), config, seed=1)
    batch = make_batch([2, 3, 5], [2, 4, 7], [[3, 4], [], [2, 3]])
    asked = objective.requests(batch, 0)["item.item"].ids.values.tolist()
    assert 5 not in asked
    assert {2, 4, 7} <= set(asked)
    loss = loss_of(objective, tables, batch).item()
    rows = tables({**model.user_requests(batch), **model.item_requests(catalogue)})
    scores = model.encode_users(batch, rows) @ model.encode_items(catalogue, rows).T
    own = scores[torch.arange(3), batch.item_index - 2].detach()
    trained = scores[:, [index - 2 for index in (2, 3, 4, 6, 7)]].detach()
    is_other = trained != own.unsqueeze(1)
    # in proportion to (count + 1) ** 0.75, and the positive itself left out
    share = (counts[[0, 1, 2, 4, 5]] + 1.0) ** 0.75
    times = is_other * 400_000 * share / share.sum()
    share = times / times.sum(dim=1, keepdim=True)
    expected = {
        "binary": torch.log1p(torch.exp(-own)),
        # beside so many negatives the positive is nothing
        "sampled_binary": (times * torch.log1p(torch.exp(trained))).sum(dim=1),
        "bpr": (share * torch.log1p(torch.exp(trained - own.unsqueeze(1)))).sum(dim=1),
    }.get(kind, torch.logsumexp(trained, 1) - own)
    is_exact = kind in ("softmax", "binary")
    assert loss == pytest.approx(
        float((batch.weights * expected).sum()), rel=1e-5 if is_exact else 1e-2
    )


@pytest.mark.parametrize("kind", OF_CATALOGUE)
@pytest.mark.parametrize("train_rows", ["events", "windows"])
@pytest.mark.parametrize("has_free", [False, True])
def test_what_was_seen_is_no_candidate(kind: str, train_rows: TrainRows, has_free: bool) -> None:
    """Histories hold items twice, the target itself, unknown, cold and free ones."""
    model = make_model()
    tables = InMemoryTables(model)
    catalogue = make_catalogue(model.spec)
    counts = torch.where(catalogue.item_index == 5, -1, catalogue.count)
    if has_free:
        catalogue = replace(catalogue, count=counts)
    config = LossConfig.model_validate({"kind": kind, "num_negatives": 400_000, "l2": 0.0})
    objective = Objective(model, catalogue, config, 1, train_rows, exclude_seen=True)
    # a free index is no target
    histories = [[3, 4, 3], [], [2, 1, 7, 9], [5 if train_rows == "events" else 8, 6]]
    batch = make_batch([2, 3, 5, 4], [2, 4, 7, 3], histories)
    times = torch.arange(len(batch.history.values))
    batch = replace(
        batch,
        history_times=Jagged(times, batch.history.offsets),
        time=torch.full((4,), len(times)),
    )
    positions, targets = Positions.ends(batch), batch.item_index
    if train_rows == "windows":
        positions, targets = window_targets(batch)
    candidates = [index for index in range(2, 8) if index != 5 or not has_free]
    rows = tables({**model.user_requests(batch, positions), **model.item_requests(catalogue)})
    users = model.encode_users(batch, rows, positions)
    vectors = model.encode_items(catalogue, rows)[[index - 2 for index in candidates]]
    share = (catalogue.count[[index - 2 for index in candidates]] + 1.0) ** 0.75
    expected, num_targets = 0.0, 0
    examples = zip(positions.example, positions.length, targets.tolist(), users, strict=True)
    for example, length, target, user in examples:
        if target not in candidates:
            continue
        num_targets += 1
        seen = set(histories[example][:length])
        scores = (vectors @ user).detach()
        own = scores[candidates.index(target)]
        is_other = torch.tensor([index not in seen | {target} for index in candidates])
        others = scores[is_other]
        times = 400_000 * (share / share.sum())[is_other]
        losses = {
            "sampled_binary": (times * functional.softplus(others)).sum(),
            "bpr": (times * functional.softplus(others - own)).sum() / times.sum(),
        }
        softmax = torch.logsumexp(torch.cat([own.reshape(1), others]), 0) - own
        expected += float(batch.weights[example] * losses.get(kind, softmax))
    assert num_targets == (4 if train_rows == "events" else 10)
    found = objective.loss_sum(batch, tables(objective.requests(batch, 0)), 0)[0].item()
    assert found == pytest.approx(expected, rel=1e-5 if kind == "softmax" else 1e-2)
    without = loss_of(Objective(model, catalogue, config, 1, train_rows), tables, batch).item()
    assert abs(without - found) > 1e-3 * found


def test_histories_without_a_target_leave_nothing_out() -> None:
    """Nor is anything drawn, where negatives are the targets of a batch that has none."""
    model = make_model()
    config = LossConfig(kind="sampled_softmax", negatives="in_batch", l2=0.0)
    objective = Objective(model, make_catalogue(), config, 1, exclude_seen=True)
    batch = make_batch([2, 3], [1, 9], [[3, 4], [5]])
    assert loss_of(objective, InMemoryTables(model), batch).item() == 0.0


def test_what_was_seen_is_not_left_out_of_losses_of_labels() -> None:
    model = make_model(SPEC.model_copy(update={"has_labels": True}))
    with pytest.raises(ConfigError, match=r"Received: exclude_seen = true with binary. Set it to"):
        make_objective(model, "binary", exclude_seen=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_the_sum_of_its_parts(kind: str) -> None:
    model = make_model()
    tables = InMemoryTables(model)
    objective = make_objective(model, kind, l2=0.01)
    users, items = [2, 3, 5, 1, 4], [2, 4, 7, 3, 4]
    histories = [[3, 4], [], [2, 3, 5, 6], [9], [2]]
    labels = [1.0, 0.0, 1.0, 1.0, 1.0]
    whole = make_batch(users, items, histories, labels)
    parts = []
    for start, stop in ((0, 3), (3, 5), (5, 5)):
        cut = slice(start, stop)
        part = make_batch(users[cut], items[cut], histories[cut], labels[cut])
        parts.append(replace(part, weights=whole.weights[cut], dense=whole.dense[cut]))
    together = loss_of(objective, tables, whole, 3)
    apart = torch.stack([loss_of(objective, tables, part, 3) for part in parts]).sum(dim=0)
    assert together.item() > 1.0
    torch.testing.assert_close(apart, together)
    weights = [objective.weight_sum(part).item() for part in parts]
    assert (
        sum(weights) == objective.weight_sum(whole).item() == (15.0 if kind == "binary" else 13.0)
    )


def _opened_gates(model: UnifiedModel) -> None:
    for gate in (model.user_gate, model.item_gate):
        torch.nn.init.normal_(gate.output.weight, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("normalize", [False, True])
def test_each_towers_own_loss_is_that_of_its_vectors_before_the_gate(normalize: bool) -> None:
    model = make_model(temperature=0.5, normalize=normalize)
    tables = InMemoryTables(model)
    batch = make_batch([2, 3, 5], [2, 4, 7], [[3, 4], [], [2, 3, 5, 6]])
    items = select_items(make_catalogue(SPEC), torch.arange(SPEC.num_trained_items - 2))
    rows = tables({**model.user_requests(batch), **model.item_requests(items)})
    # all weights are 1 before training
    users, vectors = model.encode_users(batch, rows), model.encode_items(items, rows)
    parts = model.part_scores(users, vectors)
    positives = batch.item_index - 2
    own = sum(
        (batch.weights * functional.cross_entropy(part + parts[-3], positives, reduction="none"))
        for part in parts[:-3]
    )
    _opened_gates(model)
    plain = loss_of(make_objective(model, "softmax"), tables, batch)
    with_towers = loss_of(make_objective(model, "softmax", towers=0.3), tables, batch)
    assert float(own.detach().sum()) > 1.0
    torch.testing.assert_close(with_towers - plain, 0.3 * own.sum().reshape(1))


@pytest.mark.parametrize("kind", OF_CATALOGUE)
def test_gradients_of_the_towers_own_losses_add_up_over_weights(kind: str) -> None:
    model = make_model()
    _opened_gates(model)
    tables = InMemoryTables(model)
    batch = make_batch([2, 3, 5], [2, 4, 7], [[3, 4], [], [2, 3, 5, 6]])

    def gradients(towers: float, adversarial: float = 0.0) -> dict[str, Tensor]:
        objective = make_objective(model, kind, towers=towers, adversarial=adversarial)
        rows = tables(objective.requests(batch, 3))
        wanted = {**rows, **dict(model.named_parameters())}
        total = objective.loss_sum(batch, rows, 3)[0].sum()
        found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
        return {n: g for n, g in zip(wanted, found, strict=True) if g is not None}

    none, half, whole = gradients(0.0), gradients(0.5), gradients(1.0)
    moved = max(float((whole[name] - none[name]).abs().max()) for name in none)
    assert moved > 1e-3
    # rows moved by next to nothing have the same loss once more
    twice = gradients(0.5, adversarial=1e-6)
    for name, gradient in none.items():
        middle = (gradient + whole[name]) / 2
        torch.testing.assert_close(half[name], middle, rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(twice[name], 2 * half[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("kind", OF_CATALOGUE)
def test_with_the_towers_own_losses_a_batch_is_the_sum_of_its_parts(kind: str) -> None:
    model = make_model()
    _opened_gates(model)
    tables = InMemoryTables(model)
    objective = make_objective(model, kind, towers=0.7)
    users, items, histories = [2, 3, 5, 1], [2, 4, 7, 3], [[3, 4], [], [2, 3, 5, 6], [9]]
    whole = make_batch(users, items, histories)
    parts = []
    for start, stop in ((0, 3), (3, 4), (4, 4)):
        cut = slice(start, stop)
        part = make_batch(users[cut], items[cut], histories[cut])
        parts.append(replace(part, weights=whole.weights[cut], dense=whole.dense[cut]))
    together = loss_of(objective, tables, whole, 3)
    apart = torch.stack([loss_of(objective, tables, part, 3) for part in parts]).sum(dim=0)
    assert together.item() > 1.0
    torch.testing.assert_close(apart, together)


def test_the_towers_own_losses_are_refused_for_labels_and_nothing_with_one_tower() -> None:
    spec = SPEC.model_copy(update={"has_labels": True})
    with pytest.raises(ConfigError, match=r"Received: towers = 0.5 with binary. Set it to 0"):
        make_objective(make_model(spec), "binary", towers=0.5)
    model = make_model(towers=("cf",))
    tables = InMemoryTables(model)
    batch = make_batch([2, 3], [2, 4], [[3, 4], []])
    losses = [
        loss_of(make_objective(model, "softmax", towers=towers), tables, batch)
        for towers in (0.0, 2.0)
    ]
    assert losses[0].item() == losses[1].item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("id_dropout", [0.0, 0.5])
def test_no_examples_give_zero_gradients_everywhere(kind: str, id_dropout: float) -> None:
    model = make_model(dropout=0.5, input_dropout=0.5, id_dropout=id_dropout)
    objective = make_objective(model, kind, l2=0.1)
    batch = make_batch([], [], [])
    rows = InMemoryTables(model)(objective.requests(batch, 0))
    for row in rows.values():
        row.retain_grad()
    total, _ = objective.loss_sum(batch, rows, 0)
    total.backward()
    assert total.item() == 0.0
    assert objective.weight_sum(batch).item() == 0.0
    for name, tensor in [*rows.items(), *model.named_parameters()]:
        assert tensor.grad is not None, name
        assert tensor.grad.abs().sum() == 0, name


def test_the_same_rows_are_asked_for_twice_in_a_step() -> None:
    model = make_model()
    objective = make_objective(model, "sampled_softmax")
    first = objective.requests(BATCH, 4)["item.item"].ids.values
    other_rank = make_objective(model, "sampled_softmax")
    other_rank.requests(BATCH, 3)
    assert torch.equal(other_rank.requests(BATCH, 4)["item.item"].ids.values, first)
    steps = {
        tuple(objective.requests(BATCH, step)["item.item"].ids.values.tolist()) for step in range(9)
    }
    assert len(steps) > 1


def test_kind_auto() -> None:
    labelled = SPEC.model_copy(update={"has_labels": True})
    assert resolve_loss_kind(labelled, LossConfig()) == "binary"
    assert resolve_loss_kind(SPEC, LossConfig(full_softmax_items=6)) == "softmax"
    assert resolve_loss_kind(SPEC, LossConfig(full_softmax_items=5)) == "sampled_softmax"
    with pytest.raises(ConfigError, match=r"Received: loss.label_smoothing = 0.1 with sampled"):
        resolve_loss_kind(SPEC, LossConfig(full_softmax_items=5, label_smoothing=0.1))
    with pytest.raises(ConfigError, match=r"Received: loss.label_smoothing = 0.1 with bpr"):
        resolve_loss_kind(SPEC, LossConfig(kind="bpr", label_smoothing=0.1))


def test_a_catalogue_with_a_gap_is_refused() -> None:
    short = select_items(make_catalogue(), torch.tensor([0, 1, 3]))
    with pytest.raises(DataError, match=r"items 2 to 9, ascending.*Received: 3 other"):
        Objective(make_model(), short, LossConfig(), seed=1)


def test_selected_items_keep_their_features() -> None:
    items = ItemBatch(
        item_index=torch.tensor([2, 3, 4]),
        count=torch.tensor([9, 5, 1]),
        recent=torch.tensor([2, 0, 1]),
        ids={"item_tags": Jagged.from_lists([[5, 6], [], [7]])},
        dense=torch.tensor([[0.1], [0.2], [0.3]]),
    )
    chosen = select_items(items, torch.tensor([2, 1, 0, 2]))
    assert chosen.item_index.tolist() == [4, 3, 2, 4]
    assert chosen.count.tolist() == [1, 5, 9, 1]
    assert chosen.recent.tolist() == [1, 0, 2, 1]
    assert chosen.ids["item_tags"].values.tolist() == [7, 5, 6, 7]
    assert chosen.ids["item_tags"].lengths.tolist() == [1, 0, 2, 1]
    assert chosen.dense.squeeze(1).tolist() == pytest.approx([0.3, 0.2, 0.1, 0.3])


# --- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("towers", [("cf",), ("autoencoder",), ("cf", "autoencoder", "deep")])
@pytest.mark.parametrize("kind", OF_CATALOGUE)
def test_on_a_checkerboard_the_withheld_item_ranks_first(towers: tuple, kind: str) -> None:
    size = 10
    spec = ModelSpec(
        features=(), num_users=size + 2, num_trained_items=size + 2, num_items=size + 2,
        history_length=size, has_labels=False,
    )  # fmt: skip
    liked = {u: [i for i in range(2, size + 2) if (u + i) % 2 == 0] for u in range(2, size + 2)}
    withheld = {u: items[(u * 3) % len(items)] for u, items in liked.items()}
    known = {u: [i for i in items if i != withheld[u]] for u, items in liked.items()}
    pairs = [(u, i) for u, items in known.items() for i in items]
    model = make_model(spec, towers=towers)
    tables = InMemoryTables(model, scale=0.05)
    catalogue = ItemBatch(
        torch.arange(2, size + 2),
        torch.full((size,), 4),
        torch.zeros(size, dtype=torch.int64),
        {},
        torch.zeros(size, 0),
    )
    config = LossConfig(kind=kind, num_negatives=40, l2=0.01)
    objective = Objective(model, catalogue, config, seed=1)
    batch = bare_batch(
        [u for u, _ in pairs],
        [i for _, i in pairs],
        [[j for j in known[u] if j != i] for u, i in pairs],
    )
    optimizer = torch.optim.Adam([*model.parameters(), *tables.weights.values()], lr=0.02)
    for step in range(150):
        optimizer.zero_grad()
        (loss_of(objective, tables, batch, step) / objective.weight_sum(batch)).backward()
        optimizer.step()
    model.eval()
    queries = bare_batch(list(known), [0] * size, list(known.values()))
    rows = tables({**model.user_requests(queries), **model.item_requests(catalogue)})
    scores = model.encode_users(queries, rows) @ model.encode_items(catalogue, rows).T
    for place, (user, items) in enumerate(known.items()):
        scores[place, torch.tensor(items) - 2] = -torch.inf
        assert int(scores[place].argmax()) + 2 == withheld[user]


def bare_batch(users: list[int], items: list[int], histories: list[list[int]]) -> Batch:
    full = make_batch(users, items, histories)
    return replace(full, weights=torch.ones(len(users)), ids={}, dense=torch.zeros(len(users), 0))
