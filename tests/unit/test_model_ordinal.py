"""Ordered ratings: probabilities that add up, the loss by hand, and what is predicted."""

from __future__ import annotations

import math

import pytest
import torch

from distrec.config import LossConfig, parse_config
from distrec.errors import ConfigError
from distrec.metrics.evaluation import ModelScorer, inference
from distrec.model import Objective
from distrec.model.losses import rating_of_score
from distrec.model.ordinal import RatingThresholds, ordinal_loss, score_of_levels
from tests.unit.test_model import SPEC, InMemoryTables, make_batch, make_catalogue, make_model

SCALE = (1.0, 5.0)
RATINGS = SPEC.model_copy(update={"rating_scale": SCALE})


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_loss_by_hand() -> None:
    # of 1, 3 and 5
    thresholds = torch.tensor([-0.5, 1.5])
    scores = torch.tensor([0.3, 0.3, 0.3, -40.0, 40.0, 60.0])
    ratings = torch.tensor([1.0, 3.2, 5.0, 1.0, 5.0, 1.0])
    reaches_middle, reaches_top = sigmoid(0.8), sigmoid(-1.2)
    expected = [
        -math.log(1 - reaches_middle),
        -math.log(reaches_middle - reaches_top),  # 3.2 counts as 3
        -math.log(reaches_top),
        0.0,
        0.0,
        60.5,  # a probability that float32 rounds to zero
    ]
    found = ordinal_loss(scores, ratings, thresholds, SCALE)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_probabilities_add_up_and_their_mean_is_predicted() -> None:
    thresholds = torch.tensor([-2.0, -0.3, 0.4, 3.0])
    levels = torch.arange(1.0, 6.0)
    for score in (-3.0, 0.0, 0.1, 2.5):
        scores = torch.full((5,), score)
        chances = (-ordinal_loss(scores, levels, thresholds, SCALE)).exp()
        assert float(chances.sum()) == pytest.approx(1.0, rel=1e-5)
        predicted = rating_of_score(score_of_levels(scores[:1], thresholds), SCALE)
        assert predicted.item() == pytest.approx(float((chances * levels).sum()), rel=1e-5)


def test_thresholds_start_even_and_stay_in_order() -> None:
    thresholds = RatingThresholds(5)
    losses = ordinal_loss(torch.zeros(5), torch.arange(1.0, 6.0), thresholds(), SCALE)
    torch.testing.assert_close(losses, torch.full((5,), math.log(5)))
    with torch.no_grad():
        thresholds.gaps.copy_(torch.tensor([-9.0, 4.0, -3.0]))
    assert bool((thresholds().diff() > 0).all())


def test_training_fits_them_and_examples_get_the_expected_rating() -> None:
    """Nine of ten ratings are 4, one is 1: what a single score cannot say of a symmetric error."""
    model = make_model(RATINGS, towers=("cf",), rating_levels=5)
    tables = InMemoryTables(model, scale=0.0)
    objective = Objective(model, make_catalogue(RATINGS), LossConfig(kind="ordinal", l2=0.0), 1)
    batch = make_batch([2] * 10, [3] * 10, [[4]] * 10, labels=[4.0] * 9 + [1.0])
    batch.weights.fill_(1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for step in range(300):
        optimizer.zero_grad()
        loss, parts = objective.loss_sum(batch, tables(objective.requests(batch, step)), step)
        loss.backward()
        optimizer.step()
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert parts["loss"] / 10 == pytest.approx(entropy, abs=0.03)
    with inference(model):
        catalogue = make_catalogue(RATINGS)
        items = model.encode_items(catalogue, tables(model.item_requests(catalogue)))
        scores, _ = ModelScorer(model, tables, items).score_examples(batch)
    assert rating_of_score(scores, SCALE)[0].item() == pytest.approx(3.7, abs=0.1)


def test_levels_and_loss_go_together() -> None:
    events = {"paths": ["a"], "time": "t", "rating": "r"}
    message = "rating_levels go together. Received: rating_levels = "
    for levels, kind in ((0, "ordinal"), (5, "squared")):
        model = make_model(RATINGS, towers=("cf",), rating_levels=levels)
        with pytest.raises(ConfigError, match=f"{message}{levels} with {kind}"):
            Objective(model, make_catalogue(RATINGS), LossConfig(kind=kind), 1)
        document = {
            "name": "x",
            "prepare": {"events": events, "predict_ratings": True},
            "loss": {"kind": kind},
            "model": {"rating_levels": levels},
        }
        with pytest.raises(ConfigError, match=f"{message}{levels} with kind = '{kind}'"):
            parse_config(document, "the test")
    with pytest.raises(ConfigError, match=r'loss.kind = "ordinal" needs ratings. Received: a dat'):
        Objective(make_model(), make_catalogue(), LossConfig(kind="ordinal"), 1)
    with pytest.raises(ValueError, match=r"are at least three. Received: rating_levels = 2"):
        make_model(rating_levels=2)
