"""Look-up, gradient and update of EmbeddingTables beside nn.EmbeddingBag(sparse=True) and Adagrad.

    python benchmarks/sharding.py [--quick] [--batch-size 4096] [--rounds 7] [--threads 1]
        [--device cuda]

One process, two shapes: `features` is 26 tables of 200,000 rows x 16 with one id an example, as in
a click model; `history` is one table of 200,000 rows x 64 with bags of 50 ids. Ids are Zipf-like,
as ids by descending frequency are. Both start from the same rows, take the same steps in turns, and
must end with equal rows (Adagrad of every number); medians count. Our default, row-wise Adagrad,
is shown as well. Then one table of 1,000,000 rows alone, look-up and update of 16,000 rows, each of
some 12,000: the one in plain torch, which the CPU uses, beside FBGEMM's kernel, which GPUs use. It
ends with one line of JSON.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import common
import numpy as np
import torch
from torch import nn

from distrec.batch import Jagged
from distrec.config import ShardingConfig
from distrec.sharding.collectives import OneProcess
from distrec.sharding.fbgemm import FbgemmTable
from distrec.sharding.kernels import CpuTable
from distrec.sharding.lookup import Request
from distrec.sharding.plan import TableSpec, plan_tables
from distrec.sharding.tables import EmbeddingTables

# with a tiny eps the first steps are of size LEARNING_RATE whatever the gradient: rounding decides
LEARNING_RATE, EPS = 0.05, 1e-3
# tables, rows, width, ids a bag
SHAPES = {"features": (26, 200_000, 16, 1), "history": (1, 200_000, 64, 50)}
QUICK_SHAPES = {"features": (4, 5_000, 16, 1), "history": (1, 5_000, 64, 10)}


def make_batches(
    shape: tuple[int, int, int, int], batch_size: int, number: int, device: torch.device
) -> list[dict[str, Jagged]]:
    """Bags for every table: ids in [1, rows), the small ones more often."""
    num_tables, num_rows, _, bag = shape
    random = np.random.default_rng(1)
    batches = []
    for _ in range(number):
        batch = {}
        for table in range(num_tables):
            # density falls like 1 / id
            ids = np.exp(random.random(batch_size * bag) * np.log(num_rows)).astype(np.int64)
            values = torch.from_numpy(np.clip(ids, 1, num_rows - 1))
            bags = Jagged.from_lengths(values, torch.full((batch_size,), bag))
            batch[f"t{table}"] = bags.to(device)
        batches.append(batch)
    return batches


def make_tables(
    shape: tuple[int, int, int, int], optimizer: str, device: torch.device
) -> EmbeddingTables:
    """Ours, on one process."""
    config = ShardingConfig.model_validate(
        {"optimizer": optimizer, "learning_rate": LEARNING_RATE, "eps": EPS}
    )
    specs = [TableSpec(f"t{table}", shape[1], shape[2]) for table in range(shape[0])]
    return EmbeddingTables(plan_tables(specs, config, 1), OneProcess(device), config, 1, device)


class Plain:
    """torch's own tables, with the rows of ours."""

    def __init__(self, tables: EmbeddingTables) -> None:
        self.bags = {
            name: nn.EmbeddingBag.from_pretrained(
                tables.local_rows(name)[1].clone(),
                freeze=False,
                mode="sum",
                sparse=True,
                include_last_offset=True,
            )
            for name in tables.table_plans
        }
        weights = [bag.weight for bag in self.bags.values()]
        self.optimizer = torch.optim.Adagrad(weights, lr=LEARNING_RATE, eps=EPS)

    def step(self, batch: dict[str, Jagged]) -> None:
        """Look up, square, update."""
        self.optimizer.zero_grad()
        rows = [self.bags[name](ids.values, ids.offsets) for name, ids in batch.items()]
        torch.stack([part.square().sum() for part in rows]).sum().backward()
        self.optimizer.step()


def our_step(tables: EmbeddingTables) -> Callable[[dict[str, Jagged]], None]:
    """The same step with ours."""

    def step(batch: dict[str, Jagged]) -> None:
        rows = tables({name: Request(name, ids, "sum") for name, ids in batch.items()})
        torch.stack([part.square().sum() for part in rows.values()]).sum().backward()

    return step


