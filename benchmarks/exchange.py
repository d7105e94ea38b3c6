"""Step time, bytes and loss of the DLRM, by what of the exchange is rounded or sent ahead.

    python benchmarks/exchange.py [--quick] [--rounds 7] [--steps 6] [--width 16]

The shape of scaling.py. Jobs of two ranks, one a key of [sharding] that is not at its default, live
side by side, take the same steps from the same rows, and work in turns; medians count. Bytes are
what a rank sends a step for the tables. The loss is that of the last turn, over all ranks; its
ratio to the exact side's says what a key costs in quality on the way there. It ends with one line
of JSON.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import common
from dlrm_shape import Shape, write_data
from embedding_vs_torchrec import OUR_SHARDING, start_ours
from turns import Job

NUM_RANKS = 2
EXACT = "exact, in turn"
SIDES: dict[str, dict[str, Any]] = {
    EXACT: {"prefetch_ids": False},
    "fp16": {"prefetch_ids": False, "exchange_precision": "fp16"},
    "bf16": {"prefetch_ids": False, "exchange_precision": "bf16"},
    "ids ahead": {"prefetch_ids": True},
    "rows ahead": {"prefetch_rows": True},
}


def measure(folder: Path, rounds: int, steps: int) -> dict[str, Any]:
    """Figures by side."""
    jobs: dict[str, Job] = {}
    try:
        for name, sharding in SIDES.items():
            jobs[name] = start_ours(folder, name, NUM_RANKS, {**OUR_SHARDING, **sharding})
        answers: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in jobs}
        for number in range(rounds + 1):
            order = {"what": "whole", "first": number * steps, "steps": steps}
            for name in list(jobs) if number % 2 else reversed(list(jobs)):
                answers[name].append(jobs[name].turn(order))
    finally:
        for job in jobs.values():
            job.end()
    figures = {}
    for name, found in answers.items():
        # the first turn pays for memory that the later ones find; the slower rank is the step
        times = [max(rank["seconds"] for rank in turn) / steps for turn in found[1:]]
        last = found[-1]
        figures[name] = {
            "milliseconds": round(statistics.median(times) * 1000, 1),
            "kbytes": round(statistics.mean(rank["bytes_a_step"] for rank in last) / 1e3, 1),
            "loss": round(statistics.mean(last[0]["losses"]), 5),
        }
    return figures


def main() -> None:
    """Measure and print."""
    parser = common.parser(str(__doc__), 7, "tables of up to 50,000 rows, five rounds")
    parser.add_argument("--steps", type=int, default=6, help="steps a turn")
    parser.add_argument("--width", type=int, default=16, help="D")
    arguments = parser.parse_args()
    max_rows = 1_000_000
    if arguments.quick:
        max_rows, arguments.rounds, arguments.steps = 50_000, 5, 4
    common.print_header(("torch", "fbgemm-gpu-cpu", "horovod"), "2 ranks, 1 thread each")
    shape = Shape(arguments.width, max_rows=max_rows)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shape.json").write_text(json.dumps(shape.to_json()))
        write_data(folder, shape, NUM_RANKS)
        figures = measure(folder, arguments.rounds, arguments.steps)
    exact = figures[EXACT]
    for name, found in figures.items():
        ratios = ", ".join(f"{key} {found[key] / exact[key]:.4f}" for key in found)
        print(f"{name:>11} {found}  over {EXACT}: {ratios}")
    common.print_result("exchange", figures, {})


if __name__ == "__main__":
    main()
