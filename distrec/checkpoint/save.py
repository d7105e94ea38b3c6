"""Saving: every rank writes its own rows, the first rank commits by one rename.

Until the rename there is only a directory with another name, so a crash at any moment, a full disk
or a lost rank leaves the checkpoints that were there before.
"""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distrec import __version__
from distrec.checkpoint.dense import dense_tensors, optimizer_settings
from distrec.checkpoint.files import Source, rows_per_chunk, whole, write_tensors
from distrec.checkpoint.find import PARTIAL_PREFIX, checkpoint_name
from distrec.checkpoint.manifest import (
    DELTA_FORMAT_VERSION,
    DENSE_FILE,
    FORMAT_VERSION,
    MANIFEST,
    TABLES_DIRECTORY,
    BaseEntry,
    CheckpointManifest,
    FileEntry,
    PrivacyEntry,
    ShardEntry,
    TableEntry,
    manifest_text,
    shard_name,
    table_directory,
)
from distrec.checkpoint.together import together
from distrec.config import ShardingConfig
from distrec.errors import CheckpointError
from distrec.files import fsync, write_text
from distrec.model.spec import ModelSpec
from distrec.sharding.plan import TablePlan, state_width

if TYPE_CHECKING:
    from distrec.sharding.collectives import Collectives
    from distrec.sharding.tables import EmbeddingTables

logger = logging.getLogger("distrec.checkpoint")


@dataclass(frozen=True)
class Identity:
    """What all checkpoints of one run share.

    Args:
        seed: Of the run.
        config: The resolved sections that training depends on.
        config_hash: Of what a resumed run must share.
        dataset_hash: DatasetManifest.content_hash.
        vocabularies: Vocabulary -> SHA-256.
        model_spec: Of the dataset.
    """

    seed: int
    config: Mapping[str, Any]
    config_hash: str
    dataset_hash: str
    vocabularies: Mapping[str, str]
    model_spec: ModelSpec


@dataclass(frozen=True)
class Position:
    """Where in the run a checkpoint stands.

    Args:
        global_step: Optimizer updates done.
        epoch: Of the next batch.
        step_in_epoch: Of the next batch.
        lanes: Of the reader.
        metrics: Of the validation at this step, if there was one.
        early_stopping: Its state.
        skipped_steps: Steps before it that were left out.
        privacy: What private training has spent.
    """

    global_step: int
    epoch: int
    step_in_epoch: int
    lanes: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    early_stopping: Mapping[str, Any] = field(default_factory=dict)
    skipped_steps: int = 0
    privacy: PrivacyEntry | None = None


@dataclass(frozen=True)
class Parts:
    """What holds the tensors.

    Args:
        model: The dense part.
        optimizer: Of the dense part.
        tables: The embedding tables.
        plans: Of the tables.
        sharding: The section [sharding].
        average: Parameter -> its moving average, which is scored in its place.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    tables: EmbeddingTables
    plans: tuple[TablePlan, ...]
    sharding: ShardingConfig
    average: Mapping[str, Tensor] | None = None


def save(
    directory: str | Path,
    identity: Identity,
    position: Position,
    parts: Parts,
    collectives: Collectives,
    base: BaseEntry | None = None,
) -> Path:
    """Write a checkpoint and commit it; what was there before stays.

    Collective. The directory is one that all ranks share. Beside some small pieces of it nothing is
    copied in memory.

    Args:
        directory: Of all checkpoints of the run.
        identity: Of the run.
        position: In the run.
        parts: What is saved.
        collectives: Of the job.
        base: Write a delta: the rows that `parts.tables` counts as touched, which are all that
            differ from this full checkpoint. The same on every rank.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: On every rank, when any rank could not write. Nothing is left behind.
    """
    directory = Path(directory)
    token = collectives.broadcast_object(uuid.uuid4().hex[:12], "checkpoint.token")
    name = checkpoint_name(position.global_step)
    partial = directory / f"{PARTIAL_PREFIX}{name}-{token}"
    world = collectives.world
    try:
        together("checkpoint.begin", lambda: _begin(partial, parts, world.is_first), collectives)
        written = together(
            "checkpoint.write",
            lambda: _write_own(partial, parts, collectives, base is not None),
            collectives,
        )
        entries = collectives.gather_objects(written, "checkpoint.entries")
        together(
            "checkpoint.commit",
            lambda: _commit(
                partial,
                directory / name,
                _manifest(identity, position, parts, entries, base) if world.is_first else None,
            ),
            collectives,
        )
    except Exception:
        if world.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return directory / name


def _begin(partial: Path, parts: Parts, is_first: bool) -> None:
    if not is_first:
        return
    try:
        for plan in parts.plans:
            (partial / table_directory(plan.name)).mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{partial} cannot be made: {error}") from error


def _write_own(
    partial: Path, parts: Parts, collectives: Collectives, is_delta: bool
) -> dict[str, Any]:
    """Write this rank's files; their entries as JSON: tables by name, dense."""
    world = collectives.world
    if not partial.is_dir():
        raise CheckpointError(
            "checkpoints lie in a directory that all ranks share. Received: rank "
            f"{world.rank} does not see {partial}. Put output on a shared file system."
        )
    written: dict[str, Any] = {"tables": {}}
    for plan in parts.plans:
        shared = plan.placement == "replicated"
        if shared and not world.is_first:
            continue
        index, count = (0, 1) if shared else (world.rank, world.world_size)
        tensors = delta_sources(parts, plan) if is_delta else full_sources(parts, plan)
        path = partial / table_directory(plan.name) / shard_name(index, count)
        entry = write_tensors(path, tensors)
        num_rows = tensors["weights"].shape[0]
        shard = ShardEntry(index=index, num_rows=num_rows, **entry.model_dump())
        written["tables"][plan.name] = shard.model_dump()
    if world.is_first:
        dense = dense_tensors(parts.model, parts.optimizer, parts.average)
        entry = write_tensors(partial / DENSE_FILE, dense)
        written["dense"] = entry.model_dump()
    return written


