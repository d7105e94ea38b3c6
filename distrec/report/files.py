"""What a run left in its directory, read with patience: a part may be missing or damaged.

A part that cannot be read becomes a note that says why; it never stops the report.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distrec.config import Config
from distrec.dataset import DatasetManifest, read_manifest
from distrec.errors import DataError

# as distrec.job and the trainer name them; the report imports neither
JOBS_LOG = "jobs.jsonl"
TRAIN_LOG = "train.jsonl"
PLAN_LOG = "plan.json"
# the report itself, with which it would change each time, and attempts, which are within training
_NO_JOBS = ("report", "train restart")


@dataclass
class RunFiles:
    """The small files of a run, in memory; Parquet is left on disk."""

    manifest: DatasetManifest | None = None
    metrics: Mapping[str, Any] | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    """Lines of kind step, ascending; of steps done twice after a restart, the later ones."""
    validations: list[dict[str, Any]] = field(default_factory=list)
    """Lines of kind valid, likewise."""
    plan: list[dict[str, Any]] = field(default_factory=list)
    jobs: list[dict[str, Any]] = field(default_factory=list)
    """The latest line of each job, in the order in which they were started."""
    score_manifest: Mapping[str, Any] | None = None
    notes: dict[str, str] = field(default_factory=dict)
    """Part -> why it could not be read."""


def read_run(config: Config) -> RunFiles:
    """Read everything but the Parquet."""
    files = RunFiles()
    try:
        files.manifest = read_manifest(config.dataset_directory)
    except DataError as error:
        if config.dataset_directory.is_dir():
            files.notes["dataset"] = str(error)
    files.metrics = _mapping(config.metrics_path, "metrics", files.notes)
    files.score_manifest = _mapping(
        config.scores_directory / "manifest.json", "scores", files.notes
    )
    plan = _json(config.logs_directory / PLAN_LOG, "plan", files.notes)
    if isinstance(plan, Mapping):
        plan = plan.get("tables", [])
    files.plan = [entry for entry in plan or [] if isinstance(entry, dict)]
    files.steps, files.validations = _training(config.logs_directory / TRAIN_LOG)
    files.jobs = _latest_jobs(config.logs_directory / JOBS_LOG)
    return files


def finite(value: Any) -> float | None:
    """The value as a float, or None when it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def _json(path: Path, part: str, notes: dict[str, str]) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        notes[part] = f"{path.name} cannot be read: {error}"
        return None


def _mapping(path: Path, part: str, notes: dict[str, str]) -> Mapping[str, Any] | None:
    value = _json(path, part, notes)
    if value is not None and not isinstance(value, Mapping):
        notes[part] = f"{path.name} holds a {type(value).__name__}, not an object"
        return None
    return value


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; a line cut off by a crash is passed over."""
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            for line in stream:
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                if isinstance(entry, dict):
                    yield entry
    except OSError:
        return


def _training(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    steps: list[dict[str, Any]] = []
    validations: list[dict[str, Any]] = []
    for entry in _lines(path):
        step = finite(entry.get("step"))
        if step is None:
            continue
        if entry.get("kind") == "step":
            # a restart goes on from a checkpoint: what came after it was lost
            if steps and step <= steps[-1]["step"]:
                _rewind(steps, step)
                _rewind(validations, step)
            steps.append(entry)
        elif entry.get("kind") == "valid":
            _rewind(validations, step)
            validations.append(entry)
    return steps, validations


def _rewind(entries: list[dict[str, Any]], step: float) -> None:
    while entries and entries[-1]["step"] >= step:
        entries.pop()


def _latest_jobs(path: Path) -> list[dict[str, Any]]:
    latest: dict[str, dict[str, Any]] = {}
    for entry in _lines(path):
        name = entry.get("job")
        if isinstance(name, str) and name not in _NO_JOBS:
            latest.pop(name, None)
            latest[name] = entry
    return list(latest.values())