def seconds_of(work: Callable[[], None]) -> float:
    """How long a GPU is busy with it, or the CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    shape: tuple[int, int, int, int], batch_size: int, rounds: int, device: torch.device
) -> dict[str, float | int]:
    """Median milliseconds a step of each, taking turns."""
    ours, rowwise = (
        make_tables(shape, "adagrad", device),
        make_tables(shape, "rowwise_adagrad", device),
    )
    plain = Plain(ours)
    steps = {"ours": our_step(ours), "ours_rowwise": our_step(rowwise), "plain": plain.step}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number, batch in enumerate(make_batches(shape, batch_size, rounds + 1, device)):
        for name, step in steps.items():
            seconds = seconds_of(partial(step, batch))
            # the first round pays for memory that the later ones find
            if number:
                times[name].append(seconds)
    difference = max(
        float((ours.local_rows(name)[1] - bag.weight.detach()).abs().max())
        for name, bag in plain.bags.items()
    )
    # a GPU adds up in another order every time
    bound = 1e-3 if device.type == "cpu" else 3e-3
    assert difference < bound, f"the two have learned different rows: {difference}"
    medians = {name: statistics.median(values) * 1000 for name, values in times.items()}
    return {
        "ids": batch_size * shape[0] * shape[3],
        "ours_ms": round(medians["ours"], 3),
        "ours_rowwise_ms": round(medians["ours_rowwise"], 3),
        "plain_ms": round(medians["plain"], 3),
        "ratio": round(medians["plain"] / medians["ours"], 3),
        "ratio_rowwise": round(medians["plain"] / medians["ours_rowwise"], 3),
        "largest_difference": difference,
    }


def measure_kernels(
    num_rows: int, width: int, num_ids: int, rounds: int, device: torch.device
) -> dict[str, float]:
    """Median milliseconds of a look-up with its row-wise Adagrad update, kernels in turns."""
    config = ShardingConfig.model_validate({"learning_rate": LEARNING_RATE, "eps": EPS})
    tables = {
        "torch": CpuTable(num_rows, width, config, device),
        "fbgemm": FbgemmTable(num_rows, width, config, device, False),
    }
    generator = torch.Generator().manual_seed(1)
    own = torch.randperm(num_rows, generator=generator)[: num_ids * 3 // 4]
    # what an owner sees: distinct rows of one rank, and those of another, some of them the same
    rows = torch.cat([own.sort().values, own[: num_ids // 4].sort().values])
    rows, gradient = rows.to(device), torch.randn(len(rows), width, generator=generator).to(device)
    times: dict[str, list[float]] = {name: [] for name in tables}
    for number in range(rounds + 1):
        for name, table in tables.items():
            seconds = seconds_of(lambda: table.lookup(rows).backward(gradient))  # noqa: B023
            if number:
                times[name].append(seconds)
    torch.testing.assert_close(tables["torch"].weights(), tables["fbgemm"].weights(),
                               rtol=1e-3, atol=1e-4)  # fmt: skip
    medians = {name: statistics.median(values) * 1000 for name, values in times.items()}
    return {
        "torch_ms": round(medians["torch"], 3),
        "fbgemm_ms": round(medians["fbgemm"], 3),
        "fbgemm_over_torch": round(medians["fbgemm"] / medians["torch"], 3),
    }


def main() -> None:
    """Measure both shapes and print."""
    parser = common.parser(__doc__, 7, "small tables, a few seconds")
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shapes = QUICK_SHAPES if arguments.quick else SHAPES
    batch_size = min(arguments.batch_size, 512) if arguments.quick else arguments.batch_size
    device = torch.device(arguments.device)
    kernels_of = "fbgemm-gpu" if device.type == "cuda" else "fbgemm-gpu-cpu"
    gpu = f", {torch.cuda.get_device_name()}" if device.type == "cuda" else ""
    common.print_header(("torch", kernels_of), f"{arguments.threads} threads{gpu}")
    results = {}
    for name, shape in shapes.items():
        found = measure(shape, batch_size, arguments.rounds, device)
        results[name] = found
        print(
            f"{name}: EmbeddingTables {found['ours_ms']:.1f} ms (row-wise Adagrad "
            f"{found['ours_rowwise_ms']:.1f} ms), nn.EmbeddingBag + Adagrad "
            f"{found['plain_ms']:.1f} ms: {found['ratio']:.2f} (row-wise "
            f"{found['ratio_rowwise']:.2f}) times as fast"
        )
    kernels = {}
    num_rows, num_ids = (50_000, 2_000) if arguments.quick else (1_000_000, 16_000)
    for width in (16, 64):
        found = measure_kernels(num_rows, width, num_ids, arguments.rounds, device)
        kernels[f"d{width}"] = found
        print(
            f"one table, D = {width}: plain torch {found['torch_ms']:.2f} ms, FBGEMM "
            f"{found['fbgemm_ms']:.2f} ms: {found['fbgemm_over_torch']:.2f} times as long"
        )
    figures = {"batch_size": batch_size, **results, "kernels": kernels}
    common.print_result("sharding", figures, {})


if __name__ == "__main__":
    main()
