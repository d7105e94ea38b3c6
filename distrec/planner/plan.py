"""From a configuration and its dataset to what each rank will hold and send."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from distrec import columns
from distrec.config import Config
from distrec.dataset import DatasetManifest, read_manifest
from distrec.errors import ConfigError, DataError
from distrec.model import ModelSpec, UnifiedModel
from distrec.planner.dataset import Sample, read_catalogue, read_sample
from distrec.planner.lookups import StepLookups, step_lookups
from distrec.planner.memory import Memory, ModelSize, rank_memory
from distrec.sharding import sizing
from distrec.sharding.plan import TablePlan, has_chosen_hot_rows, plan_tables
from distrec.sharding.sizing import RowChances, TableCost, Wire

# beyond this many, more ranks are no answer
MOST_RANKS = 2**14


@dataclass(frozen=True)
class TableReport:
    """One table.

    Args:
        plan: Where it lies.
        num_bytes: Weights and optimizer state on all ranks together.
        num_ids: Expected look-ups a rank and step, repeated ids counted.
        cost: Expected bytes a step, and distinct rows on a rank.
        best_hot_rows: H with which the network would see the fewest bytes of it.
    """

    plan: TablePlan
    num_bytes: int
    num_ids: float
    cost: TableCost
    best_hot_rows: int


@dataclass(frozen=True)
class RankReport:
    """One rank.

    Args:
        memory: By part.
        sent_bytes: A step for the tables, as EmbeddingTables.exchanged_bytes counts them.
        network_bytes: A step on the wire: the same with sums as rings send them, and the gradients
            of the dense part.
        share: Of the rows that all ranks serve, by bytes.
    """

    memory: Memory
    sent_bytes: float
    network_bytes: float
    share: float


@dataclass(frozen=True)
class Report:
    """What a run will cost.

    Args:
        name: Of the run.
        world_size: N.
        examples_per_rank: Of a full step.
        tables: In the model's order.
        ranks: In order.
        table_network_bytes: Of the tables, a rank and step, on average.
        best_network_bytes: The same with TableReport.best_hot_rows in place of the plan's.
        fewest_ranks: That fit the memory: 0 when no number does, None when none was given.
        most_ranks: That the tables and the reader can be dealt to.
        memory_per_rank: What was given, in bytes.
        bandwidth: What was given, in bytes a second.
    """

    name: str
    world_size: int
    examples_per_rank: float
    tables: tuple[TableReport, ...]
    ranks: tuple[RankReport, ...]
    table_network_bytes: float
    best_network_bytes: float
    fewest_ranks: int | None
    most_ranks: int
    memory_per_rank: int | None
    bandwidth: float | None


def plan_run(
    config: Config,
    world_size: int,
    memory_per_rank: int | None = None,
    bandwidth: float | None = None,
) -> Report:
    """Read the dataset of a run and size its training.

    Args:
        config: Of the run, whose dataset is prepared.
        world_size: N.
        memory_per_rank: Bytes.
        bandwidth: Bytes a second that a rank can send.

    Raises:
        ConfigError: N is not positive, or a table cannot lie as the configuration says.
        DataError: The dataset is not there or not whole.
    """
    if world_size < 1:
        raise ConfigError(f"--ranks is at least 1. Received: {world_size}.")
    sizer = Sizer(config, world_size)
    plans = sizer.plans(world_size)
    lookups = sizer.lookups(world_size)
    rows = {name: table.rows for name, table in lookups.tables.items()}
    precision = config.sharding.exchange_precision
    wire = sizing.wire_of(plans, world_size, precision)
    costs = step_costs(plans, rows, world_size, wire)
    tables = tuple(
        TableReport(
            plan=plan,
            num_bytes=sum(plan.bytes_on(rank, world_size) for rank in range(world_size)),
            num_ids=lookups.tables[plan.name].num_ids,
            cost=costs[plan.name],
            best_hot_rows=sizing.best_hot_rows(plan, rows[plan.name], world_size, wire),
        )
        for plan in plans
    )
    best = [replace(entry.plan, hot_rows=entry.best_hot_rows) for entry in tables]
    return Report(
        name=config.name,
        world_size=world_size,
        examples_per_rank=lookups.num_examples,
        tables=tables,
        ranks=_ranks(sizer, plans, costs, world_size),
        table_network_bytes=_network_bytes(costs),
        best_network_bytes=_network_bytes(step_costs(best, rows, world_size, wire)),
        fewest_ranks=None if memory_per_rank is None else sizer.fewest_ranks(memory_per_rank),
        most_ranks=sizer.most_ranks,
        memory_per_rank=memory_per_rank,
        bandwidth=bandwidth,
    )


def _network_bytes(costs: Mapping[str, TableCost]) -> float:
    return sum(float(cost.network_bytes.mean()) for cost in costs.values())


def _table_bytes(
    plans: Sequence[TablePlan], rows: Mapping[str, RowChances], world_size: int, wire: Wire
) -> float:
    """Bytes a rank and step that the network sees for the tables, headers included."""
    headers = sizing.header_bytes(plans, world_size)
    return headers + _network_bytes(step_costs(plans, rows, world_size, wire))


def _ranks(
    sizer: Sizer, plans: Sequence[TablePlan], costs: dict[str, TableCost], world_size: int
) -> tuple[RankReport, ...]:
    headers = float(sizing.header_bytes(plans, world_size))
    sent = np.full(world_size, headers)
    wire = np.full(world_size, headers)
    for cost in costs.values():
        sent += cost.sent_bytes
        wire += cost.network_bytes
    dense = sizer.model.num_parameters * sizing.NUMBER_BYTES
    wire += sizing.wire_bytes_of_allreduce(dense, world_size)
    shares = sizing.shares(costs, world_size)
    return tuple(
        RankReport(sizer.memory(rank, world_size), sent[rank], wire[rank], shares[rank])
        for rank in range(world_size)
    )


def step_costs(
    plans: Sequence[TablePlan], rows: Mapping[str, RowChances], world_size: int, wire: Wire
) -> dict[str, TableCost]:
    """What each table costs a step, those of one width choosing together how hot rows travel."""
    gathering = sizing.gathering_widths(plans, rows, world_size, wire)
    return {
        plan.name: sizing.table_cost(
            plan, rows[plan.name], world_size, wire, plan.embedding_dim in gathering
        )
        for plan in plans
    }


class Sizer:
    """Sizes one run for any number of ranks, having read its dataset once.

    Args:
        config: Of the run.
        least_ranks: The fewest ranks that will be asked for, apart from `fewest_ranks`.

    Attributes:
        model: Sizes of the dense part.
    """

    def __init__(self, config: Config, least_ranks: int = 1) -> None:
        self.config = config
        self.manifest = read_manifest(config.dataset_directory)
        self._num_rows = _train_rows(config, self.manifest)
        spec = ModelSpec.from_manifest(self.manifest)
        with torch.device("meta"):
            self._module = UnifiedModel(spec, config.model)
        self._specs = self._module.table_specs()
        self.model = model_size(self._module)
        self._sample = self._read(self._batch_rows(least_ranks))
        self._lookups: dict[int, StepLookups] = {}
        self._hot_rows: dict[int, Mapping[str, int]] = {}

    def plans(self, world_size: int) -> tuple[TablePlan, ...]:
        """As training plans."""
        return self._plans(world_size, self.hot_rows(world_size))

    def hot_rows(self, world_size: int) -> Mapping[str, int]:
        """H of the tables whose H is "auto": with it, the network is expected to see fewer bytes.

        Tables of one width gain or lose together: in one step the hot rows of all are summed, or
        those of all are sent where they were used.
        """
        if world_size not in self._hot_rows:
            self._hot_rows[world_size] = self._find_hot_rows(world_size)
        return self._hot_rows[world_size]

    def _find_hot_rows(self, world_size: int) -> Mapping[str, int]:
        sharding = self.config.sharding
        plain = self._plans(world_size, {})
        wanted = [plan for plan in plain if has_chosen_hot_rows(plan.name, sharding)]
        chosen: Mapping[str, int] = {}
        if world_size == 1 or not wanted:
            return chosen
        rows = {name: table.rows for name, table in self.lookups(world_size).tables.items()}
        wire = sizing.wire_of(plain, world_size, sharding.exchange_precision)

        def cost(hot_rows: Mapping[str, int]) -> float:
            return _table_bytes(self._plans(world_size, hot_rows), rows, world_size, wire)

        for width in sorted({plan.embedding_dim for plan in wanted}):
            best = {
                plan.name: sizing.best_hot_rows(plan, rows[plan.name], world_size, wire)
                for plan in wanted
                if plan.embedding_dim == width
            }
            chosen = min(chosen, {**chosen, **best}, key=cost)
        return {name: number for name, number in chosen.items() if number}

    def _plans(self, world_size: int, hot_rows: Mapping[str, int]) -> tuple[TablePlan, ...]:
        return plan_tables(self._specs, self.config.sharding, world_size, hot_rows)

    def lookups(self, world_size: int) -> StepLookups:
        """Of one rank in a full step."""
        if world_size not in self._lookups:
            rows = self._batch_rows(world_size)
            if self._sample.batch.batch_size < rows:
                self._sample = self._read(rows)
            torch.manual_seed(self.config.seed)
            directory = self.config.dataset_directory
            self._lookups[world_size] = step_lookups(
                self._module, self._plans(world_size, {}), self.config.loss, self._sample,
                lambda: read_catalogue(directory, self.manifest), self._num_rows, rows,
                self.manifest.train_rows, world_size,
            )  # fmt: skip
        return self._lookups[world_size]

    def memory(self, rank: int, world_size: int) -> Memory:
        """Of one rank."""
        return rank_memory(
            self.config, self.manifest, self.plans(world_size), self.lookups(world_size),
            self.model, self._sample.row_bytes, rank, world_size,
        )  # fmt: skip

    def fewest_ranks(self, memory_per_rank: int) -> int:
        """The least number of ranks of which each fits; 0 when up to `most_ranks` do not."""
        most = 1
        while not self._fits(most, memory_per_rank):
            if most == self.most_ranks:
                return 0
            most = min(2 * most, self.most_ranks)
        least = 1
        while least < most:
            middle = (least + most) // 2
            if self._fits(middle, memory_per_rank):
                most = middle
            else:
                least = middle + 1
        return most

    @property
    def most_ranks(self) -> int:
        """More than these have no plan: a spread table has a row a rank, a rank a lane to read."""
        sharding, lanes = self.config.sharding, self.config.reader.lanes
        spread = [
            plan.num_embeddings
            for plan in self._plans(1, {})
            if sharding.tables.get(plan.name, sharding.placement) == "row_wise"
        ]
        return min([MOST_RANKS, *spread, *([lanes] if lanes else [])])

    def _fits(self, world_size: int, memory_per_rank: int) -> bool:
        # rank 0 has a row more than the others where the rows do not come out even
        return self.memory(0, world_size).total <= memory_per_rank

    def _batch_rows(self, world_size: int) -> float:
        return min(self.config.train.global_batch_size, self._num_rows) / world_size

    def _read(self, batch_rows: float) -> Sample:
        return read_sample(self.config.dataset_directory, self.manifest, int(np.ceil(batch_rows)))


def _train_rows(config: Config, manifest: DatasetManifest) -> int:
    rows = manifest.splits[columns.TRAIN].num_rows if columns.TRAIN in manifest.splits else 0
    if rows == 0:
        raise DataError(
            f"a plan needs rows in train. Received: none ({config.dataset_directory}). Loosen the "
            "filters of [prepare]."
        )
    return rows


def model_size(model: UnifiedModel) -> ModelSize:
    """Sizes of the dense part; its weights may be on the meta device."""
    widths = sum(module.out_features for module in model.modules() if isinstance(module, nn.Linear))
    # user and item side are about half of the layers each; rows that come in, vectors that go out
    rows = sum(spec.embedding_dim for spec in model.table_specs())
    heads, layers = model.config.sequence_heads, model.config.sequence_layers
    # hstu keeps them before and after its activation
    of_layer = heads * (3 if model.config.sequence_attention == "hstu" else 1)
    return ModelSize(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        vector_width=model.vector_width,
        activation_width=widths // 2 + rows // 2 + 2 * model.vector_width,
        # the layers' weights, and once the bias and a place, of twice the size, in its table
        attention_width=layers * of_layer + heads + 2,
    )
