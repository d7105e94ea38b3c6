"""Ridge regression from sums: what was planted comes back, what says nothing leaves the mean."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distrec.trainer.ridge import RidgeRegression


def planted(num_rows: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, outputs without noise, outputs. One input never varies, one hardly counts."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(3.0, [1.0, 1e-3, 20.0, 0.0, 1.0, 1.0], (num_rows, 6))
    weights = np.array([[1.0, -2], [500, 0], [0.1, 0.2], [7, 7], [0, 0], [-1, 1]])
    clean = inputs @ weights + [5, -40]
    outputs = clean + noise * rng.normal(size=clean.shape)
    return tuple(torch.from_numpy(part).float() for part in (inputs, clean, outputs))  # type: ignore[return-value]


def predicted(inputs: Tensor, outputs: Tensor, wanted: Tensor) -> Tensor:
    regression = RidgeRegression(inputs.shape[1], outputs.shape[1])
    for part in torch.arange(len(inputs)).split(70):
        regression.add(inputs[part], outputs[part], torch.ones(len(part)))
    weights, constant = regression.solve()
    return wanted @ weights + constant


def test_what_was_planted_comes_back() -> None:
    inputs, _, outputs = planted(400, 0.0)
    others, expected, _ = planted(50, 0.0, seed=1)
    assert torch.allclose(predicted(inputs, outputs, others), expected, atol=2e-2)


def test_noise_is_shrunk_towards_the_mean() -> None:
    """Fewer rows than inputs, or inputs that say nothing: no worse than the mean."""
    rng = np.random.default_rng(2)
    for num_rows, num_inputs in ((30, 60), (60, 40), (400, 40)):
        inputs = torch.from_numpy(rng.normal(size=(num_rows, num_inputs))).float()
        others = torch.from_numpy(rng.normal(size=(200, num_inputs))).float()
        outputs = torch.from_numpy(rng.normal(2.0, 1.0, (num_rows, 8))).float()
        error = (predicted(inputs, outputs, others) - outputs.mean(dim=0)).square().mean()
        assert float(error) < 0.1
    one = predicted(inputs[:1], outputs[:1], others)
    assert torch.allclose(one, outputs[:1].expand_as(one))


def test_a_row_counts_as_often_as_its_weight() -> None:
    """In the sums of any ranks; one that does not count is not there."""
    inputs, _, outputs = planted(90, 1.0)
    weights = torch.arange(90) % 4
    assert RidgeRegression(6, 2).is_empty
    whole, parts = RidgeRegression(6, 2), [RidgeRegression(6, 2) for _ in range(3)]
    whole.add(
        *(part.repeat_interleave(weights, 0) for part in (inputs, outputs)),
        torch.ones(int(weights.sum())),
    )
    for rank, part in enumerate(parts):
        part.add(inputs[rank::3], outputs[rank::3], weights[rank::3])
    expected = whole.sums[:-1, :-1]
    whole.sums = sum((part.sums for part in parts), torch.zeros_like(whole.sums))
    torch.testing.assert_close(whole.sums[:-1, :-1], expected)
    # the regression by numpy, with a penalty that is as good as none
    rows = np.concatenate([np.ones((90, 1)), inputs.numpy()], axis=1).astype(float)
    roots = np.sqrt(weights.numpy())[:, None]
    least = np.linalg.lstsq(roots * rows, roots * outputs.numpy(), rcond=1e-12)[0]
    found, constant = whole.solve()
    errors = rows @ least - (inputs @ found + constant).numpy()
    assert np.abs(errors).max() < 0.2
