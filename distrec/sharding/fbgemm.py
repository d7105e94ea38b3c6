"""A table on FBGEMM's kernel, which is for GPUs; it computes on the CPU too, slowly, as tests do.

The only file that imports fbgemm_gpu. The kernel sums the gradients of a row that is used more than
once before the one, exact update.
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
from distrec.sharding.kernels import FusedTable
from distrec.sharding.plan import state_width

_OPTIMIZERS = {
    "rowwise_adagrad": OptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": OptimType.EXACT_ADAGRAD,
    "sgd": OptimType.EXACT_SGD,
}
_PRECISIONS = {"fp32": SparseType.FP32, "fp16": SparseType.FP16}


class FbgemmTable(FusedTable):
    """See `FusedTable`.

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
        super().__init__(num_rows, embedding_dim)
        self._state_width = state_width(config.optimizer, embedding_dim)
        location, compute = EmbeddingLocation.HOST, ComputeDevice.CPU
        if device.type == "cuda":
            compute = ComputeDevice.CUDA
            location = EmbeddingLocation.DEVICE
            if config.cpu_offload:
                location = EmbeddingLocation.MANAGED_CACHING
        self._cached = location == EmbeddingLocation.MANAGED_CACHING
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

    def _lookup(self, rows: Tensor) -> Tensor:
        offsets = torch.arange(len(rows) + 1, device=rows.device)
        result: Tensor = self._kernel(rows, offsets)
        return result

    def _update(self, rows: Tensor, gradient: Tensor) -> None:
        with torch.enable_grad():
            output = self.lookup(rows)
        output.backward(gradient)

    def weights(self) -> Tensor:
        """See `FusedTable.weights`."""
        if self._cached:
            self._kernel.flush()
        view: Tensor = self._kernel.split_embedding_weights()[0]
        return view

    def state(self) -> Tensor:
        """See `FusedTable.state`."""
        if self._state_width == 0:
            return torch.zeros(self.num_rows, 0, device=self.weights().device)
        if self._cached:
            self._kernel.flush()
        view: Tensor = self._kernel.split_optimizer_states()[0][0]
        return view.view(self.num_rows, self._state_width)

    def rows_were_written(self) -> None:
        """See `FusedTable.rows_were_written`."""
        if self._cached:
            self._kernel.reset_cache_states()

    def set_learning_rate(self, learning_rate: float) -> None:
        """From the next update on."""
        self._kernel.set_learning_rate(learning_rate)
