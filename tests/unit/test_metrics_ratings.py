"""RMSE and MAE against numbers worked out by hand, and their sum over ranks."""

from __future__ import annotations

import math

import pytest
import torch

from distrec.errors import DataError
from distrec.metrics.ratings import RatingMetrics

# ratings 3, 4, and 0.2, which is 1 on the scale
SCORES = torch.tensor([0.0, 1.0, -2.8])
RATINGS = torch.tensor([5.0, 4.0, 1.8])
WEIGHTS = torch.tensor([1.0, 5.0, 2.0])


def test_by_hand() -> None:
    metrics = RatingMetrics((1.0, 5.0))
    metrics.update(SCORES, RATINGS, WEIGHTS)
    found = metrics.compute()
    assert found["rmse"] == pytest.approx(math.sqrt((1 * 4 + 5 * 0 + 2 * 0.64) / 8), rel=1e-6)
    assert found["mae"] == pytest.approx((1 * 2 + 5 * 0 + 2 * 0.8) / 8, rel=1e-6)
    assert found["num_examples"] == 3


def test_states_of_ranks_add_up() -> None:
    whole, first, second = (RatingMetrics((1.0, 5.0)) for _ in range(3))
    whole.update(SCORES, RATINGS, WEIGHTS)
    first.update(SCORES[:1], RATINGS[:1], WEIGHTS[:1])
    second.update(SCORES[1:], RATINGS[1:], WEIGHTS[1:])
    first.load_state_vector(first.state_vector() + second.state_vector())
    assert first.compute() == pytest.approx(whole.compute())


def test_nothing_gives_nothing_and_no_number_is_refused() -> None:
    metrics = RatingMetrics((1.0, 5.0))
    assert metrics.compute() == {"rmse": None, "mae": None, "num_examples": 0}
    with pytest.raises(DataError, match="Received: NaN among 1 examples"):
        metrics.update(torch.tensor([math.nan]), torch.ones(1), torch.ones(1))
