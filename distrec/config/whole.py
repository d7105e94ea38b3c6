"""The whole file: every section, and the places that follow from it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from distrec.columns import LABEL
from distrec.config.data import PrepareConfig
from distrec.config.model import LossConfig, ModelConfig
from distrec.config.privacy import PrivacyConfig, check_private
from distrec.config.section import Section
from distrec.config.serving import (
    EvaluateConfig,
    LaunchConfig,
    ReportConfig,
    ScoreConfig,
    SparkConfig,
)
from distrec.config.store_url import checked_url
from distrec.config.training import ReaderConfig, ShardingConfig, TrainConfig
from distrec.config.tuning import TuneConfig


class Config(Section):
    """The whole file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run."""
    output: str = ""
    """Directory of everything the run writes; runs/<name> when empty. This and every other relative
    path starts at the directory in which the command is run."""
    store: str = ""
    """Where dataset, checkpoints and scores are published, in <store>/<name>:
    "s3://bucket/path" (for other S3-like stores with ?endpoint_override=host:port&scheme=http, and
    region=...), "hdfs://host:port/path" or "file:///path". What is published then counts: a job
    fetches it into `output` before it starts. Credentials come from the environment alone."""
    data: Literal["", "movielens-100k", "complete-journey"] = ""
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
    privacy: PrivacyConfig | None = None
    """Differentially private training."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Metrics and baselines."""
    score: ScoreConfig = ScoreConfig()
    """Batch scoring."""
    report: ReportConfig = ReportConfig()
    """The HTML report."""
    tune: TuneConfig = TuneConfig()
    """The search of `distrec tune`."""
    launch: LaunchConfig = LaunchConfig()
    """Where the ranks run."""
    spark: SparkConfig = SparkConfig()
    """Where Spark runs."""

    @field_validator("store")
    @classmethod
    def _store(cls, value: str) -> str:
        return checked_url(value) if value else value

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
    def query_ranks_path(self) -> Path:
        """Where evaluate writes where each query's targets were found."""
        return self.directory / "query_ranks.parquet"

    @property
    def report_path(self) -> Path:
        """Where the report is written."""
        return self.directory / "report.html"

    @property
    def logs_directory(self) -> Path:
        """Logs, TensorBoard events and the learning curve."""
        return self.directory / "logs"

    @property
    def bad_batches_directory(self) -> Path:
        """Batches whose loss was bad."""
        return self.directory / "bad_batches"

    @property
    def stop_path(self) -> Path:
        """A file by which the launcher tells the ranks, on every host, to save and end."""
        return self.logs_directory / "stop"

    @property
    def trains_without_seen(self) -> bool:
        """What loss.exclude_seen says, or stands for where it is not given."""
        if self.loss.exclude_seen is not None:
            return self.loss.exclude_seen
        repeats = self.prepare.duplicates == "keep_all"
        return self.evaluate.exclude_seen and not repeats and self.privacy is None

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
        if self.loss.kind in ("squared", "ordinal") and not self.prepare.predict_ratings:
            raise ValueError(
                f'loss.kind = "{self.loss.kind}" needs ratings. Received: no '
                "prepare.predict_ratings. Set it, or use another loss"
            )
        if (self.loss.kind == "ordinal") != (self.model.rating_levels > 0):
            raise ValueError(
                'loss.kind = "ordinal" and model.rating_levels go together. Received: '
                f"rating_levels = {self.model.rating_levels} with kind = {self.loss.kind!r}. Set "
                "both, or neither"
            )
        check_tasks(self)
        model = self.model
        withholds = model.dropout or model.input_dropout or model.sequence_mask
        if self.loss.contrastive and not (model.augment or withholds):
            raise ValueError(
                "loss.contrastive compares two views of a history. Received: neither model.augment "
                "nor model.dropout, input_dropout or sequence_mask, by which they would differ. "
                "Set one of them"
            )
        if self.model.frozen and self.train.warm_start is None:
            raise ValueError(
                "model.frozen needs train.warm_start. Received: "
                f"{list(self.model.frozen)} without: they would stay as they are drawn. Name the "
                "checkpoints of a run that was trained before"
            )
        if self.privacy is not None:
            check_private(self)
        if "markov" in (self.evaluate.baselines or ()) and self.prepare.events.time is None:
            raise ValueError(
                "the baseline markov needs prepare.events.time. Received: evaluate.baselines = "
                f"{list(self.evaluate.baselines or ())}, no time column. Name the column, or take "
                "markov out"
            )
        return self


def check_tasks(config: Config) -> None:
    """Refuse several tasks without their labels, and weights of tasks that are not trained.

    Raises:
        ValueError: With what was received and the fix.
    """
    tasks, kind = config.prepare.events.tasks, config.model.multi_task
    weights = config.loss.task_weights
    if kind != "none" and not tasks:
        raise ValueError(
            f"model.multi_task needs prepare.events.tasks. Received: {kind!r}, no tasks. Name "
            "their columns"
        )
    if kind != "none" and config.loss.kind not in ("auto", "binary"):
        raise ValueError(
            f"model.multi_task is for the loss of labels, binary. Received: {kind!r} with "
            f'loss.kind = {config.loss.kind!r}. Set it to "binary"'
        )
    trained = (LABEL, *tasks) if kind != "none" else ()
    others = sorted(set(weights) - set(trained))
    if others:
        raise ValueError(
            f"loss.task_weights names tasks that are trained: {list(trained)}. Received: {others}, "
            f"with model.multi_task = {kind!r}. Take them out, or set multi_task"
        )
    if trained and not any(weights.get(task, 1.0) for task in trained):
        raise ValueError(
            f"one of loss.task_weights is above 0. Received: {dict(weights)}. Raise one"
        )


def section_hash(config: Config, *names: str) -> str:
    """SHA-256 of the named keys, such as train or score.checkpoint; equal values, equal hashes."""
    dumped = config.model_dump(mode="json")
    chosen = {}
    for name in sorted(names):
        value = dumped
        for part in name.split("."):
            value = value[part]
        chosen[name] = value
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()
