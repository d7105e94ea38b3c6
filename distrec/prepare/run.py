"""The preparation from end to end: what is read, worked on and written, in this order."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from distrec import columns as c
from distrec.config import Config, PrepareConfig
from distrec.dataset import DatasetManifest
from distrec.errors import DataError
from distrec.files import commit, staging
from distrec.prepare.clean import events_that_count
from distrec.prepare.door import Door, door_of
from distrec.prepare.entities import NO_TIMES, Entities, Recent, find_items, find_users
from distrec.prepare.examples import Examples
from distrec.prepare.extend import SECONDS_PER_DAY, Continuation, open_previous
from distrec.prepare.faults import translated
from distrec.prepare.features import TRAIN_COUNT, FittedFeature, encode, fit_features
from distrec.prepare.k_core import k_core
from distrec.prepare.manifest import write_manifest
from distrec.prepare.output import Output
from distrec.prepare.sources import Sources, read_sources
from distrec.prepare.split import BY_TIME, KNOWN, WITHHELD, require_rows, split_events
from distrec.prepare.validate import feature_columns
from distrec.prepare.workspace import Workspace, concurrently, stage
from distrec.spark import tasks_ended
from distrec.user_key import key_digest

logger = logging.getLogger("distrec.prepare")

# for the time of the job, whatever the session has
_SQL_SETTINGS = {
    "spark.sql.session.timeZone": "UTC",
    # a cast that fails gives null, which validation rejects with a reason
    "spark.sql.ansi.enabled": "false",
    # text in Windows and other code pages, too
    "spark.sql.legacy.javaCharsets": "true",
}

Counts = dict[str, int]
Fitted = dict[str, tuple[FittedFeature, ...]]


@dataclass(frozen=True)
class Divided:
    """What is found of the divided events.

    Args:
        first: Time of the first of all.
        latest: Split -> time of its last.
        labels: The least and largest label of train.
    """

    first: int
    latest: dict[str, int]
    labels: tuple[float, float]

    @property
    def times(self) -> dict[str, float]:
        """Of the first and the last event."""
        return {"min": float(self.first), "max": float(max(self.latest.values()))}

    def recent(self, prepare: PrepareConfig) -> Recent:
        """Since when events are recent: some days before the last one that is known by then."""
        if prepare.events.time is None:
            return NO_TIMES
        days = prepare.recent_days * SECONDS_PER_DAY
        after = {
            split: max(self.latest[name] for name in pool if name in self.latest) - days
            for split, pool in c.RECENT_POOLS.items()
        }
        return Recent(after, hides_new=prepare.split.new_items_share > 0)


def run(spark: SparkSession, config: Config) -> DatasetManifest:
    """Write config.dataset_directory, whole or not at all.

    Args:
        spark: From distrec.spark.session, or any other.
        config: Of the run; its [prepare] and seed count.

    Returns:
        The manifest, as it was written.

    Raises:
        ConfigError: A value cannot be used with this data.
        DataError: Raw data is missing, damaged, breaks its contract, or nothing is left of it.
    """
    target = config.dataset_directory
    door = door_of(config.prepare)
    continuation = open_previous(config, door.key)
    with (
        _settings(spark), translated("the dataset"), staging(target) as root, tasks_ended(spark),
    ):  # fmt: skip
        workspace = Workspace(spark, root)
        manifest = _prepare(config, workspace, door, continuation)
        with stage("commit"):
            workspace.drop_work()
            write_manifest(manifest, root)
            commit(root, target)
    counts = ", ".join(f"{name} {number:,}" for name, number in manifest.counts.items() if number)
    logger.info("dataset in %s: %s", target, counts)
    return manifest


@contextmanager
def _settings(spark: SparkSession) -> Iterator[None]:
    before = {key: spark.conf.get(key, None) for key in _SQL_SETTINGS}
    for key, value in _SQL_SETTINGS.items():
        spark.conf.set(key, value)
    try:
        yield
    finally:
        for key, old in before.items():
            if old is None:
                spark.conf.unset(key)
            else:
                spark.conf.set(key, old)


def _prepare(
    config: Config, workspace: Workspace, door: Door, continuation: Continuation
) -> DatasetManifest:
    """Everything but the move into place."""
    with stage("read and validate"):
        sources = read_sources(config.prepare, door, workspace)
    with stage("filter and split"):
        kept, counts, dropped = _filter(sources, config, workspace)
        events, found = _split(kept, counts, config, workspace)
    days = config.prepare.evict_after_days
    if days is not None:
        continuation = replace(
            continuation, oldest=int(found.times["max"]) - days * SECONDS_PER_DAY
        )
    with stage("vocabularies and features"):
        recent = found.recent(config.prepare)
        users, items = _find(events, dropped, sources, config, workspace, continuation, recent)
        num_items = items.num_rows - items.vocabulary.num_free
        counts |= {"users": users.num_rows, "items": num_items}
        fitted = _fit(events, users, items, config, workspace, continuation)
        examples = _examples(events, users, items, fitted, config, workspace)
    with stage("histories and files"):
        features = [feature for side in fitted.values() for feature in side]
        output = Output(
            config, workspace, examples, users, items, features, sources.audit, counts, found.times,
            continuation, found.labels if config.prepare.predict_ratings else None, recent.after,
        )  # fmt: skip
        output.write()
    with stage("checksums"):
        manifest = output.manifest()
        return manifest.model_copy(update={"user_key_digest": key_digest(door.key)})


def _filter(
    sources: Sources, config: Config, workspace: Workspace
) -> tuple[DataFrame, Counts, DataFrame | None]:
    """The events that count, the rows that each step took away, and the items out of the core."""
    prepare, audit = config.prepare, sources.audit
    read, rejected = audit.num_read["events"], audit.num_rejected["events"]
    kept, filtered = events_that_count(sources.events, read - rejected, prepare, workspace)
    excluded = {"excluded": audit.num_excluded["events"]} if audit.num_excluded else {}
    counts = {**excluded, "read": read, "rejected": rejected, **filtered}
    num_kept = read - rejected - sum(filtered.values())
    _require_events(num_kept, counts)
    counts["k_core"] = 0
    dropped = None
    if prepare.user_k_core > 1 or prepare.item_k_core > 1:
        core = workspace.materialize(k_core(kept, prepare, workspace), "k-core")
        in_core = core.count()
        counts["k_core"] = num_kept - in_core
        _require_events(in_core, counts)
        if prepare.item_k_core > 1:
            items = core.select(c.ITEM_ID).distinct()
            dropped = kept.select(c.ITEM_ID).distinct().join(items, c.ITEM_ID, "left_anti")
            dropped = workspace.materialize(dropped, "out-of-core")
        kept, num_kept = core, in_core
    counts["kept"] = num_kept
    return kept, counts, dropped


def _require_events(num_kept: int, counts: Counts) -> None:
    if num_kept:
        return
    told = ", ".join(f"{name} {number}" for name, number in counts.items() if number)
    raise DataError(
        f"filtering must leave users. Received: none; rows by step: {told}. Loosen event_types, "
        "min_rating, user_k_core or item_k_core of [prepare]."
    )


def _split(
    kept: DataFrame, counts: Counts, config: Config, workspace: Workspace
) -> tuple[DataFrame, Divided]:
    """Events with their split, and what is found of them; counts is added to."""
    prepare = config.prepare
    has_time = prepare.events.time is not None
    events = split_events(kept, prepare.split, config.seed, has_time, workspace)
    # as of negatives: in `seen`, in no history
    label = F.when(F.col(c.SPLIT) == WITHHELD, F.lit(0)).otherwise(F.col(c.LABEL))
    events = events.withColumn(c.LABEL, label.cast(events.schema[c.LABEL].dataType))
    rows = events.groupBy(c.SPLIT).agg(
        F.count("*").alias("rows"), F.min(c.TIME).alias("min"), F.max(c.TIME).alias("max"),
        F.min(c.LABEL).alias("least"), F.max(c.LABEL).alias("largest"),
    )  # fmt: skip
    found = {row[c.SPLIT]: row for row in rows.collect()}
    for name in (c.TRAIN, c.VALID, c.TEST, KNOWN):
        counts[name] = found[name]["rows"] if name in found else 0
    if WITHHELD in found:
        counts[WITHHELD] = found[WITHHELD]["rows"]
    require_rows({name: counts[name] for name in (c.TRAIN, c.VALID, c.TEST)}, prepare.split)
    train = found[c.TRAIN]
    return events, Divided(
        first=int(min(row["min"] for row in found.values())),
        latest={name: int(row["max"]) for name, row in found.items()},
        labels=(float(train["least"]), float(train["largest"])),
    )


def _find(
    events: DataFrame,
    dropped: DataFrame | None,
    sources: Sources,
    config: Config,
    workspace: Workspace,
    continuation: Continuation,
    recent: Recent,
) -> tuple[Entities, Entities]:
    """Every known user and item with an index."""
    prepare = config.prepare
    raw = {side: feature_columns(side, features) for side, features in prepare.features_by_side()}
    least = {"user": prepare.min_user_count, "item": prepare.min_item_count}
    common = (workspace, continuation)
    users, items = concurrently(
        partial(find_users, events, sources.users, raw["user"], least["user"], *common),
        partial(
            find_items, events, sources.items, dropped, raw["item"], least["item"], *common, recent
        ),
    )
    return users, items


def _fit(
    events: DataFrame,
    users: Entities,
    items: Entities,
    config: Config,
    workspace: Workspace,
    continuation: Continuation,
) -> Fitted:
    """The features of each side, fitted on train."""
    in_train = (F.col(c.SPLIT) == c.TRAIN).cast("long")
    frames = {
        "user": users.frame,
        "item": items.frame,
        "context": events.withColumns({TRAIN_COUNT: in_train, c.LAST_TIME: F.col(c.TIME)}),
    }
    sides = dict(config.prepare.features_by_side())
    fitted = concurrently(
        *(
            partial(fit_features, frames[side], side, features, workspace, continuation)
            for side, features in sides.items()
        )
    )
    return dict(zip(sides, fitted, strict=True))


def _examples(
    events: DataFrame,
    users: Entities,
    items: Entities,
    fitted: Fitted,
    config: Config,
    workspace: Workspace,
) -> Examples:
    """Events with indexes and encoded context, beside the encoded users."""
    unknown = F.lit(c.UNKNOWN_INDEX).cast("long")
    tasks = config.prepare.events.tasks
    indexed = (
        events.join(items.frame.select(c.ITEM_ID, c.ITEM_INDEX), c.ITEM_ID, "left")
        .join(users.frame.select(c.USER_ID, c.USER_INDEX), c.USER_ID, "inner")
        .withColumns(
            {
                c.ITEM_INDEX: F.coalesce(c.ITEM_INDEX, unknown),
                c.LABEL: F.col(c.LABEL).cast("float"),
                c.WEIGHT: F.col(c.WEIGHT).cast("float"),
                # a dataset has no nulls
                **{
                    name: F.coalesce(F.col(name), F.lit(float("nan"))).cast("float")
                    for name in map(c.task_column, tasks)
                },
            }
        )
    )
    described = encode(users.frame, fitted["user"])
    described = described.drop(c.USER_INDEX, TRAIN_COUNT, c.LAST_TIME)
    indexed, described = concurrently(
        partial(workspace.materialize, encode(indexed, fitted["context"]), "indexed"),
        partial(workspace.materialize, described, "user-features"),
    )
    has_time = config.prepare.events.time is not None
    return Examples(
        events=indexed,
        user_features=described,
        user=fitted["user"],
        context=fitted["context"],
        tasks=tasks,
        length=config.prepare.history_length,
        has_time=has_time,
        by_time=has_time and config.prepare.split.method in BY_TIME,
    )
