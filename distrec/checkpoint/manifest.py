"""The manifest of a checkpoint: written last, so what has none is not a checkpoint.

Layout of a checkpoint directory::

    manifest.json
    dense.safetensors
    tables/<table>/shard-00001-of-00004.safetensors

Row i of a row-wise table lies in shard i % N at place i // N, N being the number of shards; so any
number of ranks reads any checkpoint by arithmetic. A delta names a full checkpoint beside it, its
base, and its shards hold only rows that have changed since, ascending, with their numbers; all
else of it is whole. The manifest may come from anybody: names, sizes, shapes and types are checked
before a byte of a tensor is read, and nothing is unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distrec.errors import CheckpointError
from distrec.files import sha256
from distrec.model.spec import ModelSpec
from distrec.sharding.compression import Composition
from distrec.untrusted import plain_size, read_manifest_text

FORMAT_VERSION = 1
# of deltas; full checkpoints stay readable for all who read format 1
DELTA_FORMAT_VERSION = 2
MANIFEST = "manifest.json"
DENSE_FILE = "dense.safetensors"
TABLES_DIRECTORY = "tables"
MAX_SHARDS = 1_000_000


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


class FileEntry(_Part):
    """One file of the checkpoint."""

    path: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")
    """Base name; the directory follows from what the file is."""
    num_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class ShardEntry(FileEntry):
    """The rows of one shard of a table: ``weights`` and ``state``, in a delta ``row_ids`` too."""

    index: int = Field(ge=0)
    """Row i of the table lies in the shard with index i % number of shards."""
    num_rows: int = Field(ge=0)


class TableEntry(_Part):
    """One logical embedding table."""

    num_embeddings: int = Field(ge=1, lt=2**48)
    embedding_dim: int = Field(ge=1, lt=2**24)
    precision: Literal["fp32", "fp16"]
    optimizer: str
    state_dim: int = Field(ge=0, lt=2**24)
    """Numbers of optimizer state a row, fp32."""
    placement: Literal["row_wise", "replicated"]
    """Where it lay in training; a replicated table is one shard."""
    shards: tuple[ShardEntry, ...] = Field(min_length=1, max_length=MAX_SHARDS)
    composition: Composition | None = None
    """Of a compressed table, which has fewer rows than ids; left out of the others' entries."""

    @property
    def num_ids(self) -> int:
        """Ids lie in [0, num_ids)."""
        return self.num_embeddings if self.composition is None else self.composition.num_ids

    @model_validator(mode="after")
    def _rows_of_composition(self) -> TableEntry:
        if self.composition is not None and self.composition.num_embeddings != self.num_embeddings:
            raise ValueError(
                "a compressed table has the rows of its composition. Received: "
                f"{self.num_embeddings} rows, {self.composition}"
            )
        return self

    @model_validator(mode="after")
    def _shards_in_order(self) -> TableEntry:
        found = [shard.index for shard in self.shards]
        if found != list(range(len(found))):
            raise ValueError(f"shards are numbered from 0 in order. Received: {found[:9]}")
        return self


class BaseEntry(_Part):
    """The full checkpoint that a delta changes; it lies in the same directory."""

    checkpoint: str = Field(pattern=r"^step-[0-9]{8,}$")
    """Its name."""
    manifest_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of its manifest, which has the checksums of its files."""
    number: int = Field(ge=1)
    """This is the number-th delta on it. Each holds all that has changed since the base."""


class PrivacyEntry(_Part):
    """What differentially private training has spent: the accountant's history and its sum."""

    noise_multiplier: float = Field(gt=0)
    """Standard deviation of the noise over the clip norm, of every step."""
    sample_rate: float = Field(gt=0, le=1)
    """Chance of a user to be in a step."""
    num_steps: int = Field(ge=0)
    """Steps with noise."""
    delta: float = Field(gt=0, lt=1)
    epsilon: float = Field(ge=0)
    """At delta."""


