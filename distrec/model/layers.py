"""The dense building blocks of the towers: perceptron, cross layers and gate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# scores are inner products of D-wide vectors: outputs of this size start them near zero
_OUTPUT_SCALE = 0.1


class MultiLayerPerceptron(nn.Module):
    """Linear, GELU and dropout per hidden layer, then a linear output that starts small.

    No batch normalisation: it would make a rank's result depend on how the batch is cut.

    Args:
        input_dim: Width of the input.
        hidden_dims: Widths of the hidden layers; none gives one linear map.
        output_dim: Width of the output.
        dropout: Of the hidden activations.
    """

    def __init__(
        self, input_dim: int, hidden_dims: Sequence[int], output_dim: int, dropout: float
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = input_dim
        for hidden_dim in hidden_dims:
            layers += [nn.Linear(width, hidden_dim), nn.GELU(), nn.Dropout(dropout)]
            width = hidden_dim
        output = nn.Linear(width, output_dim)
        nn.init.normal_(output.weight, std=_OUTPUT_SCALE / width**0.5)
        nn.init.zeros_(output.bias)
        self.layers = nn.Sequential(*layers, output)

    def forward(self, inputs: Tensor) -> Tensor:
        """float32 (B, input_dim) to (B, output_dim)."""
        outputs: Tensor = self.layers(inputs)
        return outputs


class CrossNetwork(nn.Module):
    """Layers that multiply each number by a linear map of all: x' = x0 * (W x + b) + x.

    l of them make products of up to l + 1 features, which an MLP can only approach.

    Args:
        width: Of the input x0, and of the output.
        num_layers: None gives the input back.
        rank: Above 0, each W is a product of two matrices of so low a rank.

    Source: Wang et al. 2021, arXiv:2008.13535 (DCN-v2), equations 1 and 2.
    """

    def __init__(self, width: int, num_layers: int, rank: int = 0) -> None:
        super().__init__()

        def linear() -> nn.Module:
            if not rank:
                return nn.Linear(width, width)
            return nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width))

        self.layers = nn.ModuleList(linear() for _ in range(num_layers))

    def forward(self, inputs: Tensor) -> Tensor:
        """float32 (B, width) to (B, width)."""
        outputs = inputs
        for layer in self.layers:
            outputs = inputs * layer(outputs) + outputs
        return outputs


class PairHead(nn.Module):
    """What a user's and an item's vector say together beyond their inner product.

    Cross layers over both side by side, then an MLP to one number that starts near zero.

    Args:
        vector_width: Of each of the two.
        num_crosses: Cross layers.
        cross_rank: Of their maps, as in CrossNetwork.
        hidden_dims: Widths of the hidden layers.
        dropout: Of the hidden activations.
    """

    def __init__(
        self,
        vector_width: int,
        num_crosses: int,
        cross_rank: int,
        hidden_dims: Sequence[int],
        dropout: float,
    ) -> None:
        super().__init__()
        self.crosses = CrossNetwork(2 * vector_width, num_crosses, cross_rank)
        self.network = MultiLayerPerceptron(2 * vector_width, hidden_dims, 1, dropout)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """float32 (B, vector_width) twice to (B,)."""
        outputs: Tensor = self.network(self.crosses(torch.cat([users, items], dim=1)))
        return outputs.squeeze(1)


class Gate(nn.Module):
    """Weights of the towers from how much is known of a user or an item.

    The weights of one example sum to the number of towers, and all start at 1. With one tower the
    weight is 1 and there is nothing to learn.

    Args:
        num_signals: Width of what is known.
        num_towers: T.
        hidden_dim: Width of the hidden layer.
        sees_recency: Whether `forward` gets a recency.
    """

    def __init__(
        self, num_signals: int, num_towers: int, hidden_dim: int, sees_recency: bool = False
    ) -> None:
        super().__init__()
        self.num_towers = num_towers
        if num_towers > 1:
            self.hidden = nn.Linear(num_signals, hidden_dim)
            if sees_recency:
                # apart from the other signals, and zero: checkpoints of before do not have it
                self.recency = nn.Parameter(torch.zeros(hidden_dim))
            self.output = nn.Linear(hidden_dim, num_towers)
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def forward(self, signals: Tensor, recency: Tensor | None = None) -> Tensor:
        """float32 (B, num_signals), and (B,) how long ago the last event was, to (B, T)."""
        if self.num_towers == 1:
            return torch.ones(len(signals), 1, dtype=signals.dtype, device=signals.device)
        hidden = self.hidden(signals)
        if recency is not None:
            hidden = hidden + recency.unsqueeze(1) * self.recency
        logits = self.output(torch.tanh(hidden))
        return self.num_towers * torch.softmax(logits, dim=-1)
