"""The configuration: one TOML file for every job, typed, refused as a whole before anything starts.

Each section is a frozen class; the text under a key is its documentation, from which
``docs/configuration.md`` is generated. A key that is left out has the default given here.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distrec import columns
from distrec.errors import ConfigError


class Section(BaseModel):
    """Base of every section: frozen, strict about types, no unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


# --- raw data ----------------------------------------------------------------------------------


class Source(Section):
    """Where raw rows are read from."""

    paths: tuple[str, ...] = Field(min_length=1)
    """Files, directories or glob patterns, on any file system that Spark reads."""
    format: Literal["csv", "json", "parquet"] = "csv"
    """csv (any separator), json (one object a line) or parquet. gzip is told by the ending .gz."""
    separator: str = Field(default=",", min_length=1)
    """csv: between two columns; several characters are allowed, such as "::"."""
    header: bool = True
    """csv: whether the first line of each file names the columns."""
    column_names: tuple[str, ...] = ()
    """csv without header: the names of the columns, left to right."""
    encoding: str = "UTF-8"
    """csv and json: of the text. Bytes that are not of this encoding go to rejects."""
    quote: str = Field(default='"', max_length=1)
    """csv: character around values that hold the separator; "" for none."""

    @model_validator(mode="after")
    def _names(self) -> Source:
        if self.format == "csv" and not self.header and not self.column_names:
            raise ValueError(
                "csv without a header needs column_names. Received: header = false, no "
                "column_names. List the columns from left to right"
            )
        if self.column_names and (self.format != "csv" or self.header):
            raise ValueError(
                "column_names is for csv without a header. Received: "
                f"format = {self.format!r}, header = {str(self.header).lower()}. Remove it"
            )
        return self


class FeatureConfig(Section):
    """One raw column that becomes a feature."""

    column: str
    """Column of the source."""
    kind: Literal["categorical", "multi_categorical", "number", "vector", "text"]
    """categorical: one value. multi_categorical: several, split at `separator` or a list column.
    number: a float. vector: numbers, split at `separator` or a list column. text: words."""
    name: str = ""
    """Name of the feature; by default the column's."""
    separator: str = "|"
    """multi_categorical, vector: between two values of one cell."""
    min_count: int = Field(default=1, ge=1)
    """categorical: rarer values share the unknown id."""
    transform: Literal["standardize", "log", "none"] = "standardize"
    """number: standardize = (x - mean) / std fitted on train; log = sign(x) log(1 + |x|), then
    standardize."""
    clip: tuple[float, float] | None = None
    """number: lower and upper bound, applied to the raw value."""
    missing: Literal["mean", "zero", "reject"] = "mean"
    """number, vector: what stands for a missing value; mean is zero after standardising."""
    num_buckets: int = Field(default=0, ge=0)
    """number: if > 1, make it categorical by this many quantile buckets fitted on train.
    text: number of hash buckets (65,536 when 0)."""
    dim: int = Field(default=0, ge=0)
    """vector: its length; a row with another length is rejected."""
    ngrams: int = Field(default=2, ge=1, le=4)
    """text: longest word n-gram that is hashed."""
    max_values: int = Field(default=32, ge=1)
    """multi_categorical, text: values kept of one cell, the first ones."""

    @property
    def feature_name(self) -> str:
        """The name, which is the column's unless it is given."""
        return self.name or self.column

    @model_validator(mode="after")
    def _possible(self) -> FeatureConfig:
        if self.kind == "vector" and self.dim < 1:
            raise ValueError(
                f"a vector needs dim >= 1. Received: dim = {self.dim} (column {self.column!r}). "
                "Set dim to the length of the vectors"
            )
        if self.feature_name in columns.RESERVED_FEATURE_NAMES:
            raise ValueError(
                f"the feature names {sorted(columns.RESERVED_FEATURE_NAMES)} are taken. Received: "
                f"{self.feature_name!r}. Set name to another word"
            )
        if self.clip is not None and self.clip[0] >= self.clip[1]:
            raise ValueError(f"clip is (lower, upper) with lower < upper. Received: {self.clip}")
        return self


