"""Rows of embedding tables from a checkpoint into any number of ranks, each byte read once.

A rank that finds its own shard reads it where it belongs. Else the files are cut into one stretch a
rank, whatever rows are in it; each rank reads its stretch chunk by chunk and sends the rows to the
ranks that hold them. So N ranks read the files once together, and one after the other, where each
picking its rows out of all files would read every page N times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distrec import pulse
from distrec.checkpoint.files import StoredRows, rows_per_chunk
from distrec.checkpoint.manifest import (
    CheckpointManifest,
    TableEntry,
    read_base,
    read_checkpoint_manifest,
    rows_of_shard,
    shapes,
)
from distrec.checkpoint.shards import WEIGHT_TYPES, check_row_ids, stored_rows
from distrec.checkpoint.together import together
from distrec.config import ShardingConfig
from distrec.errors import CheckpointError
from distrec.sharding.plan import TablePlan, state_width
from distrec.world import World

if TYPE_CHECKING:
    from distrec.sharding.collectives import Collectives
    from distrec.sharding.tables import EmbeddingTables

Rows = tuple[Tensor, Tensor, Tensor]
"""Row ids, int64 (n,); weights (n, D); optimizer state, float32 (n, S)."""


@dataclass(frozen=True)
class Stretch:
    """Rows at places [start, stop) of one shard."""

    shard: int
    start: int
    stop: int


def load_tables(
    path: str | Path,
    tables: EmbeddingTables,
    plans: tuple[TablePlan, ...],
    sharding: ShardingConfig,
    world: World,
    *,
    some_tables: bool = False,
) -> int:
    """Fill this rank's rows from a checkpoint of any number of ranks and any placement.

    Collective, over the ranks of `tables`. Rows of a delta count as touched since its base.

    Args:
        path: The checkpoint's directory, which all ranks see.
        tables: Of this rank.
        plans: Of the tables; with fewer rows than those of `tables`, the others stay as they are.
        sharding: The section [sharding].
        world: This rank.
        some_tables: Whether the checkpoint may have more tables than `plans`.

    Returns:
        Bytes of tensors that this rank has read; over all ranks they are those of the files.

    Raises:
        CheckpointError: A table is missing, or of another shape, precision or optimizer; a file
            is damaged. On every rank.
    """
    path, collectives = Path(path), tables.collectives
    assert collectives.world == world, (collectives.world, world)

    def begin() -> tuple[CheckpointManifest, CheckpointManifest | None]:
        manifest = read_checkpoint_manifest(path)
        _check_tables(path, manifest, plans, sharding, some_tables)
        return manifest, read_base(path, manifest)

    manifest, base = together("checkpoint.load", begin, collectives)
    loading = _Loading(tables, collectives)
    for plan in plans:
        if manifest.base is None or base is None:
            loading.full(path, plan, manifest.tables[plan.name])
        else:
            loading.full(path.parent / manifest.base.checkpoint, plan, base.tables[plan.name])
            loading.delta(path, plan, manifest.tables[plan.name])
    together("checkpoint.loaded", loading.end, collectives)
    return loading.bytes_read


@dataclass
class _Loading:
    """One load on one rank.

    A rank that cannot read goes on taking part, for the others wait for it, and tells at the end.
    """

    tables: EmbeddingTables
    collectives: Collectives
    bytes_read: int = 0
    failures: list[CheckpointError] = field(default_factory=list)

    def end(self) -> None:
        """Raise what went wrong."""
        self.tables.rows_were_written()
        if self.failures:
            raise self.failures[0]

    def full(self, path: Path, plan: TablePlan, entry: TableEntry) -> None:
        """All rows of a table."""
        world, num_shards = self.collectives.world, len(entry.shards)
        shared = min(self.tables.num_shared_rows(plan.name), plan.num_embeddings)
        if world.world_size == 1:
            for index in range(num_shards):
                self._read_own(path, plan, entry, index, 0, slice(index, None, num_shards))
            return
        places = [shard.num_rows for shard in entry.shards]
        if num_shards == world.world_size and plan.placement == "row_wise":
            first = rows_of_shard(shared, world.rank, num_shards)
            self._read_own(path, plan, entry, world.rank, first, slice(None))
            places = [rows_of_shard(shared, index, num_shards) for index in range(num_shards)]
        self._exchange(path, plan, entry, places, is_delta=False)

    def delta(self, path: Path, plan: TablePlan, entry: TableEntry) -> None:
        """The rows of a table that have changed since the base."""
        places = [shard.num_rows for shard in entry.shards]
        self._exchange(path, plan, entry, places, is_delta=True)

    def _read_own(
        self, path: Path, plan: TablePlan, entry: TableEntry, index: int, first: int, rows: slice
    ) -> None:
        """A shard from place `first` on, straight into `rows` of what only this rank holds."""
        try:
            stored = stored_rows(path, plan.name, entry, index)
            ids, *targets = self.tables.held_parts(plan.name)[-1]
            count = len(range(ids.start, plan.num_embeddings, ids.step))
            for name, target in zip(("weights", "state"), targets, strict=True):
                stored[name].copy_into(first, target[:count][rows])
                self.bytes_read += stored[name].bytes_read
        except CheckpointError as error:
            self.failures.append(error)

    def _exchange(
        self, path: Path, plan: TablePlan, entry: TableEntry, places: Sequence[int], is_delta: bool
    ) -> None:
        """Read this rank's stretches, and send each row to all ranks that hold it."""
        world = self.collectives.world
        shared = min(self.tables.num_shared_rows(plan.name), plan.num_embeddings)
        # a row that every rank keeps is sent N times
        row_bytes = plan.weight_bytes_per_row + plan.state_bytes_per_row
        step = rows_per_chunk(row_bytes * (world.world_size if shared else 1))
        rounds = [
            stretches(places, rank, world.world_size, step) for rank in range(world.world_size)
        ]
        reader = _Reader(path, plan, entry, is_delta)
        for number in range(max(map(len, rounds))):
            pulse.beat()
            rows = reader.empty()
            try:
                if number < len(rounds[world.rank]):
                    rows = reader.read(rounds[world.rank][number])
            except CheckpointError as error:
                self.failures.append(error)
            ids, weights, state = self._deal(plan.name, rows, shared)
            self.tables.load_rows(plan.name, ids, weights, state)
            if is_delta:
                self.tables.mark_touched(plan.name, ids)
        self.bytes_read += reader.bytes_read

    def _deal(self, table: str, rows: Rows, shared: int) -> Rows:
        """Send rows to who holds them, and receive those that this rank holds."""
        world, device = self.collectives.world, self.collectives.device
        chosen = [
            ((rows[0] < shared) | (rows[0] % world.world_size == rank)).nonzero().flatten()
            for rank in range(world.world_size)
        ]
        order, counts = torch.cat(chosen), [len(part) for part in chosen]
        packed = torch.cat([_as_bytes(part[order]) for part in rows], dim=1)
        received, _ = self.collectives.alltoall(packed.to(device), counts, f"rows of {table}")
        parts = received.cpu().split([_width(part) for part in rows], dim=1)
        ids, weights, state = (
            # a copy lies at an even address
            part.reshape(-1).clone().view(like.dtype).view(len(part), *like.shape[1:])
            for part, like in zip(parts, rows, strict=True)
        )
        return ids, weights, state


