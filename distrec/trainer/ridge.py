"""Ridge regression from sums over rows, which ranks can add up: exact, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

# penalties that are tried, in units of the variance of an input
_PENALTIES = torch.logspace(-6, 3, 28, dtype=torch.float64)
# of an input's mean square; what varies less says nothing but how it was rounded
_LEAST_VARIANCE = 1e-10


class RidgeRegression:
    """A linear map from P inputs to Q outputs.

    The penalty is the one with which rows that were left out would be predicted best: generalised
    cross-validation. Inputs that say nothing leave the mean of the outputs.

    Args:
        num_inputs: P.
        num_outputs: Q.

    Attributes:
        sums: float64, (2 + P + Q, 2 + P + Q): of the weighted products of 1, inputs, outputs and
            the root of the weight. Those of several ranks add up to those of all rows.

    Source: Golub, Heath and Wahba 1979, "Generalized Cross-Validation as a Method for Choosing a
    Good Ridge Parameter".
    """

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        self.num_inputs = num_inputs
        size = 2 + num_inputs + num_outputs
        self.sums = torch.zeros(size, size, dtype=torch.float64)

    @property
    def is_empty(self) -> bool:
        """Whether no row has a weight."""
        return not bool(self.sums[0, 0] > 0)

    def add(self, inputs: Tensor, outputs: Tensor, weights: Tensor) -> None:
        """Add n rows: (n, P) and (n, Q), and how much each counts, (n,), from 0."""
        roots = weights.double().sqrt().unsqueeze(1)
        ones = torch.ones_like(roots)
        rows = roots * torch.cat([ones, inputs.cpu(), outputs.cpu(), roots], dim=1)
        self.sums += rows.T @ rows

    def solve(self) -> tuple[Tensor, Tensor]:
        """Weights and constant: float32, (P, Q) and (Q,). There is at least one row."""
        total = self.sums[0, 0]
        # as many rows of one weight say as much
        count = total.square() / self.sums[-1, -1]
        means = self.sums[0, 1:-1] / total
        squares = self.sums[1:-1, 1:-1] / total
        covariance = squares - means.outer(means)
        variance = covariance.diagonal()
        varies = variance > _LEAST_VARIANCE * squares.diagonal()
        scale = torch.where(varies, variance, torch.inf).sqrt()
        correlation = covariance / scale.outer(scale)
        inputs, outputs = slice(self.num_inputs), slice(self.num_inputs, None)
        values, vectors = torch.linalg.eigh(correlation[inputs, inputs])
        values = values.clamp(min=0)
        turned = vectors.T @ correlation[inputs, outputs]
        penalty = _penalty(values, turned, int(varies[outputs].sum()), count)
        weights = vectors @ (turned / (values + penalty)[:, None])
        weights = weights / scale[inputs, None] * scale[outputs].nan_to_num(posinf=0.0)
        constant = means[outputs] - means[inputs] @ weights
        return weights.float(), constant.float()


def _penalty(values: Tensor, turned: Tensor, num_outputs: int, count: Tensor) -> Tensor:
    """The one of _PENALTIES with the least error of rows that are left out.

    Args:
        values: Eigenvalues of the inputs' correlation, (P,).
        turned: Correlation of the outputs with its eigenvectors, (P, Q).
        num_outputs: Outputs that vary.
        count: Rows.
    """
    strength = turned.square().sum(dim=1)
    shrunk = 1 / (values + _PENALTIES[:, None])  # (L, P)
    errors = num_outputs - (strength * shrunk * (2 - values * shrunk)).sum(dim=1)
    freedom = 1 + (values * shrunk).sum(dim=1)
    left = (1 - freedom / count).clamp(min=0)
    scores = torch.where(left > 0, errors.clamp(min=0) / left.square(), torch.inf)
    return _PENALTIES[scores.argmin()]