def full_sources(parts: Parts, plan: TablePlan) -> dict[str, Source]:
    """All rows of a table that this rank answers for, from where they lie."""
    found = parts.tables.local_parts(plan.name)
    return {
        "weights": whole([weights for _, weights, _ in found]),
        "state": whole([state for _, _, state in found]),
    }


def delta_sources(parts: Parts, plan: TablePlan) -> dict[str, Source]:
    """Those of them that have been touched, and their numbers."""
    found = parts.tables.local_parts(plan.name)
    touched = parts.tables.touched_parts(plan.name)
    count = sum(int(part.sum()) for part in touched)
    width = state_width(parts.sharding.optimizer, plan.embedding_dim)
    row_bytes = plan.weight_bytes_per_row + plan.state_bytes_per_row

    step = rows_per_chunk(row_bytes)

    def chosen() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for (ids, weights, state), marks in zip(found, touched, strict=True):
            for start in range(0, len(marks), step):
                places = start + marks[start : start + step].nonzero().flatten()
                yield ids.start + ids.step * places.cpu(), weights[places], state[places]

    return {
        "row_ids": Source((count,), torch.int64, lambda: (ids for ids, _, _ in chosen())),
        "weights": Source(
            (count, plan.embedding_dim),
            found[0][1].dtype,
            lambda: (weights for _, weights, _ in chosen()),
        ),
        "state": Source((count, width), torch.float32, lambda: (state for _, _, state in chosen())),
    }


def _manifest(
    identity: Identity,
    position: Position,
    parts: Parts,
    entries: list[dict[str, Any]],
    base: BaseEntry | None,
) -> CheckpointManifest:
    tables = {}
    for plan in parts.plans:
        shards = [
            ShardEntry.model_validate(entry["tables"][plan.name])
            for entry in entries
            if plan.name in entry["tables"]
        ]
        tables[plan.name] = TableEntry(
            num_embeddings=plan.num_embeddings,
            embedding_dim=plan.embedding_dim,
            precision=parts.sharding.precision,
            optimizer=parts.sharding.optimizer,
            state_dim=state_width(parts.sharding.optimizer, plan.embedding_dim),
            placement=plan.placement,
            shards=tuple(shards),
            composition=plan.composition,
        )
    return CheckpointManifest(
        format_version=FORMAT_VERSION if base is None else DELTA_FORMAT_VERSION,
        base=base,
        distrec_version=__version__,
        created_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        global_step=position.global_step,
        epoch=position.epoch,
        step_in_epoch=position.step_in_epoch,
        lanes=position.lanes,
        world_size=len(entries),
        seed=identity.seed,
        config=dict(identity.config),
        config_hash=identity.config_hash,
        dataset_hash=identity.dataset_hash,
        vocabularies=dict(identity.vocabularies),
        model_spec=identity.model_spec,
        tables=tables,
        dense=FileEntry.model_validate(entries[0]["dense"]),
        optimizer=optimizer_settings(parts.optimizer),
        metrics=dict(position.metrics),
        early_stopping=dict(position.early_stopping),
        skipped_steps=position.skipped_steps,
        privacy=position.privacy,
    )


def _commit(partial: Path, final: Path, manifest: CheckpointManifest | None) -> None:
    """Write the manifest last and rename; on the first rank, which alone has a manifest."""
    if manifest is None:
        return
    try:
        write_text(partial / MANIFEST, manifest_text(manifest))
        for folder in sorted((partial / TABLES_DIRECTORY).iterdir()):
            fsync(folder)
        fsync(partial / TABLES_DIRECTORY)
        fsync(partial)
        _make_room(final)
        partial.rename(final)
        fsync(final.parent)
    except OSError as error:
        raise CheckpointError(f"{final} cannot be written: {error}") from error


def _make_room(final: Path) -> None:
    """Take away what stands under the name: damaged, or of the same step done again."""
    if not final.exists():
        return
    logger.warning("checkpoint %s is there already, and is replaced", final.name)
    replaced = final.with_name(f"{PARTIAL_PREFIX}replaced-{final.name}-{uuid.uuid4().hex[:12]}")
    final.rename(replaced)
    shutil.rmtree(replaced, ignore_errors=True)
