"""The losses: of scores, one value an example; of vectors, their sum, in blocks of users."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

SCORES_PER_BLOCK = 1 << 21
"""Scores of users and items held at once, 8 MiB, but for a large catalogue."""
_FEWEST_ROWS = 64
# numbers of a vector register of AVX2; tensor cores of GPUs want as many
_WIDTH_MULTIPLE = 8


@dataclass(frozen=True)
class LeftOut:
    """Of each user the items that are no candidates.

    Args:
        columns: int64, (nnz,): items; -1 for one that is none anyway.
        starts: int64, (B,): where a user's are among the columns. Users may share columns.
        lengths: int64, (B,).
    """

    columns: Tensor
    starts: Tensor
    lengths: Tensor

    @cached_property
    def _bounds(self) -> list[int]:
        """B + 1 sums of lengths, at once: a block that asked a GPU for its own would wait."""
        return [0, *self.lengths.cumsum(0).tolist()]

    def pairs(self, part: slice) -> tuple[Tensor, Tensor]:
        """Rows and columns, -1 among them, of what is left out of a block of users: int64, (n,)."""
        lengths, device = self.lengths[part], self.lengths.device
        size = self._bounds[part.start + len(lengths)] - self._bounds[part.start]
        rows = torch.repeat_interleave(
            torch.arange(len(lengths), device=device), lengths, output_size=size
        )
        shift = self.starts[part] - lengths.cumsum(0) + lengths
        return rows, self.columns[torch.arange(size, device=device) + shift[rows]]

    def mask(self, part: slice, width: int) -> Tensor:
        """What is left out of a block of b users: bool, (b, width), of items 0 to width - 1."""
        rows, columns = self.pairs(part)
        num_users = len(self.lengths[part])
        # what is no item falls into the last column
        mask = torch.zeros(num_users, width + 1, dtype=torch.bool, device=rows.device)
        mask[rows, torch.where(columns < 0, width, columns)] = True
        return mask[:, :width]


def softmax_loss_sum(
    users: Tensor,
    items: Tensor,
    positives: Tensor,
    weights: Tensor,
    label_smoothing: float = 0.0,
    left_out: LeftOut | None = None,
) -> Tensor:
    """Weighted sum of the cross-entropies of each user's positive among all M items.

    Scores are made a block of users at a time, and each block's gradients with it, so that the
    (B, M) scores never exist at once. It is differentiable once, by users and items; of several
    passes over one graph only the last may scale it, for the gradients are scaled where they lie.

    Args:
        users: float32, (B, W).
        items: float32, (M, W).
        positives: int64, (B,), rows of items.
        weights: float32, (B,).
        label_smoothing: Share of the target spread evenly over the M items.
        left_out: Items that are not among the M of a user, unless it is the positive.

    Returns:
        float32 scalar.
    """
    total: Tensor = _SoftmaxLossSum.apply(
        _aligned(users), _aligned(items), positives, weights, label_smoothing, left_out
    )
    return total


def block_rows(num_columns: int) -> int:
    """Users whose scores are held at once.

    Not too few of them, as what each block adds to the gradients of all items is read and written.
    """
    return max(SCORES_PER_BLOCK // max(num_columns, 1), _FEWEST_ROWS)


def _aligned(vectors: Tensor) -> Tensor:
    """The same with zeros up to a width at which their products take two thirds of the time."""
    return functional.pad(vectors, (0, -vectors.shape[1] % _WIDTH_MULTIPLE))


class _SoftmaxLossSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        users: Tensor,
        items: Tensor,
        positives: Tensor,
        weights: Tensor,
        label_smoothing: float,
        left_out: LeftOut | None,
    ) -> Tensor:
        total = users.new_zeros(())
        user_gradients = torch.empty_like(users)
        item_gradients = torch.zeros_like(items)
        with_gradients = any(ctx.needs_input_grad)
        rows = block_rows(len(items))
        for start in range(0, len(users), rows):
            part = slice(start, start + rows)
            block, positive = users[part], positives[part].unsqueeze(1)
            scores = block @ items.T
            if left_out is not None:
                kept = scores.gather(1, positive)
                row, column = left_out.pairs(part)
                # what is no item falls on the positive, which stays
                column = torch.where(column < 0, positive[row, 0], column)
                scores[row, column] = -torch.inf
                scores.scatter_(1, positive, kept)
            scores -= scores.amax(dim=1, keepdim=True)
            wanted = (1.0 - label_smoothing) * scores.gather(1, positive)
            if label_smoothing:
                spread = scores.isfinite() * label_smoothing
                spread /= scores.isfinite().sum(dim=1, keepdim=True)
                wanted += (spread * scores.nan_to_num(neginf=0.0)).sum(dim=1, keepdim=True)
            sums = scores.exp_().sum(dim=1, keepdim=True)
            weight = weights[part].unsqueeze(1)
            total += (weight * (sums.log() - wanted)).sum()
            if with_gradients:
                scores *= weight / sums
                if label_smoothing:
                    scores -= weight * spread
                scores.scatter_add_(1, positive, weight * (label_smoothing - 1.0))
                torch.mm(scores, items, out=user_gradients[part])
                item_gradients.addmm_(scores.T, block)
        ctx.gradients = user_gradients, item_gradients
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        of_users, of_items = ctx.gradients
        return of_users.mul_(gradient), of_items.mul_(gradient), None, None, None, None


def sampled_loss_sum(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    users: Tensor,
    items: Tensor,
    positives: Tensor,
    negatives: Tensor,
    weights: Tensor,
    left_out: LeftOut | None = None,
) -> Tensor:
    """Weighted sum of a loss of each user's positive beside negatives that all users share.

    As in `softmax_loss_sum` the scores never exist at once. It is differentiable once, by users and
    items.

    Args:
        loss: Of positive scores (b,), negative scores (b, S) and which of the latter are no
            negatives, bool (b, S): one value a user, (b,).
        users: float32, (B, W).
        items: float32, (M, W).
        positives: int64, (B,), rows of items.
        negatives: int64, (S,), rows of items, distinct.
        weights: float32, (B,).
        left_out: Of the S negatives those that are none of a user, beside the positive's own.

    Returns:
        float32 scalar.
    """

    def block_loss(block: Tensor, wanted: Tensor, others: Tensor, part: slice) -> Tensor:
        is_none = positives[part].unsqueeze(1) == negatives
        if left_out is not None:
            is_none |= left_out.mask(part, len(negatives))
        return (weights[part] * loss((block * wanted).sum(dim=1), block @ others.T, is_none)).sum()

    rows = block_rows(len(negatives))
    users, items = _aligned(users), _aligned(items)
    total: Tensor = _SumOfBlocks.apply(block_loss, rows, users, items[positives], items[negatives])
    return total


class _SumOfBlocks(torch.autograd.Function):
    """Makes the gradients of each block with it, and keeps nothing else of it."""

    @staticmethod
    def forward(
        ctx: Any,
        block_loss: Callable[[Tensor, Tensor, Tensor, slice], Tensor],
        rows: int,
        users: Tensor,
        wanted: Tensor,
        others: Tensor,
    ) -> Tensor:
        total = users.new_zeros(())
        gradients = tuple(torch.zeros_like(tensor) for tensor in (users, wanted, others))
        for start in range(0, len(users), rows):
            part = slice(start, start + rows)
            own = [
                tensor.detach().requires_grad_() for tensor in (users[part], wanted[part], others)
            ]
            with torch.enable_grad():
                loss = block_loss(own[0], own[1], own[2], part)
            total += loss.detach()
            if any(ctx.needs_input_grad):
                of_users, of_wanted, of_others = torch.autograd.grad(loss, own)
                gradients[0][part], gradients[1][part] = of_users, of_wanted
                gradients[2].add_(of_others)
        ctx.gradients = gradients
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor, Tensor, Tensor]:
        of_users, of_wanted, of_others = ctx.gradients
        return (
            None,
            None,
            of_users.mul_(gradient),
            of_wanted.mul_(gradient),
            of_others.mul_(gradient),
        )


def sampled_softmax_loss(
    positive_scores: Tensor, negative_scores: Tensor, log_weights: Tensor, is_none: Tensor
) -> Tensor:
    """Cross-entropy of each example's positive among itself and a sample of the other items.

    The partition function is estimated by exp(positive) + the sum over sampled items other than the
    positive of (times drawn / expected times drawn) * exp(score), whose expectation is the exact
    one. The positive is there with certainty, so its own score gets no correction.

    Args:
        positive_scores: float32, (B,).
        negative_scores: float32, (B, S): of the S distinct sampled items.
        log_weights: float32, (S,): log(times drawn / expected times drawn).
        is_none: bool, (B, S): the sampled item is no negative of the example, such as its positive
            (an accidental hit).

    Returns:
        float32, (B,).

    Source: Bengio and Senecal 2008, "Adaptive Importance Sampling to Accelerate Training of a
    Neural Probabilistic Language Model"; the correction for two towers: Yi et al. 2019,
    "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations", which also
    corrects the positive; why not to: Khrylchenko et al. 2025, arXiv:2507.09331.
    """
    corrected = (negative_scores + log_weights).masked_fill(is_none, -torch.inf)
    scores = torch.cat([positive_scores.unsqueeze(1), corrected], dim=1)
    return torch.logsumexp(scores, dim=1) - positive_scores


def sampled_binary_loss(
    positive_scores: Tensor,
    negative_scores: Tensor,
    times: Tensor,
    is_none: Tensor,
    beta: float = 1.0,
) -> Tensor:
    """Binary cross-entropies of each example's positive and a sample of the other items: (B,).

    The positive's probability is sigmoid(score) ** beta, which takes back what leaving out most
    negatives does to probabilities. They are added up, where the source takes their mean: so a
    positive counts as much beside L2, however many negatives there are.

    Args:
        positive_scores: float32, (B,).
        negative_scores: float32, (B, S).
        times: float32, (S,): how often each negative was drawn.
        is_none: bool, (B, S): is left out, such as an accidental hit.
        beta: See `calibration_exponent`.

    Source: Petrov and Macdonald 2023, arXiv:2308.07192 (gSASRec).
    """
    counts = times.expand_as(negative_scores).masked_fill(is_none, 0.0)
    negative = (counts * functional.softplus(negative_scores)).sum(dim=1)
    return beta * functional.softplus(-positive_scores) + negative


def calibration_exponent(num_negatives: float, num_items: int, t: float) -> float:
    """The beta of `sampled_binary_loss`: 1 at t = 0; the sampling rate at t = 1.

    Args:
        num_negatives: Of each positive.
        num_items: From which they are drawn, the positive among them.
        t: In [0, 1]; at 1 probabilities are those of training on all negatives.

    Source: Petrov and Macdonald 2023, arXiv:2308.07192.
    """
    rate = min(1.0, num_negatives / max(num_items - 1, 1))
    return 1.0 - t * (1.0 - rate)


def pairwise_loss(
    positive_scores: Tensor, negative_scores: Tensor, times: Tensor, is_none: Tensor
) -> Tensor:
    """Mean over the negatives of -log sigmoid(positive score - negative score): float32, (B,).

    Arguments as of `sampled_binary_loss`. Without a negative it is zero.

    Source: Rendle et al. 2009, arXiv:1205.2618 (BPR).
    """
    counts = times.expand_as(negative_scores).masked_fill(is_none, 0.0)
    losses = functional.softplus(negative_scores - positive_scores.unsqueeze(1))
    return (counts * losses).sum(dim=1) / counts.sum(dim=1).clamp(min=1.0)


def squared_loss(scores: Tensor, ratings: Tensor, scale: tuple[float, float]) -> Tensor:
    """Squared difference between ratings and what scores say of them: float32, (B,).

    Args:
        scores: float32, (B,).
        ratings: float32, (B,).
        scale: The lowest and the highest rating.
    """
    return (rating_of_score(scores, scale) - ratings).square()


def rating_of_score(scores: Tensor, scale: tuple[float, float]) -> Tensor:
    """What scores say of ratings: 0 is the middle of the scale, -2 and 2 are its ends.

    It is linear, and so may leave the scale: a sigmoid would learn nothing more at its ends, where
    a few large steps bring it.

    Example:
        >>> rating_of_score(torch.tensor([0.0, 2.0, 3.0]), (1.0, 5.0)).tolist()
        [3.0, 5.0, 6.0]
    """
    lowest, highest = scale
    return (lowest + highest) / 2.0 + (highest - lowest) / 4.0 * scores


def binary_loss(scores: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of the label given sigmoid(score): float32, (B,).

    Args:
        scores: float32, (B,).
        labels: float32, (B,), in [0, 1].
        label_smoothing: Moves labels this share of the way to one half.
    """
    targets = labels * (1.0 - label_smoothing) + 0.5 * label_smoothing
    return functional.binary_cross_entropy_with_logits(scores, targets, reduction="none")


def task_loss_sums(
    scores: Tensor, labels: Tensor, weights: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Weighted sum of the cross-entropies of each task, over the rows where its label is known.

    Args:
        scores: float32, (B, T).
        labels: float32, (B, T), in [0, 1] or NaN.
        weights: float32, (B,).
        label_smoothing: As of `binary_loss`.

    Returns:
        float32, (T,).
    """
    known = ~labels.isnan()
    # NaN times zero is NaN, also in a gradient
    losses = binary_loss(scores, torch.where(known, labels, 0.0), label_smoothing)
    return (weights.unsqueeze(1) * known * losses).sum(dim=0)
