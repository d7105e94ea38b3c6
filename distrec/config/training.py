"""Sections of train: reader, tables, loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from distrec.config.section import Section


class ReaderConfig(Section):
    """Parquet to batches."""

    lanes: int = Field(default=0, ge=0, le=1_000_000)
    """An epoch is cut into this many equal lanes, dealt over the ranks; a global batch takes the
    same number of rows from each, so that it is the same on any number of ranks. 0: 12 when
    world_size divides 12, else world_size."""
    shuffle: bool = True
    """Another order every epoch, a pure function of the seed and the epoch."""
    prefetch_batches: int = Field(default=4, ge=1, le=10_000)
    """Batches made ready in the background."""
    cache_mib: int = Field(default=256, ge=0)
    """Decoded row groups kept in memory by each rank; small datasets are then read once."""
    verify: Literal["size", "sampled", "sha256"] = "sampled"
    """What train, evaluate and score compare with the dataset's manifest before they begin, beside
    the size of every file. sampled: the SHA-256 of one file in ten, at least one of each split, on
    every rank others. sha256: of every file, shared out over the ranks. size: nothing more."""


class CompressionConfig(Section):
    """An embedding table with fewer rows than ids: the vector of an id is composed of rows that it
    shares with others."""

    method: Literal["hash", "quotient_remainder"]
    """hash: the sum of num_hashes rows, found by as many hash functions; two ids rarely share all.
    quotient_remainder: of the row of id div num_buckets and that of id mod num_buckets; no two ids
    share both."""
    num_buckets: int = Field(ge=1)
    """Rows that ids are hashed to; or the number that ids are divided by, of which the root of the
    number of ids makes the smallest table."""
    num_hashes: int = Field(default=2, ge=1, le=8)
    """hash: rows an id."""
    operation: Literal["sum", "product"] = "sum"
    """quotient_remainder: q + r, or number by number q * (1 + r)."""
    own_rows: int = Field(default=0, ge=0)
    """The so many most frequent values keep a row each, as padding and unknown always do."""

    @model_validator(mode="after")
    def _of_method(self) -> CompressionConfig:
        for key, method in (("num_hashes", "hash"), ("operation", "quotient_remainder")):
            value = getattr(self, key)
            if value != type(self).model_fields[key].default and self.method != method:
                raise ValueError(
                    f"{key} is for method = {method!r}. Received: {key} = {value!r} with method = "
                    f"{self.method!r}. Remove it, or change method"
                )
        return self


class ShardingConfig(Section):
    """Embedding tables over the ranks."""

    placement: Literal["auto", "row_wise", "replicated"] = "auto"
    """auto: tables up to replicate_below_mib are on every rank, the others are spread by row."""
    replicate_below_mib: float = Field(default=1.0, ge=0)
    """Size of the weights, in MiB, up to which auto replicates a table."""
    tables: Mapping[str, Literal["row_wise", "replicated"]] = {}
    """Placement of single tables, by name; goes before `placement`."""
    hot_rows: Literal["auto"] | Mapping[str, int | Literal["auto"]] = {}
    """Table -> H: its rows [0, H), the most frequent ids, are on every rank as well, and only the
    others travel. A table with H at or above its rows is replicated; no effect on a replicated
    table or on one rank. "auto", for a table or in place of them all: the H of `distrec plan`,
    found again from the frequencies for each number of ranks. It saves row numbers only, 0.1 % of
    the bytes on Zipf ids, and a step takes as long or longer (benchmarks/hot_tier.py); so
    no table has one unless asked."""
    compress: Mapping[str, CompressionConfig] = {}
    """Table -> how its ids share rows; the others have a row an id."""
    exchange_precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of rows and row gradients on their way between ranks; sums are fp32. fp16: rows within a
    factor of 1 +- 2^-11 (below 2^-14 within 2^-25, beyond 65504 infinite, which stops the run),
    each number of a gradient within 2^-11 of the largest of its row. bf16: both within a factor of
    1 +- 2^-8. Replicated rows and dense sums stay fp32."""
    prefetch_ids: bool = True
    """Send the row numbers of the next batch while this one is computed. Exact. On, as a step of
    two ranks takes 0.94 of the time; see benchmarks/exchange.py."""
    prefetch_rows: bool = False
    """Send the rows of the next batch, too, before this one has updated them: not exact. A step
    computes with the rows of one update ago, and updates the present ones. The first step of an
    epoch and those after a validation or a checkpoint have present rows. The same on any number of
    ranks, bit-equal when resumed. Off, as it is not exact; benchmarks/exchange.py measures it."""
    optimizer: Literal["rowwise_adagrad", "adagrad", "sgd"] = "rowwise_adagrad"
    """Fused into the backward pass, exact: rows used twice in a batch are updated once."""
    learning_rate: float = Field(default=0.1, gt=0)
    """Of the embedding tables; scheduled like the dense one."""
    eps: float = Field(default=1e-8, gt=0)
    """Adagrad: added to the root of the accumulated squares."""
    init_scale: float = Field(default=0.05, gt=0)
    """Rows start uniform in [-init_scale, init_scale], a pure function of seed, table and row."""
    precision: Literal["fp32", "fp16"] = "fp32"
    """Of the weights; optimizer state is fp32. fp16 halves them; on CPU, which does not round at
    random, an update below half a unit of a number's last place is lost. There is no bf16: of
    its 8 bits an update would have to reach one in 256 to count, and FBGEMM 1.8 has no such rows
    on CPU to test the GPU's against."""
    cpu_offload: bool = False
    """GPU: keep tables in host memory with a cache on the device (FBGEMM's UVM caching)."""

    @field_validator("hot_rows", mode="before")
    @classmethod
    def _hot_rows(cls, value: Any) -> Any:
        # one message in place of one for each type that it might have been
        by_table = value if isinstance(value, Mapping) else {"every table": value}
        numbers = [one for one in by_table.values() if one != "auto"]
        if not numbers or (by_table is value and all(type(n) is int and n >= 0 for n in numbers)):
            return value
        raise ValueError(
            'hot_rows is "auto", or for each table "auto" or a number of rows from 0 on. Received: '
            f"{value!r}"
        )


