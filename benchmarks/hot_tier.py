"""Bytes and time of a step of spread tables, by skew of the ids and by rows kept on every rank.

    python benchmarks/hot_tier.py [--quick] [--rounds 15]

Two ranks with one thread each look up, pool and update tables of 200,000 x 16 (row-wise Adagrad)
with ids drawn from Zipf(alpha), in turns: as it was before (row numbers as int64, no hot tier),
with int32, with H rows of each table on every rank, the exchange in bf16 and fp16, and row numbers,
or rows, sent ahead. All sides take the same steps from the same rows; the exact ones must end with
equal rows. Medians count; bytes are what a rank sends in a step, on average. It ends with one line
of JSON.

What to expect of H: a distinct row is sent once to a rank that uses it and its gradient once back,
which is what a sum over ranks sends too. So a hot row saves its number, and only where nearly every
rank uses it in nearly every step; what it spares is the wait for it on the way forward.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from distrec.batch import Jagged
from distrec.config import LaunchConfig, ShardingConfig
from distrec.sharding.collectives import Collectives, start
from distrec.sharding.lookup import Request
from distrec.sharding.plan import TableSpec, plan_tables
from distrec.sharding.tables import EmbeddingTables

NUM_RANKS, NUM_TABLES, WIDTH = 2, 4, 16
ALPHAS = (0.9, 1.05, 1.2)
# with a tiny eps the first steps are of one size whatever the gradient: rounding would decide
EPS = 1e-3
BEFORE, LATEST = "before", "int32"


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Args:
        num_rows: Of each table.
        batch_size: Bags of each table on a rank.
        bag: Ids in a bag.
        hot_rows: The values of H.
    """

    num_rows: int
    batch_size: int
    bag: int
    hot_rows: tuple[int, ...]


FULL = Size(200_000, 2048, 5, (64, 256, 1024, 4096, 16_384))
QUICK = Size(20_000, 512, 5, (64, 1024))


def sides_of(size: Size) -> dict[str, dict[str, Any]]:
    """Keys of [sharding] by side."""
    sides: dict[str, dict[str, Any]] = {BEFORE: {}, LATEST: {}}
    sides |= {f"H={rows}": {"hot_rows": rows} for rows in size.hot_rows}
    sides |= {name: {"exchange_precision": name} for name in ("bf16", "fp16")}
    sides |= {"ahead": {"prefetch_ids": True}, "rows": {"prefetch_rows": True}}
    return sides


def make_tables(size: Size, side: str, collectives: Collectives) -> EmbeddingTables:
    """The tables of one side."""
    keys = sides_of(size)[side]
    specs = [TableSpec(f"t{table}", size.num_rows, WIDTH) for table in range(NUM_TABLES)]
    hot = {spec.name: keys["hot_rows"] for spec in specs} if "hot_rows" in keys else {}
    config = ShardingConfig.model_validate(
        {"placement": "row_wise", "eps": EPS, "learning_rate": 0.05, **keys, "hot_rows": hot}
    )
    plans = plan_tables(specs, config, collectives.world.world_size)
    tables = EmbeddingTables(plans, collectives, config, 1, collectives.device)
    if side == BEFORE:
        # the exchange sends what the layout says
        tables._exchange.layout.id_dtype = torch.int64
    return tables


def make_batches(size: Size, alpha: float, rank: int, number: int) -> list[dict[str, Request]]:
    """Bags of ids from 1 on, id k in proportion to k ** -alpha."""
    random = np.random.default_rng((rank, round(100 * alpha)))
    cumulative = np.cumsum(np.arange(1, size.num_rows) ** -alpha)
    lengths = torch.full((size.batch_size,), size.bag)
    batches = []
    for _ in range(number):
        batch = {}
        for table in range(NUM_TABLES):
            draws = random.random(size.batch_size * size.bag) * cumulative[-1]
            ids = torch.from_numpy(1 + np.searchsorted(cumulative, draws))
            batch[f"t{table}"] = Request(f"t{table}", Jagged.from_lengths(ids, lengths), "sum")
        batches.append(batch)
    return batches


def step(tables: EmbeddingTables, batches: list[dict[str, Request]], side: str) -> None:
    """Two steps; what the second one needs may go ahead of the first one's backward."""
    asked = None
    for number, batch in enumerate(batches):
        rows = tables(batch, asked)
        loss = torch.stack([(part - 0.01).square().sum() for part in rows.values()]).sum()
        asked = None
        if side in ("ahead", "rows") and number + 1 < len(batches):
            asked = tables.ask(batches[number + 1], with_rows=side == "rows")
        loss.backward()


