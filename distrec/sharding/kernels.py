"""One FBGEMM table: rows looked up, and updated inside the backward pass.

The only file that imports fbgemm_gpu. Its kernel sums the gradients of a row that is used more than
once before the one, exact update; on CPU that is several times as fast as nn.EmbeddingBag with a
sparse gradient (benchmarks/sharding.py).
"""

from __future__ import annotations

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
    BoundsCheckMode,
    EmbeddingLocation,
    PoolingMode,
)
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    OptimType,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from distrec.config import ShardingConfig
from distrec.sharding.plan import state_width

_OPTIMIZERS = {
    "rowwise_adagrad": OptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": OptimType.EXACT_ADAGRAD,
    "sgd": OptimType.EXACT_SGD,
}
_PRECISIONS = {"fp32": SparseType.FP32, "fp16": SparseType.FP16}


class FusedTable:
    """Rows of one width with their optimizer state, on one device.

    Not an nn.Module: its weights are trained in `FusedTable.lookup`'s backward pass, so that no
    optimizer, gradient clipping or broadcast of a model's parameters may find them.

    Args:
        num_rows: Rows.
        embedding_dim: D.
        config: Section [sharding].
        device: Where to compute; with config.cpu_offload, a GPU's rows lie in host memory.
        identical_on_all_ranks: Whether other ranks keep the same rows; then no update is random.
    """

    def __init__(
        self,
        num_rows: int,
        embedding_dim: int,
        config: ShardingConfig,
        device: torch.device,
        identical_on_all_ranks: bool,
    ) -> None:
        self.num_rows = num_rows
        self.embedding_dim = embedding_dim
        self._state_width = state_width(config.optimizer, embedding_dim)
        location, compute = EmbeddingLocation.HOST, ComputeDevice.CPU
        if device.type == "cuda":
            compute = ComputeDevice.CUDA
            location = EmbeddingLocation.DEVICE
            if config.cpu_offload:
                location = EmbeddingLocation.MANAGED_CACHING
        self._cached = location == EmbeddingLocation.MANAGED_CACHING
        self._touched: Tensor | None = None
        self._kernel = SplitTableBatchedEmbeddingBagsCodegen(
            [(num_rows, embedding_dim, location, compute)],
            optimizer=_OPTIMIZERS[config.optimizer],
            learning_rate=config.learning_rate,
            eps=config.eps,
            # fp16 rows lose small updates unless they are rounded at random (GPU only)
            stochastic_rounding=config.precision == "fp16" and not identical_on_all_ranks,
            weights_precision=_PRECISIONS[config.precision],
            output_dtype=SparseType.FP32,
            # every row a bag of its own: PoolingMode.NONE has no vectorised update on CPU and takes
            # tens of times as long
            pooling_mode=PoolingMode.SUM,
            # the caller has checked; the kernel would only warn, and read row 0
            bounds_check_mode=BoundsCheckMode.NONE,
            device=device,
        )

    def lookup(self, rows: Tensor) -> Tensor:
        """Rows by number: float32, (n, D).

        With gradients enabled, `.backward(gradient)` of the result updates the rows, each once.

        Args:
            rows: int64, (n,), in [0, num_rows).
        """
        if self._touched is not None and torch.is_grad_enabled():
            self._touched[rows] = True
        return self._lookup(rows)

    def _lookup(self, rows: Tensor) -> Tensor:
        if not len(rows):
            return torch.zeros(0, self.embedding_dim, device=rows.device, requires_grad=True)
        offsets = torch.arange(len(rows) + 1, device=rows.device)
        result: Tensor = self._kernel(rows, offsets)
        return result

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

    def _update(self, rows: Tensor, gradient: Tensor) -> None:
        with torch.enable_grad():
            output = self._lookup(rows)
        output.backward(gradient)

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

    def weights(self) -> Tensor:
        """A view, (num_rows, D), float32 or float16."""
        if self._cached:
            self._kernel.flush()
        view: Tensor = self._kernel.split_embedding_weights()[0]
        return view

    def state(self) -> Tensor:
        """Optimizer state, a float32 view, (num_rows, S); S is `plan.state_width`."""
        if self._state_width == 0:
            return torch.zeros(self.num_rows, 0, device=self.weights().device)
        if self._cached:
            self._kernel.flush()
        view: Tensor = self._kernel.split_optimizer_states()[0][0]
        return view.view(self.num_rows, self._state_width)

    def rows_were_written(self) -> None:
        """Must follow a write through `weights` or `state`: a cache on the GPU forgets its copy."""
        if self._cached:
            self._kernel.reset_cache_states()

    def set_learning_rate(self, learning_rate: float) -> None:
        """From the next update on."""
        self._kernel.set_learning_rate(learning_rate)
