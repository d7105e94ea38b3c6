"""Metrics of probabilities on labelled examples: AUC, log loss and calibration.

- ``auc``: chance that a positive scores above a negative, ties counting half, weighted;
- ``log_loss``: mean binary cross-entropy, weighted, in nats;
- ``calibration``: sum of predicted probabilities / sum of labels;
- ``calibration_error``: mean over NUM_CALIBRATION_BINS equal intervals of the predicted probability
  of the gap between mean prediction and mean label, weighted by what lies in the interval.

AUC needs all scores in one order. One process can keep them and be exact; across ranks a histogram
of scores is summed instead, whose bins are as wide as bfloat16 is precise.

Source: Fawcett 2006, doi:10.1016/j.patrec.2005.10.010 (auc); Naeini et al. 2015, "Obtaining Well
Calibrated Probabilities Using Bayesian Binning" (calibration error).
"""

from __future__ import annotations

import torch
from torch import Tensor

from distrec.errors import DataError

NUM_CALIBRATION_BINS = 20
_NUM_SCORE_BINS = 1 << 16


def auc(scores: Tensor, labels: Tensor, weights: Tensor) -> float | None:
    """Area under the ROC curve, exact.

    Args:
        scores: float, (n,).
        labels: float in [0, 1], (n,).
        weights: float, (n,).

    Returns:
        In [0, 1]; None when the positives or the negatives have no weight.

    Example:
        >>> ones = torch.ones(4)
        >>> auc(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([0.0, 0.0, 1.0, 1.0]), ones)
        0.875
    """
    distinct, group = torch.unique(scores, return_inverse=True)
    positive = torch.zeros(len(distinct)).double()
    negative = torch.zeros(len(distinct)).double()
    positive.index_add_(0, group, weights.double() * labels.double())
    negative.index_add_(0, group, weights.double() * (1.0 - labels.double()))
    return _auc_of_groups(positive, negative)


def _auc_of_groups(positive: Tensor, negative: Tensor) -> float | None:
    """AUC from the weights of positives and negatives at each score, ascending."""
    total = positive.sum() * negative.sum()
    if float(total) <= 0.0:
        return None
    below = negative.cumsum(0) - negative
    return float((positive * (below + negative / 2.0)).sum() / total)


class ClassificationMetrics:
    """Accumulates metrics over batches of examples; the states of several ranks add up.

    Args:
        exact_auc: Keep every score, 12 bytes an example, for an exact AUC in one process. Otherwise
            AUC is of scores cut to bfloat16, and the state is additive.
    """

    def __init__(self, exact_auc: bool = False) -> None:
        self.exact_auc = exact_auc
        self._kept: list[Tensor] = []
        # examples, weight, loss
        self._sums = torch.zeros(3).double()
        # by interval of the probability: predicted, labels
        self._calibration = torch.zeros(2, NUM_CALIBRATION_BINS).double()
        # by score, ascending: positives, negatives
        self._histogram = torch.zeros(2, _NUM_SCORE_BINS).double()

    def update(self, scores: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Add n examples.

        Args:
            scores: Log odds, float32, (n,).
            labels: In [0, 1], float32, (n,).
            weights: float32, (n,).

        Raises:
            DataError: A score is NaN.
        """
        scores = scores.detach().cpu().float() + 0.0  # no negative zero
        labels, weights = labels.cpu().float(), weights.cpu().float()
        if bool(scores.isnan().any()):
            raise DataError(
                f"a score is a number. Received: NaN among {len(scores)} examples. The model or a "
                "feature is not finite: use an earlier checkpoint, or train with a lower rate."
            )
        logits, label, weight = scores.double(), labels.double(), weights.double()
        loss = torch.nn.functional.softplus(logits) - label * logits
        self._sums += torch.stack(
            [torch.tensor(float(len(scores))).double(), weight.sum(), (weight * loss).sum()]
        )
        predicted = torch.sigmoid(logits)
        bins = (predicted * NUM_CALIBRATION_BINS).long().clamp(max=NUM_CALIBRATION_BINS - 1)
        for row, values in enumerate((weight * predicted, weight * label)):
            self._calibration[row].index_add_(0, bins, values)
        if self.exact_auc:
            self._kept.append(torch.stack([scores, labels, weights]))
        else:
            bins = _score_bins(scores)
            self._histogram[0].index_add_(0, bins, weight * label)
            self._histogram[1].index_add_(0, bins, weight * (1.0 - label))

    def state_vector(self) -> Tensor:
        """Everything accumulated, float64, 1-D: the sum over ranks is the state of the whole."""
        assert not self.exact_auc, "scores that are kept do not add up: exact_auc=False"
        return torch.cat([part.flatten() for part in self._parts()])

    def load_state_vector(self, state: Tensor) -> None:
        """Replace what was accumulated, by the sum of vectors."""
        assert not self.exact_auc, "scores that are kept do not add up: exact_auc=False"
        state = state.to("cpu", torch.float64)
        sizes = [part.numel() for part in self._parts()]
        for part, values in zip(self._parts(), state.split(sizes), strict=True):
            part.copy_(values.view(part.shape))

    def _parts(self) -> tuple[Tensor, ...]:
        return self._sums, self._calibration, self._histogram

    def compute(self) -> dict[str, float | None]:
        """By name, with num_examples and positive_share; None for what is not defined."""
        num_examples, weight, loss = self._sums.tolist()
        predicted, labels = self._calibration
        gap = float((predicted - labels).abs().sum())
        total_labels = float(labels.sum())
        return {
            "auc": self._auc(),
            "log_loss": loss / weight if weight > 0 else None,
            "calibration": float(predicted.sum()) / total_labels if total_labels > 0 else None,
            "calibration_error": gap / weight if weight > 0 else None,
            "positive_share": total_labels / weight if weight > 0 else None,
            "num_examples": int(num_examples),
        }

    def _auc(self) -> float | None:
        if not self.exact_auc:
            return _auc_of_groups(self._histogram[0], self._histogram[1])
        if not self._kept:
            return None
        scores, labels, weights = torch.cat(self._kept, dim=1)
        return auc(scores, labels, weights)


def _score_bins(scores: Tensor) -> Tensor:
    """Bin of each float32 score: its upper 16 bits, in the order of the numbers."""
    bits = scores.contiguous().view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered >> 16).long() + _NUM_SCORE_BINS // 2
