"""Samples a second of a DLRM on EmbeddingTables and Horovod beside TorchRec, two ranks each.

    python benchmarks/embedding_vs_torchrec.py [--quick] [--rounds 7] [--steps 32]

26 tables of up to a million rows (Criteo's sizes), 13 numbers, bottom MLP 512-256-D, top
512-512-256-1, row-wise Adagrad 0.01, Zipf 1.05, 2,048 rows a rank and step, D = 16 and 64. Two
ranks on two cores, one thread each. Theirs is TorchRec over gloo with the plan that its planner
finds best; it runs in a virtual environment of its own, which is made in the user's cache folder.
TorchRec offers no row-wise sharding on CPU (its planner finds no such kernel), so its tables lie
whole on one rank each.

Both sides have the same data, the same first rows, the same dense module, and must find the same
losses. They live side by side and work in turns. `whole` is a step of training; `sparse` is
look-up, exchange and update alone. It ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from typing import Any

import common
from dlrm_shape import Shape, write_data
from turns import Job

NUM_RANKS = 2
HERE = Path(__file__).parent
THEIR_VERSIONS = ("torchrec==1.8.0", "fbgemm-gpu-cpu==1.8.0", "torch==2.13.0")
# torchrec asks for fbgemm-gpu, the build for CUDA, which would overwrite the one for CPU
THEIR_OTHERS = ("numpy<2.5", "tensordict", "torchmetrics==1.0.3", "tqdm", "pyre-extensions")
# every table spread, none replicated: chosen by reasoning, not yet compared with other settings
OUR_SHARDING = {"replicate_below_mib": 0.0}
BARS = {"whole": 1.0, "sparse": 1.5}
# the first loss is equal; then they drift apart by about 1e-5 a step. That is TorchRec's
# data-parallel tables: with a plan of table-wise ones alone, 32 losses in a row are equal to 3e-7
LOSS_TOLERANCE = 2e-3


def their_python() -> Path:
    """TorchRec's virtual environment, made when it is not there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "distrec" / "torchrec-1.8.0"
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    print(f"installing {', '.join(THEIR_VERSIONS)} into {folder}", flush=True)
    venv.create(folder, clear=True, with_pip=True)
    install = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, *THEIR_VERSIONS[1:], *THEIR_OTHERS], check=True)
    subprocess.run([*install, "--no-deps", THEIR_VERSIONS[0]], check=True)
    (folder / "complete").touch()
    return python


def environment() -> dict[str, str]:
    """Of every rank of either side."""
    return {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
        "PYTHONWARNINGS": "ignore",
        # a rank that is out of turn is not a rank that hangs
        "HOROVOD_GLOO_TIMEOUT_SECONDS": "3600",
    }


def start_ours(
    folder: Path, name: str, num_ranks: int, sharding: dict[str, Any], bind_cores: bool = False
) -> Job:
    """Our ranks, with the settings of [sharding] and launch.bind_cores given."""
    own = folder / name
    own.mkdir()
    (own / "sharding.json").write_text(json.dumps(sharding))
    launcher = Path(sysconfig.get_path("scripts")) / "horovodrun"
    command = [
        str(launcher), "-np", str(num_ranks), "--gloo", "--network-interfaces", "lo",
        sys.executable, str(HERE / "dlrm_ours.py"), str(folder), name,
        *(["bind_cores"] if bind_cores else []),
    ]  # fmt: skip
    return Job(name, command, environment(), num_ranks, own)


def start_theirs(folder: Path, num_ranks: int) -> Job:
    """TorchRec's ranks."""
    own = folder / "torchrec"
    own.mkdir()
    command = [
        str(their_python()), "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(num_ranks), str(HERE / "dlrm_torchrec.py"), str(folder),
    ]  # fmt: skip
    return Job("torchrec", command, environment(), num_ranks, own)


def samples_per_second(job: Job, shape: Shape, what: str, first: int, steps: int) -> float:
    """Of one turn; a step ends when the slower rank has done it."""
    answers = job.turn({"what": what, "first": first, "steps": steps})
    elapsed = max(answer["seconds"] for answer in answers)
    return shape.batch_size_per_rank * job.num_ranks * steps / elapsed


