"""Towers that stay as they are, but for low-rank maps beside their linear ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ADAPTER = "adapter_"
"""How the names of the parameters of adapters begin."""


class AdaptedLinear(nn.Linear):
    """A linear map and, added to it, one of low rank that starts at zero: W x + b + U D x.

    Its parameters have the names of the linear map's, so that a checkpoint without adapters fits.

    Args:
        linear: Whose weights it takes over.
        rank: r, of D (r, in) and U (out, r).

    Source: Hu et al. 2021, arXiv:2106.09685 (LoRA), section 4.1.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        has_bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, has_bias, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        down = torch.randn(rank, linear.in_features) / linear.in_features**0.5
        self.adapter_down = nn.Parameter(down)
        self.adapter_up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, inputs: Tensor) -> Tensor:
        """float32 (..., in) to (..., out)."""
        return super().forward(inputs) + (inputs @ self.adapter_down.T) @ self.adapter_up.T


def freeze(module: nn.Module, adapter_rank: int) -> None:
    """Train nothing of a module but, with a rank above 0, an adapter beside each linear map."""
    module.requires_grad_(False)
    if not adapter_rank:
        return
    linears = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
    for parent, name, linear in linears:
        setattr(parent, name, AdaptedLinear(linear, adapter_rank))
