"""Time of a step of the DLRM on two ranks over one: weak scaling, and where the rest goes.

    python benchmarks/scaling.py [--quick] [--rounds 7] [--steps 6] [--width 16]

The shape of embedding_vs_torchrec.py, 2,048 rows a rank, one thread a rank. Jobs of one and of two
ranks live side by side and work in turns; medians count. What two cores of this machine cost each
other is shown beside it: two jobs of one rank, which have nothing to do with each other, at once.
The bar is of ranks that keep to a core each (launch.bind_cores); others are shown beside them.
Stages are measured in turns of their own, since measuring costs time. It ends with one line of
JSON.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common
from dlrm_shape import Shape, write_data
from embedding_vs_torchrec import OUR_SHARDING, start_ours
from turns import Job

BAR = common.at_most(1.15)


def milliseconds(jobs: list[Job], steps: int) -> float:
    """A step of all jobs at once; the slowest rank decides."""
    order = {"what": "whole", "first": 0, "steps": steps}
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = [
            answer for found in pool.map(lambda job: job.turn(order), jobs) for answer in found
        ]
    return max(answer["seconds"] for answer in answers) / steps * 1000


def stages(job: Job, rounds: int, steps: int) -> dict[str, float]:
    """Milliseconds a step by stage, rank 0, median."""
    order = {"what": "whole", "first": 0, "steps": steps, "stages": True}
    found = [job.turn(order)[0]["stages"] for _ in range(rounds)]
    return {
        name: round(statistics.median(one[name] for one in found) / steps * 1000, 2)
        for name in found[0]
    }


def measure(folder: Path, rounds: int, steps: int) -> dict[str, Any]:
    """Start the jobs, and let them take turns."""
    jobs: list[Job] = []
    try:
        for name, num_ranks in (("one", 1), ("another", 1), ("two", 2), ("bound", 2)):
            bind_cores = name == "bound"
            jobs.append(start_ours(folder, name, num_ranks, OUR_SHARDING, bind_cores))
        one, another, two, bound = jobs
        sides = {
            "one rank": lambda: milliseconds([one], steps),
            "two ranks": lambda: milliseconds([two], steps),
            "two ranks, bound": lambda: milliseconds([bound], steps),
            "two alone, at once": lambda: milliseconds([one, another], steps),
        }
        common.alternate(sides, 1)
        times = common.medians(common.alternate(sides, rounds))
        return {
            "step_milliseconds": {name: round(value, 2) for name, value in times.items()},
            "two_over_one": round(times["two ranks, bound"] / times["one rank"], 3),
            "two_unbound_over_one": round(times["two ranks"] / times["one rank"], 3),
            "two_over_two_alone": round(times["two ranks, bound"] / times["two alone, at once"], 3),
            "two_alone_over_one": round(times["two alone, at once"] / times["one rank"], 3),
            "stages_milliseconds": {
                "one rank": stages(one, rounds, steps),
                "two ranks, bound": stages(bound, rounds, steps),
            },
        }
    finally:
        for job in jobs:
            job.end()


def show(figures: dict[str, Any]) -> None:
    """Print a table of stages."""
    for name, value in figures["step_milliseconds"].items():
        print(f"{name:>20} {value:8.1f} ms a step")
    print(f"{'two over one':>20} {figures['two_over_one']:8.2f}, bound")
    print(f"{'two over one':>20} {figures['two_unbound_over_one']:8.2f}, not bound")
    print(f"{'two over two alone':>20} {figures['two_over_two_alone']:8.2f}")
    print(f"{'two alone over one':>20} {figures['two_alone_over_one']:8.2f}")
    one, two = (figures["stages_milliseconds"][name] for name in ("one rank", "two ranks, bound"))
    print(f"{'stage':>20} {'one rank':>9} {'two ranks':>9} {'more':>7}  ms, while measured")
    for name in two:
        print(f"{name:>20} {one[name]:9.2f} {two[name]:9.2f} {two[name] - one[name]:7.2f}")


def main() -> None:
    """Measure and print."""
    parser = common.parser(__doc__, 7, "tables of up to 50,000 rows, five rounds")
    parser.add_argument("--steps", type=int, default=6, help="steps a turn")
    parser.add_argument("--width", type=int, default=16, help="D")
    arguments = parser.parse_args()
    max_rows = 1_000_000
    if arguments.quick:
        max_rows, arguments.rounds, arguments.steps = 50_000, 5, 4
    common.print_header(("torch", "fbgemm-gpu-cpu", "horovod"), "1 thread a rank")
    shape = Shape(arguments.width, max_rows=max_rows)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shape.json").write_text(json.dumps(shape.to_json()))
        write_data(folder, shape, 2)
        figures = measure(folder, arguments.rounds, arguments.steps)
    show(figures)
    common.print_result("scaling", figures, {"two_over_one": BAR})


if __name__ == "__main__":
    main()
