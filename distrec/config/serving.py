"""Sections of what comes after training, and of where the jobs run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_serializer, field_validator, model_validator

from distrec.config.secrets import mask_setting
from distrec.config.section import Section


class EvaluateConfig(Section):
    """Measuring on valid and test queries, by default over the whole catalogue."""

    ks: tuple[int, ...] = (5, 10, 20, 50)
    """Cut-offs K."""
    exclude_seen: bool = True
    """Mask what the user has already had."""
    test_candidates: str | None = None
    """Parquet or CSV file with columns user_id and item_id: on test, each user's targets are ranked
    among these items alone, not the whole catalogue; users without any are left out. For comparing
    with published figures that are measured so, such as 99 negatives a user."""
    batch_size: int = Field(default=1024, ge=1, le=2**31 - 1)
    """Users scored at once."""
    baselines: tuple[Literal["popularity", "item_knn", "markov", "ease", "als"], ...] | None = None
    """Measured beside the model through the same code. By default the cheap ones that the dataset
    allows: popularity, item_knn (up to 200,000 items) and, where events have times, markov. ease
    takes up to 30,000 items, 4 bytes a pair of items (3.6 GB at 30,000) and minutes; als is a Spark
    job with the settings of [spark]."""
    fit_baselines_on_valid: bool = False
    """For test, baselines learn from valid too, which our model never does. Either way the valid
    events are in the histories of test queries."""
    knn_neighbors: int = Field(default=100, ge=1)
    """item_knn: neighbours kept of an item."""
    markov_length: int = Field(default=5, ge=1)
    """markov: last items of the history that count."""
    markov_decay: float = Field(default=0.6, gt=0, le=1)
    """markov: weight of an item beside that of the one after it."""
    markov_smoothing: float = Field(default=20.0, gt=0)
    """markov: transitions that each item is lent, spread over items as all transitions are."""
    ease_l2: float = Field(default=100.0, gt=0)
    """ease: weight of the squared item-to-item weights."""
    als_factors: int = Field(default=64, ge=1)
    """als: width of the factors."""
    als_iterations: int = Field(default=15, ge=1)
    """als: passes over users and items."""
    als_regularization: float = Field(default=0.1, ge=0)
    """als: weight of squared factors, times the events of their user or item."""
    als_alpha: float = Field(default=10.0, gt=0)
    """als: what a user has had weighs 1 + als_alpha, all else 1."""
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

    k: int = Field(default=20, ge=1, le=1_000_000)
    """Items a user."""
    users: str | None = None
    """Parquet or CSV file with a column user_id: only these; else every known user. A user unknown
    to the dataset may bring a column history (list of raw item ids) and user features."""
    block_list: str | None = None
    """Parquet or CSV file with a column item_id: never recommended."""
    exclude_seen: bool = True
    """Leave out what the user has already had."""
    user_block: int = Field(default=1024, ge=1, le=2**31 - 1)
    """Users in one matrix product."""
    item_block: int = Field(default=65_536, ge=1, le=2**31 - 1)
    """Items in one matrix product."""
    checkpoint: Literal["best", "newest"] = "best"
    """Which checkpoint of the run scores."""
    num_files: int = Field(default=0, ge=0, le=1_000_000)
    """Parquet files written; 0: as many as Spark has partitions."""


class LaunchConfig(Section):
    """Where the ranks run. Nothing here changes what is computed."""

    num_ranks: int = Field(default=1, ge=1, le=65_536)
    """Processes, one a GPU or one a CPU socket."""
    hosts: tuple[str, ...] = ()
    """host:slots, as for horovodrun -H; this machine when empty."""
    threads_per_rank: int = Field(default=1, ge=1, le=1_024)
    """CPU threads of each rank."""
    bind_cores: bool = False
    """Each rank keeps to a share of its host's cores of its own, so that ranks do not push each
    other from core to core; threads that carry messages may go anywhere. Only where no other job
    computes on these hosts: each would take the same cores. Without effect where a host has more
    ranks than cores, and other than on Linux."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    network_interfaces: tuple[str, ...] = ()
    """Interfaces for Gloo, such as eth0; on one machine the loopback."""
    ssh_port: int = Field(default=22, ge=1, le=65535)
    """Several hosts: where their ssh servers listen."""
    ssh_identity_file: str | None = None
    """Several hosts: private key to log in with; ssh's own choice when not given."""
    timeout_seconds: int = Field(default=120, ge=1)
    """A rank that does nothing for longer stops the job; so does one that waits in a collective
    while no other rank moves, which is seen where the ranks share the directory of the output."""
    max_restarts: int = Field(default=3, ge=0)
    """How often `distrec train` starts the ranks again, from the newest checkpoint that is whole,
    after one of them has died, was stuck or failed in an unforeseen way. Counted anew after each
    new checkpoint; 0: never. Errors in configuration, data or checkpoints, and a loss that is not
    finite, are not tried again."""
    restart_backoff_seconds: float = Field(default=5.0, ge=0)
    """Wait before the first restart; doubled for each further one, up to 5 minutes."""
    min_ranks: int | None = Field(default=None, ge=1)
    """With hosts: go on without those that ssh does not reach, on as many ranks as the others have
    slots for, if that is no fewer than this. Not given: num_ranks, that is, wait for them."""
    grace_seconds: float = Field(default=30.0, ge=0)
    """After SIGTERM the ranks have so long to save a checkpoint at the end of their step."""

    @model_validator(mode="after")
    def _fewest(self) -> LaunchConfig:
        if self.min_ranks is not None and self.min_ranks > self.num_ranks:
            raise ValueError(
                f"min_ranks is at most num_ranks. Received: min_ranks = {self.min_ranks}, "
                f"num_ranks = {self.num_ranks}. Lower min_ranks"
            )
        return self


class SparkConfig(Section):
    """The Spark session, when a job is not started by spark-submit with its own settings."""

    master: str = "local[*]"
    """As spark-submit --master."""
    driver_memory: str = "4g"
    """Of the driver; in local mode that is everything."""
    shuffle_partitions: int = Field(default=0, ge=0)
    """0: twice the cores in local mode, else Spark's own default."""
    conf: Mapping[str, str] = Field(default={}, repr=False)
    """Any other Spark setting. What looks like a secret (password, secret, token, key) is written
    as (hidden) into the run's config.toml and everywhere else; Spark is not started from such a
    copy."""

    @field_serializer("conf", when_used="json")
    def _without_secrets(self, conf: Mapping[str, str]) -> dict[str, str]:
        return {key: mask_setting(key, value) for key, value in conf.items()}


class ReportConfig(Section):
    """The HTML report."""

    sample_users: int = Field(default=50, ge=0)
    """Users shown with their history and recommendations."""
    mlflow_uri: str | None = None
    """Server that gets the settings and the learning curve of training, such as
    http://mlflow:5000, beside TensorBoard's files; needs the extra mlflow. What it wants to know of
    who is asking comes from the environment (MLFLOW_TRACKING_USERNAME and so on)."""
    mlflow_experiment: str = Field(default="distrec", min_length=1)
    """Experiment of the server in which the run appears, under its name."""

    @field_validator("mlflow_uri")
    @classmethod
    def _no_secret(cls, uri: str | None) -> str | None:
        if uri is not None and urlsplit(uri).password is not None:
            raise ValueError(
                "mlflow_uri holds no password, for the configuration is copied into runs. "
                "Received: one. Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return uri
