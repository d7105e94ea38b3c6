"""The losses as pure functions of scores, one value an example."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def softmax_loss(scores: Tensor, positives: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each example's positive among all M items.

    Args:
        scores: float32, (B, M).
        positives: int64, (B,), columns of scores.
        label_smoothing: Share of the target spread evenly over the M items.

    Returns:
        float32, (B,).
    """
    return functional.cross_entropy(
        scores, positives, reduction="none", label_smoothing=label_smoothing
    )


def sampled_softmax_loss(
    positive_scores: Tensor, negative_scores: Tensor, log_weights: Tensor, is_positive: Tensor
) -> Tensor:
    """Cross-entropy of each example's positive among itself and a sample of the other items.

    The partition function is estimated by exp(positive) + the sum over sampled items other than the
    positive of (times drawn / expected times drawn) * exp(score), whose expectation is the exact
    one. The positive is there with certainty, so its own score gets no correction.

    Args:
        positive_scores: float32, (B,).
        negative_scores: float32, (B, S): of the S distinct sampled items.
        log_weights: float32, (S,): log(times drawn / expected times drawn).
        is_positive: bool, (B, S): the sampled item is the example's positive (an accidental hit).

    Returns:
        float32, (B,).

    Source: Bengio and Senecal 2008, "Adaptive Importance Sampling to Accelerate Training of a
    Neural Probabilistic Language Model"; the correction for two towers: Yi et al. 2019,
    "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations", which also
    corrects the positive; why not to: Khrylchenko et al. 2025, arXiv:2507.09331.
    """
    corrected = (negative_scores + log_weights).masked_fill(is_positive, -torch.inf)
    scores = torch.cat([positive_scores.unsqueeze(1), corrected], dim=1)
    return torch.logsumexp(scores, dim=1) - positive_scores


def binary_loss(scores: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of the label given sigmoid(score): float32, (B,).

    Args:
        scores: float32, (B,).
        labels: float32, (B,), in [0, 1].
        label_smoothing: Moves labels this share of the way to one half.
    """
    targets = labels * (1.0 - label_smoothing) + 0.5 * label_smoothing
    return functional.binary_cross_entropy_with_logits(scores, targets, reduction="none")