def measure(size: Size, alpha: float, rounds: int, collectives: Collectives) -> dict[str, Any]:
    """Milliseconds and bytes of a step, by side, with all sides alive and taking turns."""
    sides = {side: make_tables(size, side, collectives) for side in sides_of(size)}
    batches = make_batches(size, alpha, collectives.world.rank, 2 * rounds + 2)
    milliseconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        pair = batches[2 * number : 2 * number + 2]
        for side in list(sides) if number % 2 else reversed(list(sides)):
            collectives.barrier("turn")
            began = time.perf_counter()
            step(sides[side], pair, side)
            # the first round pays for memory that the later ones find
            if number:
                milliseconds[side].append((time.perf_counter() - began) / 2 * 1000)
    found = {}
    for side, tables in sides.items():
        exact = side not in ("bf16", "fp16", "rows")
        found[side] = {
            "ms": milliseconds[side],
            "bytes": tables.exchanged_bytes / len(batches),
            "difference": largest_difference(tables, sides[BEFORE]) if exact else 0.0,
        }
    return found


def largest_difference(one: EmbeddingTables, other: EmbeddingTables) -> float:
    """Of any number of a rank's rows."""
    return max(
        float((one.local_rows(name)[1] - other.local_rows(name)[1]).abs().max())
        for name in one.table_plans
    )


def run_rank(folder: Path, quick: bool, rounds: int) -> None:
    """What each rank does."""
    collectives = start(LaunchConfig(device="cpu"), distributed=True)
    size = QUICK if quick else FULL
    found = {str(alpha): measure(size, alpha, rounds, collectives) for alpha in ALPHAS}
    (folder / f"{collectives.world.rank}.json").write_text(json.dumps(found))
    collectives.barrier("end")
    collectives.shutdown()


def launch(quick: bool, rounds: int) -> list[dict[str, Any]]:
    """What each rank found."""
    launcher = Path(sysconfig.get_path("scripts")) / "horovodrun"
    with tempfile.TemporaryDirectory() as folder:
        command = [
            str(launcher), "-np", str(NUM_RANKS), "--gloo", "--network-interfaces", "lo",
            sys.executable, __file__, "--rank-folder", folder, "--rounds", str(rounds),
            *(["--quick"] if quick else []),
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        ended = subprocess.run(command, env=environment, text=True, capture_output=True)
        if ended.returncode:
            sys.exit(f"{shown(ended.stdout)}{shown(ended.stderr)}the ranks failed")
        return [
            json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(NUM_RANKS)
        ]


def shown(text: str) -> str:
    """The end of an output."""
    return text[-4000:] + "\n"


def main() -> None:
    """Measure and print."""
    parser = common.parser(str(__doc__), rounds=15, quick="small tables, less than a minute")
    parser.add_argument("--rank-folder", type=Path, help="set by the benchmark for its ranks")
    arguments = parser.parse_args()
    rounds = min(arguments.rounds, 5) if arguments.quick else arguments.rounds
    if arguments.rank_folder is not None:
        run_rank(arguments.rank_folder, arguments.quick, arguments.rounds)
        return
    common.print_header(("torch", "fbgemm-gpu-cpu", "horovod"), f"{NUM_RANKS} ranks, 1 thread each")
    size = QUICK if arguments.quick else FULL
    print(
        f"{NUM_TABLES} tables of {size.num_rows} x {WIDTH}, {size.batch_size} bags of {size.bag} a "
        "table and rank"
    )
    answers = launch(arguments.quick, rounds)
    figures: dict[str, Any] = {"largest_difference": 0.0}
    bars = {"largest_difference": common.at_most(1e-5)}
    for alpha in map(str, ALPHAS):
        table = {}
        for side in answers[0][alpha]:
            # the slower rank is the step
            times = [
                max(pair) for pair in zip(*(a[alpha][side]["ms"] for a in answers), strict=True)
            ]
            table[side] = {
                "kbytes": round(sum(a[alpha][side]["bytes"] for a in answers) / NUM_RANKS / 1e3, 1),
                "ms": round(float(np.median(times)), 2),
            }
            differences = [a[alpha][side]["difference"] for a in answers]
            figures["largest_difference"] = max(figures["largest_difference"], *differences)
        before = table[BEFORE]
        for side, found in table.items():
            print(
                f"alpha {alpha:4} {side:8} {found['kbytes']:9.1f} kB a step and rank "
                f"({found['kbytes'] / before['kbytes']:.3f})  {found['ms']:7.2f} ms "
                f"({found['ms'] / before['ms']:.3f})"
            )
        hot = [found["kbytes"] for side, found in table.items() if side.startswith("H=")]
        figures[f"alpha {alpha}"] = table
        name = f"bytes of the best H over before, alpha {alpha}"
        figures[name] = round(min(hot) / before["kbytes"], 4)
        bars[name] = common.at_most(1.0)
        # int32 row numbers help without a tier too
        name = f"bytes of the best H over none, alpha {alpha}"
        figures[name] = round(min(hot) / table[LATEST]["kbytes"], 4)
    common.print_result("hot_tier", figures, bars)


if __name__ == "__main__":
    main()