def check_losses(ours: Job, theirs: Job, steps: int) -> tuple[list[float], list[float]]:
    """Train both from the same start; the losses must fall, and together."""
    order = {"what": "whole", "first": 0, "steps": steps}
    own, other = (job.turn(order)[0]["losses"] for job in (ours, theirs))
    furthest = max(abs(a - b) for a, b in zip(own, other, strict=True))
    if furthest > LOSS_TOLERANCE or not 0.3 < own[-1] < own[0] < 1.0:
        raise SystemExit(f"losses make no sense or differ: ours {own}, TorchRec's {other}")
    return own, other


def compare(shape: Shape, rounds: int, steps: int) -> dict[str, Any]:
    """Both sides in turns; medians."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shape.json").write_text(json.dumps(shape.to_json()))
        write_data(folder, shape, NUM_RANKS)
        ours = start_ours(folder, "distrec", NUM_RANKS, OUR_SHARDING)
        theirs = None
        try:
            theirs = start_theirs(folder, NUM_RANKS)
            return measure(ours, theirs, shape, rounds, steps)
        finally:
            for job in (ours, theirs):
                if job is not None:
                    job.end()


def measure(ours: Job, theirs: Job, shape: Shape, rounds: int, steps: int) -> dict[str, Any]:
    """Figures of one width."""
    own, other = check_losses(ours, theirs, 2 * shape.num_batches)
    plan = theirs.turn({"what": "sparse", "first": 0, "steps": 1})[0]["plan"]
    found: dict[str, Any] = {"torchrec_plan": plan, "losses": [own[-1], other[-1]]}
    found["bytes_a_step"] = ours.turn({"what": "sparse", "first": 0, "steps": 1})[0]["bytes_a_step"]
    for what in BARS:
        sides = {
            job.name: lambda job=job, what=what: samples_per_second(job, shape, what, 0, steps)
            for job in (ours, theirs)
        }
        rates = common.alternate(sides, rounds)
        ratios = [a / b for a, b in zip(rates["distrec"], rates["torchrec"], strict=True)]
        median = common.medians(rates)
        found[what] = {
            "samples_per_second": {side: round(rate) for side, rate in median.items()},
            "ratio": round(median["distrec"] / median["torchrec"], 3),
            "lowest_and_highest": [round(min(ratios), 3), round(max(ratios), 3)],
        }
    return found


def show(width: int, found: dict[str, Any]) -> None:
    """Print one width."""
    print(f"D = {width}")
    print(f"  TorchRec's plan: {found['torchrec_plan']} (tables of each kind)")
    print(
        f"  losses after the check: ours {found['losses'][0]:.4f}, theirs {found['losses'][1]:.4f}"
    )
    for what in BARS:
        rates = found[what]["samples_per_second"]
        low, high = found[what]["lowest_and_highest"]
        print(
            f"  {what:6} ours {rates['distrec']:9,} samples/s, TorchRec {rates['torchrec']:9,}: "
            f"{found[what]['ratio']:.2f} (rounds {low:.2f} to {high:.2f})",
            flush=True,
        )


def options() -> argparse.Namespace:
    """The command line."""
    parser = common.parser(__doc__, 7, "tables of up to 50,000 rows, D = 16, five rounds")
    parser.add_argument("--steps", type=int, default=32, help="steps a turn")
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--batch-size", type=int, default=2048, help="rows a rank")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    arguments = options()
    max_rows = 1_000_000
    if arguments.quick:
        max_rows, arguments.rounds, arguments.widths, arguments.steps = 50_000, 5, [16], 4
    common.print_header(("torch", "fbgemm-gpu-cpu", "horovod"), f"{NUM_RANKS} ranks, 1 thread each")
    print(f"TorchRec  {', '.join(THEIR_VERSIONS)}; gloo; row-wise sharding is not offered on CPU")
    their_python()
    figures: dict[str, Any] = {}
    bars = {}
    for width in arguments.widths:
        shape = Shape(width, max_rows=max_rows, batch_size_per_rank=arguments.batch_size)
        found = compare(shape, arguments.rounds, arguments.steps)
        show(width, found)
        for what, bar in BARS.items():
            figures[f"{what}_ratio_d{width}"] = found[what]["ratio"]
            bars[f"{what}_ratio_d{width}"] = common.at_least(bar)
        figures[f"d{width}"] = found
    common.print_result("embedding_vs_torchrec", figures, bars)


if __name__ == "__main__":
    main()
