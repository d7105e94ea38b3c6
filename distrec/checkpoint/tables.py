"""Rows of embedding tables from a checkpoint: into any number of ranks, or looked up on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distrec.checkpoint.files import open_tensors
from distrec.checkpoint.manifest import (
    CheckpointManifest,
    TableEntry,
    read_checkpoint_manifest,
    table_directory,
)
from distrec.columns import PADDING_INDEX
from distrec.config import ShardingConfig
from distrec.errors import CheckpointError, DataError
from distrec.sharding.lookup import Request, gather_and_pool
from distrec.sharding.plan import TablePlan, state_width
from distrec.world import World

if TYPE_CHECKING:
    from distrec.sharding.tables import EmbeddingTables

# numbers of a table that are loaded together: 4 MiB of float32
_CHUNK_NUMBERS = 2**20
WEIGHT_TYPES = {"fp32": torch.float32, "fp16": torch.float16}


def open_shard(path: Path, name: str, table: TableEntry, index: int) -> dict[str, Tensor]:
    """``weights`` (rows, D) and ``state`` (rows, S) of one shard, mapped into memory."""
    shard = table.shards[index]
    rows = shard.num_rows
    return open_tensors(
        path / table_directory(name) / shard.path,
        {
            "weights": ((rows, table.embedding_dim), WEIGHT_TYPES[table.precision]),
            "state": ((rows, table.state_dim), torch.float32),
        },
    )


def load_tables(
    path: str | Path,
    tables: EmbeddingTables,
    plans: tuple[TablePlan, ...],
    sharding: ShardingConfig,
    world: World,
    *,
    some_tables: bool = False,
) -> None:
    """Fill this rank's rows from a checkpoint of any number of ranks and any placement.

    Args:
        path: The checkpoint's directory.
        tables: Of this rank.
        plans: Of the tables.
        sharding: The section [sharding].
        world: This rank.
        some_tables: Whether the checkpoint may have more tables than `plans`.

    Raises:
        CheckpointError: A table is missing, or of another shape, precision or optimizer.
    """
    path = Path(path)
    manifest = read_checkpoint_manifest(path)
    wanted_tables = {plan.name for plan in plans}
    if not wanted_tables <= set(manifest.tables) or (
        not some_tables and set(manifest.tables) != wanted_tables
    ):
        raise CheckpointError(
            f"a checkpoint has the tables of the model. Received: {sorted(manifest.tables)} in "
            f"{path}, the model has {sorted(plan.name for plan in plans)}. Use the configuration "
            "that it was trained with."
        )
    for plan in plans:
        entry = manifest.tables[plan.name]
        _check_table(path, plan, entry, sharding)
        for rows in plan.held_rows(world.rank, world.world_size):
            _load_rows(path, plan.name, entry, rows, tables)


def _load_rows(
    path: Path, name: str, entry: TableEntry, rows: range, tables: EmbeddingTables
) -> None:
    for index in range(len(entry.shards)):
        wanted = shared_rows(rows, index, len(entry.shards))
        if not wanted:
            continue
        shard = open_shard(path, name, entry, index)
        places = slice(wanted.start // len(entry.shards), None, _place_step(wanted, entry))
        weights, state = (shard[key][places][: len(wanted)] for key in ("weights", "state"))
        _load_in_parts(tables, name, wanted, weights, state)


def _load_in_parts(
    tables: EmbeddingTables, name: str, rows: range, weights: Tensor, state: Tensor
) -> None:
    """Rows as they lie on disk to their places, without a second copy of the table in memory."""
    chunk = max(_CHUNK_NUMBERS // weights.shape[1], 1)
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        tables.load_rows(
            name,
            torch.arange(part.start, part.stop, part.step),
            weights[start : start + chunk],
            state[start : start + chunk],
        )


def _place_step(rows: range, entry: TableEntry) -> int:
    return max(1, rows.step // len(entry.shards))


def shared_rows(rows: range, index: int, num_shards: int) -> range:
    """The rows among `rows`, as a rank holds them, that lie in one shard.

    Example:
        >>> shared_rows(range(1, 12, 2), 2, 3)  # rank 1 of 2 reads shard 2 of 3: 5, 11
        range(5, 12, 6)
    """
    step = math.lcm(rows.step, num_shards)
    for row in range(rows.start, min(rows.stop, rows.start + step), rows.step):
        if row % num_shards == index:
            return range(row, rows.stop, step)
    return range(0)


def _check_table(path: Path, plan: TablePlan, entry: TableEntry, sharding: ShardingConfig) -> None:
    wanted = (
        plan.num_embeddings,
        plan.embedding_dim,
        sharding.precision,
        sharding.optimizer,
        state_width(sharding.optimizer, plan.embedding_dim),
    )
    found = (
        entry.num_embeddings,
        entry.embedding_dim,
        entry.precision,
        entry.optimizer,
        entry.state_dim,
    )
    if wanted != found:
        raise CheckpointError(
            "a table has the rows, width, precision, optimizer and state width that it was saved "
            f"with. Received: {found} (table {plan.name!r} of {path}), the model has {wanted}. Use "
            "the configuration that it was trained with."
        )


class MappedTables:
    """A Lookup over the tables of a checkpoint, for one process; reads only the rows asked for.

    Args:
        path: The checkpoint's directory.

    Attributes:
        manifest: Of the checkpoint.

    Raises:
        CheckpointError: The checkpoint is not whole.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest: CheckpointManifest = read_checkpoint_manifest(path)
        self._shards: dict[str, list[Tensor]] = {}

    def __call__(self, requests: Mapping[str, Request]) -> dict[str, Tensor]:
        """Rows by key, as training looks them up.

        Raises:
            DataError: An id lies outside the table.
        """
        found = {}
        for key, request in requests.items():
            rows, index = self._distinct_rows(request.table, request.ids.values)
            found[key] = gather_and_pool(rows, index, request.ids, request.pooling)
        return found

    def rows(self, table: str, ids: Tensor) -> Tensor:
        """The row of each id, zeros for padding: ids int64 (n,) to float32 (n, D)."""
        rows, index = self._distinct_rows(table, ids)
        return rows.index_select(0, index)

    def _distinct_rows(self, table: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Distinct rows, float32 (U, D), and which of them each id is, int64 (n,)."""
        entry = self._entry(table)
        distinct, index = torch.unique(ids.cpu(), return_inverse=True)
        if len(distinct) and not 0 <= int(distinct[0]) <= int(distinct[-1]) < entry.num_embeddings:
            raise DataError(
                f"an id of table {table!r} lies in [0, {entry.num_embeddings}). Received: "
                f"{int(distinct[0])} to {int(distinct[-1])}. The dataset and the checkpoint are "
                "not of the same vocabulary: run prepare and train again."
            )
        shards = self._open(table)
        rows = torch.empty(len(distinct), entry.embedding_dim)
        for number, shard in enumerate(shards):
            own = (distinct % len(shards) == number).nonzero().squeeze(1)
            if len(own):
                rows[own] = shard[distinct[own] // len(shards)].to(torch.float32)
        rows[distinct == PADDING_INDEX] = 0.0
        return rows, index

    def read_rows(self, table: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a table, for export: float32, (stop - start, D)."""
        return self.rows(table, torch.arange(start, stop))

    def _entry(self, table: str) -> TableEntry:
        if table not in self.manifest.tables:
            raise CheckpointError(
                f"{self.path} has no table {table!r}, only {sorted(self.manifest.tables)}. Use the "
                "configuration that it was trained with."
            )
        return self.manifest.tables[table]

    def _open(self, table: str) -> list[Tensor]:
        if table not in self._shards:
            entry = self._entry(table)
            self._shards[table] = [
                open_shard(self.path, table, entry, index)["weights"]
                for index in range(len(entry.shards))
            ]
        return self._shards[table]


def read_rows(path: str | Path, table: str, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a table of a checkpoint: float32, (stop - start, D)."""
    return MappedTables(path).read_rows(table, start, stop)