class EventsConfig(Source):
    """The events: who did what to which item, when."""

    user: str = "user_id"
    """Column with the user's id; any type, kept as text."""
    item: str = "item_id"
    """Column with the item's id; any type, kept as text."""
    time: str | None = None
    """Column with the time. Without one there are no ordered histories: order is by item id."""
    time_format: str = "unix_seconds"
    """unix_seconds, unix_milliseconds, or a Spark pattern such as yyyy-MM-dd HH:mm:ss (UTC)."""
    rating: str | None = None
    """Column with a number that says how much it was liked."""
    label: str | None = None
    """Column with 0 or 1: then negatives are kept and AUC and log loss are reported."""
    weight: str | None = None
    """Column with a non-negative weight of the event in the loss."""
    event_type: str | None = None
    """Column with the kind of event: view, cart, buy."""
    split: str | None = None
    """Column with train, valid or test, for split.method = "given"."""
    context: tuple[FeatureConfig, ...] = ()
    """Features of the event itself: device, hour, place."""


class TableConfig(Source):
    """A catalogue: one row an item, or one row a user."""

    id: str
    """Column with the id, as it stands in the events."""
    title: str | None = None
    """Items: column with the text to show to people, in reports."""
    features: tuple[FeatureConfig, ...] = ()
    """Features of the item or user."""
    duplicates: Literal["error", "first"] = "error"
    """What to do when an id stands twice: fail, or keep one row and send the others to rejects."""


class SplitConfig(Section):
    """How events are divided into train, valid and test."""

    method: Literal["leave_one_out", "temporal", "random", "held_out_users", "given"] = (
        "leave_one_out"
    )
    """leave_one_out: each user's last event is test, the one before valid (by time; users with
    fewer than 3 events stay in train). temporal: cuts at global times. random: shares of each
    user's events. held_out_users: whole users go to valid and test, part of their events is what is
    known of them, the rest is to be found. given: events.split, or valid_paths and test_paths."""
    valid_share: float = Field(default=0.1, ge=0, lt=1)
    """temporal, random, held_out_users: share of events (random, temporal) or users."""
    test_share: float = Field(default=0.1, gt=0, lt=1)
    """As valid_share, for test."""
    valid_time: int | None = None
    """temporal: Unix seconds at which valid starts; instead of valid_share."""
    test_time: int | None = None
    """temporal: Unix seconds at which test starts; instead of test_share."""
    known_share: float = Field(default=0.8, gt=0, lt=1)
    """held_out_users: share of a held-out user's events, the earliest, that are known."""
    valid_paths: tuple[str, ...] = ()
    """given: files with the valid events, of the format of [prepare.events]."""
    test_paths: tuple[str, ...] = ()
    """given: files with the test events, of the format of [prepare.events]."""

    @model_validator(mode="after")
    def _shares(self) -> SplitConfig:
        if self.valid_share + self.test_share >= 1:
            raise ValueError(
                "valid_share + test_share must leave something for train. Received: "
                f"{self.valid_share} + {self.test_share}. Make them smaller"
            )
        return self


