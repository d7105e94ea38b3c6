"""Whether anything of the people is left in a run's directory, whatever was done before.

Every Parquet file, checkpoint and report below the directory is read, those that no manifest names
and those of dead jobs included. What is told names places and numbers, never a person.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from distrec import checkpoint
from distrec import columns as c
from distrec.checkpoint.manifest import MANIFEST, CheckpointManifest
from distrec.checkpoint.shards import stored_rows
from distrec.errors import DistrecError
from distrec.forget.checkpoints import (
    Changes,
    forgotten_rows,
    never_trained,
    places_in_shard,
)
from distrec.forget.outputs import exported_tables, named_in_log, vocabulary
from distrec.forget.rows import NO_IDS, Ids, among, integers, row_groups
from distrec.people import names_somebody

_SAMPLE = re.compile(r'<script type="application/json" id="sample-data">(.*?)</script>', re.S)
_PART = re.compile(r"part-\d+\.parquet")


def remains(directory: Path, people: frozenset[str], changes: Changes) -> list[str]:
    """What is left of the people, one line a place; nothing is changed.

    Args:
        directory: Of a run.
        people: Raw values.
        changes: The ids that they had, by vocabulary.
    """
    found = []
    for path in sorted(directory.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        try:
            count = sum(_in_file(path, people, changes))
        except (DistrecError, OSError, ValueError, KeyError) as error:
            found.append(f"{path}: cannot be read: {type(error).__name__}")
            continue
        if count:
            found.append(f"{path}: {count}")
    for path, table in exported_tables(directory / "logs"):
        if not path.resolve().is_relative_to(directory.resolve()):
            count = sum(_in_table(path, vocabulary(table), people, changes))
            found += [f"{path}: {count}"] if count else []
    return found


def _in_file(path: Path, people: frozenset[str], changes: Changes) -> Iterator[int]:
    """How often they are in a file, by part of it."""
    if path.suffix == ".parquet":
        yield from _in_parquet(path, people, changes)
    elif path.name == MANIFEST and (path.parent / "tables").is_dir():
        yield from _in_checkpoint(path.parent, changes)
    elif path.suffix == ".safetensors" and not _is_in_a_checkpoint(path):
        # of a save that failed: nobody can say whose rows these are
        yield 1
    elif path.name == "jobs.jsonl":
        yield named_in_log(path.parent, people)
    elif path.suffix == ".html":
        for text in _SAMPLE.findall(path.read_text(encoding="utf-8")):
            yield sum(user["id"] in people for user in json.loads(text)["users"])


def _is_in_a_checkpoint(path: Path) -> bool:
    return any((above / MANIFEST).is_file() for above in list(path.parents)[:3])


def _in_parquet(path: Path, people: frozenset[str], changes: Changes) -> Iterator[int]:
    schema = pq.read_schema(path)
    table = (schema.metadata or {}).get(b"distrec.table", b"").decode()
    if table:
        yield from _in_table(path, vocabulary(table), people, changes)
        return
    is_vocabulary = c.VALUE in schema.names and _PART.fullmatch(path.name)
    if is_vocabulary:
        yield from _in_table(path, path.parent.name, people, changes)
    for group in row_groups(path):
        if c.USER_ID in schema.names:
            yield int(among(group, c.USER_ID, people).sum())
        if c.USER_INDEX in schema.names:
            yield int(np.isin(integers(group, c.USER_INDEX), _ids(c.USER_ID, changes)).sum())
        if c.RAW_ROW in schema.names:
            rows = group.select([c.SOURCE, c.RAW_ROW]).to_pylist()
            yield sum(
                row[c.SOURCE] != c.ITEMS and names_somebody(row[c.RAW_ROW], people) for row in rows
            )
        yield sum(_of_features(group, changes))


def _of_features(group: pa.Table, changes: Changes) -> Iterator[int]:
    for name in changes:
        if name in group.schema.names and pa.types.is_int64(group.schema.field(name).type):
            yield int(np.isin(integers(group, name), _ids(name, changes)).sum())


def _in_table(path: Path, name: str, people: frozenset[str], changes: Changes) -> Iterator[int]:
    """Of a vocabulary, or of an exported table: value and id."""
    for group in row_groups(path, [c.VALUE, c.ID]):
        if name == c.USER_ID:
            yield int(among(group, c.VALUE, people).sum())
        yield int(np.isin(integers(group, c.ID), _ids(name, changes)).sum())


def _ids(name: str, changes: Changes) -> Ids:
    return changes[name].ids if name in changes else NO_IDS


def _in_checkpoint(path: Path, changes: Changes) -> Iterator[int]:
    manifest = checkpoint.read_checkpoint_manifest(path)
    stored = manifest.vocabularies
    if any(stored.get(name) != change.after for name, change in changes.items()):
        # row numbers of other vocabularies, or of those that still have the people
        yield 1
    for table, rows in forgotten_rows(manifest, changes).items():
        for index in range(len(manifest.tables[table].shards)):
            yield _trained(path, manifest, table, index, rows)


def _trained(path: Path, manifest: CheckpointManifest, table: str, index: int, rows: Ids) -> int:
    """Rows of a shard that differ from those that no step has touched."""
    entry, count = manifest.tables[table], 0
    is_delta = manifest.base is not None
    stored = stored_rows(path, table, entry, index, is_delta)
    for place in places_in_shard(path, manifest, table, index, rows).tolist():
        number = place * len(entry.shards) + index
        if is_delta:
            number = int(stored["row_ids"].read(place, place + 1))
        weights, state = never_trained(manifest, table, np.array([number], np.int64))
        own = stored["weights"].read(place, place + 1)
        is_new = torch.equal(own, weights.to(own.dtype))
        count += not (is_new and torch.equal(stored["state"].read(place, place + 1), state))
    return count
