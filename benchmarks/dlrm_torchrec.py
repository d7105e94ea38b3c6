"""One rank of the DLRM on TorchRec, over gloo: run by embedding_vs_torchrec.py under torchrun.

    torchrun --nproc-per-node 2 dlrm_torchrec.py FOLDER

Runs in a virtual environment of its own, with torch, fbgemm-gpu-cpu and torchrec.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchrec
import turns
from dlrm_shape import (
    DENSE_LEARNING_RATE,
    EPS,
    INIT_SCALE,
    LEARNING_RATE,
    NUM_TABLES,
    SEED,
    Dense,
    Shape,
    pair_index,
    read_data,
    table_name,
)
from torch import Tensor, distributed, nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.comm_ops import set_gradient_division
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from distrec.sharding.initial import initial_rows

CPU = torch.device("cpu")


def fill(name: str, weights: Tensor) -> None:
    """The first rows of a table, as EmbeddingTables makes them."""
    if not weights.numel():
        return  # another rank's
    ids = np.arange(len(weights))
    rows = initial_rows(name, ids, weights.shape[1], SEED, INIT_SCALE)
    with torch.no_grad():
        weights.copy_(torch.from_numpy(rows))


class Model(nn.Module):
    """Tables and dense part."""

    def __init__(self, tables: torchrec.EmbeddingBagCollection, dense: Dense) -> None:
        super().__init__()
        self.tables = tables
        self.dense = dense

    def forward(self, numbers: Tensor, ids: torchrec.KeyedJaggedTensor) -> Tensor:
        """Logits, (B,)."""
        rows = self.tables(ids)
        # on both sides this is computed while rows travel: values() waits for them
        own = self.dense.bottom(numbers)
        return self.dense(own, rows.values().view(len(numbers), NUM_TABLES, -1))


class Side:
    """What carries out the orders."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        self.names = [table_name(number) for number in range(NUM_TABLES)]
        self.ids, self.numbers, self.labels = read_data(folder, self.rank)
        self.lengths = torch.ones(NUM_TABLES * shape.batch_size_per_rank, dtype=torch.int32)
        tables = self._tables(shape)
        planner = EmbeddingShardingPlanner(
            topology=Topology(
                world_size=self.world_size, local_world_size=self.world_size, compute_device="cpu"
            ),
            batch_size=shape.batch_size_per_rank,
        )
        sharder = EmbeddingBagCollectionSharder()
        # the order of the pooled columns is known only once the tables are placed
        dense = Dense(shape.embedding_dim, pair_index(self.names))
        model = Model(tables, dense)
        plan = planner.collective_plan(model, [sharder], distributed.group.WORLD)
        self.plan = Counter(
            f"{spec.sharding_type}, {spec.compute_kernel}"
            for module in plan.plan.values()
            for spec in module.values()
        )
        self.model = DistributedModelParallel(model, device=CPU, plan=plan, sharders=[sharder])
        self.tables = self.model.module.tables
        with torch.no_grad():
            order = list(self.tables(self._batch_ids(0)).keys())
            pairs = pair_index(order)
            self._dense().pairs.copy_(pairs[0] * (NUM_TABLES + 1) + pairs[1])
        self.optimizer = torch.optim.SGD(self._dense().parameters(), lr=DENSE_LEARNING_RATE)
        self.given = torch.full((shape.batch_size_per_rank, NUM_TABLES * shape.embedding_dim), 1e-6)

    def _dense(self) -> Dense:
        dense = self.model.module.dense
        return getattr(dense, "module", dense)

    def _tables(self, shape: Shape) -> torchrec.EmbeddingBagCollection:
        configs = [
            torchrec.EmbeddingBagConfig(
                name=name,
                num_embeddings=rows + 1,
                embedding_dim=shape.embedding_dim,
                feature_names=[name],
                # sharding makes the rows anew, with this
                init_fn=functools.partial(fill, name),
            )
            for name, rows in zip(self.names, shape.table_rows, strict=True)
        ]
        tables = torchrec.EmbeddingBagCollection(device=torch.device("meta"), tables=configs)
        options = {"lr": LEARNING_RATE, "eps": EPS}
        apply_optimizer_in_backward(RowWiseAdagrad, tables.parameters(), options)
        return tables

    def _batch_ids(self, number: int) -> torchrec.KeyedJaggedTensor:
        values = self.ids[number % len(self.ids)].flatten()
        return torchrec.KeyedJaggedTensor.from_lengths_sync(self.names, values, self.lengths)

    def whole(self, number: int) -> float:
        """A step of training; the loss."""
        batch = number % len(self.ids)
        self.optimizer.zero_grad()
        logits = self.model(self.numbers[batch], self._batch_ids(number))
        loss = nn.functional.binary_cross_entropy_with_logits(logits, self.labels[batch])
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def sparse(self, number: int) -> float:
        """Look-up, exchange, update with a given gradient."""
        rows = self.tables(self._batch_ids(number)).values()
        rows.backward(self.given)
        return 0.0

    def answer(self, order: dict[str, Any]) -> dict[str, Any]:
        """Seconds of some steps, and their losses over all ranks."""
        step = {"whole": self.whole, "sparse": self.sparse}[order["what"]]
        distributed.barrier()
        start, start_cpu = time.perf_counter(), time.process_time()
        losses = [step(order["first"] + number) for number in range(order["steps"])]
        elapsed, used = time.perf_counter() - start, time.process_time() - start_cpu
        totals = torch.tensor(losses)
        distributed.all_reduce(totals)
        return {
            "seconds": elapsed,
            "cpu_seconds": used,
            "losses": (totals / self.world_size).tolist(),
            "plan": dict(self.plan),
        }


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    shape = Shape(**json.loads((folder / "shape.json").read_text()))
    distributed.init_process_group("gloo")
    # a gradient is the mean over all rows of all ranks, as DDP's is
    set_gradient_division(True)
    side = Side(folder, shape)
    turns.serve(folder / "torchrec", side.rank, side.answer)


if __name__ == "__main__":
    main()