class TrainConfig(Section):
    """The loop."""

    global_batch_size: int = Field(default=2048, ge=1, le=2**31 - 1)
    """Examples a step over all ranks: what is computed does not change with their number."""
    max_epochs: int = Field(default=20, ge=1)
    """Passes over train."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many steps."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """Of the dense part."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Of the dense part, at its highest."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Of the dense part (L2)."""
    average_decay: float = Field(default=0.0, ge=0, lt=1)
    """Validate and score with a moving average of the dense weights, of which each step keeps so
    much, such as 0.999 (in the first steps less); rows of tables stay as they are. 0: with the
    weights of the last step."""
    warmup_steps: int = Field(default=100, ge=0)
    """Steps over which both learning rates rise from 0."""
    decay: Literal["none", "linear", "cosine"] = "cosine"
    """After the warm-up, down to min_learning_rate_share at the last step."""
    min_learning_rate_share: float = Field(default=0.05, ge=0, le=1)
    """Where the decay ends, as a share of the highest rate."""
    gradient_clip: float = Field(default=5.0, ge=0)
    """Largest norm of the dense gradients; 0 for no clipping. Embedding rows are updated inside the
    backward pass and are not clipped."""
    evaluate_every_steps: int = Field(default=0, ge=0)
    """Validate this often; 0: once an epoch."""
    early_stopping_patience: int = Field(default=3, ge=0)
    """Validations without an improvement after which training stops; 0: never."""
    fit_tower_weights: bool = True
    """Whether each validation of lists fits how much each tower, and the item's bias, counts
    outside training, model.new_item_bias and model.recent_weight, by cross-entropy on valid: T + 3
    numbers, kept unless `metric` is worse with them than with those of [model] by half a standard
    error or more. A tower that learns train by heart is trusted too much by the gate, which learns
    from train alone. Not with labels, ratings or [privacy]; without valid, those of [model] or of a
    warm start stay."""
    metric: str = "ndcg@10"
    """Validation metric that is maximised (auc and ranking metrics) or minimised (log_loss, rmse,
    mae); with model.multi_task also auc:<task> and log_loss:<task>."""
    checkpoint_every_steps: int = Field(default=0, ge=0)
    """Save this often; 0: at every validation."""
    full_checkpoint_every: int = Field(default=1, ge=1)
    """Of so many checkpoints in a row only the first holds every row of the tables; the others are
    deltas: rows touched since it. 1: all are full. A delta is read with the full one beside it,
    which is kept as long; both together are bit-equal to a full one."""
    on_bad_loss: Literal["stop", "skip"] = "stop"
    """When the loss of a step is not finite on any rank, or above bad_loss_above: stop training, or
    leave the step out on all ranks. Either way the batch is kept in bad_batches/ of the run, as
    Parquet. Gradients that are not finite stop training: rows have been updated by then."""
    bad_loss_above: float | None = Field(default=None, gt=0)
    """Mean loss of a step above which it has exploded; not given: none is too large."""
    max_skipped_steps: int = Field(default=10, ge=0)
    """skip: steps of a run that may be left out; one more stops it."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints kept, beside the best one."""
    keep_earlier_runs: int = Field(default=3, ge=0)
    """A run with another configuration or dataset moves the checkpoints that it finds to
    checkpoints-before-N. So many of these directories are kept, those moved last, and the one that
    warm_start reads; 0: they are deleted at once."""
    log_every_steps: int = Field(default=10, ge=1)
    """Steps between two lines of progress."""
    warm_start: str | None = Field(default=None, min_length=1)
    """A checkpoint, or another run's directory of checkpoints (its best one, else its newest), from
    which a new run takes its weights. The vocabularies of that run's dataset are those of this
    one, or this one extends it (prepare.extend). Steps count from 0, the dense optimizer is new."""
    predict_new_rows: bool = False
    """Whether rows of items and users that are new at a warm start begin as their features predict
    from the old ones, in place of as in a new run. For a model that is used before it is trained on
    them, and for frozen towers; after an epoch it was no better."""
    resume: bool = True
    """Go on from the newest checkpoint when it is of the same configuration and dataset."""
