"""The manifest of a checkpoint: written last, so what has none is not a checkpoint.

Layout of a checkpoint directory::

    manifest.json
    dense.safetensors
    tables/<table>/shard-00001-of-00004.safetensors

Row i of a row-wise table lies in shard i % N at place i // N, N being the number of shards; so any
number of ranks reads any checkpoint by arithmetic. The manifest may come from anybody: names,
sizes, shapes and types are checked before a byte of a tensor is read, and nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distrec.errors import CheckpointError
from distrec.model.spec import ModelSpec

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
DENSE_FILE = "dense.safetensors"
TABLES_DIRECTORY = "tables"
# far above what a manifest of thousands of shards takes
MAX_MANIFEST_BYTES = 256 * 2**20
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
    """The rows of one shard of a table: ``weights`` and ``state``."""

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

    @model_validator(mode="after")
    def _rows_add_up(self) -> TableEntry:
        count = len(self.shards)
        for index, shard in enumerate(self.shards):
            expected = rows_of_shard(self.num_embeddings, index, count)
            if shard.index != index or shard.num_rows != expected:
                raise ValueError(
                    f"shard {index} of {count} holds {expected} of {self.num_embeddings} rows. "
                    f"Received: shard {shard.index} with {shard.num_rows} rows"
                )
        return self


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


def files_of(manifest: CheckpointManifest) -> Iterator[tuple[str, FileEntry]]:
    """Every file of a checkpoint: path below its directory, and entry."""
    yield manifest.dense.path, manifest.dense
    for name, table in sorted(manifest.tables.items()):
        for shard in table.shards:
            yield f"{table_directory(name)}/{shard.path}", shard


def read_checkpoint_manifest(path: str | Path) -> CheckpointManifest:
    """Read the manifest of one checkpoint directory and check every file's name, kind and size.

    Raises:
        CheckpointError: It has none, it is damaged or of another format, or a file is missing, a
            link or of another size.
    """
    directory = Path(path)
    file = directory / MANIFEST
    try:
        status = os.lstat(file)
    except OSError as error:
        raise CheckpointError(
            f"a checkpoint has a {MANIFEST}, written last. Received: {directory}, which has none. "
            "What has none is the rest of a save that failed: use another checkpoint."
        ) from error
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_MANIFEST_BYTES:
        raise CheckpointError(
            f"{MANIFEST} is a plain file of at most {MAX_MANIFEST_BYTES} bytes. Received: {file}, "
            f"{status.st_size} bytes. Use another checkpoint."
        )
    manifest = _parse(file)
    for name, entry in files_of(manifest):
        _check_file(directory, name, entry)
    return manifest


def _parse(file: Path) -> CheckpointManifest:
    try:
        text = file.read_text(encoding="utf-8")
        document = json.loads(text)
        version = document.get("format_version") if isinstance(document, dict) else None
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"this distrec reads checkpoints of format {FORMAT_VERSION}. Received: format "
                f"{version} ({file}). Train again, or use the version that wrote it."
            )
        return CheckpointManifest.model_validate_json(text)
    except (ValidationError, ValueError, OSError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is not a checkpoint's manifest: {error}. Use another checkpoint."
        ) from error


def _check_file(directory: Path, name: str, entry: FileEntry) -> None:
    file = directory
    # a link anywhere below the checkpoint could lead out of it
    for part in name.split("/"):
        file = file / part
        try:
            mode = os.lstat(file).st_mode
        except OSError:
            raise CheckpointError(
                f"every file of a checkpoint's manifest is there. Received: no {file}. Use "
                "another checkpoint, or copy this one again, whole."
            ) from None
        if stat.S_ISLNK(mode):
            raise CheckpointError(f"a checkpoint holds no links. Received: {file} is one.")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{file} is a plain file. Received: something else.")
    size = os.lstat(file).st_size
    if size != entry.num_bytes:
        raise CheckpointError(
            f"a file has the size that the manifest gives. Received: {file} with {size} bytes, "
            f"expected {entry.num_bytes}. Use another checkpoint, or copy this one again."
        )