class PrepareConfig(Section):
    """Raw data to a dataset, with Spark."""

    events: EventsConfig
    """The events."""
    items: TableConfig | None = None
    """The catalogue of items, if there is one."""
    users: TableConfig | None = None
    """The table of users, if there is one."""
    split: SplitConfig = SplitConfig()
    """How the events are divided."""
    min_rating: float | None = None
    """Implicit feedback from ratings: events rated lower are dropped. With label_from_rating they
    become negatives instead."""
    label_from_rating: bool = False
    """Label = rating >= min_rating, and negatives are kept."""
    event_types: tuple[str, ...] = ()
    """Kinds of event that are kept; all when empty."""
    duplicates: Literal["keep_last", "keep_first", "keep_all"] = "keep_last"
    """Of several events of one user with one item, which one to keep. Equal rows are always one."""
    user_k_core: int = Field(default=1, ge=1)
    """Users with fewer events are dropped, again and again until nothing changes."""
    item_k_core: int = Field(default=1, ge=1)
    """Items with fewer events are dropped, again and again until nothing changes."""
    min_user_count: int = Field(default=1, ge=1)
    """Users with fewer train events share the unknown id."""
    min_item_count: int = Field(default=1, ge=1)
    """Items with fewer train events get no row of their own in the embedding tables."""
    history_length: int = Field(default=50, ge=1)
    """L: positive events kept of a user's past."""
    max_reject_share: float = Field(default=0.01, ge=0, le=1)
    """The job fails when a larger share of the rows of a source breaks the contract."""
    latest_time: int | None = None
    """Unix seconds; a later event is rejected as lying in the future. By default: now."""
    num_files: int = Field(default=0, ge=0)
    """Parquet files of train; 0: enough that each holds at most rows_per_file, a multiple of 12."""
    rows_per_file: int = Field(default=1_000_000, ge=1)
    """Upper bound of rows a file when num_files is 0."""

    @model_validator(mode="after")
    def _possible(self) -> PrepareConfig:
        events, split = self.events, self.split
        if self.min_rating is not None and events.rating is None:
            raise ValueError(
                "min_rating needs events.rating. Received: min_rating = "
                f"{self.min_rating}, no rating column. Name the column"
            )
        if self.label_from_rating and (self.min_rating is None or events.label is not None):
            raise ValueError(
                "label_from_rating needs min_rating, and no events.label. Received: min_rating = "
                f"{self.min_rating}, events.label = {events.label!r}"
            )
        if self.event_types and events.event_type is None:
            raise ValueError(
                f"event_types needs events.event_type. Received: {list(self.event_types)}, no "
                "column. Name the column"
            )
        if split.method in ("leave_one_out", "temporal") and events.time is None:
            raise ValueError(
                f"split.method = {split.method!r} needs events.time. Received: no time column. "
                'Name it, or use split.method = "random"'
            )
        if split.method == "given" and (events.split is None) == (not split.test_paths):
            raise ValueError(
                'split.method = "given" needs either events.split or split.test_paths. Received: '
                f"events.split = {events.split!r}, test_paths = {list(split.test_paths)}"
            )
        for side, features in self.features_by_side():
            names = [feature.feature_name for feature in features]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(
                    f"feature names of one side differ. Received twice: {twice} ({side}). Set name"
                )
        return self

    def features_by_side(self) -> Iterable[tuple[str, tuple[FeatureConfig, ...]]]:
        """The features of users, items and context."""
        yield "user", self.users.features if self.users else ()
        yield "item", self.items.features if self.items else ()
        yield "context", self.events.context


# --- training ----------------------------------------------------------------------------------


class ReaderConfig(Section):
    """Parquet to batches."""

    lanes: int = Field(default=0, ge=0)
    """An epoch is cut into this many equal lanes, dealt over the ranks; a global batch takes the
    same number of rows from each, so that it is the same on any number of ranks. 0: 12 when
    world_size divides 12, else world_size."""
    shuffle: bool = True
    """Another order every epoch, a pure function of the seed and the epoch."""
    prefetch_batches: int = Field(default=4, ge=1)
    """Batches made ready in the background."""
    cache_mib: int = Field(default=256, ge=0)
    """Decoded row groups kept in memory by each rank; small datasets are then read once."""
    verify: Literal["size", "sha256"] = "size"
    """What of each file is checked against the manifest before the first step."""


