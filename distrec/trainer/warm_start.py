"""A new run from older weights: which checkpoint, whether its rows mean the same, what it gives.

Not a resume: steps count from 0, the dense optimizer is new, and the learning rates follow their
schedule from the start. Rows of embedding tables come with their optimizer state.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from distrec import checkpoint
from distrec import columns as c
from distrec.checkpoint.together import together
from distrec.columns import SIDES
from distrec.dataset import DatasetManifest
from distrec.errors import CheckpointError, DataError
from distrec.model import ModelSpec, vocabulary_of
from distrec.model.adapters import ADAPTER
from distrec.sharding.collectives import Collectives
from distrec.trainer.new_rows import predict_new_rows
from distrec.trainer.setup import Inputs, Run

logger = logging.getLogger("distrec.train")

# towers that read features side by side: their parameters go with the order of those
_FEATURE_TOWERS = ("towers.deep.", "towers.content.item_")
# a row a kind of event, by its place
_KINDS = "towers.sequence.kinds"
_KEY = "train.warm_start"


def find_warm_start(inputs: Inputs, collectives: Collectives) -> Path | None:
    """The checkpoint that train.warm_start means, verified; None without one.

    Collective: rank 0 decides for all.

    Raises:
        CheckpointError: On every rank: there is none, or its rows mean something else.
    """
    if inputs.config.train.warm_start is None:
        return None
    is_first = collectives.world.is_first
    chosen = together(
        "train.warm_start", lambda: str(_choose(inputs)) if is_first else "", collectives
    )
    return Path(str(collectives.broadcast_object(chosen, "train.warm_start.path")))


def _choose(inputs: Inputs) -> Path:
    path = _resolve(Path(str(inputs.config.train.warm_start)))
    saved = checkpoint.read_checkpoint_manifest(path)
    generation_of(saved.vocabularies, inputs.manifest, path)
    rows = checkpoint.old_rows(path, saved, inputs.plans)
    sizes = {plan.name: plan.num_ids for plan in inputs.plans}
    for plan in rows.plans:
        is_hashed = vocabulary_of(plan.name, inputs.spec) not in inputs.manifest.vocabularies
        if is_hashed and plan.num_ids != sizes[plan.name]:
            raise CheckpointError(
                "a hashed feature keeps its number of buckets. Received: table "
                f"{plan.name!r} with {plan.num_ids} ids in {path}, {sizes[plan.name]} in "
                "the dataset. Put num_buckets back, or give the feature another name."
            )
    return path


def _resolve(path: Path) -> Path:
    if (path / checkpoint.manifest.MANIFEST).is_file():
        checkpoint.verify(path)
        return path
    if not checkpoint.committed(path):
        raise CheckpointError(
            f"{_KEY} names a checkpoint, or a directory of checkpoints. Received: {path}, which is "
            "neither. Give another run's checkpoints directory."
        )
    which = "newest" if checkpoint.read_best(path) is None else "best"
    return checkpoint.find(path, which)  # type: ignore[arg-type]


def generation_of(vocabularies: Mapping[str, str], manifest: DatasetManifest, path: Path) -> int:
    """Generation of the dataset, this one or one that it extends, whose ids a checkpoint uses.

    Args:
        vocabularies: Vocabulary -> SHA-256, of the checkpoint.
        manifest: Of the dataset to train on.
        path: Of the checkpoint, for messages.

    Raises:
        CheckpointError: There is none: a row would stand for another value.
    """
    stored = dict(vocabularies)
    own = {name: one.sha256 for name, one in manifest.vocabularies.items()}
    known = [own]
    if manifest.extends is not None:
        for ancestor in manifest.extends.ancestors:
            known.append({name: one.sha256 for name, one in ancestor.vocabularies.items()})
    for back, hashes in enumerate(known):
        if hashes == stored:
            return manifest.generation - back
    nearest = known[min(1, len(known) - 1)]
    differing = [
        name for name in sorted({*nearest, *stored}) if nearest.get(name) != stored.get(name)
    ]
    told = "that this one extends" if manifest.extends is not None else "itself: it extends none"
    raise CheckpointError(
        "the vocabularies of a warm start are those of the dataset, or of one that it extends. "
        f"Received: {path}, of which {', '.join(map(repr, differing))} differ from the dataset "
        f"{told}. Prepare with prepare.extend = the dataset that the checkpoint was trained on, or "
        f"unset {_KEY}."
    )


def load_warm_start(run: Run, path: Path) -> None:
    """Fill tables and model from an older checkpoint; the optimizer of the dense part stays new.

    Collective.

    Raises:
        CheckpointError: On every rank: the checkpoint does not fit, or is damaged.
        DataError: On every rank: the dataset's list of reused ids is damaged.
    """
    inputs, world = run.inputs, run.collectives.world
    sharding, seed = run.config.sharding, run.config.seed
    # what a rank may fail at alone comes before what all ranks do together
    old = together("train.load", lambda: _read_old(run, path), run.collectives)
    checkpoint.load_old_rows(path, old.rows, run.tables, sharding, world)
    for plan in old.rows.plans:
        if plan.name in old.reused:
            row_ids = old.reused[plan.name]
            checkpoint.start_rows_anew(plan, row_ids, run.tables, sharding, seed, world)
    if run.config.train.predict_new_rows:
        predict_new_rows(run, old.rows.plans, old.reused)
    if world.is_first:
        _tell(path, old, inputs)


@dataclass(frozen=True)
class _Old:
    """What an older checkpoint gives, beside the rows themselves.

    Args:
        rows: Which rows it has.
        reused: Table -> rows that meant something else there, int64, (n,).
        left: Names of dense parameters that stay as they are.
    """

    rows: checkpoint.OldRows
    reused: Mapping[str, NDArray[np.int64]]
    left: tuple[str, ...]


def _read_old(run: Run, path: Path) -> _Old:
    """Fill the dense part, and find out what becomes of the rows. Not collective."""
    inputs = run.inputs
    saved = checkpoint.read_checkpoint_manifest(path)
    rows = checkpoint.old_rows(path, saved, inputs.plans)
    generation = generation_of(saved.vocabularies, inputs.manifest, path)
    by_vocabulary: dict[str, NDArray[np.int64]] = {}
    reused: dict[str, NDArray[np.int64]] = {}
    for plan in rows.plans:
        name = vocabulary_of(plan.name, inputs.spec)
        if name not in inputs.manifest.vocabularies:
            continue
        if name not in by_vocabulary:
            directory = run.config.dataset_directory
            by_vocabulary[name] = reused_ids(directory, inputs.manifest, name, generation)
        ids = by_vocabulary[name]
        # rows that ids share are nobody's to begin anew
        reused[plan.name] = ids if plan.composition is None else ids[ids < plan.composition.num_own]
    changed = changed_sides(saved.model_spec, inputs.spec)
    leave = _FEATURE_TOWERS if changed else ()
    old_towers = saved.config.get("model", {}).get("towers", ())
    if set(old_towers) != set(run.model.tower_names):
        leave = (*leave, "tower_weights", "new_item_bias", "recent_weight")
    if saved.model_spec.event_types != inputs.spec.event_types:
        leave = (*leave, _KINDS)
    left = checkpoint.load_dense_where_it_fits(path, saved, run.model, leave)
    _check_frozen(run, path, rows, left)
    return _Old(rows, reused, left)


def _check_frozen(run: Run, path: Path, rows: checkpoint.OldRows, left: tuple[str, ...]) -> None:
    """Refuse to keep as it is what the checkpoint does not have."""
    of_towers = tuple(f"towers.{name}." for name in run.model.config.frozen)
    missing = [name for name in left if name.startswith(of_towers) and ADAPTER not in name]
    missing += [name for name in rows.new_tables if name in run.model.frozen_tables]
    if of_towers and missing:
        raise CheckpointError(
            "what is frozen comes from the warm start. Received: model.frozen = "
            f"{list(run.model.config.frozen)} and {path}, which does not have {', '.join(missing)} "
            "in this shape. Train these towers, or give a checkpoint of a model that has them."
        )


def reused_ids(
    directory: Path, manifest: DatasetManifest, vocabulary: str, generation: int
) -> NDArray[np.int64]:
    """Ids that another value had in the dataset of the given generation: int64, (n,).

    Raises:
        DataError: A file is missing or damaged.
    """
    found = []
    for entry in manifest.vocabularies[vocabulary].reused_files:
        try:
            table = pq.read_table(directory / entry.path, columns=[c.ID, c.GENERATION])
        except (OSError, ValueError) as error:
            raise DataError(
                f"a dataset is whole. Received: {directory / entry.path}: {error}. Run prepare "
                "again."
            ) from error
        ids = table.column(c.ID).to_numpy()
        found.append(ids[table.column(c.GENERATION).to_numpy() > generation])
    return np.concatenate(found).astype(np.int64) if found else np.zeros(0, np.int64)


def changed_sides(old: ModelSpec, new: ModelSpec) -> list[str]:
    """Sides whose features are others, or in another order; more ids of a feature change nothing.

    Where they are, the widths of the layers that read them may be the same by chance.
    """

    def shown(spec: ModelSpec, side: str) -> list[tuple[str, str, int]]:
        return [(one.column, one.kind, one.dim) for one in spec.features_of(side)]

    return [side for side in SIDES if shown(old, side) != shown(new, side)]


def _tell(path: Path, old: _Old, inputs: Inputs) -> None:
    logger.info("warm start from %s", path)
    sizes = {plan.name: plan.num_embeddings for plan in inputs.plans}
    for plan in old.rows.plans:
        logger.info(
            "table %s: %d old rows, %d new, %d of the old ones start anew",
            *(plan.name, plan.num_embeddings, sizes[plan.name] - plan.num_embeddings),
            len(old.reused.get(plan.name, ())),
        )
    for name in old.rows.new_tables:
        logger.warning("table %s is not in the checkpoint, and starts anew", name)
    if old.left:
        shown = ", ".join(old.left)
        logger.warning("not in the checkpoint in this shape, and start anew: %s", shown)
