"""Draws the negatives of a step, the same ones on every rank."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# keeps the draws apart from other uses of the same seed
_STREAM = 0x4E4547


class NegativeSampler:
    """Draws items with replacement, in proportion to (count + 1) ** power.

    Inverse transform over the cumulative weights: one binary search a draw, for any catalogue.

    Args:
        counts: int64, (M,): events of each item in train.
        power: 0 is uniform, 1 is by popularity.
        num_negatives: Draws a step, S.
        seed: With the step, decides the draws.
    """

    def __init__(self, counts: Tensor, power: float, num_negatives: int, seed: int) -> None:
        weights = (counts.cpu().to(torch.float64) + 1.0) ** power
        self._cumulative = torch.cumsum(weights, 0) / weights.sum()
        self._log_expected = torch.log(num_negatives * weights / weights.sum())
        self.num_negatives = num_negatives
        self.seed = seed

    def draw(self, global_step: int) -> tuple[Tensor, Tensor]:
        """The negatives of a step.

        Returns:
            Distinct positions, int64 (at most num_negatives,) ascending, and the logarithm of
            times drawn / expected times drawn, float32, aligned with them.
        """
        generator = np.random.default_rng((_STREAM, self.seed, global_step))
        draws = torch.from_numpy(generator.random(self.num_negatives))
        drawn = torch.searchsorted(self._cumulative, draws, right=True)
        # the last cumulative weight may fall short of 1 by rounding
        drawn = drawn.clamp(max=len(self._cumulative) - 1)
        positions, times = torch.unique(drawn, return_counts=True)
        log_weights = torch.log(times.to(torch.float64)) - self._log_expected[positions]
        return positions, log_weights.to(torch.float32)
