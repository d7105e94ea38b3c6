"""AUC, log loss and calibration against scikit-learn and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from distrec.errors import DataError
from distrec.metrics.classification import ClassificationMetrics, auc


def examples(size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    # rounded, so that there are ties
    scores = np.round(rng.normal(size=size) * 3, 1).astype(np.float32)
    labels = (rng.random(size) < 1 / (1 + np.exp(-scores / 2))).astype(np.float32)
    weights = rng.choice([0.0, 0.5, 1.0, 3.0], size).astype(np.float32)
    return torch.tensor(scores), torch.tensor(labels), torch.tensor(weights)


@pytest.mark.parametrize("exact", [True, False])
def test_agrees_with_sklearn(exact: bool) -> None:
    scores, labels, weights = examples(3000, 1)
    metrics = ClassificationMetrics(exact_auc=exact)
    for start in range(0, 3000, 700):
        part = slice(start, start + 700)
        metrics.update(scores[part], labels[part], weights[part])
    values = metrics.compute()
    expected = roc_auc_score(labels, scores, sample_weight=weights)
    assert values["auc"] == pytest.approx(expected, abs=1e-9 if exact else 1e-3)
    probabilities = torch.sigmoid(scores.double()).numpy()
    assert values["log_loss"] == pytest.approx(
        log_loss(labels, probabilities, sample_weight=weights)
    )
    assert values["num_examples"] == 3000


def test_auc_by_hand() -> None:
    # pairs (positive, negative): 2 above 1, 2 ties 2, 3 above both
    scores, labels = torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert auc(scores, labels, torch.ones(4)) == (1 + 0.5 + 2) / 4
    assert auc(scores, torch.ones(4), torch.ones(4)) is None
    assert auc(-scores, labels, torch.ones(4)) == 1 - (1 + 0.5 + 2) / 4


def test_calibration_by_hand() -> None:
    metrics = ClassificationMetrics()
    # probabilities 1/4 (twice) and 3/4, in two intervals
    scores = torch.tensor([-math.log(3.0), -math.log(3.0), math.log(3.0)])
    # too low in one, too high in the other
    metrics.update(scores, torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 2.0]))
    values = metrics.compute()
    assert values["calibration"] == pytest.approx((0.25 + 0.25 + 1.5) / 1)
    assert values["calibration_error"] == pytest.approx((abs(0.5 - 1) + abs(1.5 - 0)) / 4)
    assert values["positive_share"] == pytest.approx(1 / 4)


def test_zero_and_negative_zero_are_a_tie() -> None:
    metrics = ClassificationMetrics()
    metrics.update(torch.tensor([0.0, -0.0]), torch.tensor([1.0, 0.0]), torch.ones(2))
    assert metrics.compute()["auc"] == 0.5


def test_scores_far_out_stay_finite() -> None:
    metrics = ClassificationMetrics()
    metrics.update(torch.tensor([1e4, -1e4]), torch.tensor([0.0, 0.0]), torch.ones(2))
    values = metrics.compute()
    assert values["log_loss"] == pytest.approx(5e3)
    assert (values["auc"], values["calibration"]) == (None, None)


def test_the_states_of_two_ranks_add_up_to_the_whole() -> None:
    whole, first, second = (ClassificationMetrics() for _ in range(3))
    scores, labels, weights = examples(400, 2)
    whole.update(scores, labels, weights)
    first.update(scores[:150], labels[:150], weights[:150])
    second.update(scores[150:], labels[150:], weights[150:])
    second.update(*examples(0, 3))
    first.load_state_vector(first.state_vector() + second.state_vector())
    assert first.compute() == pytest.approx(whole.compute(), abs=1e-12)


def test_nothing_measured_is_not_defined() -> None:
    for exact in (True, False):
        values = ClassificationMetrics(exact).compute()
        assert values["num_examples"] == 0
        assert {value for name, value in values.items() if name != "num_examples"} == {None}


def test_nan_is_an_error() -> None:
    with pytest.raises(DataError, match="Received: NaN among 2 examples"):
        ClassificationMetrics().update(torch.tensor([math.nan, 0.0]), torch.ones(2), torch.ones(2))
