"""The losses as pure functions of scores, one value an example; the full softmax of vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

SCORES_PER_BLOCK = 1 << 21
"""softmax_loss_sum: scores held at once, 8 MiB."""


def softmax_loss_sum(
    users: Tensor, items: Tensor, positives: Tensor, weights: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Weighted sum of the cross-entropies of each user's positive among all M items.

    Scores are made a block of users at a time, and each block's gradients with it, so that the
    (B, M) scores never exist at once. It is differentiable once, by users and items.

    Args:
        users: float32, (B, W).
        items: float32, (M, W).
        positives: int64, (B,), rows of items.
        weights: float32, (B,).
        label_smoothing: Share of the target spread evenly over the M items.

    Returns:
        float32 scalar.
    """
    total: Tensor = _SoftmaxLossSum.apply(users, items, positives, weights, label_smoothing)
    return total


class _SoftmaxLossSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        users: Tensor,
        items: Tensor,
        positives: Tensor,
        weights: Tensor,
        label_smoothing: float,
    ) -> Tensor:
        num_items = len(items)
        total = users.new_zeros(())
        user_gradients = torch.empty_like(users)
        item_gradients = torch.zeros_like(items)
        with_gradients = any(ctx.needs_input_grad)
        rows = max(1, SCORES_PER_BLOCK // max(num_items, 1))
        for start in range(0, len(users), rows):
            part = slice(start, start + rows)
            block, positive = users[part], positives[part].unsqueeze(1)
            scores = block @ items.T
            scores -= scores.amax(dim=1, keepdim=True)
            wanted = (1.0 - label_smoothing) * scores.gather(1, positive)
            if label_smoothing:
                wanted += label_smoothing * scores.mean(dim=1, keepdim=True)
            sums = scores.exp_().sum(dim=1, keepdim=True)
            weight = weights[part].unsqueeze(1)
            total += (weight * (sums.log() - wanted)).sum()
            if with_gradients:
                scores *= weight / sums
                if label_smoothing:
                    scores -= weight * (label_smoothing / num_items)
                scores.scatter_add_(1, positive, weight * (label_smoothing - 1.0))
                torch.mm(scores, items, out=user_gradients[part])
                item_gradients.addmm_(scores.T, block)
        ctx.gradients = user_gradients, item_gradients
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        of_users, of_items = ctx.gradients
        return of_users.mul_(gradient), of_items.mul_(gradient), None, None, None


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
