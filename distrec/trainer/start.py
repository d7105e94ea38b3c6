"""Where a run begins: anew, or from the newest checkpoint of the same configuration and data."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from distrec import checkpoint
from distrec.checkpoint.together import together
from distrec.config import Config
from distrec.errors import ConfigError
from distrec.sharding.collectives import Collectives
from distrec.trainer.setup import Inputs, Run

logger = logging.getLogger("distrec.train")


def find_start(inputs: Inputs, collectives: Collectives) -> Path | None:
    """The checkpoint to go on from, or None to begin; decided by rank 0 for all.

    Checkpoints of another configuration or dataset are moved aside; train.keep_earlier_runs of
    those set aside stay.

    Raises:
        CheckpointError: On every rank.
    """
    world = collectives.world

    def decide() -> str:
        return _choose(inputs) if world.is_first else ""

    chosen = together("train.start", decide, collectives)
    name = str(collectives.broadcast_object(chosen, "train.start.name"))
    return inputs.config.checkpoint_directory / name if name else None


def _choose(inputs: Inputs) -> str:
    config = inputs.config
    path, why = _newest(inputs)
    stored = checkpoint.newest_published(config) if config.train.resume else None
    if stored is not None and (other := _of_another_run(stored, inputs)):
        logger.warning("the published checkpoints are left alone: the newest %s", other)
    elif stored is not None and stored.global_step > _step(path):
        if why:
            logger.warning("%s. Earlier checkpoints: %s", why, _set_aside(config))
        checkpoint.fetch_all(config)
        return checkpoint.find(config.checkpoint_directory, "newest").name
    if why:
        logger.warning("%s: starting anew. Earlier checkpoints: %s", why, _set_aside(config))
    return "" if path is None else path.name


def _newest(inputs: Inputs) -> tuple[Path | None, str]:
    """The checkpoint in the run's directory to go on from; why not, if there are some."""
    config = inputs.config
    directory = config.checkpoint_directory
    if not checkpoint.committed(directory):
        return None, ""
    if not config.train.resume:
        return None, "train.resume is false"
    path = checkpoint.find(directory, "newest")
    other = _of_another_run(checkpoint.read_checkpoint_manifest(path), inputs)
    return (None, f"{path.name} {other}") if other else (path, "")


def _of_another_run(manifest: checkpoint.CheckpointManifest, inputs: Inputs) -> str:
    """What tells a checkpoint from those of this run; empty: it is one of them."""
    if manifest.dataset_hash != inputs.identity.dataset_hash:
        return "was trained on another dataset"
    if manifest.config_hash != inputs.identity.config_hash:
        return "was trained with another configuration"
    return ""


def _step(path: Path | None) -> int:
    return -1 if path is None else checkpoint.read_checkpoint_manifest(path).global_step


def _set_aside(config: Config) -> Path:
    """Move a run's checkpoints away, and delete those set aside longest ago."""
    directory = config.checkpoint_directory
    earlier = _earlier_runs(directory)
    number = max(earlier, default=0) + 1
    target = earlier[number] = directory.with_name(f"{directory.name}-before-{number}")
    directory.rename(target)
    num_spare = len(earlier) - config.train.keep_earlier_runs
    source = config.train.warm_start
    for _, path in sorted(earlier.items())[: max(num_spare, 0)]:
        if source is not None and Path(source).resolve().is_relative_to(path.resolve()):
            logger.warning("%s is kept: train.warm_start reads it", path)
            continue
        logger.warning("deleting %s: train.keep_earlier_runs", path)
        shutil.rmtree(path, ignore_errors=True)
    return target


def _earlier_runs(directory: Path) -> dict[int, Path]:
    """Directories that were set aside, by number; the highest is the latest."""
    name = re.compile(re.escape(f"{directory.name}-before-") + r"(\d+)")
    found = {}
    for path in directory.parent.iterdir():
        match = name.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            found[int(match[1])] = path
    return found


def load(run: Run, path: Path) -> checkpoint.CheckpointManifest:
    """Fill tables, model and optimizer from a checkpoint. Collective.

    Raises:
        CheckpointError: On every rank, with what is wrong with the checkpoint.
        ConfigError: The reader would count steps differently.
    """
    world = run.collectives.world
    manifest = together(
        "train.load",
        lambda: checkpoint.load_dense(path, run.model, run.optimizer, run.parts.average),
        run.collectives,
    )
    checkpoint.load_tables(path, run.tables, run.inputs.plans, run.config.sharding, world)
    steps = manifest.epoch * run.reader.steps_per_epoch + manifest.step_in_epoch
    if steps != manifest.global_step:
        raise ConfigError(
            f"a resumed run has the same steps in an epoch. Received: {path.name} at epoch "
            f"{manifest.epoch}, step {manifest.step_in_epoch}, but {run.reader.steps_per_epoch} "
            "steps in an epoch. Set train.resume = false."
        )
    return manifest
