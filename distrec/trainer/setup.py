"""Everything a run is made of, read and built before the first step, on every rank alike."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distrec import checkpoint, columns
from distrec.batch import ItemBatch
from distrec.checkpoint.together import together
from distrec.config import Config, section_hash
from distrec.dataset import DatasetManifest, read_manifest
from distrec.errors import ConfigError, DataError, TrainingError
from distrec.metrics.item_neighbors import similar_items
from distrec.model import RELATIVE, ModelSpec, Objective, UnifiedModel, resolve_loss_kind
from distrec.planner import Sizer
from distrec.private import Spending, UserReader, check_opacus
from distrec.reader import ExampleReader, check_files, read_items
from distrec.sharding.collectives import Collectives
from distrec.sharding.plan import TablePlan, TableSpec, has_chosen_hot_rows, plan_tables
from distrec.sharding.tables import EmbeddingTables
from distrec.trainer.average import WeightAverage
from distrec.trainer.identity import TRAINED_SECTIONS, resume_hash
from distrec.trainer.tracking import check_tracking
from distrec.trainer.validation import Validator, check_labels, check_metric

PLAN_LOG = "plan.json"
# of an item, of which one may stand in for it
_NUM_SIMILAR = 10
_MAX_SIMILAR_ITEMS = 200_000

logger = logging.getLogger("distrec.train")


@dataclass(frozen=True)
class Inputs:
    """What is read before anything is built.

    Args:
        config: Of the run.
        manifest: Of the dataset.
        items: The whole catalogue.
        spec: Sizes of the model.
        plans: Where the tables lie.
        identity: What all checkpoints of this run share.
    """

    config: Config
    manifest: DatasetManifest
    items: ItemBatch
    spec: ModelSpec
    plans: tuple[TablePlan, ...]
    identity: checkpoint.Identity


@dataclass(frozen=True)
class Run:
    """What trains.

    Args:
        inputs: What was read.
        collectives: Of the job.
        model: The dense part, on the device.
        tables: The embedding tables.
        optimizer: Of the dense part, summing gradients over ranks.
        objective: The loss.
        reader: Of the train split.
        validator: Measures on the valid split.
        total_steps: Of the whole run.
        average: Of the dense weights, with train.average_decay.
        spending: Of private training.
    """

    inputs: Inputs
    collectives: Collectives
    model: UnifiedModel
    tables: EmbeddingTables
    optimizer: torch.optim.Optimizer
    objective: Objective
    reader: ExampleReader | UserReader
    validator: Validator
    total_steps: int
    average: WeightAverage | None = None
    spending: Spending | None = None

    @property
    def config(self) -> Config:
        """Of the run."""
        return self.inputs.config

    @property
    def parts(self) -> checkpoint.Parts:
        """What a checkpoint holds."""
        return checkpoint.Parts(
            self.model, self.optimizer, self.tables, self.inputs.plans, self.config.sharding,
            None if self.average is None else self.average.tensors,
        )  # fmt: skip

    def averaged(self) -> AbstractContextManager[None]:
        """The model is what it is validated and scored as, inside."""
        return nullcontext() if self.average is None else self.average.applied()


def read_inputs(config: Config, world_size: int) -> Inputs:
    """Read the dataset's manifest and catalogue, and refuse what cannot work.

    Raises:
        ConfigError: The metric, the loss or a table cannot be had with this dataset, or MLflow or
            Opacus is wanted and not installed.
        DataError: The dataset is not whole, or has nothing to learn from.
    """
    check_tracking(config)
    if config.privacy is not None:
        check_opacus()
    manifest = read_manifest(config.dataset_directory)
    rows = manifest.splits[columns.TRAIN].num_rows if columns.TRAIN in manifest.splits else 0
    if rows == 0:
        raise DataError(
            f"training needs rows in train. Received: none ({config.dataset_directory}). Loosen "
            "the filters of [prepare]."
        )
    check_metric(config, manifest)
    check_labels(config, manifest)
    spec = ModelSpec.from_manifest(manifest)
    resolve_loss_kind(spec, config.loss)
    if "substitute" in config.model.augment and spec.num_items > _MAX_SIMILAR_ITEMS:
        raise ConfigError(
            f"model.augment substitutes among up to {_MAX_SIMILAR_ITEMS:,} items, for every pair "
            f"is compared. Received: {spec.num_items:,} items. Take substitute out of it."
        )
    return Inputs(
        config=config,
        manifest=manifest,
        items=read_items(config.dataset_directory, manifest),
        spec=spec,
        plans=plan_tables(_table_specs(spec, config), config.sharding, world_size),
        identity=_identity(config, manifest, spec),
    )


def _table_specs(spec: ModelSpec, config: Config) -> tuple[TableSpec, ...]:
    # on the meta device: the tables' sizes without the memory of the dense part
    with torch.device("meta"):
        return UnifiedModel(spec, config.model).table_specs()


def check_dataset(inputs: Inputs, collectives: Collectives) -> None:
    """Compare the dataset's files with its manifest, as reader.verify says. Collective.

    Raises:
        DataError: On every rank, with the file that is missing or damaged.
    """
    config = inputs.config
    together(
        "train.files",
        lambda: check_files(
            config.dataset_directory, inputs.manifest, config.reader.verify, collectives.world
        ),
        collectives,
    )


def choose_hot_rows(inputs: Inputs, collectives: Collectives) -> Inputs:
    """Put the planner's H where sharding.hot_rows is "auto". Collective.

    Rank 0 finds them for all, so that no rounding of another machine gives another plan.

    Raises:
        DistrecError: On every rank, when rank 0 cannot read what it needs.
    """
    config, world = inputs.config, collectives.world
    if world.world_size == 1 or not any(
        has_chosen_hot_rows(plan.name, config.sharding) for plan in inputs.plans
    ):
        return inputs

    def find() -> Mapping[str, int]:
        return Sizer(config, world.world_size).hot_rows(world.world_size) if world.is_first else {}

    found = together("train.hot_rows", find, collectives)
    chosen = collectives.broadcast_object(found, "train.hot_rows.chosen")
    if world.is_first:
        tables = ", ".join(f"{name} {number}" for name, number in chosen.items())
        logger.info("rows that every rank keeps: %s", tables or "none would send fewer bytes")
    specs = _table_specs(inputs.spec, config)
    plans = plan_tables(specs, config.sharding, world.world_size, chosen)
    return replace(inputs, plans=plans)


def _identity(config: Config, manifest: DatasetManifest, spec: ModelSpec) -> checkpoint.Identity:
    dumped = config.model_dump(mode="json")
    return checkpoint.Identity(
        seed=config.seed,
        config={name: dumped[name] for name in TRAINED_SECTIONS},
        config_hash=resume_hash(config),
        dataset_hash=manifest.content_hash,
        vocabularies={name: entry.sha256 for name, entry in manifest.vocabularies.items()},
        model_spec=spec,
    )


def check_agreement(inputs: Inputs, collectives: Collectives) -> None:
    """Refuse to start when the ranks read different configurations or datasets.

    Collective; the first thing that ranks exchange after reading.

    Raises:
        TrainingError: On every rank, with what differs and where.
    """
    config = inputs.config
    own = {"the dataset": inputs.identity.dataset_hash}
    own |= {f"[{name}]": section_hash(config, name) for name in type(config).model_fields}
    every = collectives.gather_objects(own, "train.agreement")
    for name in own:
        values = [answer.get(name) for answer in every]
        differing = [rank for rank, value in enumerate(values) if value != values[0]]
        if differing:
            raise TrainingError(
                "all ranks train with the same configuration on the same dataset. Received: "
                f"{name} of ranks {differing} differs from rank 0's. Start every rank with the "
                "same files and the same --set."
            )


def build(inputs: Inputs, collectives: Collectives, lanes: int | None) -> Run:
    """Make tables, model, optimizer, loss and reader; equal on all ranks, by the seed.

    Args:
        inputs: What was read.
        collectives: Of the job.
        lanes: Of the checkpoint that the run goes on from, if any.
    """
    config, manifest, device = inputs.config, inputs.manifest, collectives.device
    _check_memory(inputs, collectives)
    tables = EmbeddingTables(inputs.plans, collectives, config.sharding, config.seed, device)
    if config.train.full_checkpoint_every > 1:
        tables.track_touched_rows()
    torch.manual_seed(config.seed)
    model = UnifiedModel(inputs.spec, config.model).to(device)
    # where it cancels out, Adam would make large steps of rounding errors
    is_relative = resolve_loss_kind(inputs.spec, config.loss) in RELATIVE
    model.global_bias.requires_grad_(not is_relative)
    reader = ExampleReader(
        config.dataset_directory, manifest, columns.TRAIN, collectives.world, config.reader,
        config.train.global_batch_size, config.seed, lanes,
    )  # fmt: skip
    decay = config.train.average_decay
    total_steps = config.train.max_epochs * reader.steps_per_epoch
    if config.train.max_steps is not None:
        total_steps = min(total_steps, config.train.max_steps)
    return Run(
        inputs=inputs,
        collectives=collectives,
        model=model,
        tables=tables,
        optimizer=dense_optimizer(model, config),
        objective=Objective(
            model,
            inputs.items,
            config.loss,
            config.seed,
            manifest.train_rows,
            collectives,
            _similar_items(inputs),
            config.trains_without_seen,
        ),
        reader=reader,
        validator=Validator(config, manifest, inputs.items, collectives),
        total_steps=total_steps,
        average=WeightAverage(model, decay) if decay else None,
    )


def _similar_items(inputs: Inputs) -> Tensor | None:
    """What may stand in for each item, the same on every rank; None where that is not wanted."""
    if "substitute" not in inputs.config.model.augment:
        return None
    return similar_items(inputs.config.dataset_directory, inputs.manifest, _NUM_SIMILAR)


def _check_memory(inputs: Inputs, collectives: Collectives) -> None:
    """Refuse tables that no memory of this machine holds, before any is taken.

    Raises:
        ConfigError: With what they need and what there is.
    """
    world = collectives.world
    if collectives.device.type != "cpu":
        return
    needed = sum(plan.bytes_on(world.rank, world.world_size) for plan in inputs.plans)
    needed *= world.local_size
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ConfigError(
            "the tables of the ranks of one machine fit its memory. Received: "
            f"{needed / 2**30:,.1f} GiB of tables for {world.local_size} ranks, "
            f"{there / 2**30:,.1f} GiB of memory. Use more hosts, a smaller model.embedding_dim or "
            "sharding.compress; `distrec plan` sizes a run."
        )


def dense_optimizer(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimizer of the dense part; its learning rate is set at every step."""
    train = config.train
    kinds: dict[str, type[torch.optim.Optimizer]] = {
        "adamw": torch.optim.AdamW,
        "adam": torch.optim.Adam,
        "sgd": torch.optim.SGD,
    }
    settings = {"lr": train.learning_rate, "weight_decay": train.weight_decay}
    # those that are not trained as well: there may be no other, and a list must not be empty
    return kinds[train.optimizer](model.parameters(), **settings)  # type: ignore[arg-type]


