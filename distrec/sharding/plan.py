"""Which rank holds which row of each table; pure, so that it can be asked before anything starts.

Row i of a row-wise table lies on rank i mod N. Ids are popularity ranks, so the hot rows spread
evenly, and moving from N to M ranks is arithmetic. A replicated table is whole on every rank: for
small ones a sum of gradients costs less than sending rows around. A row-wise table may have a hot
tier: its first rows are on every rank, and the others as before.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from distrec.columns import FIRST_INDEX
from distrec.config import CompressionConfig, ShardingConfig
from distrec.errors import ConfigError
from distrec.sharding.compression import Composition

Placement = Literal["row_wise", "replicated"]

# FBGEMM's kernels read rows as vectors of four numbers
DIM_MULTIPLE = 4
_WEIGHT_BYTES = {"fp32": 4, "fp16": 2}
_STATE_BYTES = 4


@dataclass(frozen=True)
class TableSpec:
    """An embedding table that a model asks for.

    Args:
        name: Unique among the tables.
        num_embeddings: Ids, and unless it is compressed rows; id 0 is padding.
        embedding_dim: Width, a multiple of 4.
    """

    name: str
    num_embeddings: int
    embedding_dim: int


@dataclass(frozen=True)
class TablePlan:
    """A table with its place.

    Args:
        name: As in TableSpec.
        num_embeddings: Rows; row 0 is padding.
        embedding_dim: As in TableSpec.
        placement: row_wise or replicated.
        weight_bytes_per_row: Of the weights.
        state_bytes_per_row: Of the optimizer's state.
        hot_rows: H: rows [0, H) of a row-wise table are on every rank; below num_embeddings.
        composition: Of a compressed table: the rows that make up an id's.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    placement: Placement
    weight_bytes_per_row: int
    state_bytes_per_row: int
    hot_rows: int = 0
    composition: Composition | None = None

    @property
    def num_ids(self) -> int:
        """Ids lie in [0, num_ids): as many as rows, unless the table is compressed."""
        return self.num_embeddings if self.composition is None else self.composition.num_ids

    def row_ids(self, ids: Tensor) -> Tensor:
        """The rows of each id, one after the other: int64 (n,) to (n * K,), K = 1 uncompressed."""
        if self.composition is None:
            return ids
        return self.composition.row_ids(self.name, ids).flatten()

    def local_rows(self, rank: int, world_size: int) -> range:
        """Ids of the rows that are a rank's own, ascending: those that it saves.

        The hot tier does not change them: rank i mod N owns row i, wherever its copies are.

        Example:
            >>> TablePlan("user", 8, 4, "row_wise", 16, 4).local_rows(1, 3)
            range(1, 8, 3)
        """
        if self.placement == "replicated":
            return range(self.num_embeddings)
        return range(rank, self.num_embeddings, world_size)

    def held_rows(self, rank: int, world_size: int) -> tuple[range, ...]:
        """Ids of all rows that a rank keeps: the hot ones, if any, then those that only it has.

        Example:
            >>> TablePlan("user", 8, 4, "row_wise", 16, 4, hot_rows=3).held_rows(1, 3)
            (range(0, 3), range(4, 8, 3))
        """
        hot = self.hot_on(world_size)
        if not hot:
            return (self.local_rows(rank, world_size),)
        first = hot + (rank - hot) % world_size
        return range(hot), range(first, max(first, self.num_embeddings), world_size)

    def is_held(self, row_ids: Tensor, rank: int, world_size: int) -> Tensor:
        """Which of the rows, int64 (n,), a rank keeps: bool, (n,)."""
        held = torch.zeros(len(row_ids), dtype=torch.bool)
        for rows in self.held_rows(rank, world_size):
            inside = (row_ids >= rows.start) & (row_ids < rows.stop)
            held |= inside & ((row_ids - rows.start) % rows.step == 0)
        return held

    def hot_on(self, world_size: int) -> int:
        """Hot rows among N ranks: one rank alone has nothing to keep twice."""
        return self.hot_rows if world_size > 1 and self.placement == "row_wise" else 0

    def num_held(self, rank: int, world_size: int) -> int:
        """Rows that a rank keeps."""
        return sum(len(rows) for rows in self.held_rows(rank, world_size))

    def bytes_on(self, rank: int, world_size: int) -> int:
        """Bytes of weights and optimizer state that a rank holds."""
        row_bytes = self.weight_bytes_per_row + self.state_bytes_per_row
        return self.num_held(rank, world_size) * row_bytes


def state_width(optimizer: str, embedding_dim: int) -> int:
    """float32 numbers of optimizer state a row: S of `EmbeddingTables.local_rows`.

    Args:
        optimizer: One of ShardingConfig.optimizer.
        embedding_dim: Width of the table.
    """
    return {"rowwise_adagrad": 1, "adagrad": embedding_dim, "sgd": 0}[optimizer]


