"""Rows of users moved to where the loss is worst, a small step from where they are (FGM)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from distrec.batch import Batch


def perturbed_rows(
    loss: Tensor, batch: Batch, rows: Mapping[str, Tensor], of_events: Collection[str], size: float
) -> dict[str, Tensor]:
    """The rows of the user side, those of each example moved by `size` up the gradient.

    An example's rows are its own: what moves them is the gradient of its own loss, on any number of
    ranks. Rows of items are shared by the examples of all ranks; they stay. So does the unknown
    row. The gradient is taken with respect to what a look-up gave, which updates nothing.

    Args:
        loss: Sum over the examples, by any weights.
        batch: B examples.
        rows: What the look-up gave; those without a gradient stay.
        of_events: Names of rows that are one an event of the history.
        size: Length of an example's step over all its rows together.

    Returns:
        The rows that were moved, by name, connected to those that were looked up.

    Source: Miyato, Dai and Goodfellow 2017, arXiv:1605.07725, section 3.
    """
    names = [name for name in sorted(rows) if name.startswith("user.") and rows[name].requires_grad]
    gradients = torch.autograd.grad(
        loss, [rows[name] for name in names], retain_graph=True, materialize_grads=True
    )
    of_example = torch.arange(batch.batch_size, device=batch.user_index.device)
    examples = {
        name: batch.history.bag_of_value if name in of_events else of_example for name in names
    }
    squares = torch.zeros(batch.batch_size, device=loss.device)
    for name, gradient in zip(names, gradients, strict=True):
        example = examples[name]
        squares.index_add_(0, example, gradient[: len(example)].square().sum(dim=1))
    factor = torch.where(squares > 0, size / squares.sqrt(), 0.0)
    moved = {}
    for name, gradient in zip(names, gradients, strict=True):
        example = examples[name]
        step = torch.zeros_like(gradient)
        step[: len(example)] = gradient[: len(example)] * factor[example].unsqueeze(1)
        moved[name] = rows[name] + step
    return moved
