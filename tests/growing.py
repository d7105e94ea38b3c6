"""A synthetic dataset that extends another one, made without Spark, for tests of warm starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distrec import columns as c
from distrec.config import Config
from distrec.dataset import MANIFEST, DatasetManifest, Extension, FileEntry, read_manifest
from tests.synthetic import write_dataset
from tests.training import make_config

# ids of items that another item had in the dataset before
REUSED_ITEMS = (3, 8, 9)


def old_config(
    directory: Path, sections: Mapping[str, Mapping[str, Any]] | None = None, **dataset: Any
) -> Config:
    """A run on the first dataset: 60 users, 40 items."""
    keys = {"train": {"max_steps": 4, "evaluate_every_steps": 4}, **(sections or {})}
    return make_config(directory, keys, **dataset)


def new_config(
    directory: Path,
    warm_start: Path,
    sections: Mapping[str, Mapping[str, Any]] | None = None,
) -> Config:
    """A run on the second dataset, with another seed, that starts from older weights."""
    keys = {name: dict(section) for name, section in (sections or {}).items()}
    keys["train"] = {
        "max_steps": 4,
        "evaluate_every_steps": 4,
        "warm_start": str(warm_start),
        **keys.get("train", {}),
    }
    return make_config(directory, keys).model_copy(update={"seed": 4})


def extend_dataset(
    old: Path, new: Path, reused: Sequence[int] = REUSED_ITEMS, **dataset: Any
) -> DatasetManifest:
    """Write a dataset with 6 more users and 4 more items that says that it extends `old`."""
    sizes = {"num_users": 66, "num_items": 44, "seed": 1, **dataset}
    before, manifest = read_manifest(old), write_dataset(new, **sizes)
    items = manifest.vocabularies[c.ITEM_ID]
    table = pa.table(
        {c.ID: pa.array(reused, pa.int64()), c.GENERATION: pa.array([1] * len(reused), pa.int64())}
    )
    path = new / "vocab_reused" / c.ITEM_ID / "part-00000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(table, path)
    data = path.read_bytes()
    entry = FileEntry(
        path=str(path.relative_to(new)),
        num_rows=len(reused),
        num_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )
    vocabularies = {
        **manifest.vocabularies,
        c.ITEM_ID: items.model_copy(update={"reused_files": (entry,), "num_reused": len(reused)}),
    }
    extension = Extension(generation=before.generation + 1, ancestors=(before.as_ancestor(),))
    manifest = manifest.model_copy(update={"vocabularies": vocabularies, "extends": extension})
    (new / MANIFEST).write_text(json.dumps(manifest.model_dump(mode="json"), indent=1))
    return manifest