class CheckpointManifest(_Part):
    """Everything about a checkpoint that is not a tensor."""

    format_version: int = FORMAT_VERSION
    distrec_version: str
    created_at: str
    """UTC, ISO 8601."""
    global_step: int = Field(ge=0)
    """Optimizer updates done."""
    epoch: int = Field(ge=0)
    """Position of the reader: the epoch of the next batch ..."""
    step_in_epoch: int = Field(ge=0)
    """... and its place in the epoch."""
    lanes: int = Field(ge=1)
    """Of the reader: the order of the rows depends on it, so a resumed run keeps it."""
    world_size: int = Field(ge=1)
    """Ranks that wrote it."""
    seed: int = Field(ge=0)
    """With the step it decides every random number, so no generator's state is kept."""
    config: dict[str, Any]
    """The resolved sections model, loss, train, sharding and reader."""
    config_hash: str
    """Of what a run that is resumed must share with this one."""
    dataset_hash: str
    """DatasetManifest.content_hash."""
    vocabularies: dict[str, str]
    """Vocabulary -> SHA-256: what the row numbers mean."""
    model_spec: ModelSpec
    """Sizes and features of the dataset."""
    tables: dict[str, TableEntry]
    dense: FileEntry
    """Parameters, buffers and the dense optimizer's state."""
    optimizer: dict[str, Any]
    """Settings of the dense optimizer: kind and parameter groups, without tensors."""
    metrics: dict[str, float] = {}
    """On the validation queries at this step, when it was a validation step."""
    early_stopping: dict[str, Any] = {}
    """State of the early stopping."""
    skipped_steps: int = Field(default=0, ge=0)
    """Steps before it that were left out for their loss; not there when there was none."""
    privacy: PrivacyEntry | None = None
    """Of private training; others have none."""
    base: BaseEntry | None = None
    """Of a delta; a full checkpoint has none."""

    @model_validator(mode="after")
    def _rows_add_up(self) -> CheckpointManifest:
        if (self.base is not None) != (self.format_version == DELTA_FORMAT_VERSION):
            raise ValueError(
                f"deltas, and no others, are of format {DELTA_FORMAT_VERSION} and have a base. "
                f"Received: format {self.format_version}, base {self.base}"
            )
        for name, table in self.tables.items():
            count = len(table.shards)
            for shard in table.shards:
                most = rows_of_shard(table.num_embeddings, shard.index, count)
                if shard.num_rows != most and (self.base is None or shard.num_rows > most):
                    raise ValueError(
                        f"shard {shard.index} of {count} holds {most} of {table.num_embeddings} "
                        f"rows. Received: {shard.num_rows} rows (table {name!r})"
                    )
        return self


