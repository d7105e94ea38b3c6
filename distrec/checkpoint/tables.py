"""Rows of embedding tables looked up in a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from distrec.batch import Jagged
from distrec.checkpoint.manifest import (
    CheckpointManifest,
    TableEntry,
    read_base,
    read_checkpoint_manifest,
)
from distrec.checkpoint.shards import check_row_ids, open_shard
from distrec.columns import PADDING_INDEX
from distrec.errors import CheckpointError, DataError
from distrec.sharding.lookup import Request, gather_and_pool


class MappedTables:
    """A Lookup over the tables of a checkpoint, for one process; reads only the rows asked for.

    Of a delta, rows that have changed are its own, and the others its base's.

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
        self._base = read_base(path, self.manifest)
        self._shards: dict[str, list[Tensor]] = {}
        self._changed: dict[str, list[dict[str, Tensor]]] = {}

    def __call__(self, requests: Mapping[str, Request]) -> dict[str, Tensor]:
        """Rows by key, as training looks them up.

        Raises:
            DataError: An id lies outside the table.
        """
        found = {}
        for key, request in requests.items():
            found[key] = self._look_up(request)
        return found

    def rows(self, table: str, ids: Tensor) -> Tensor:
        """The vector of each id, zeros for padding: ids int64 (n,) to float32 (n, D)."""
        return self._look_up(Request(table, Jagged.singles(ids), "none"))

    def _look_up(self, request: Request) -> Tensor:
        table, ids = request.table, request.ids.values.cpu()
        entry = self._entry(table)
        least, most = (int(bound) for bound in torch.aminmax(ids)) if len(ids) else (0, 0)
        if not 0 <= least <= most < entry.num_ids:
            raise DataError(
                f"an id of table {table!r} lies in [0, {entry.num_ids}). Received: {least} to "
                f"{most}. The dataset and the checkpoint are not of the same vocabulary: run "
                "prepare and train again."
            )
        if entry.composition is not None:
            ids = entry.composition.row_ids(table, ids).flatten()
        rows, index = self._distinct_rows(table, ids)
        return gather_and_pool(rows, index, request.ids, request.pooling, entry.composition)

    def _distinct_rows(self, table: str, row_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Distinct rows, float32 (U, D), and which of them each row id is, int64 (n,)."""
        entry = self._entry(table)
        distinct, index = torch.unique(row_ids, return_inverse=True)
        shards = self._open(table)
        rows = torch.empty(len(distinct), entry.embedding_dim)
        for number, shard in enumerate(shards):
            own = (distinct % len(shards) == number).nonzero().squeeze(1)
            if len(own):
                rows[own] = shard[distinct[own] // len(shards)].to(torch.float32)
        for changed in self._open_changed(table):
            stored = changed["row_ids"]
            if len(stored):
                places = torch.searchsorted(stored, distinct).clamp_(max=len(stored) - 1)
                own = (stored[places] == distinct).nonzero().squeeze(1)
                rows[own] = changed["weights"][places[own]].to(torch.float32)
        rows[distinct == PADDING_INDEX] = 0.0
        return rows, index

    def read_rows(self, table: str, start: int, stop: int) -> Tensor:
        """Vectors of ids [start, stop) of a table: float32, (stop - start, D)."""
        return self.rows(table, torch.arange(start, stop))

    def _entry(self, table: str) -> TableEntry:
        if table not in self.manifest.tables:
            raise CheckpointError(
                f"{self.path} has no table {table!r}, only {sorted(self.manifest.tables)}. Use the "
                "configuration that it was trained with."
            )
        return self.manifest.tables[table]

    def _open(self, table: str) -> list[Tensor]:
        """Shards of the whole table."""
        if table not in self._shards:
            path, manifest = self.path, self.manifest
            if manifest.base is not None and self._base is not None:
                path, manifest = path.parent / manifest.base.checkpoint, self._base
            entry = manifest.tables[table]
            self._shards[table] = [
                open_shard(path, table, entry, index)["weights"]
                for index in range(len(entry.shards))
            ]
        return self._shards[table]

    def _open_changed(self, table: str) -> list[dict[str, Tensor]]:
        """Shards of a delta; none of a full checkpoint."""
        if self._base is None:
            return []
        if table not in self._changed:
            entry = self._entry(table)
            self._changed[table] = []
            for index in range(len(entry.shards)):
                shard = open_shard(self.path, table, entry, index, is_delta=True)
                check_row_ids(self.path, table, entry, index, shard["row_ids"])
                self._changed[table].append(shard)
        return self._changed[table]


def read_rows(path: str | Path, table: str, start: int, stop: int) -> Tensor:
    """Vectors of ids [start, stop) of a table of a checkpoint: float32, (stop - start, D)."""
    return MappedTables(path).read_rows(table, start, stop)
