"""Weights of another run: what of a checkpoint a model of a grown dataset takes over."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from distrec.checkpoint.dense import model_tensors, scored
from distrec.checkpoint.files import open_tensors
from distrec.checkpoint.load import load_tables
from distrec.checkpoint.manifest import CheckpointManifest
from distrec.config import ShardingConfig
from distrec.errors import CheckpointError
from distrec.sharding.compression import Composition
from distrec.sharding.initial import initial_rows
from distrec.sharding.plan import TablePlan, state_width
from distrec.world import World

if TYPE_CHECKING:
    from distrec.sharding.tables import EmbeddingTables


@dataclass(frozen=True)
class OldRows:
    """The rows of tables that a checkpoint gives.

    Args:
        plans: Of the tables, cut to the rows that the checkpoint has.
        new_tables: Names of the tables that it does not have.
    """

    plans: tuple[TablePlan, ...]
    new_tables: tuple[str, ...]


def old_rows(path: Path, saved: CheckpointManifest, plans: Iterable[TablePlan]) -> OldRows:
    """Which rows of the tables a checkpoint has.

    Raises:
        CheckpointError: A table has more ids there than here, or composes them in another way.
    """
    cut, new = [], []
    for plan in plans:
        entry = saved.tables.get(plan.name)
        if entry is None:
            new.append(plan.name)
            continue
        rows, composition = entry.num_embeddings, entry.composition
        if entry.num_ids > plan.num_ids:
            raise CheckpointError(
                "tables grow, they do not shrink. Received: table "
                f"{plan.name!r} with {entry.num_ids} ids in {path}, {plan.num_ids} in the model. "
                "Warm-start from a checkpoint of the dataset that this one extends."
            )
        if not _same_rows(composition, plan.composition):
            raise CheckpointError(
                "the ids of a table go on sharing their rows, or go on having their own. Received: "
                f"table {plan.name!r} with {composition or 'a row an id'} in {path}, "
                f"{plan.composition or 'a row an id'} in the model. Put back sharding.compress."
                f"{plan.name}."
            )
        hot_rows = min(plan.hot_rows, rows)
        cut.append(replace(plan, num_embeddings=rows, hot_rows=hot_rows, composition=composition))
    return OldRows(tuple(cut), tuple(new))


def _same_rows(old: Composition | None, new: Composition | None) -> bool:
    if old is None or new is None:
        return old is new
    return new.continues(old)


def load_old_rows(
    path: Path, rows: OldRows, tables: EmbeddingTables, sharding: ShardingConfig, world: World
) -> None:
    """Fill this rank's part of the old rows, optimizer state included; new rows stay as they are.

    Raises:
        CheckpointError: A table has another width, precision or optimizer.
    """
    load_tables(path, tables, rows.plans, sharding, world, some_tables=True)


def start_rows_anew(
    plan: TablePlan,
    row_ids: NDArray[np.int64],
    tables: EmbeddingTables,
    sharding: ShardingConfig,
    seed: int,
    world: World,
) -> None:
    """Give rows the values and the optimizer state that they have in a new run.

    Args:
        plan: Of the table.
        row_ids: Any rows, (n,), each once; those of other ranks are passed over.
        tables: Of this rank.
        sharding: The section [sharding].
        seed: Of the run.
        world: This rank.
    """
    given = torch.from_numpy(row_ids)
    own = given[plan.is_held(given, world.rank, world.world_size)]
    scale = sharding.init_scale
    weights = initial_rows(plan.name, own.numpy(), plan.embedding_dim, seed, scale)
    state = torch.zeros(len(own), state_width(sharding.optimizer, plan.embedding_dim))
    tables.load_rows(plan.name, own, torch.from_numpy(weights), state)


def load_dense_where_it_fits(
    path: Path, saved: CheckpointManifest, model: nn.Module, leave: Iterable[str] = ()
) -> tuple[str, ...]:
    """Fill parameters and buffers that the checkpoint has in the same shape and type.

    Averaged weights come in the place of those that they are the average of.

    Args:
        path: The checkpoint's directory.
        saved: Its manifest.
        model: The dense part.
        leave: Beginnings of names of parameters that mean something else now.

    Returns:
        Names of what stays as it is.
    """
    tensors = open_tensors(path / saved.dense.path, None)
    left, leave = [], tuple(leave)
    with torch.no_grad():
        for name, own in model_tensors(model).items():
            _, _, parameter = name.partition("/")
            stored = scored(tensors, name) if name in tensors else None
            fits = stored is not None and (stored.shape, stored.dtype) == (own.shape, own.dtype)
            if stored is None or not fits or parameter.startswith(leave):
                left.append(parameter)
                continue
            own.copy_(stored)
    return tuple(left)
