"""Where the time of a step goes: clocks around the parts of a look-up, of one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from distrec.sharding.autograd import UnderWay
from distrec.sharding.collectives import Collectives
from distrec.sharding.dense import DenseGradients
from distrec.sharding.kernels import FusedTable
from distrec.sharding.routing import Layout

STAGES = (
    "route", "id exchange", "row exchange", "kernel, look-up", "look-up, rest",
    "dense forward", "dense and pooling backward", "gradient exchange", "kernel, update",
    "dense allreduce", "rest",
)  # fmt: skip


class Stages:
    """Seconds by stage. What is measured inside another stage is not counted there.

    Attributes:
        seconds: By name, one of STAGES.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._inner = [0.0]

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Count what happens inside to a stage."""
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[name] += elapsed - self._inner.pop()
            self._inner[-1] += elapsed

    def timed(self, name: str | Callable[[], str], function: Callable[..., Any]) -> Any:
        """A function that counts its time."""

        def call(*arguments: Any, **named: Any) -> Any:
            with self.time(name if isinstance(name, str) else name()):
                return function(*arguments, **named)

        return call

    @contextmanager
    def installed(self, collectives: Collectives) -> Iterator[None]:
        """Clocks around the parts of distrec, for as long as this lasts."""
        kind = type(collectives)
        replacements = [
            (Layout, "route", self.timed("route", Layout.route)),
            (FusedTable, "lookup", self.timed("kernel, look-up", FusedTable.lookup)),
            # what is left of them once the exchange is taken out is the kernel
            (UnderWay, "send", self.timed("kernel, update", UnderWay.send)),
            (UnderWay, "update", self.timed("kernel, update", UnderWay.update)),
            (kind, "start_alltoall", self._exchange(kind.start_alltoall)),
            (DenseGradients, "start", self.timed("dense allreduce", DenseGradients.start)),
            (DenseGradients, "step", self.timed("dense allreduce", DenseGradients.step)),
        ]
        with ExitStack() as stack:
            for owner, name, replacement in replacements:
                stack.enter_context(mock.patch.object(owner, name, replacement))
            yield

    def _exchange(self, begin: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            label = arguments[3] if len(arguments) > 3 else named["name"]
            stage = "id exchange" if "numbers" in label else "row exchange"
            if "gradients" in label:
                stage = "gradient exchange"
            with self.time(stage):
                wait = begin(*arguments, **named)
            return self.timed(stage, wait)

        return call