class _Reader:
    """Rows of a table of one checkpoint, stretch by stretch."""

    def __init__(self, path: Path, plan: TablePlan, entry: TableEntry, is_delta: bool) -> None:
        self._path, self._name, self._entry, self._is_delta = path, plan.name, entry, is_delta
        self._shard, self._stored = -1, dict[str, StoredRows]()
        self.bytes_read = 0

    def empty(self) -> Rows:
        """No rows, of the types that `read` gives."""
        dtype = WEIGHT_TYPES[self._entry.precision]
        return (
            torch.empty(0, dtype=torch.int64),
            torch.empty(0, self._entry.embedding_dim, dtype=dtype),
            torch.empty(0, self._entry.state_dim),
        )

    def read(self, stretch: Stretch) -> Rows:
        """Row ids, weights and state."""
        entry, shard = self._entry, stretch.shard
        if shard != self._shard:
            self._stored = stored_rows(self._path, self._name, entry, shard, self._is_delta)
            self._shard = shard
        found = {}
        for name, stored in self._stored.items():
            before = stored.bytes_read
            found[name] = stored.read(stretch.start, stretch.stop)
            self.bytes_read += stored.bytes_read - before
        if self._is_delta:
            check_row_ids(self._path, self._name, entry, shard, found["row_ids"])
        else:
            places = torch.arange(stretch.start, stretch.stop)
            found["row_ids"] = places * len(entry.shards) + shard
        return found["row_ids"], found["weights"], found["state"]


def _as_bytes(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.uint8).view(len(rows), _width(rows))


def _width(rows: Tensor) -> int:
    """Bytes of a row."""
    return rows.element_size() * (1 if rows.dim() == 1 else rows.shape[1])


def stretches(places: Sequence[int], rank: int, world_size: int, step: int) -> list[Stretch]:
    """What a rank reads: its share of every shard, in chunks of at most `step` rows.

    Example:
        >>> stretches([5, 4], 1, 2, 2)
        [Stretch(shard=0, start=2, stop=4), Stretch(shard=0, start=4, stop=5), \
Stretch(shard=1, start=2, stop=4)]
    """
    found = []
    for shard, count in enumerate(places):
        begin, end = count * rank // world_size, count * (rank + 1) // world_size
        found += [
            Stretch(shard, start, min(start + step, end)) for start in range(begin, end, step)
        ]
    return found


def _check_tables(
    path: Path,
    manifest: CheckpointManifest,
    plans: tuple[TablePlan, ...],
    sharding: ShardingConfig,
    some_tables: bool,
) -> None:
    wanted = {
        plan.name: (
            plan.num_embeddings,
            plan.embedding_dim,
            sharding.precision,
            sharding.optimizer,
            state_width(sharding.optimizer, plan.embedding_dim),
            plan.composition,
        )
        for plan in plans
    }
    found = shapes(manifest)
    if set(wanted) - set(found) or (set(found) - set(wanted) and not some_tables):
        raise CheckpointError(
            f"a checkpoint has the tables of the model. Received: {sorted(found)} in {path}, the "
            f"model has {sorted(wanted)}. Use the configuration that it was trained with."
        )
    for name, shape in wanted.items():
        if shape != found[name]:
            raise CheckpointError(
                "a table has the rows, width, precision, optimizer, state width and compression "
                f"that it was saved with. Received: {found[name]} (table {name!r} of {path}), the "
                f"model has {shape}. Use the configuration that it was trained with."
            )
