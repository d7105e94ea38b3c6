"""The dense part of an update: gradients summed over ranks while row gradients travel, then a step.

Gradients that are complete at the same time travel as one tensor: each collective has a cost of its
own, and the order in which numbers are added does not depend on what else is under way.
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
        self._waiting = {id(one): one for one in self._parameters}
        self._travelling: list[_Travelling] = []

    def start(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Begin to sum them over ranks. Collective, and returns at once.

        The backward pass may still be at work, but not on these.

        Args:
            parameters: Some, the same on every rank. None: all that no earlier call has begun with.
        """
        chosen = self._waiting.values() if parameters is None else parameters
        part = [one for one in [*chosen] if self._waiting.pop(id(one), None) is not None]
        if part:
            name = f"dense gradients {len(self._travelling)}"
            self._travelling.append(_Travelling(part, self._collectives, name))

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
        self.start()
        for part in self._travelling:
            part.finish()
        gradients = [one.grad for one in self._parameters if one.grad is not None]
        norm = _clip(gradients, clip_norm)
        optimizer.step()
        return norm


class _Travelling:
    """Some gradients that are being summed over ranks."""

    def __init__(self, parameters: list[nn.Parameter], collectives: Collectives, name: str) -> None:
        self._parameters = parameters
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = self._gradients()
        self._sent = [(gradient, gradient._version) for gradient in gradients]
        self._wait: Callable[[], Tensor] | None = None
        if collectives.world.world_size > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            self._wait = collectives.start_allreduce(flat, name, in_place=True)

    def _gradients(self) -> list[Tensor]:
        return [one.grad for one in self._parameters if one.grad is not None]

    def finish(self) -> None:
        """Wait for the sums and put them in the gradients' place."""
        total = None if self._wait is None else self._wait()
        gradients = self._gradients()
        for gradient, (sent, version) in zip(gradients, self._sent, strict=True):
            if gradient is not sent or gradient._version != version:
                raise TrainingError(
                    "dense gradients are complete when they are summed over ranks. Received: one "
                    "that was added to later. This is a fault of the program: the look-up of a "
                    "step is started before anything of the model is computed."
                )
        if total is not None:
            sizes = [gradient.numel() for gradient in gradients]
            for parameter, part in zip(self._parameters, total.split(sizes), strict=True):
                parameter.grad = part.view_as(parameter)


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
