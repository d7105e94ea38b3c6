"""The stages of a run in order, each done again only when what it depends on has changed.

A stage is up to date when three things are as they were when it last ended: its sections of the
configuration, the outputs of the stages before it, and its own output, on disk and published.
``stages.json`` in the run directory remembers them.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrec import __version__
from distrec.config import Config, dump_config, section_hash
from distrec.files import replace_text
from distrec.job import execute
from distrec.store import (
    CHECKPOINTS,
    DATASET,
    SCORES,
    fetch_dataset,
    publish,
    published_manifests,
)

STATE = "stages.json"
logger = logging.getLogger("distrec.pipeline")


# The functions import what they need themselves: prepare must not load torch, training not Spark.


def prepare(config: Config) -> dict[str, Any]:
    """Raw data to the dataset."""
    from distrec import prepare as preparation
    from distrec.spark import session

    manifest = preparation.run(session(config, "prepare"), config)
    publish(config, DATASET, config.dataset_directory, manifest.all_files())
    return {"dataset": str(config.dataset_directory), "counts": manifest.counts}


def train(config: Config) -> dict[str, Any]:
    """Dataset to checkpoints, on config.launch.num_ranks ranks."""
    from distrec.launch import train_locally

    return train_locally(config)


def evaluate(config: Config) -> dict[str, Any]:
    """Checkpoint to metrics.json."""
    from distrec import checkpoint
    from distrec import evaluate as evaluation

    fetch_dataset(config)
    checkpoint.fetch_one(config, config.score.checkpoint)
    return evaluation.run(config)


def score(config: Config) -> dict[str, Any]:
    """Checkpoint to scored Parquet."""
    from distrec import checkpoint, scoring
    from distrec.spark import session

    fetch_dataset(config)
    checkpoint.fetch_one(config, config.score.checkpoint)
    manifest = scoring.run(session(config, "score"), config)
    publish(config, SCORES, config.scores_directory, manifest.files)
    return {
        "scores": str(config.scores_directory),
        "num_users": manifest.num_users,
        "num_rows": manifest.num_rows,
        "model_version": manifest.model_version,
    }


def report(config: Config) -> dict[str, Any]:
    """Everything that the run left, to one HTML file."""
    from distrec.report import write_report

    return {"report": str(write_report(config))}


def export(
    config: Config, table: str, output: Path, start: int, stop: int | None
) -> dict[str, Any]:
    """Rows of an embedding table of a checkpoint to a Parquet file; no stage of a run."""
    from distrec import checkpoint
    from distrec.checkpoint.export import export_table
    from distrec.dataset import read_manifest

    fetch_dataset(config)
    checkpoint.fetch_one(config, config.score.checkpoint)
    path = checkpoint.find(config.checkpoint_directory, config.score.checkpoint)
    directory = config.dataset_directory
    num_rows = export_table(path, table, output, directory, read_manifest(directory), start, stop)
    return {"output": str(output), "checkpoint": path.name, "table": table, "num_rows": num_rows}


def forget(config: Config, users: Path, dry_run: bool) -> dict[str, Any]:
    """Take people out of what the run keeps and has published; no stage of a run."""
    from distrec import forget as erasure
    from distrec.people import read_people

    return erasure.run(config, read_people(users, config.prepare.events.user), dry_run)


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Args:
        name: Of the job.
        function: Does it.
        sections: Keys of the configuration that its result depends on.
        inputs: Names of the stages whose output it reads.
        output: File whose bytes tell one output from another.
        files: Raw files it reads, as paths or patterns.
        published: Which output of the run's store it makes, if any.
    """

    name: str
    function: Callable[[Config], dict[str, Any]]
    sections: tuple[str, ...]
    inputs: tuple[str, ...]
    output: Callable[[Config], Path]
    files: Callable[[Config], tuple[str | None, ...]] = lambda config: ()
    published: str | None = None


def _raw_files(config: Config) -> tuple[str, ...]:
    sources = [config.prepare.events, config.prepare.items, config.prepare.users]
    paths = [path for source in sources if source is not None for path in source.paths]
    paths += [] if config.prepare.exclude_users is None else [config.prepare.exclude_users]
    split, extend = config.prepare.split, config.prepare.extend
    # datasets and checkpoints change only as a whole: their manifests tell one from another
    manifests = [f"{extend}/manifest.json"] if extend is not None else []
    return (*paths, *split.valid_paths, *split.test_paths, *manifests)


def _older_weights(config: Config) -> tuple[str, ...]:
    path = config.train.warm_start
    return () if path is None else (f"{path}/*.json", f"{path}/step-*/manifest.json")


