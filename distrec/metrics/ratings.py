"""Metrics of predicted ratings: RMSE and MAE, weighted, over labelled examples.

- ``rmse``: root of the mean squared difference between rating and prediction;
- ``mae``: mean absolute difference.

A score becomes a rating as in the loss; one that leaves the scale is moved to its end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distrec.errors import DataError
from distrec.model.losses import rating_of_score


class RatingMetrics:
    """Accumulates metrics over batches of examples; the states of several ranks add up.

    Args:
        scale: The lowest and the highest rating.
    """

    def __init__(self, scale: tuple[float, float]) -> None:
        self.scale = scale
        # examples, weight, squared differences, absolute differences
        self._sums = torch.zeros(4).double()

    def update(self, scores: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Add n examples.

        Args:
            scores: float32, (n,).
            labels: Ratings, float32, (n,).
            weights: float32, (n,).

        Raises:
            DataError: A score is NaN.
        """
        predicted = rating_of_score(scores.detach().cpu().double(), self.scale).clamp(*self.scale)
        if bool(predicted.isnan().any()):
            raise DataError(
                f"a score is a number. Received: NaN among {len(scores)} examples. The model or a "
                "feature is not finite: use an earlier checkpoint, or train with a lower rate."
            )
        gap, weight = predicted - labels.cpu().double(), weights.cpu().double()
        parts = (weight, weight * gap.square(), weight * gap.abs())
        self._sums += torch.stack(
            [torch.tensor(float(len(gap))).double(), *(p.sum() for p in parts)]
        )

    def state_vector(self) -> Tensor:
        """Everything accumulated, float64, 1-D: the sum over ranks is the state of the whole."""
        return self._sums.clone()

    def load_state_vector(self, state: Tensor) -> None:
        """Replace what was accumulated, by the sum of vectors."""
        self._sums = state.to("cpu", torch.float64)

    def compute(self) -> dict[str, float | None]:
        """By name, with num_examples; None for what is not defined."""
        num_examples, weight, squared, absolute = self._sums.tolist()
        return {
            "rmse": math.sqrt(squared / weight) if weight > 0 else None,
            "mae": absolute / weight if weight > 0 else None,
            "num_examples": int(num_examples),
        }