def plan_tables(
    specs: Sequence[TableSpec],
    config: ShardingConfig,
    world_size: int,
    chosen_hot_rows: Mapping[str, int] | None = None,
) -> tuple[TablePlan, ...]:
    """Decide where every table lies.

    Args:
        specs: The model's tables.
        config: Section [sharding].
        world_size: N.
        chosen_hot_rows: H of tables whose H is "auto" in `config`; 0 where nothing is given.

    Returns:
        One plan a spec, in their order.

    Raises:
        ConfigError: A name stands twice or is unknown, a table is too small to be spread or no
            smaller when it is compressed, a width is not a multiple of 4.
    """
    _check_names([spec.name for spec in specs], config)
    chosen = chosen_hot_rows or {}
    return tuple(
        _plan(spec, config, world_size, _hot_rows(spec.name, config, chosen)) for spec in specs
    )


def has_chosen_hot_rows(table: str, config: ShardingConfig) -> bool:
    """Whether the H of a table is "auto"."""
    hot_rows = config.hot_rows
    return (hot_rows if isinstance(hot_rows, str) else hot_rows.get(table)) == "auto"


def _hot_rows(table: str, config: ShardingConfig, chosen: Mapping[str, int]) -> int:
    hot_rows = chosen if has_chosen_hot_rows(table, config) else config.hot_rows
    assert not isinstance(hot_rows, str)
    return int(hot_rows.get(table, 0))


def bytes_per_rank(plans: Sequence[TablePlan], world_size: int) -> tuple[int, ...]:
    """Bytes of weights and optimizer state on each rank, all tables together."""
    return tuple(
        sum(plan.bytes_on(rank, world_size) for plan in plans) for rank in range(world_size)
    )


def check_known(tables: Iterable[str], known: Sequence[str], key: str) -> None:
    """Raise ConfigError if the key names a table that is none of those."""
    for name in tables:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Tables: {', '.join(sorted(known))}."
            raise ConfigError(f"unknown table {name!r} in {key}. {hint}")


def _check_names(names: list[str], config: ShardingConfig) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"tables have names of their own. Received twice: {twice}. Rename them.")
    hot_rows = {} if isinstance(config.hot_rows, str) else config.hot_rows
    named = {"tables": config.tables, "hot_rows": hot_rows, "compress": config.compress}
    for key, tables in named.items():
        check_known(tables, names, f"sharding.{key}")


def _plan(spec: TableSpec, config: ShardingConfig, world_size: int, hot_rows: int) -> TablePlan:
    if spec.num_embeddings < 1:
        raise ConfigError(
            "a table has at least one row. Received: num_embeddings="
            f"{spec.num_embeddings} (table {spec.name!r}). Leave the table out."
        )
    if spec.embedding_dim < 1 or spec.embedding_dim % DIM_MULTIPLE:
        wider = -(-max(spec.embedding_dim, 1) // DIM_MULTIPLE) * DIM_MULTIPLE
        raise ConfigError(
            f"an embedding_dim is a multiple of {DIM_MULTIPLE}. Received: embedding_dim="
            f"{spec.embedding_dim} (table {spec.name!r}). Use {wider}."
        )
    composition = None
    if spec.name in config.compress:
        composition = _composition(spec, config.compress[spec.name])
        spec = replace(spec, num_embeddings=composition.num_embeddings)
    placement = _placement(spec, config, world_size)
    if hot_rows >= spec.num_embeddings:
        placement = "replicated"
    if placement == "row_wise" and spec.num_embeddings < world_size:
        raise ConfigError(
            "row-wise sharding needs num_embeddings >= world_size. Received: num_embeddings="
            f"{spec.num_embeddings} (table {spec.name!r}), world_size={world_size}. Use placement "
            '= "replicated".'
        )
    return TablePlan(
        name=spec.name,
        num_embeddings=spec.num_embeddings,
        embedding_dim=spec.embedding_dim,
        placement=placement,
        weight_bytes_per_row=spec.embedding_dim * _WEIGHT_BYTES[config.precision],
        state_bytes_per_row=state_width(config.optimizer, spec.embedding_dim) * _STATE_BYTES,
        hot_rows=hot_rows if placement == "row_wise" else 0,
        composition=composition,
    )


def _composition(spec: TableSpec, config: CompressionConfig) -> Composition:
    composition = Composition(
        method=config.method,
        operation=config.operation,
        num_ids=spec.num_embeddings,
        num_own=FIRST_INDEX + config.own_rows,
        num_buckets=config.num_buckets,
        rows_per_id=config.num_hashes if config.method == "hash" else 2,
    )
    if composition.num_embeddings >= spec.num_embeddings:
        raise ConfigError(
            "a compressed table has fewer rows than ids. Received: sharding.compress."
            f"{spec.name} with {composition.num_embeddings:,} rows for {spec.num_embeddings:,} "
            "ids. Lower num_buckets or own_rows, or leave the table as it is."
        )
    return composition


def _placement(spec: TableSpec, config: ShardingConfig, world_size: int) -> Placement:
    if spec.name in config.tables:
        return config.tables[spec.name]
    if config.placement != "auto":
        return config.placement
    size = spec.num_embeddings * spec.embedding_dim * _WEIGHT_BYTES[config.precision]
    small = size <= config.replicate_below_mib * 2**20
    return "replicated" if small or spec.num_embeddings < world_size else "row_wise"
