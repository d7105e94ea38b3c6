"""The moving average of the dense weights: what is validated and scored in place of the last ones.

Rows of tables are not averaged. Their fused update touches few rows a step, and an average that
decays at every step would have to keep a second row each with the step of its last update: twice
the memory, and one more look-up of every row that is validated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# updates after which the average reaches back as far as ten, then as its decay says
_WARM_UP = 10


class WeightAverage:
    """An exponential moving average of the parameters that are trained.

    Equal on all ranks, as the parameters are.

    Args:
        model: The dense part, on its device.
        decay: Share of the average that an update keeps; in the first updates less.

    Attributes:
        tensors: Parameter -> its average.

    Source: Tarvainen and Valpola 2017, arXiv:1703.01780; the warm-up of the decay is TensorFlow's.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = {
            name: parameter for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }  # fmt: skip
        self.tensors: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def restart(self) -> None:
        """Begin with the present weights."""
        for name, parameter in self._parameters.items():
            self.tensors[name].copy_(parameter)

    @torch.no_grad()
    def update(self, global_step: int) -> None:
        """Add the weights after an optimizer update.

        Args:
            global_step: Updates done, this one included.
        """
        kept = min(self.decay, (1 + global_step) / (_WARM_UP + global_step))
        for name, parameter in self._parameters.items():
            self.tensors[name].lerp_(parameter, 1.0 - kept)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside, and its own again afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.data, self.tensors[name] = self.tensors[name], parameter.data