STAGES = (
    Stage(
        "prepare",
        prepare,
        ("data", "prepare", "seed"),
        (),
        lambda config: config.dataset_directory / "manifest.json",
        _raw_files,
        DATASET,
    ),
    Stage(
        "train",
        train,
        ("reader", "sharding", "model", "loss", "train", "privacy", "seed"),
        ("prepare",),
        lambda config: config.checkpoint_directory / "best.json",
        _older_weights,
        CHECKPOINTS,
    ),
    Stage(
        "evaluate",
        evaluate,
        ("evaluate", "score.checkpoint"),
        ("prepare", "train"),
        lambda config: config.metrics_path,
        lambda config: (config.evaluate.test_candidates,),
    ),
    Stage(
        "score",
        score,
        ("score",),
        ("prepare", "train"),
        lambda config: config.scores_directory / "manifest.json",
        lambda config: (config.score.users, config.score.block_list),
        SCORES,
    ),
    Stage(
        "report",
        report,
        ("report",),
        ("prepare", "train", "evaluate", "score"),
        lambda config: config.report_path,
    ),
)


def _output_hash(stage: Stage, config: Config) -> str:
    """Of what a stage has made, and of what is published of it; empty: it has made nothing."""
    path = stage.output(config)
    if not path.is_file():
        return ""
    digest = hashlib.sha256(path.read_bytes())
    if config.store and stage.published is not None:
        published = published_manifests(config, stage.published)
        digest.update(json.dumps(published, sort_keys=True).encode())
    return digest.hexdigest()


def _fingerprints(patterns: tuple[str | None, ...]) -> list[tuple[str, int, int]]:
    """(path, bytes, modification time in ns) of local files; a remote address stands for itself."""
    found: list[tuple[str, int, int]] = []
    for pattern in patterns:
        if pattern is None:
            continue
        paths = sorted(glob.glob(pattern, recursive=True))
        for name in paths:
            inner = sorted(Path(name).rglob("*")) if Path(name).is_dir() else [Path(name)]
            for path in inner:
                status = path.stat()
                found.append((str(path), status.st_size, status.st_mtime_ns))
        if not paths:
            found.append((pattern, -1, -1))
    return found


def stage_key(stage: Stage, config: Config, outputs: Mapping[str, str]) -> str:
    """What the result of a stage depends on, as one hash."""
    parts = [
        __version__,
        section_hash(config, *stage.sections),
        [outputs[name] for name in stage.inputs],
        _fingerprints(stage.files(config)),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def up_to_date(config: Config) -> list[str]:
    """Names of the stages that would not be run."""
    state = _read_state(config)
    outputs = {stage.name: _output_hash(stage, config) for stage in STAGES}
    return [
        stage.name
        for stage in STAGES
        if outputs[stage.name]
        and state.get(stage.name, {}).get("key") == stage_key(stage, config, outputs)
        and state[stage.name].get("output") == outputs[stage.name]
    ]


def mark_up_to_date(config: Config, names: Sequence[str]) -> None:
    """Take the outputs of stages, which were changed in place, for what the stages make."""
    state = _read_state(config)
    outputs = {stage.name: _output_hash(stage, config) for stage in STAGES}
    for stage in STAGES:
        if stage.name in names:
            entry = {"key": stage_key(stage, config, outputs), "output": outputs[stage.name]}
            state[stage.name] = {**state[stage.name], **entry}
    if names:
        replace_text(config.directory / STATE, json.dumps(state, indent=1))


def _read_state(config: Config) -> dict[str, Any]:
    try:
        state = json.loads((config.directory / STATE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _stop_spark() -> None:
    """Give Spark's memory back before the next stage."""
    from pyspark.sql import SparkSession

    active = SparkSession.getActiveSession()
    if active is not None:
        active.stop()


def run_stages(
    config: Config, force: bool = False, only: Sequence[str] | None = None
) -> tuple[int, list[str]]:
    """Run what is not up to date.

    Args:
        config: Of the run.
        force: Run every stage.
        only: Names of the stages that may be run; the outputs of the others are taken as they lie.

    Returns:
        The exit code of the stage that failed, or 0; the names of the stages that were run.
    """
    config.directory.mkdir(parents=True, exist_ok=True)
    replace_text(config.directory / "config.toml", dump_config(config))
    state = {} if force else _read_state(config)
    outputs: dict[str, str] = {}
    done: list[str] = []
    for stage in STAGES:
        output = _output_hash(stage, config)
        if only is not None and stage.name not in only:
            outputs[stage.name] = output
            continue
        key = stage_key(stage, config, outputs)
        known = state.get(stage.name, {})
        if output and known.get("key") == key and known.get("output") == output:
            logger.info("%s: up to date", stage.name)
            outputs[stage.name] = output
            continue
        logger.info("%s: starting", stage.name)
        started = time.monotonic()
        code = execute(stage.name, config, stage.function, print_line=False)
        if stage.name in ("prepare", "score"):
            _stop_spark()
        if code:
            return code, done
        done.append(stage.name)
        outputs[stage.name] = _output_hash(stage, config)
        state[stage.name] = {
            "key": key,
            "output": outputs[stage.name],
            "seconds": round(time.monotonic() - started, 3),
        }
        replace_text(config.directory / STATE, json.dumps(state, indent=1))
    return 0, done
