"""One rank of the DLRM on EmbeddingTables and Horovod: run by the benchmarks under horovodrun.

horovodrun -np 2 --gloo python dlrm_ours.py FOLDER NAME [bind_cores]
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
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
from stages import Stages
from torch import nn

from distrec.batch import Jagged
from distrec.config import LaunchConfig, ShardingConfig
from distrec.sharding.collectives import start
from distrec.sharding.dense import DenseGradients
from distrec.sharding.exchange import Asked
from distrec.sharding.lookup import Request
from distrec.sharding.plan import TableSpec, plan_tables
from distrec.sharding.tables import EmbeddingTables, Wait

CPU = torch.device("cpu")


class Side:
    """What carries out the orders."""

    def __init__(
        self, folder: Path, shape: Shape, sharding: dict[str, Any], bind_cores: bool
    ) -> None:
        launch = LaunchConfig(device="cpu", threads_per_rank=1, bind_cores=bind_cores)
        self.collectives = start(launch)
        world = self.collectives.world
        self.world_size = world.world_size
        self.names = [table_name(number) for number in range(NUM_TABLES)]
        ids, self.numbers, self.labels = read_data(folder, world.rank)
        self.batches = [
            {name: Jagged.singles(ids[batch, n]) for n, name in enumerate(self.names)}
            for batch in range(len(ids))
        ]
        config = ShardingConfig.model_validate(
            {
                "optimizer": "rowwise_adagrad",
                "learning_rate": LEARNING_RATE,
                "eps": EPS,
                "init_scale": INIT_SCALE,
                **sharding,
            }
        )
        specs = [
            TableSpec(name, rows + 1, shape.embedding_dim)
            for name, rows in zip(self.names, shape.table_rows, strict=True)
        ]
        plans = plan_tables(specs, config, self.world_size)
        self.tables = EmbeddingTables(plans, self.collectives, config, SEED, CPU)
        self.dense = Dense(shape.embedding_dim, pair_index(self.names))
        self.optimizer = torch.optim.SGD(self.dense.parameters(), lr=DENSE_LEARNING_RATE)
        self.sharding = config
        self.asked: Asked | None = None
        self.given = [torch.full((shape.batch_size_per_rank, shape.embedding_dim), 1e-6)]
        self.given *= NUM_TABLES
        self.stages = Stages()

    def requests(self, number: int) -> dict[str, Request]:
        """Of a batch."""
        bags = self.batches[number % len(self.batches)]
        return {name: Request(name, ids, "sum") for name, ids in bags.items()}

    def start_look_up(self, number: int, meanwhile: Callable[[], None]) -> Wait:
        """Have the rows of a batch sent."""
        wait = self.tables.start(self.requests(number), self.asked, meanwhile)
        self.asked = None
        return wait

    def ask_ahead(self, number: int) -> None:
        """As the trainer does before a backward pass."""
        if self.sharding.prefetch_ids or self.sharding.prefetch_rows:
            requests = self.requests(number)
            self.asked = self.tables.ask(requests, self.sharding.prefetch_rows)

    def whole(self, number: int, is_last: bool) -> float:
        """A step of training; the loss."""
        batch = number % len(self.batches)
        clock = self.stages.time
        with clock("rest"):
            self.optimizer.zero_grad()
            gradients = DenseGradients(self.dense.parameters(), self.collectives)
            with clock("look-up, rest"):
                wait = self.start_look_up(number, gradients.start)
            with clock("dense forward"):
                own = self.dense.bottom(self.numbers[batch])
            with clock("look-up, rest"):
                found = wait(lambda: gradients.start(self.dense.top.parameters()))
                rows = torch.stack([found[name] for name in self.names], dim=1)
            with clock("dense forward"):
                logits = self.dense(own, rows)
                loss = nn.functional.binary_cross_entropy_with_logits(logits, self.labels[batch])
            if not is_last:
                self.ask_ahead(number + 1)
            with clock("dense and pooling backward"):
                # gradients are summed over ranks
                (loss / self.world_size).backward()
            gradients.step(self.optimizer)
            return float(loss.detach())

    def sparse(self, number: int, is_last: bool) -> float:
        """Look-up, exchange, update with a given gradient."""
        rows = self.tables(self.requests(number))
        torch.autograd.backward([rows[name] for name in self.names], self.given)
        return 0.0

    def answer(self, order: dict[str, Any]) -> dict[str, Any]:
        """Seconds of some steps, and their losses over all ranks."""
        self.stages = Stages()
        if order.get("stages"):
            with self.stages.installed(self.collectives):
                return {**self._measure(order), "stages": self.stages.seconds}
        return self._measure(order)

    def _measure(self, order: dict[str, Any]) -> dict[str, Any]:
        step = {"whole": self.whole, "sparse": self.sparse}[order["what"]]
        self.collectives.barrier("benchmark")
        before = self.tables.exchanged_bytes
        start_time, start_cpu = time.perf_counter(), time.process_time()
        first, end = order["first"], order["first"] + order["steps"]
        losses = [step(number, number + 1 == end) for number in range(first, end)]
        elapsed, used = time.perf_counter() - start_time, time.process_time() - start_cpu
        totals = self.collectives.allreduce(torch.tensor(losses), "losses")
        return {
            "seconds": elapsed,
            "cpu_seconds": used,
            "losses": (totals / self.world_size).tolist(),
            "bytes_a_step": (self.tables.exchanged_bytes - before) // order["steps"],
        }


def main() -> None:
    folder, name, bind_cores = Path(sys.argv[1]), sys.argv[2], "bind_cores" in sys.argv[3:]
    shape = Shape(**json.loads((folder / "shape.json").read_text()))
    sharding = json.loads((folder / name / "sharding.json").read_text())
    side = Side(folder, shape, sharding, bind_cores)
    turns.serve(folder / name, side.collectives.world.rank, side.answer)


if __name__ == "__main__":
    main()
