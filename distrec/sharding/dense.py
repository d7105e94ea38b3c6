"""The dense part of an update: gradients summed over ranks while row gradients travel, then a step.

All gradients travel as one tensor: each collective has a cost of its own, and the order in which
numbers are added does not depend on what else is under way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from distrec.errors import TrainingError
from distrec.sharding.collectives import Collectives


class DenseGradients:
    """The gradients of one backward pass.

    Args:
        parameters: Whose gradients are summed and clipped together; those that are trained and have
            none count as zero.
        collectives: The ranks.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], collectives: Collectives) -> None:
        self._parameters = [one for one in parameters if one.requires_grad]
        self._collectives = collectives
        self._wait: Callable[[], Tensor] | None = None
        self._sent: list[tuple[Tensor, int]] = []

    def start(self) -> None:
        """Begin to sum them over ranks. Collective, and returns at once.

        The backward pass may still be at work, but not on these.
        """
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = self._gradients()
        self._sent = [(gradient, gradient._version) for gradient in gradients]
        if not gradients or self._collectives.world.world_size == 1:
            self._wait = lambda: torch.empty(0)
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self._wait = self._collectives.start_allreduce(flat, "dense gradients", in_place=True)

    def step(self, optimizer: torch.optim.Optimizer, clip_norm: float = 0.0) -> float:
        """Wait for the sums, clip them, update. Collective where `start` was not called.

        Args:
            optimizer: The same on every rank.
            clip_norm: Largest norm; 0 for no clipping.

        Returns:
            The norm of the summed gradients before clipping; not finite where a gradient is not.

        Raises:
            TrainingError: A gradient was added to after `start`.
        """
        if self._wait is None:
            self.start()
        assert self._wait is not None
        total = self._wait()
        gradients = self._gradients()
        for gradient, (sent, version) in zip(gradients, self._sent, strict=True):
            if gradient is not sent or gradient._version != version:
                raise TrainingError(
                    "dense gradients are complete when rows get theirs. Received: one that was "
                    "added to later. This is a fault of the program: the rows of a step are looked "
                    "up before anything else of the model is computed."
                )
        if len(total):
            sizes = [gradient.numel() for gradient in gradients]
            for gradient, part in zip(gradients, total.split(sizes), strict=True):
                gradient.copy_(part.view_as(gradient))
        norm = _clip(gradients, clip_norm)
        optimizer.step()
        return norm

    def _gradients(self) -> list[Tensor]:
        return [one.grad for one in self._parameters if one.grad is not None]


def _clip(gradients: list[Tensor], clip_norm: float) -> float:
    """Scale all gradients so that their common norm is at most `clip_norm`; 0 leaves them.

    Returns:
        The norm before.
    """
    norm = nn.utils.get_total_norm(gradients)
    if clip_norm > 0:
        factor = torch.clamp(clip_norm / (norm + 1e-6), max=1.0)
        for gradient in gradients:
            gradient.mul_(factor)
    return float(norm)
