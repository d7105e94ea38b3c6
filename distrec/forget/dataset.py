"""A dataset without some people: the rest of its files, with a manifest of their own."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distrec import columns as c
from distrec.dataset import (
    MANIFEST,
    MAX_ANCESTORS,
    DatasetManifest,
    Extension,
    FileEntry,
    Forgetting,
    Split,
    Vocabulary,
)
from distrec.errors import DataError
from distrec.files import describe_file, replace_text
from distrec.forget.found import Found
from distrec.forget.rows import (
    NO_IDS,
    Change,
    Ids,
    change_file,
    integers,
    link,
    row_groups,
    without,
)

_FREE_SCHEMA = pa.schema([pa.field(c.ID, pa.int64())])


def write_rest(
    source: Path, found: Found, extends: Extension | None, root: Path
) -> DatasetManifest:
    """Write what is left of a dataset; files that nobody was in are linked.

    Args:
        source: The dataset.
        found: What goes.
        extends: What the rest extends.
        root: Directory that exists and is empty.

    Returns:
        Its manifest, which is written last.

    Raises:
        DataError: Nothing would be left to train on.
    """
    manifest = found.manifest
    splits = {
        name: _rest_of_split(source, found, name, split, root)
        for name, split in manifest.splits.items()
    }
    if not splits[c.TRAIN].num_rows:
        raise DataError(
            "a dataset has rows to train on. Received: a list of all people who have any. Delete "
            "the run's directory."
        )
    vocabularies = {
        name: _rest_of_vocabulary(source, found, one, root)
        for name, one in manifest.vocabularies.items()
    }
    forgetting = Forgetting(content_hash=manifest.content_hash, num_users=len(found.known))
    rest = manifest.model_copy(
        update={
            "splits": splits,
            "vocabularies": vocabularies,
            "counts": _rest_of_counts(found),
            "rejects": _reject_counts(root, splits.get(c.REJECTS)),
            "extends": extends,
            "forgotten": (*manifest.forgotten, forgetting),
        }
    )
    replace_text(root / MANIFEST, json.dumps(rest.model_dump(mode="json"), indent=1))
    return rest


def _rest_of_split(source: Path, found: Found, name: str, split: Split, root: Path) -> Split:
    if name == c.ITEMS:
        change: Change = partial(_with_fewer_events, found, c.ITEM_INDEX)
    else:
        change = partial(_rest_of_rows, found, name)
    files = _change_files(source, split.files, change, root)
    return Split(num_rows=sum(file.num_rows for file in files), files=files)


def _rest_of_rows(found: Found, name: str, table: pa.Table) -> pa.Table:
    return without(table, found.gone(name, table))


def _change_files(
    source: Path, entries: tuple[FileEntry, ...], change: Change, root: Path
) -> tuple[FileEntry, ...]:
    """Files of which nothing is left are not written."""
    files = []
    for entry in entries:
        if change_file(source / entry.path, root / entry.path, change):
            entry = describe_file(root, entry.path)
        if entry.num_rows:
            files.append(entry)
        else:
            (root / entry.path).unlink()
    return tuple(files)


def _with_fewer_events(found: Found, index: str, table: pa.Table) -> pa.Table:
    """Counts of events of items without those that go."""
    gone = {c.COUNT: found.num_events}
    gone |= {c.recent_column(split): counts for split, counts in found.recent.items()}
    ids = integers(table, index).tolist()
    for name in filter(table.column_names.__contains__, gone):
        counts = integers(table, name)
        fewer = np.array([gone[name][one] for one in ids], np.int64)
        if fewer.any():
            # an item of an extended dataset may be counted as 0, and a free index stands for none
            column = pa.array(np.where(counts > 0, np.maximum(counts - fewer, 0), counts))
            place = table.schema.get_field_index(name)
            table = table.set_column(place, table.schema.field(place), column)
    return table


def _rest_of_vocabulary(source: Path, found: Found, one: Vocabulary, root: Path) -> Vocabulary:
    ids = found.ids.get(one.name, NO_IDS)

    def change(table: pa.Table) -> pa.Table:
        if one.name == c.ITEM_ID:
            return _with_fewer_events(found, c.ID, table)
        return without(table, np.isin(integers(table, c.ID), ids))

    files = _change_files(source, one.files, change, root)
    for entry in one.reused_files:
        (root / entry.path).parent.mkdir(parents=True, exist_ok=True)
        link(source / entry.path, root / entry.path)
    free = _free_ids(source, one, ids, root)
    if not len(ids):
        return one.model_copy(update={"files": files, "free_files": free})
    return one.model_copy(
        update={
            "files": files,
            "sha256": found.hashes[one.name],
            "num_free": one.num_free + len(ids),
            "free_files": free,
        }
    )


def _free_ids(source: Path, one: Vocabulary, ids: Ids, root: Path) -> tuple[FileEntry, ...]:
    """The ids of nobody, the new ones among them: the next extension may give them away."""
    if not len(ids):
        for entry in one.free_files:
            (root / entry.path).parent.mkdir(parents=True, exist_ok=True)
            link(source / entry.path, root / entry.path)
        return one.free_files
    before = [
        integers(table, c.ID)
        for entry in one.free_files
        for table in row_groups(source / entry.path)
    ]
    whole = np.unique(np.concatenate([ids, *before]))
    name = f"vocab_free/{one.name}/part-00000.parquet"
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table([pa.array(whole)], _FREE_SCHEMA), root / name, compression="zstd")
    return (describe_file(root, name),)


def _rest_of_counts(found: Found) -> dict[str, int]:
    """Counts of what the dataset holds; those of what was read stay."""
    counts = dict(found.manifest.counts)
    for name in (c.TRAIN, c.VALID, c.TEST, c.USERS):
        if name in counts:
            fewer = len(found.rows.get(name, NO_IDS))
            if name == c.TRAIN:
                fewer = sum(found.num_events.values())
            counts[name] = max(counts[name] - fewer, 0)
    return counts


def _reject_counts(root: Path, rejects: Split | None) -> dict[str, int]:
    counts: dict[str, int] = {}
    for entry in () if rejects is None else rejects.files:
        for table in row_groups(root / entry.path, [c.SOURCE, c.REASON]):
            for row in table.to_pylist():
                key = f"{row[c.SOURCE]}: {row[c.REASON]}"
                counts[key] = counts.get(key, 0) + 1
    return dict(sorted(counts.items()))


def extended_after_forgetting(
    extends: Extension | None, previous: DatasetManifest | None
) -> Extension | None:
    """What a dataset extends, where people were forgotten in that since.

    Args:
        extends: As its manifest says.
        previous: The dataset that it extends, as it is now; None where it is gone.
    """
    if extends is None or previous is None:
        return extends
    before = {one.content_hash for one in previous.forgotten}
    if extends.ancestors[0].content_hash not in before:
        return extends
    older = () if previous.extends is None else previous.extends.ancestors
    return Extension(
        generation=extends.generation,
        ancestors=(previous.as_ancestor(), *older)[:MAX_ANCESTORS],
    )