class ShardingConfig(Section):
    """Embedding tables over the ranks."""

    placement: Literal["auto", "row_wise", "replicated"] = "auto"
    """auto: tables up to replicate_below_mib are on every rank, the others are spread by row."""
    replicate_below_mib: float = Field(default=1.0, ge=0)
    """Size of the weights, in MiB, up to which auto replicates a table."""
    tables: Mapping[str, Literal["row_wise", "replicated"]] = {}
    """Placement of single tables, by name; goes before `placement`."""
    optimizer: Literal["rowwise_adagrad", "adagrad", "sgd"] = "rowwise_adagrad"
    """Fused into the backward pass, exact: rows used twice in a batch are updated once."""
    learning_rate: float = Field(default=0.1, gt=0)
    """Of the embedding tables; scheduled like the dense one."""
    eps: float = Field(default=1e-8, gt=0)
    """Adagrad: added to the root of the accumulated squares."""
    init_scale: float = Field(default=0.05, gt=0)
    """Rows start uniform in [-init_scale, init_scale], a pure function of seed, table and row."""
    precision: Literal["fp32", "fp16"] = "fp32"
    """Of the weights; optimizer state is fp32."""
    cpu_offload: bool = False
    """GPU: keep tables in host memory with a cache on the device (FBGEMM's UVM caching)."""


class ModelConfig(Section):
    """The unified model: towers that share embeddings, weighed by a gate."""

    towers: tuple[Literal["cf", "autoencoder", "deep"], ...] = ("cf", "autoencoder", "deep")
    """Which towers are on."""
    embedding_dim: int = Field(default=64, ge=4, multiple_of=4)
    """D, the width of user, item and tower vectors."""
    feature_dim: int = Field(default=16, ge=4, multiple_of=4)
    """Width of the embeddings of features."""
    share_item_embedding: bool = True
    """One item table for the cf tower and the autoencoder's output; else one each."""
    autoencoder_hidden: tuple[int, ...] = (256,)
    """Widths of the hidden layers between the pooled history and the tower's vector."""
    deep_hidden: tuple[int, ...] = (128,)
    """Widths of the hidden layers of the deep tower, user and item side."""
    gate_hidden: int = Field(default=16, ge=1)
    """Width of the hidden layer of the gate."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """Of hidden layers."""
    input_dropout: float = Field(default=0.3, ge=0, lt=1)
    """Share of the history's items withheld from the autoencoder in training (denoising)."""
    id_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of user ids and item ids replaced by the unknown id in training, so that the other
    towers learn to stand in for it; and of examples without their context, which scoring has not."""
    normalize: bool = False
    """Tower vectors of length one (cosine), with `temperature`."""
    temperature: float = Field(default=1.0, gt=0)
    """The towers' part of a score is divided by it."""

    @model_validator(mode="after")
    def _towers(self) -> ModelConfig:
        if not self.towers or len(set(self.towers)) != len(self.towers):
            raise ValueError(
                f"towers names each tower once, and at least one. Received: {list(self.towers)}"
            )
        return self


class LossConfig(Section):
    """What is minimised."""

    kind: Literal["auto", "softmax", "sampled_softmax", "binary"] = "auto"
    """softmax over the whole catalogue; sampled_softmax with logQ correction; binary
    cross-entropy on label. auto: binary when the data has labels, else softmax up to
    full_softmax_items items, else sampled_softmax."""
    full_softmax_items: int = Field(default=20_000, ge=1)
    """auto: largest catalogue for the full softmax."""
    num_negatives: int = Field(default=4096, ge=1)
    """sampled_softmax: items drawn a step, shared by the global batch."""
    sampling_power: float = Field(default=0.75, ge=0, le=1)
    """sampled_softmax: items are drawn in proportion to (count + 1) ** sampling_power."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """softmax: share of the target spread over the catalogue."""
    l2: float = Field(default=1e-5, ge=0)
    """Weight of the squared norm of the embeddings that an example uses."""


class TrainConfig(Section):
    """The loop."""

    global_batch_size: int = Field(default=2048, ge=1)
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
    metric: str = "ndcg@10"
    """Validation metric that is maximised (auc and ranking metrics) or minimised (log_loss)."""
    checkpoint_every_steps: int = Field(default=0, ge=0)
    """Save this often; 0: at every validation."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints kept, beside the best one."""
    log_every_steps: int = Field(default=10, ge=1)
    """Steps between two lines of progress."""
    resume: bool = True
    """Go on from the newest checkpoint when it is of the same configuration and dataset."""


