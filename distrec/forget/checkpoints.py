"""Checkpoints without some people: their rows become those of a run that never trained them.

A directory of checkpoints is replaced as a whole, since deltas name the checksum of their base and
best.json that of the best one. Files without such a row are linked.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distrec import checkpoint
from distrec.checkpoint.files import Source, StoredRows, rows_per_chunk, write_tensors
from distrec.checkpoint.find import BEST
from distrec.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    ShardEntry,
    TableEntry,
    files_of,
    manifest_text,
    table_directory,
)
from distrec.checkpoint.shards import shard_path, stored_rows
from distrec.config import ShardingConfig
from distrec.errors import CheckpointError
from distrec.files import commit, replace_text, sha256, staging, write_text
from distrec.forget.rows import NO_IDS, Ids, link
from distrec.model import vocabulary_of
from distrec.sharding.initial import initial_rows

logger = logging.getLogger("distrec.forget")


@dataclass(frozen=True)
class Change:
    """How a vocabulary changes.

    Args:
        before: SHA-256.
        after: SHA-256.
        ids: That nobody has any more, ascending.
    """

    before: str
    after: str
    ids: Ids


Changes = Mapping[str, Change]
"""By vocabulary."""


def belongs(manifest: CheckpointManifest, changes: Changes) -> bool:
    """Whether the row numbers of a checkpoint are the ids of these vocabularies."""
    return all(
        manifest.vocabularies.get(name) in (change.before, change.after)
        for name, change in changes.items()
    )


def forgotten_rows(manifest: CheckpointManifest, changes: Changes) -> dict[str, Ids]:
    """Table -> rows that are of nobody any more; rows that ids share are none of them."""
    found = {}
    for name, entry in manifest.tables.items():
        change = changes.get(vocabulary_of(name, manifest.model_spec))
        if change is None or not len(change.ids):
            continue
        most = entry.num_embeddings if entry.composition is None else entry.composition.num_own
        found[name] = change.ids[change.ids < most]
    return found


def never_trained(manifest: CheckpointManifest, table: str, rows: Ids) -> tuple[Tensor, Tensor]:
    """Weights, float32 (n, D), and optimizer state (n, S) of rows that no step has touched."""
    entry = manifest.tables[table]
    scale = manifest.config.get("sharding", {}).get("init_scale", ShardingConfig().init_scale)
    weights = initial_rows(table, rows, entry.embedding_dim, manifest.seed, scale)
    return torch.from_numpy(weights), torch.zeros(len(rows), entry.state_dim)


def replace_checkpoints(directory: Path, changes: Changes) -> int:
    """Take the people out of every checkpoint of a directory.

    What is not a whole checkpoint is not kept.

    Returns:
        Rows that were overwritten.
    """
    count, committed = 0, checkpoint.committed(directory)
    with staging(directory) as root:
        for path in sorted(directory.iterdir()):
            if path.is_symlink() or path.name.startswith(".") or path.name == BEST:
                continue
            if path.is_file():
                link(path, root / path.name)
            elif path in committed:
                count += _replace(path, changes, root)
        _mark_best(directory, root)
        commit(root, directory)
    return count


def _mark_best(directory: Path, root: Path) -> None:
    record = checkpoint.read_best(directory)
    if record is None or not (root / str(record["checkpoint"])).is_dir():
        return
    record["manifest_sha256"] = sha256(root / str(record["checkpoint"]) / MANIFEST)
    replace_text(root / BEST, json.dumps(record, indent=1) + "\n")


def _replace(path: Path, changes: Changes, root: Path) -> int:
    """Write one checkpoint; a base comes before its deltas, as its step does."""
    try:
        checkpoint.verify(path)
        manifest = checkpoint.read_checkpoint_manifest(path)
    except CheckpointError as error:
        logger.warning("not kept, for nobody can be taken out of it: %s", error)
        return 0
    target = root / path.name
    rows = forgotten_rows(manifest, changes)
    tables, count = {}, 0
    for name, entry in manifest.tables.items():
        (target / table_directory(name)).mkdir(parents=True)
        shards = []
        for index in range(len(entry.shards)):
            shard, overwritten = _shard(path, target, manifest, name, index, rows.get(name, NO_IDS))
            shards.append(shard)
            count += overwritten
        tables[name] = entry.model_copy(update={"shards": tuple(shards)})
    link(path / manifest.dense.path, target / manifest.dense.path)
    update: dict[str, Any] = {
        "tables": tables,
        "vocabularies": {
            name: changes[name].after if name in changes else value
            for name, value in manifest.vocabularies.items()
        },
    }
    if manifest.base is not None:
        changed = sha256(root / manifest.base.checkpoint / MANIFEST)
        update["base"] = manifest.base.model_copy(update={"manifest_sha256": changed})
    write_text(target / MANIFEST, manifest_text(manifest.model_copy(update=update)))
    assert {name for name, _ in files_of(manifest)} == {
        file.relative_to(target).as_posix() for file in target.rglob("*.safetensors")
    }
    return count


def _shard(
    path: Path, target: Path, manifest: CheckpointManifest, name: str, index: int, rows: Ids
) -> tuple[ShardEntry, int]:
    """One shard, and how many of its rows were overwritten."""
    entry = manifest.tables[name]
    shard, places = entry.shards[index], places_in_shard(path, manifest, name, index, rows)
    file = target / table_directory(name) / shard.path
    if not len(places):
        link(shard_path(path, name, entry, index), file)
        return shard, 0
    stored = stored_rows(path, name, entry, index, manifest.base is not None)
    numbers = _row_numbers(stored, entry, index, places)
    weights, state = never_trained(manifest, name, numbers)
    fresh = {"weights": weights.to(stored["weights"].dtype), "state": state}
    written = write_tensors(
        file,
        {key: _with_rows(one, places, fresh.get(key)) for key, one in stored.items()},
    )
    return shard.model_copy(update=written.model_dump()), len(places)


def places_in_shard(
    path: Path, manifest: CheckpointManifest, name: str, index: int, rows: Ids
) -> Ids:
    """Where rows of a table lie in a shard, ascending; those that it does not hold are left out."""
    entry = manifest.tables[name]
    own = rows[rows % len(entry.shards) == index]
    if manifest.base is None:
        return own // len(entry.shards)
    stored = stored_rows(path, name, entry, index, is_delta=True)["row_ids"]
    return np.flatnonzero(np.isin(stored.read(0, stored.shape[0]).numpy(), own))


def _row_numbers(
    stored: Mapping[str, StoredRows], entry: TableEntry, index: int, places: Ids
) -> Ids:
    if "row_ids" in stored:
        numbers = stored["row_ids"].read(0, stored["row_ids"].shape[0]).numpy()
        return np.asarray(numbers[places], np.int64)
    return places * len(entry.shards) + index


def _with_rows(stored: StoredRows, places: Ids, fresh: Tensor | None) -> Source:
    """A stored tensor with other rows at some places; as it is where there are none."""
    width = stored.shape[1] if len(stored.shape) > 1 else 1
    step = rows_per_chunk(stored.dtype.itemsize * max(width, 1))

    def pieces() -> Iterator[Tensor]:
        for start in range(0, stored.shape[0], step):
            rows = stored.read(start, min(start + step, stored.shape[0]))
            if fresh is not None:
                first, last = np.searchsorted(places, [start, start + step])
                rows[torch.from_numpy(places[first:last] - start)] = fresh[first:last]
            yield rows

    return Source(stored.shape, stored.dtype, pieces)