def count_parameters(run: Run) -> dict[str, int]:
    """Numbers that the model has, and of these the ones that are trained."""
    dense, frozen = list(run.model.parameters()), run.model.frozen_tables
    rows = {plan.name: plan.num_embeddings * plan.embedding_dim for plan in run.inputs.plans}
    return {
        "dense": sum(one.numel() for one in dense),
        "dense_trained": sum(one.numel() for one in dense if one.requires_grad),
        "tables": sum(rows.values()),
        "tables_trained": sum(count for name, count in rows.items() if name not in frozen),
    }


def write_plan(run: Run, world_size: int) -> None:
    """Keep where each table lies, with its bytes on each rank, and how much is trained."""
    inputs, parameters = run.inputs, count_parameters(run)
    if run.model.config.frozen:
        trained = parameters["dense_trained"] + parameters["tables_trained"]
        number = parameters["dense"] + parameters["tables"]
        logger.info(
            "%d of %d numbers are trained (%.2f %%)", trained, number, 100 * trained / number
        )
    tables = [
        {
            "name": plan.name,
            "num_embeddings": plan.num_embeddings,
            "embedding_dim": plan.embedding_dim,
            "placement": plan.placement,
            "hot_rows": plan.hot_on(world_size),
            "num_ids": plan.num_ids,
            "compression": None if plan.composition is None else plan.composition.method,
            "weight_bytes_by_rank": [
                plan.num_held(rank, world_size) * plan.weight_bytes_per_row
                for rank in range(world_size)
            ],
            "state_bytes_by_rank": [
                plan.num_held(rank, world_size) * plan.state_bytes_per_row
                for rank in range(world_size)
            ],
        }
        for plan in inputs.plans
    ]
    path = inputs.config.logs_directory / PLAN_LOG
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"world_size": world_size, "tables": tables, "parameters": parameters}, indent=1)
        + "\n"
    )