class EvaluateConfig(Section):
    """Measuring on valid and test queries, whole catalogue."""

    ks: tuple[int, ...] = (5, 10, 20, 50)
    """Cut-offs K."""
    exclude_seen: bool = True
    """Mask what the user has already had."""
    batch_size: int = Field(default=1024, ge=1)
    """Users scored at once."""
    baselines: tuple[Literal["popularity", "item_knn"], ...] = ("popularity", "item_knn")
    """Measured beside the model through the same code."""
    knn_neighbors: int = Field(default=100, ge=1)
    """item_knn: neighbours kept of an item."""
    cold_user_events: int = Field(default=10, ge=0)
    """Slice: a user with at most this many events is cold."""
    cold_item_count: int = Field(default=10, ge=0)
    """Slice: an item with at most this many train events is cold."""

    @model_validator(mode="after")
    def _cutoffs(self) -> EvaluateConfig:
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"ks lists cut-offs >= 1. Received: {list(self.ks)}")
        return self


class ScoreConfig(Section):
    """Top-K for everyone, with Spark."""

    k: int = Field(default=20, ge=1)
    """Items a user."""
    users: str | None = None
    """Parquet or CSV file with a column user_id: only these; else every known user. A user unknown
    to the dataset may bring a column history (list of raw item ids) and user features."""
    block_list: str | None = None
    """Parquet or CSV file with a column item_id: never recommended."""
    exclude_seen: bool = True
    """Leave out what the user has already had."""
    user_block: int = Field(default=1024, ge=1)
    """Users in one matrix product."""
    item_block: int = Field(default=65_536, ge=1)
    """Items in one matrix product."""
    checkpoint: Literal["best", "newest"] = "best"
    """Which checkpoint of the run scores."""
    num_files: int = Field(default=0, ge=0)
    """Parquet files written; 0: as many as Spark has partitions."""


class LaunchConfig(Section):
    """Where the ranks run. Nothing here changes what is computed."""

    num_ranks: int = Field(default=1, ge=1)
    """Processes, one a GPU or one a CPU socket."""
    hosts: tuple[str, ...] = ()
    """host:slots, as for horovodrun -H; this machine when empty."""
    threads_per_rank: int = Field(default=1, ge=1)
    """CPU threads of each rank."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    network_interfaces: tuple[str, ...] = ()
    """Interfaces for Gloo, such as eth0; on one machine the loopback."""
    timeout_seconds: int = Field(default=120, ge=1)
    """A rank that waits longer in a collective stops the job."""


class SparkConfig(Section):
    """The Spark session, when a job is not started by spark-submit with its own settings."""

    master: str = "local[*]"
    """As spark-submit --master."""
    driver_memory: str = "4g"
    """Of the driver; in local mode that is everything."""
    shuffle_partitions: int = Field(default=0, ge=0)
    """0: twice the cores in local mode, else Spark's own default."""
    conf: Mapping[str, str] = {}
    """Any other Spark setting."""


class ReportConfig(Section):
    """The HTML report."""

    sample_users: int = Field(default=50, ge=0)
    """Users shown with their history and recommendations."""


