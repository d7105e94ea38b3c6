"""A look-up over ranks as two nodes of autograd, so that others compute while its rows travel.

Autograd goes back through the newest node first. What is computed between `StartRows` and
`FetchRows` has its forward pass while rows travel, and its backward pass while their gradients do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distrec.sharding.exchange import Asked, Exchange, Update


class UnderWay:
    """A look-up whose rows are on their way, and later their gradients.

    Collective: the rows that other ranks have asked for are sent at once.

    Args:
        exchange: What to work on.
        asked: Which rows.
        trains: Whether a backward pass may follow.

    Raises:
        DataError: On every rank, when an id of any rank is outside its table.
    """

    def __init__(self, exchange: Exchange, asked: Asked, trains: bool) -> None:
        self._exchange, self._route = exchange, asked.route
        self._questions = asked.wait()
        self._fetch = asked.fetch or exchange.fetch(asked.route, self._questions, trains)
        self._answers: list[Tensor | None] = []
        self._updates: list[Update] = []

    def fetch(self) -> list[Tensor]:
        """Wait for the rows: for every width (1 + U_w, D_w), zeros and then group after group."""
        fetched = self._fetch()
        self._answers = fetched.answers
        results = []
        for width, numbers in self._exchange.layout.widths.items():
            rows = [fetched.rows[number] for number in numbers]
            results.append(torch.cat([rows[0].new_zeros(1, width), *rows]))
        return results

    def send(self, gradients: Sequence[Tensor]) -> None:
        """Start bringing gradients, those of what `fetch` gave, to all who keep the rows."""
        layout, route = self._exchange.layout, self._route
        hot_counts = dict(zip(layout.hot, self._questions.hot_counts, strict=True))
        self._updates = []
        for gradient, numbers in zip(gradients, layout.widths.values(), strict=True):
            # the row of zeros is padding: it is not trained
            parts = gradient[1:].split([len(route.rows[number]) for number in numbers])
            for number, part in zip(numbers, parts, strict=True):
                hot_count = hot_counts.get(number, 0)
                self._updates.append(self._exchange.send_gradient(number, part, route, hot_count))

    def update(self) -> None:
        """Wait for the gradients of this rank's rows, and update those."""
        exchange = self._exchange
        answers = zip(self._answers, self._questions.rows, strict=True)
        for number, update in enumerate(self._updates):
            rows, gradient = update()
            if exchange.layout.groups[number].kind == "spread":
                answer, asked_for = next(answers)
                if answer is None:
                    # fetched ahead: what is updated, and at which rate, is known by now
                    with torch.enable_grad():
                        answer = exchange.kernels[number].lookup(asked_for)
                answer.backward(gradient)
            elif rows is None:
                exchange.kernels[number].update_all(gradient)
            else:
                exchange.kernels[number].update(rows, gradient)


class StartRows(torch.autograd.Function):
    """The first node of a look-up, and the last of its backward pass, which updates rows."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, look_up: UnderWay, meanwhile: Callable[[], None]
    ) -> Tensor:
        """An empty tensor, to connect `FetchRows`.

        Args:
            ctx: Of autograd.
            anchor: Empty, requires a gradient: without it autograd would see nothing to do.
            look_up: Which is under way.
            meanwhile: Called in the backward pass while gradients of rows travel. What was computed
                after this node has its gradients by then.
        """
        ctx.look_up, ctx.meanwhile = look_up, meanwhile
        return torch.empty_like(anchor)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, None, None]:
        """Update the rows of this rank."""
        ctx.meanwhile()
        ctx.look_up.update()
        return None, None, None


class FetchRows(torch.autograd.Function):
    """The distinct rows of a look-up; backward sends their gradients."""

    @staticmethod
    def forward(
        ctx: Any, started: Tensor, look_up: UnderWay, meanwhile: Callable[[], None]
    ) -> tuple[Tensor, ...]:
        """Rows for every width, as `UnderWay.fetch` gives them.

        Args:
            ctx: Of autograd.
            started: From `StartRows`.
            look_up: The same.
            meanwhile: As for `StartRows`, of what was computed after this one.
        """
        ctx.look_up, ctx.meanwhile = look_up, meanwhile
        return tuple(look_up.fetch())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Start bringing gradients to all who keep the rows."""
        ctx.look_up.send(gradients)
        ctx.meanwhile()
        return gradients[0].new_zeros(0), None, None
