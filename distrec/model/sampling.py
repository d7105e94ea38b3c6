"""Draws the negatives of a step, the same ones on every rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distrec.config import NegativesSource

# keeps the draws apart from other uses of the same seed
_STREAM = 0x4E4547


@dataclass(frozen=True)
class Negatives:
    """The negatives that all examples of a step share.

    Args:
        places: int64, (S,), ascending: distinct candidates.
        times: float32, (S,): how often each was drawn.
        log_weights: float32, (S,): log(times drawn / expected times drawn).
    """

    places: Tensor
    times: Tensor
    log_weights: Tensor


class NegativeSampler:
    """Draws items with replacement, takes the targets of the batch, or both.

    popularity draws in proportion to (count + 1) ** power, uniform and mixed draw evenly: by
    inverse transform over the cumulative weights, one binary search a draw, for any catalogue.
    in_batch and mixed take the n targets of all examples; among the n - 1 of the others an item is
    expected in proportion to its count.

    Args:
        counts: int64, (M,): events of each item in train.
        source: Where negatives come from, `loss.negatives`.
        power: 0 is uniform, 1 is by popularity.
        num_negatives: Draws a step.
        seed: With the step, decides the draws.

    Source: in_batch: Yi et al. 2019, "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item
    Recommendations"; mixed: Yang et al. 2020, "Mixed Negative Sampling for Learning Two-tower
    Neural Networks in Recommendations".
    """

    def __init__(
        self,
        counts: Tensor,
        source: NegativesSource,
        power: float,
        num_negatives: int,
        seed: int,
    ) -> None:
        counts = counts.cpu().to(torch.float64)
        self.uses_targets = source in ("in_batch", "mixed")
        self.num_negatives = 0 if source == "in_batch" else num_negatives
        weights = (counts + 1.0) ** (power if source == "popularity" else 0.0)
        self._share = weights / weights.sum()
        self._cumulative = torch.cumsum(self._share, 0)
        # whatever is a target was an event
        self._target_share = counts.clamp(min=1.0) / counts.clamp(min=1.0).sum()
        self.seed = seed

    def draw(self, global_step: int, targets: Tensor | None = None) -> Negatives:
        """The negatives of a step.

        Args:
            global_step: The same on every rank.
            targets: int64, (n,): places of the targets of all ranks, in any order; wanted where
                `uses_targets`.
        """
        generator = np.random.default_rng((_STREAM, self.seed, global_step))
        draws = torch.from_numpy(generator.random(self.num_negatives))
        drawn = torch.searchsorted(self._cumulative, draws, right=True)
        # the last cumulative weight may fall short of 1 by rounding
        drawn = drawn.clamp(max=len(self._cumulative) - 1)
        num_others = 0
        if self.uses_targets:
            assert targets is not None
            drawn = torch.cat([drawn, targets.cpu()])
            # of one target alone there are no others, and its own score is not among the negatives
            num_others = max(len(targets) - 1, 1)
        places, times = torch.unique(drawn, return_counts=True)
        expected = self.num_negatives * self._share[places]
        expected += num_others * self._target_share[places]
        log_weights = torch.log(times / expected)
        return Negatives(places, times.to(torch.float32), log_weights.to(torch.float32))