def rows_of_shard(num_embeddings: int, index: int, num_shards: int) -> int:
    """Rows of shard `index`: how many i in [0, num_embeddings) have i % num_shards == index."""
    return max(0, -(-(num_embeddings - index) // num_shards))


def shard_name(index: int, num_shards: int) -> str:
    """File name of a shard, counted from 1 as people do."""
    return f"shard-{index + 1:05d}-of-{num_shards:05d}.safetensors"


def table_directory(table: str) -> str:
    """Where a table's shards lie, below the checkpoint; the name may hold any character."""
    name = quote(table, safe="")
    if not name or name.startswith("."):
        raise CheckpointError(
            f"a table has a name that does not start with '.'. Received: {table!r}"
        )
    return f"{TABLES_DIRECTORY}/{name}"


def manifest_text(manifest: CheckpointManifest) -> str:
    """The file of a manifest."""
    document = manifest.model_dump(mode="json")
    # the first readers of format 1 know none of these, and refuse what they do not know
    if manifest.base is None:
        del document["base"]
    if manifest.privacy is None:
        del document["privacy"]
    if not manifest.skipped_steps:
        del document["skipped_steps"]
    for entry in document["tables"].values():
        if entry["composition"] is None:
            del entry["composition"]
    return json.dumps(document, indent=1) + "\n"


def files_of(manifest: CheckpointManifest) -> Iterator[tuple[str, FileEntry]]:
    """Every file of a checkpoint: path below its directory, and entry."""
    yield manifest.dense.path, manifest.dense
    for name, table in sorted(manifest.tables.items()):
        for shard in table.shards:
            yield f"{table_directory(name)}/{shard.path}", shard


def read_base(path: str | Path, manifest: CheckpointManifest) -> CheckpointManifest | None:
    """The manifest of the full checkpoint beside `path` that a delta changes; None: it is full.

    Raises:
        CheckpointError: The base is missing, another one, or does not fit.
    """
    if manifest.base is None:
        return None
    directory = Path(path).parent / manifest.base.checkpoint
    try:
        base = read_checkpoint_manifest(directory)
        received = sha256(directory / MANIFEST)
    except CheckpointError as error:
        raise CheckpointError(
            f"a delta needs the full checkpoint {manifest.base.checkpoint} beside it: {error} "
            f"({path})"
        ) from error
    if received != manifest.base.manifest_sha256 or base.base is not None:
        raise CheckpointError(
            f"a delta is read with the full checkpoint that it was made from. Received: {directory}"
            f" is another one of this name, and {Path(path).name} cannot be used with it. Use "
            "another checkpoint, or copy both again."
        )
    if shapes(base) != shapes(manifest):
        raise CheckpointError(
            f"a delta has the tables of its base. Received: {path} and {directory}, which differ. "
            "Use another checkpoint."
        )
    return base


def shapes(manifest: CheckpointManifest) -> dict[str, tuple[int | str | Composition | None, ...]]:
    """What the tables are, wherever they lay."""
    return {
        name: (
            table.num_embeddings,
            table.embedding_dim,
            table.precision,
            table.optimizer,
            table.state_dim,
            table.composition,
        )
        for name, table in manifest.tables.items()
    }


def read_checkpoint_manifest(path: str | Path) -> CheckpointManifest:
    """Read the manifest of one checkpoint directory and check every file's name, kind and size.

    Raises:
        CheckpointError: It has none, it is damaged or of another format, or a file is missing, a
            link or of another size.
    """
    directory = Path(path)
    file = directory / MANIFEST
    if not os.path.lexists(file):
        raise CheckpointError(
            f"a checkpoint has a {MANIFEST}, written last. Received: {directory}, which has none. "
            "What has none is the rest of a save that failed: use another checkpoint."
        )
    manifest = parse_manifest(file)
    for name, entry in files_of(manifest):
        _check_file(directory, name, entry)
    return manifest


def parse_manifest(file: Path) -> CheckpointManifest:
    """Read a manifest by itself, without a look at the files that it names.

    Raises:
        CheckpointError: It is damaged or of another format.
    """
    text = read_manifest_text(file, CheckpointError)
    try:
        document = json.loads(text)
        version = document.get("format_version") if isinstance(document, dict) else None
        if version not in (FORMAT_VERSION, DELTA_FORMAT_VERSION):
            raise CheckpointError(
                f"this distrec reads checkpoints of format {FORMAT_VERSION} and "
                f"{DELTA_FORMAT_VERSION}. Received: format {version} ({file}). Train again, or use "
                "the version that wrote it."
            )
        return CheckpointManifest.model_validate_json(text)
    except (ValidationError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is not a checkpoint's manifest: {error}. Use another checkpoint."
        ) from error


def _check_file(directory: Path, name: str, entry: FileEntry) -> None:
    size = plain_size(directory, name, CheckpointError)
    if size != entry.num_bytes:
        raise CheckpointError(
            f"a file has the size that the manifest gives. Received: {directory / name} with "
            f"{size} bytes, expected {entry.num_bytes}. Use another checkpoint, or copy this one "
            "again."
        )
