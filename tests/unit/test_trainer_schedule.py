"""Learning rate, early stopping and the seed of a step: pure functions of the position."""

from __future__ import annotations

import math

import pytest

from distrec.trainer.early_stopping import EarlyStopping
from distrec.trainer.schedule import rate_share
from distrec.trainer.step import step_seed


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("none", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.55, 0.1]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, 0.1 + 0.9 * 0.5, 0.1]),
    ],
)
def test_warm_up_then_decay_to_the_last_step(decay: str, expected: list[float]) -> None:
    shares = [rate_share(step, 7, 4, decay, 0.1) for step in range(7)]  # type: ignore[arg-type]
    assert shares == pytest.approx(expected)


def test_cosine_quarter_way() -> None:
    assert rate_share(1, 5, 0, "cosine", 0.0) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_a_run_of_one_step_has_a_rate() -> None:
    assert rate_share(0, 1, 0, "cosine", 0.0) == 1.0
    assert rate_share(0, 1, 100, "cosine", 0.0) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("higher", "values", "best_step"),
    [(True, [1.0, 3.0, 3.0, 2.0], 2), (False, [3.0, 1.0, 1.0, 2.0], 2)],
)
def test_patience_counts_validations_without_improvement(
    higher: bool, values: list[float], best_step: int
) -> None:
    stopping = EarlyStopping(patience=2, higher_is_better=higher)
    seen = []
    for step, value in enumerate(values, start=1):
        # as a run that is resumed before each validation
        resumed = EarlyStopping(patience=2, higher_is_better=higher)
        resumed.load_state(stopping.state())
        stopping = resumed
        seen.append((stopping.update(step, value), stopping.should_stop))
    assert seen == [(True, False), (True, False), (False, False), (False, True)]
    assert stopping.best_step == best_step


def test_patience_zero_never_stops() -> None:
    stopping = EarlyStopping(patience=0, higher_is_better=True)
    for step in range(50):
        stopping.update(step, 0.0)
    assert not stopping.should_stop


def test_every_step_and_rank_draws_its_own_numbers() -> None:
    seeds = {step_seed(1, step, rank) for step in range(50) for rank in range(4)}
    assert len(seeds) == 200
    assert step_seed(1, 7, 2) == step_seed(1, 7, 2) != step_seed(2, 7, 2)
    assert max(seeds) < 2**63
