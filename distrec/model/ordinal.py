"""Ratings as ordered levels: learned thresholds on the score, and what they say of a rating."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class RatingThresholds(nn.Module):
    """K - 1 ascending numbers; a rating reaches level k with probability sigmoid(score - t_k).

    They start where a score of 0 makes all levels as likely.

    Args:
        num_levels: K, at least 3.
    """

    def __init__(self, num_levels: int) -> None:
        super().__init__()
        start = torch.logit(torch.arange(1, num_levels) / num_levels)
        self.first = nn.Parameter(start[:1].clone())
        # of which softplus is the gap
        self.gaps = nn.Parameter(start.diff().expm1().log())

    def forward(self) -> Tensor:
        """float32, (K - 1,)."""
        gaps = functional.softplus(self.gaps)
        return torch.cat([self.first, self.first + gaps.cumsum(0)])


def ordinal_loss(
    scores: Tensor, ratings: Tensor, thresholds: Tensor, scale: tuple[float, float]
) -> Tensor:
    """Minus the log-likelihood of each rating's level: float32, (B,).

    Args:
        scores: float32, (B,).
        ratings: float32, (B,); each counts as the level that is nearest.
        thresholds: float32, (K - 1,), ascending.
        scale: The lowest and the highest level; the others lie evenly between.

    Source: McCullagh 1980, "Regression Models for Ordinal Data"; for recommending, Koren and Sill
    2011, "OrdRec: An Ordinal Model for Predicting Personalized Item Rating Distributions".
    """
    lowest, highest = scale
    last = len(thresholds)
    level = ((ratings - lowest) / (highest - lowest) * last).round().clamp(0, last).to(torch.int64)
    margins = scores.unsqueeze(1) - thresholds
    # below the first threshold nothing is to be passed, and above the last nothing to be missed
    passed = functional.pad(functional.softplus(-margins), (1, 0))
    missed = functional.pad(functional.softplus(margins), (0, 1))
    # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - e^(b - a)), whatever rounds to 1
    inside = -torch.log(-torch.expm1(-thresholds.diff()))
    losses = passed + missed + functional.pad(inside, (1, 1))
    return losses.gather(1, level.unsqueeze(1)).squeeze(1)


def score_of_levels(scores: Tensor, thresholds: Tensor) -> Tensor:
    """The expected rating as the score of which `losses.rating_of_score` makes it: (B,)."""
    share = torch.sigmoid(scores.unsqueeze(1) - thresholds).mean(dim=1)
    return 4.0 * share - 2.0