class Config(Section):
    """The whole file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run."""
    output: str = ""
    """Directory of everything the run writes; runs/<name> when empty."""
    data: Literal["", "movielens-100k"] = ""
    """Public data set that `distrec run` fetches first, into data/<name>."""
    seed: int = Field(default=1, ge=0)
    """Of every random choice: split, order, initial weights, dropout."""
    prepare: PrepareConfig
    """Raw data to a dataset."""
    reader: ReaderConfig = ReaderConfig()
    """Parquet to batches."""
    sharding: ShardingConfig = ShardingConfig()
    """Embedding tables over the ranks."""
    model: ModelConfig = ModelConfig()
    """The model."""
    loss: LossConfig = LossConfig()
    """What is minimised."""
    train: TrainConfig = TrainConfig()
    """The loop."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Metrics and baselines."""
    score: ScoreConfig = ScoreConfig()
    """Batch scoring."""
    report: ReportConfig = ReportConfig()
    """The HTML report."""
    launch: LaunchConfig = LaunchConfig()
    """Where the ranks run."""
    spark: SparkConfig = SparkConfig()
    """Where Spark runs."""

    @property
    def directory(self) -> Path:
        """Directory of everything the run writes."""
        return Path(self.output or f"runs/{self.name}")

    @property
    def dataset_directory(self) -> Path:
        """Where prepare writes and train reads."""
        return self.directory / "dataset"

    @property
    def checkpoint_directory(self) -> Path:
        """Where train writes and score reads."""
        return self.directory / "checkpoints"

    @property
    def scores_directory(self) -> Path:
        """Where score writes."""
        return self.directory / "scores"

    @property
    def metrics_path(self) -> Path:
        """Where evaluate writes."""
        return self.directory / "metrics.json"

    @property
    def report_path(self) -> Path:
        """Where the report is written."""
        return self.directory / "report.html"

    @property
    def logs_directory(self) -> Path:
        """Logs, TensorBoard events and the learning curve."""
        return self.directory / "logs"

    @model_validator(mode="after")
    def _possible(self) -> Config:
        slots = sum(int(host.rpartition(":")[2]) for host in self.launch.hosts if ":" in host)
        if self.launch.hosts and slots < self.launch.num_ranks:
            raise ValueError(
                "launch.hosts must offer a slot a rank. Received: num_ranks = "
                f"{self.launch.num_ranks}, {slots} slots in {list(self.launch.hosts)}. Write "
                "host:slots, or lower num_ranks"
            )
        labels = self.prepare.events.label is not None or self.prepare.label_from_rating
        if self.loss.kind == "binary" and not labels:
            raise ValueError(
                'loss.kind = "binary" needs labels. Received: neither prepare.events.label nor '
                "prepare.label_from_rating. Name the label, or use a softmax loss"
            )
        return self


def section_hash(config: Config, *names: str) -> str:
    """SHA-256 of the named top-level keys; equal values give equal hashes."""
    dumped = config.model_dump(mode="json")
    chosen = {name: dumped[name] for name in sorted(names)}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


# --- reading -----------------------------------------------------------------------------------


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, apply ``key=value`` overrides and check everything.

    Args:
        path: The TOML file.
        overrides: Such as ``train.learning_rate=0.01``; the value is TOML, or else a string.

    Raises:
        ConfigError: With every fault found, each with its key, what was received and the fix.
    """
    path = Path(path)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {path}. Give --config PATH.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    for override in overrides:
        _apply(document, override)
    return parse_config(document, str(path))


def parse_config(document: Mapping[str, Any], origin: str) -> Config:
    """Check a parsed document; `origin` names it in messages."""
    try:
        # JSON mode: strict about types, yet a TOML array is a tuple
        return Config.model_validate_json(json.dumps(document, default=str))
    except ValidationError as error:
        lines = [_explain(dict(fault), origin) for fault in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as TOML; `load_config` gives the same object back."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _apply(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set takes key=value. Received: {override!r}.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.strip().split(".")
    section = document
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override}: {parent!r} is a value, not a section.")
    section[last] = value


def _fields_at(location: Sequence[str | int]) -> list[str]:
    """Names of the keys that the section at `location` knows."""
    section: Any = Config
    for part in location:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part)
        if field is None:
            return []
        section = section_of(field.annotation)
        if section is None:
            return []
    return list(section.model_fields)


def section_of(annotation: Any) -> type[Section] | None:
    """The section class that an annotation holds, if any: itself, optional or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = section_of(argument)
        if found is not None:
            return found
    return None


def _explain(fault: dict[str, Any], origin: str) -> str:
    location = [part for part in fault["loc"] if part is not None]
    key = ".".join(str(part) for part in location)
    received = fault.get("input")
    if fault["type"] == "extra_forbidden":
        known = _fields_at(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(known)}."
        return f"unknown key {key!r} in {origin}. {hint}"
    if fault["type"] == "missing":
        return f"key {key!r} is required in {origin}, and is not there."
    if fault["type"] == "value_error":
        return f"{fault['ctx']['error']}. ({key or 'whole file'} in {origin})"
    return f"{key!r} in {origin}: {fault['msg']}. Received: {received!r}."
