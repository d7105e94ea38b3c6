"""Physical tables: rows looked up, and updated inside the backward pass by a fused optimizer.

On a GPU a table is FBGEMM's (`fbgemm.py`). On the CPU it is plain torch: one sort brings the
gradients of a row together and one pass updates the distinct rows; FBGEMM's CPU kernel takes 2.6 to
3.9 times as long (benchmarks/sharding.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from distrec.config import ShardingConfig
from distrec.sharding.plan import state_width

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class FusedTable(ABC):
    """Rows of one width with their optimizer state, on one device.

    Not an nn.Module: its weights are trained in `FusedTable.lookup`'s backward pass, so that no
    optimizer, gradient clipping or broadcast of a model's parameters may find them.

    Args:
        num_rows: Rows.
        embedding_dim: D.
    """

    def __init__(self, num_rows: int, embedding_dim: int) -> None:
        self.num_rows = num_rows
        self.embedding_dim = embedding_dim
        self._touched: Tensor | None = None

    def lookup(self, rows: Tensor) -> Tensor:
        """Rows by number: float32, (n, D).

        With gradients enabled, `.backward(gradient)` of the result updates the rows, each once.

        Args:
            rows: int64, (n,), in [0, num_rows).
        """
        if self._touched is not None and torch.is_grad_enabled():
            self._touched[rows] = True
        if not len(rows):
            return torch.zeros(0, self.embedding_dim, device=rows.device, requires_grad=True)
        return self._lookup(rows)

    @abstractmethod
    def _lookup(self, rows: Tensor) -> Tensor:
        """As `lookup`, of at least one row."""

    def update_all(self, gradient: Tensor) -> None:
        """One optimizer step on every row: gradient is float32, (num_rows, D).

        A row whose gradient is zero stays as it is under each of the three optimizers.
        """
        if self._touched is not None:
            self._touched |= (gradient != 0).any(1)
        self._update(torch.arange(self.num_rows, device=gradient.device), gradient)

    def update(self, rows: Tensor, gradient: Tensor) -> None:
        """One optimizer step on some rows.

        Args:
            rows: int64, (n,), each once.
            gradient: float32, (n, D).
        """
        if self._touched is not None:
            self._touched[rows] = True
        self._update(rows, gradient)

    @abstractmethod
    def _update(self, rows: Tensor, gradient: Tensor) -> None:
        """As `update`."""

    def track_touched(self) -> None:
        """From now on keep, a byte a row, which rows may have changed since `forget_touched`."""
        if self._touched is None:
            device = self.weights().device
            self._touched = torch.zeros(self.num_rows, dtype=torch.bool, device=device)

    def forget_touched(self) -> None:
        """No row counts as changed any more."""
        if self._touched is not None:
            self._touched.zero_()

    @property
    def touched(self) -> Tensor | None:
        """bool, (num_rows,): which rows may have changed; None where that is not tracked."""
        return self._touched

    @abstractmethod
    def weights(self) -> Tensor:
        """A view, (num_rows, D), of the type of [sharding] precision."""

    @abstractmethod
    def state(self) -> Tensor:
        """Optimizer state, a float32 view, (num_rows, S); S is `plan.state_width`."""

    @abstractmethod
    def rows_were_written(self) -> None:
        """Must follow a write through `weights` or `state`: a cache on the GPU forgets its copy."""

    @abstractmethod
    def set_learning_rate(self, learning_rate: float) -> None:
        """From the next update on."""


class CpuTable(FusedTable):
    """A table in plain torch.

    Args:
        num_rows: Rows.
        embedding_dim: D.
        config: Section [sharding].
        device: Where the rows lie.
    """

    def __init__(
        self,
        num_rows: int,
        embedding_dim: int,
        config: ShardingConfig,
        device: torch.device,
    ) -> None:
        super().__init__(num_rows, embedding_dim)
        self._optimizer = config.optimizer
        self._learning_rate, self._eps = config.learning_rate, config.eps
        dtype = _DTYPES[config.precision]
        # zeros take memory only when they are written to
        self._weights = torch.zeros(num_rows, embedding_dim, dtype=dtype, device=device)
        width = state_width(config.optimizer, embedding_dim)
        self._state = torch.zeros(num_rows, width, device=device)
        self._anchor = torch.empty(0, device=device, requires_grad=True)

    def _lookup(self, rows: Tensor) -> Tensor:
        found: Tensor = _Lookup.apply(self._anchor, self, rows)
        return found

    def read(self, rows: Tensor) -> Tensor:
        """Rows by number, without a graph: float32, (n, D)."""
        return self._weights.index_select(0, rows).to(torch.float32)

    def update_summed(self, rows: Tensor, gradient: Tensor) -> None:
        """As `update`, for rows that may stand there more than once: their gradients are added up.

        They are added in their order, so that the result does not depend on threads.
        """
        numbers = rows.to(torch.int32) if self.num_rows < 2**31 else rows
        ascending, order = torch.sort(numbers, stable=True)
        starts = run_starts(ascending)
        summed = functional.embedding_bag(
            order, gradient, starts, mode="sum", include_last_offset=True
        )
        self._update(ascending[starts[:-1]].to(torch.int64), summed)

    def _update(self, rows: Tensor, gradient: Tensor) -> None:
        rate: Tensor | float = self._learning_rate
        if self._optimizer != "sgd":
            if self._optimizer == "rowwise_adagrad":
                squares = torch.linalg.vector_norm(gradient, dim=1, keepdim=True).square_()
                squares /= self.embedding_dim
            else:
                squares = gradient.square()
            total = self._state.index_select(0, rows).add_(squares)
            self._state.index_copy_(0, rows, total)
            rate = self._learning_rate / total.sqrt_().add_(self._eps)
        step = gradient * -rate
        if self._weights.dtype == torch.float32:
            self._weights.index_add_(0, rows, step)
        else:
            updated = self.read(rows).add_(step)
            self._weights.index_copy_(0, rows, updated.to(self._weights.dtype))

    def weights(self) -> Tensor:
        """See `FusedTable.weights`."""
        return self._weights

    def state(self) -> Tensor:
        """See `FusedTable.state`."""
        return self._state

    def rows_were_written(self) -> None:
        """Nothing is cached."""

    def set_learning_rate(self, learning_rate: float) -> None:
        """From the next update on."""
        self._learning_rate = learning_rate


class _Lookup(torch.autograd.Function):
    """Rows of a `CpuTable`; backward updates them."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, table: CpuTable, rows: Tensor) -> Tensor:
        """Rows by number; the anchor requires a gradient, without which backward is not called."""
        ctx.table, ctx.rows = table, rows
        return table.read(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        """gradient is (n, D)."""
        ctx.table.update_summed(ctx.rows, gradient.contiguous())
        return None, None, None


def run_starts(ascending: Tensor) -> Tensor:
    """Where each run of equal numbers starts, and the end of the last: int64, (U + 1,)."""
    starts = torch.ones(len(ascending) + 1, dtype=torch.bool, device=ascending.device)
    torch.ne(ascending[1:], ascending[:-1], out=starts[1:-1])
    return starts.nonzero().squeeze(1)


def make_table(
    num_rows: int,
    embedding_dim: int,
    config: ShardingConfig,
    device: torch.device,
    identical_on_all_ranks: bool,
) -> FusedTable:
    """The table for a device.

    Args:
        num_rows: Rows.
        embedding_dim: D.
        config: Section [sharding].
        device: Where to compute.
        identical_on_all_ranks: Whether other ranks keep the same rows; then no update is random.
    """
    if device.type == "cpu":
        return CpuTable(num_rows, embedding_dim, config, device)
    from distrec.sharding.fbgemm import FbgemmTable  # seconds, and 200 MiB

    return FbgemmTable(num_rows, embedding_dim, config, device, identical_on_all_ranks)
