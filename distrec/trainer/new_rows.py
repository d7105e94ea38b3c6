"""First values of the rows that a warm start finds new: what their features predict.

Over the old items, or users, a ridge regression maps features, as the model's tables encode them,
to the trained rows of each table, each old one counted by its events; it gives the new ones their
rows. So an item begins as the mean of its like in the towers, too, that do not read features.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distrec import columns, pulse
from distrec.batch import Jagged
from distrec.checkpoint.together import together
from distrec.metrics.evaluation import slice_items
from distrec.model import vocabulary_of
from distrec.model.features import FeatureEncoder, has_features
from distrec.reader import read_queries
from distrec.reader.plan import num_query_batches, query_range
from distrec.sharding.lookup import Request
from distrec.sharding.plan import TablePlan, state_width
from distrec.trainer.ridge import RidgeRegression
from distrec.trainer.setup import Run

logger = logging.getLogger("distrec.train")


@dataclass(frozen=True)
class _Block:
    """Some items, or users, with their features.

    Args:
        index: int64, (n,).
        num_events: int64, (n,).
        ids: Features that are ids, by dataset column.
        dense: float32, (n, num_dense).
    """

    index: Tensor
    num_events: Tensor
    ids: Mapping[str, Jagged]
    dense: Tensor

    def select(self, chosen: Tensor) -> _Block:
        """Those for which `chosen`, bool (n,), holds."""
        places = chosen.nonzero()[:, 0]
        bags = {name: one.select(places) for name, one in self.ids.items()}
        return _Block(self.index[places], self.num_events[places], bags, self.dense[places])

    def to(self, device: torch.device) -> _Block:
        """The same on `device`, but for num_events."""
        bags = {name: one.to(device) for name, one in self.ids.items()}
        return _Block(self.index.to(device), self.num_events, bags, self.dense.to(device))


@dataclass(frozen=True)
class _Side:
    """The items, or the users, and the tables with a row for each.

    Args:
        encoder: Of their features.
        plans: Of the tables, cut to the rows that the older checkpoint has.
        reused: Rows that stood for another value there, int64, (n,).
        blocks: This rank's share of them, equally many blocks on every rank, at each call.
    """

    encoder: FeatureEncoder
    plans: Sequence[TablePlan]
    reused: NDArray[np.int64]
    blocks: Callable[[], Iterator[_Block]]

    def is_new(self, index: Tensor) -> Tensor:
        """Whose rows have learned nothing: bool, (n,)."""
        is_reused = torch.isin(index, torch.from_numpy(self.reused))
        return (index >= self.plans[0].num_embeddings) | is_reused


def predict_new_rows(
    run: Run, plans: Sequence[TablePlan], reused: Mapping[str, NDArray[np.int64]]
) -> None:
    """Give the new rows of items and users that have features their first values.

    Collective. Old rows, and the optimizer state of all rows, stay as they are. Whoever has no
    features keeps the row of a new run, and so do tables whose rows are shared by ids.

    Args:
        run: With old rows loaded, and rows that are reused begun anew.
        plans: Of the tables, cut to the rows that the older checkpoint has.
        reused: Table -> rows that stood for another value there.

    Raises:
        DataError: On every rank: the dataset's users cannot be read.
    """
    for name, blocks in ((columns.ITEM_ID, _item_blocks), (columns.USER_ID, _user_blocks)):
        own = [plan for plan in plans if vocabulary_of(plan.name, run.inputs.spec) == name]
        own = [plan for plan in own if plan.composition is None]
        encoder = _encoder(run, name)
        if not own or encoder is None:
            continue
        side = _Side(encoder, own, reused[own[0].name], partial(blocks, run))
        num_rows = run.tables.table_plans[own[0].name].num_embeddings
        if num_rows > own[0].num_embeddings or len(side.reused):
            with torch.no_grad():
                _predict(run, side)


def _encoder(run: Run, vocabulary: str) -> FeatureEncoder | None:
    """Of the features of items or users; None where there are none, or no tables for them."""
    spec, width = run.inputs.spec, run.config.model.feature_dim
    # the numbers of context stand beside those of users; without an event they are zeros
    sides = ("item",) if vocabulary == columns.ITEM_ID else ("user", "context")
    if not spec.features_of(sides[0]):
        return None
    encoder = FeatureEncoder(spec.features_of(*sides), sides[0], width)
    known = run.tables.table_plans
    return encoder if all(table.name in known for table in encoder.table_specs()) else None


def _predict(run: Run, side: _Side) -> None:
    collectives, encoder = run.collectives, side.encoder
    widths = [plan.embedding_dim for plan in side.plans]
    regression = RidgeRegression(encoder.output_dim, sum(widths))
    for block in side.blocks():
        old = block.select(~side.is_new(block.index)).to(collectives.device)
        singles = Jagged.singles(old.index)
        targets = {plan.name: Request(plan.name, singles, "none") for plan in side.plans}
        found = run.tables({**encoder.requests(old.ids), **targets})
        outputs = torch.cat([found[name] for name in targets], dim=1)
        # what was seen often has learned more
        regression.add(encoder(found, old.dense), outputs, old.num_events)
    regression.sums = collectives.allreduce(regression.sums, "warm_start.sums")
    if regression.is_empty:
        return
    weights, constant = regression.solve()
    num_new = 0
    for block in side.blocks():
        new = block.select(side.is_new(block.index)).to(collectives.device)
        inputs = encoder(run.tables(encoder.requests(new.ids)), new.dense).cpu()
        # they may lie on another rank, or on all of them
        index = collectives.allgather(new.index, "warm_start.index").cpu()
        rows = torch.addmm(constant, inputs, weights).to(collectives.device)
        rows = collectives.allgather(rows, "warm_start.rows").cpu()
        num_new += len(index)
        for plan, part in zip(side.plans, rows.split(widths, dim=1), strict=True):
            _write(run, plan.name, index, part)
    names = ", ".join(plan.name for plan in side.plans)
    logger.info("tables %s: %d rows begin as their features predict", names, num_new)


def _write(run: Run, table: str, index: Tensor, rows: Tensor) -> None:
    """Write what of n rows this rank keeps."""
    world, plan = run.collectives.world, run.tables.table_plans[table]
    own = plan.is_held(index, world.rank, world.world_size)
    state = torch.zeros(
        int(own.sum()), state_width(run.config.sharding.optimizer, plan.embedding_dim)
    )
    run.tables.load_rows(table, index[own], rows[own], state)


def _item_blocks(run: Run) -> Iterator[_Block]:
    """Items that have a row and features."""
    world, items, size = run.collectives.world, run.inputs.items, run.config.score.item_block
    start, stop = query_range(world.rank, world.world_size, len(items.item_index))
    for number in range(num_query_batches(world.world_size, len(items.item_index), size)):
        pulse.beat()
        first = min(start + number * size, stop)
        part = slice_items(items, first, min(first + size, stop), torch.device("cpu"))
        has_row = ~part.is_free & (part.item_index < run.inputs.spec.num_trained_items)
        yield _with_features(_Block(part.item_index, part.count, part.ids, part.dense), has_row)


def _user_blocks(run: Run) -> Iterator[_Block]:
    """Users that have a row and features."""
    config, collectives = run.config, run.collectives
    queries = together(
        "warm_start.users",
        lambda: read_queries(
            config.dataset_directory, run.inputs.manifest, columns.USERS, collectives.world,
            config.evaluate.batch_size,
        ),
        collectives,
    )  # fmt: skip
    for one in queries:
        batch = one.batch
        has_row = batch.user_index >= columns.FIRST_INDEX
        block = _Block(batch.user_index, batch.num_events, batch.ids, batch.dense)
        yield _with_features(block, has_row)


def _with_features(block: _Block, has_row: Tensor) -> _Block:
    return block.select(has_row & (has_features(block.ids, block.dense)[:, 0] > 0))
