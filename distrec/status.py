"""What a run is doing: which stage, how far, and which rank is slow, from the files that it leaves.

Nothing of the run is asked or stopped. The ranks run if their heartbeats move, whatever the clocks
of their hosts say.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from distrec.errors import ConfigError
from distrec.failure import read_heartbeats

# heartbeats are written every half second
_LOOK_SECONDS = 1.5
KINDS = ("input", "exchange", "compute")


@dataclass(frozen=True)
class Status:
    """Of a run.

    Args:
        stages: Finished ones, with seconds.
        heartbeats: Rank -> what it was doing last.
        moving: Ranks that run.
        step: The last line of train.jsonl of kind step.
        valid: Likewise of kind valid.
        restarts: Lines of restarts since the last job of another name.
        last_job: The last line of a job.
    """

    stages: Mapping[str, float]
    heartbeats: Mapping[int, Mapping[str, Any]]
    moving: frozenset[int]
    step: Mapping[str, Any]
    valid: Mapping[str, Any]
    restarts: tuple[Mapping[str, Any], ...]
    last_job: Mapping[str, Any]


def read_status(directory: Path) -> Status:
    """Read it twice, to see what moves.

    Raises:
        ConfigError: This is no run's directory.
    """
    logs = directory / "logs"
    if not logs.is_dir():
        raise ConfigError(
            f"a run's directory has its logs. Received: {directory}. Give what output and name in "
            "the configuration come to, such as runs/movielens-100k."
        )
    num_ranks = 1 + max(
        (int(name) for path in logs.glob("heartbeat-*.json")
         if (name := path.stem.removeprefix("heartbeat-")).isdecimal()), default=-1
    )  # fmt: skip
    before = read_heartbeats(logs, num_ranks)
    time.sleep(_LOOK_SECONDS if before else 0)
    heartbeats = read_heartbeats(logs, num_ranks)
    moving = frozenset(
        rank
        for rank, beat in heartbeats.items()
        if beat.get("time") != before.get(rank, {}).get("time")
    )
    jobs = _lines(logs / "jobs.jsonl")
    restarts: list[Mapping[str, Any]] = []
    last_job: Mapping[str, Any] = {}
    for entry in jobs:
        if entry.get("job") == "train restart":
            restarts.append(entry)
        else:
            last_job, restarts = entry, []
    training = _lines(logs / "train.jsonl")
    return Status(
        stages=_stages(directory / "stages.json"),
        heartbeats=heartbeats,
        moving=moving,
        step=_last(training, "step"),
        valid=_last(training, "valid"),
        restarts=tuple(restarts),
        last_job=last_job,
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            # cut off by a crash
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def _last(entries: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next((entry for entry in reversed(entries) if entry.get("kind") == kind), {})


def _stages(path: Path) -> dict[str, float]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): float(entry["seconds"]) for name, entry in state.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}


def slowest(heartbeats: Mapping[int, Mapping[str, Any]]) -> tuple[int, str] | None:
    """The rank that the others wait for, and what it spends its time on: input or compute.

    A rank that is early waits in an exchange for the last one, which therefore waits least.
    """
    shares = {
        rank: dict(beat["shares"])
        for rank, beat in heartbeats.items()
        if isinstance(beat.get("shares"), Mapping) and set(beat["shares"]) == set(KINDS)
    }
    if len(shares) < 2:
        return None
    rank = min(shares, key=lambda rank: (shares[rank]["exchange"], rank))
    own = shares[rank]
    return rank, "input" if own["input"] >= own["compute"] else "compute"


def show(status: Status, console: Console) -> None:
    """Print it."""
    for name, seconds in status.stages.items():
        console.print(f"{name}: done, {seconds:.0f} s")
    step = status.step
    if step:
        total = f" of {step['total_steps']}" if "total_steps" in step else ""
        console.print(
            f"training: step {step.get('step')}{total}, epoch {int(step.get('epoch', 0)) + 1}, "
            f"loss {step.get('loss', float('nan')):.4f}, "
            f"{step.get('examples_per_second', 0):,.0f} examples/s"
        )
    if status.valid:
        values = ", ".join(f"{name} {value:.4f}" for name, value in status.valid["metrics"].items())
        console.print(f"last validation: step {status.valid.get('step')}, {values}")
    for entry in status.restarts:
        console.print(f"lost: {entry.get('message')}")
    if not status.moving:
        console.print("no rank is running")
        if status.last_job:
            job = status.last_job
            console.print(f"last job: {job.get('job')}, exit code {job.get('exit_code')}")
            if job.get("message"):
                console.print(str(job["message"]))
        return
    table = Table()
    for column in ("rank", "host", "process", "", *KINDS, "doing"):
        table.add_column(column)
    for rank, beat in sorted(status.heartbeats.items()):
        shares = beat.get("shares", {})
        table.add_row(
            str(rank), str(beat.get("host", "")), str(beat.get("pid", "")),
            "runs" if rank in status.moving else "stands still",
            *(f"{shares[kind]:.0%}" if kind in shares else "" for kind in KINDS),
            f"{beat.get('phase')} ({beat.get('silent_seconds', 0)} s)",
        )  # fmt: skip
    console.print(table)
    slow = slowest({rank: status.heartbeats[rank] for rank in status.moving})
    if slow is not None:
        console.print(f"the others wait for rank {slow[0]}, mostly for its {slow[1]}")
