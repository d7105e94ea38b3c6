"""What a rank needs in memory, part by part; pure arithmetic over counts.

The tables are exact. The constant of the frameworks is measured (FRAMEWORK_BYTES). Buffers follow
from what is held at one time in the look-up, the forward and the backward pass, in numbers a row;
they are upper bounds for CPU ranks, good to a few tens of MiB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from distrec.config import Config
from distrec.dataset import DatasetManifest
from distrec.planner.lookups import StepLookups
from distrec.sharding.plan import TablePlan

MIB = 2**20
FRAMEWORK_BYTES = 420 * MIB
"""What a CPU rank needs whatever it trains: what is left of measured peaks (benchmarks/memory.py)
without the other parts. 315 MiB are resident once the libraries are loaded; kernels loaded at their
first use, the threads' heaps and the exchange's buffers make up the rest. Python 3.11, torch 2.13
(CPU), Horovod 0.28.1, pyarrow 14, petastorm 0.12.1, Linux x86-64. A GPU build needs more on the
host, FBGEMM among the rest."""

_FLOAT = 4
_INTEGER = 8
# copies of a looked-up row at one time: the kernel's answer, what was received, the same after the
# row of zeros, its gradient, the gradient as received by the owner
_ROW_COPIES = 5
# the gradient of a replicated table, its sum over the ranks, and the look-up that updates it
_REPLICATED_COPIES = 3
# quotients and remainders apart, their product, and the gradients of all of them
_PRODUCT_COPIES = 4
# an activation, its gradient, and what autograd keeps of the operation
_ACTIVATION_COPIES = 3
# a tower's vector by itself, scaled for its loss, and its gradient
_OWN_VECTOR_COPIES = 2
# logits, their logarithm of the softmax, its gradient
_LOGIT_COPIES = 3
_SCORES_PER_BLOCK_BYTES = 64 * MIB
_OPTIMIZER_STATE = {"adamw": 2, "adam": 2, "sgd": 0}


@dataclass(frozen=True)
class ModelSize:
    """Sizes of the dense part.

    Args:
        num_parameters: All of them.
        vector_width: Of a user's or an item's vector.
        activation_width: Numbers that one user or item leaves in the layers, hidden ones included.
        attention_width: Numbers that a pair of events leaves in the sequence tower.
    """

    num_parameters: int
    vector_width: int
    activation_width: int
    attention_width: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by what they are for.

    Args:
        framework: Libraries, see FRAMEWORK_BYTES.
        table_weights: Rows of the embedding tables.
        table_state: Their optimizer's state.
        dense: Parameters, gradients, optimizer state and average of the dense part.
        catalogue: Items with their features.
        reader: Decoded rows: cache, blocks and batches made ahead.
        buffers: The most that a step or a validation holds for a moment.
    """

    framework: int
    table_weights: int
    table_state: int
    dense: int
    catalogue: int
    reader: int
    buffers: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


def rank_memory(
    config: Config,
    manifest: DatasetManifest,
    plans: Sequence[TablePlan],
    lookups: StepLookups,
    model: ModelSize,
    row_bytes: float,
    rank: int,
    world_size: int,
) -> Memory:
    """Peak memory of one rank in training.

    Args:
        config: Of the run.
        manifest: Of the dataset.
        plans: Of its tables.
        lookups: Of a step.
        model: Of the dense part.
        row_bytes: Of a decoded row of train.
        rank: Which one.
        world_size: N.
    """
    held = {plan.name: plan.num_held(rank, world_size) for plan in plans}
    copies = 2 + _OPTIMIZER_STATE[config.train.optimizer] + (config.train.average_decay > 0)
    buffers = max(
        step_buffers(plans, lookups, model, config.loss.towers > 0, world_size),
        validation_buffers(config, manifest, model),
    )
    return Memory(
        framework=FRAMEWORK_BYTES,
        table_weights=sum(held[plan.name] * plan.weight_bytes_per_row for plan in plans),
        table_state=sum(held[plan.name] * plan.state_bytes_per_row for plan in plans),
        dense=copies * model.num_parameters * _FLOAT,
        catalogue=_catalogue(manifest),
        reader=round(_reader(config, manifest, lookups, row_bytes, world_size)),
        buffers=round(buffers),
    )


def step_buffers(
    plans: Sequence[TablePlan],
    lookups: StepLookups,
    model: ModelSize,
    trains_towers: bool,
    world_size: int,
) -> float:
    """Bytes that a training step holds for a moment; with loss.towers, if `trains_towers`."""
    total = 0.0
    for plan in plans:
        table = lookups.tables[plan.name]
        row = plan.embedding_dim * _FLOAT
        copied = plan.hot_on(world_size)
        if plan.placement == "replicated" and world_size > 1:
            copied = plan.num_embeddings
        total += copied * (_REPLICATED_COPIES * row + 2 * _INTEGER)
        total += table.rows.expected() * _ROW_COPIES * row
        if plan.composition is not None and plan.composition.operation == "product":
            total += table.num_ids * row * _PRODUCT_COPIES
        # its key, its place and their sort
        total += table.num_ids * 4 * _INTEGER
    encoded = lookups.num_targets + lookups.num_candidates
    layers = encoded + lookups.num_views
    total += layers * model.activation_width * _FLOAT * _ACTIVATION_COPIES
    # brought to a width that multiplies faster, for one loss at a time
    total += encoded * model.vector_width * _FLOAT
    if trains_towers:
        total += encoded * model.vector_width * _FLOAT * _OWN_VECTOR_COPIES
    total += lookups.num_pairs * model.attention_width * _FLOAT
    return total + lookups.num_logits * _FLOAT * _LOGIT_COPIES


def validation_buffers(config: Config, manifest: DatasetManifest, model: ModelSize) -> float:
    """Bytes that a validation holds for a moment."""
    vectors = manifest.num_items * model.vector_width * _FLOAT
    block = min(config.score.item_block, manifest.num_items)
    encoding = block * model.activation_width * _FLOAT
    scores = min(config.evaluate.batch_size * manifest.num_items * _FLOAT, _SCORES_PER_BLOCK_BYTES)
    # the blocks and the catalogue that they are joined to; scores, what is masked, what is chosen
    return vectors + max(vectors, encoding, 3 * scores)


def _catalogue(manifest: DatasetManifest) -> int:
    item = 2 * _INTEGER + manifest.num_dense("item") * _FLOAT
    # a value and its offset; text and tags have a few
    item += sum(
        (2 if feature.kind == "categorical" else 5) * _INTEGER
        for feature in manifest.features_of("item")
        if not feature.is_dense
    )
    # as it was read, and what the loss chooses from; and the sampler's weights
    return manifest.num_items * (2 * item + 2 * _INTEGER)


def _reader(
    config: Config,
    manifest: DatasetManifest,
    lookups: StepLookups,
    row_bytes: float,
    world_size: int,
) -> float:
    rows = manifest.splits["train"].num_rows / world_size
    cached = min(config.reader.cache_mib * MIB, rows * row_bytes)
    ahead = (config.reader.prefetch_batches + 2) * lookups.num_examples * row_bytes
    return cached + ahead


def parts_of(memory: Memory) -> Mapping[str, int]:
    """The parts by name, the total last."""
    return {**asdict(memory), "total": memory.total}
