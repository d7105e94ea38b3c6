"""The preparation from end to end: what is read, worked on and written, in this order."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from distrec import __version__
from distrec import columns as c
from distrec.config import Config, EventsConfig, TableConfig, section_hash
from distrec.dataset import DatasetManifest, Vocabulary
from distrec.errors import DataError
from distrec.prepare.clean import Audit, events_that_count, one_row_an_id
from distrec.prepare.entities import Entities, find_items, find_users
from distrec.prepare.examples import Examples
from distrec.prepare.faults import translated
from distrec.prepare.features import TRAIN_COUNT, FittedFeature, encode, fit_features
from distrec.prepare.k_core import k_core
from distrec.prepare.manifest import as_split, entries, write_manifest
from distrec.prepare.read import read_source, wanted_columns
from distrec.prepare.split import BY_TIME, KNOWN, require_rows, split_events
from distrec.prepare.validate import check_time_format, feature_columns, typed_events, typed_table
from distrec.prepare.vocabulary import FittedVocabulary, vocabulary_hash
from distrec.prepare.workspace import Workspace, commit, stage, staging
from distrec.prepare.write import POSITION, Written, num_train_files, shuffled, write_files

logger = logging.getLogger("distrec.prepare")

CONFIG_SECTIONS = ("prepare", "seed")
"""Sections of the configuration that a dataset depends on: those of config_hash."""

# for the time of the job, whatever the session has
_SQL_SETTINGS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.ansi.enabled": "false",
    # text in Windows and other code pages, too
    "spark.sql.legacy.javaCharsets": "true",
}


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
    with (
        _settings(spark),
        translated("the dataset"),
        staging(spark, config.dataset_directory) as workspace,
    ):
        manifest = _Preparation(config, workspace).run()
        with stage("commit"):
            workspace.drop_work()
            write_manifest(manifest, workspace.root)
            commit(workspace.root, config.dataset_directory)
    logger.info("dataset in %s: %s", config.dataset_directory, manifest.counts)
    return manifest


@contextmanager
def _settings(spark: SparkSession) -> Iterator[None]:
    before = {key: spark.conf.get(key, None) for key in _SQL_SETTINGS}
    for key, value in _SQL_SETTINGS.items():
        spark.conf.set(key, value)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                spark.conf.unset(key)
            else:
                spark.conf.set(key, value)


@dataclass
class _Preparation:
    """One run; each method is a stage.

    Args:
        config: Of the run.
        workspace: Where files are written.
    """

    config: Config
    workspace: Workspace
    counts: dict[str, int] = field(default_factory=dict)
    written: dict[str, Written] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prepare = self.config.prepare
        self.audit = Audit(self.prepare.max_reject_share)
        self.has_time = self.prepare.events.time is not None

    def run(self) -> DatasetManifest:
        with stage("read and validate"):
            check_time_format(self.workspace.spark, self.prepare.events.time_format)
            accepted = self._read_events()
            tables = {
                name: self._read_table(table, name, side)
                for name, table, side in (
                    ("users", self.prepare.users, "user"), ("items", self.prepare.items, "item"),
                )
                if table is not None
            }  # fmt: skip
        with stage("filter and split"):
            events = self._filter_and_split(accepted)
        with stage("vocabularies"):
            raw = {
                side: feature_columns(side, features)
                for side, features in self.prepare.features_by_side()
            }
            find = self.workspace
            users = find_users(
                events, tables.get("users"), raw["user"], self.prepare.min_user_count, find
            )
            items = find_items(
                events, tables.get("items"), raw["item"], self.prepare.min_item_count, find
            )
            self.counts |= {"users": users.num_rows, "items": items.num_rows}
        with stage("features"):
            counted = (F.col(c.SPLIT) == c.TRAIN).cast("long")
            frames = {
                "user": users.frame, "item": items.frame,
                "context": events.withColumn(TRAIN_COUNT, counted),
            }  # fmt: skip
            fitted = {
                side: fit_features(frames[side], side, features, self.workspace)
                for side, features in self.prepare.features_by_side()
            }
        with stage("histories and examples"):
            self._write_examples(self._examples(events, users, items, fitted), users)
        with stage("catalogue, vocabularies, rejects"):
            self._write_items(items, fitted["item"])
            vocabularies = [users.vocabulary, items.vocabulary]
            for features in fitted.values():
                vocabularies += [one.vocabulary for one in features if one.vocabulary is not None]
            for vocabulary in vocabularies:
                self._write_vocabulary(vocabulary)
            self._write_rejects()
        with stage("checksums"):
            return self._manifest(users, items, fitted, vocabularies)

    # --- reading ---------------------------------------------------------------------------------

    def _read_events(self) -> DataFrame:
        source, split = self.prepare.events, self.prepare.split
        latest = self.prepare.latest_time
        latest = int(time.time()) if latest is None else latest
        parts = {"": source.paths}
        if split.method == "given" and split.test_paths:
            parts = {c.TRAIN: source.paths, c.VALID: split.valid_paths, c.TEST: split.test_paths}
        whole: DataFrame | None = None
        for name, paths in parts.items():
            if not paths:
                continue
            part = self._read(source, paths, "events")
            part = typed_events(part, source, latest, self.prepare.min_rating is not None)
            if name:
                part = part.withColumn(c.SPLIT, F.lit(name))
            whole = part if whole is None else whole.unionByName(part)
        assert whole is not None
        with translated("events"):
            checked = self.workspace.materialize(whole, "events")
        accepted = self.audit.split_off(checked, "events")
        read = self.audit.num_read["events"]
        rejected = sum(self.audit.reasons.values())
        self.counts |= {"read": read, "rejected": rejected, "accepted": read - rejected}
        return accepted

    def _read(
        self, source: EventsConfig | TableConfig, paths: tuple[str, ...], name: str
    ) -> DataFrame:
        return read_source(self.workspace.spark, source, paths, name, wanted_columns(source))

    def _read_table(self, source: TableConfig, name: str, side: str) -> DataFrame:
        typed = typed_table(self._read(source, source.paths, name), source, side)
        with translated(name):
            checked = self.workspace.materialize(typed, name)
            checked = one_row_an_id(checked, source, name)
            return self.audit.split_off(checked, name)

    # --- events ----------------------------------------------------------------------------------

    def _filter_and_split(self, accepted: DataFrame) -> DataFrame:
        prepare = self.prepare
        kept = events_that_count(accepted, prepare, self.workspace, self.counts)
        self.counts["k_core"] = 0
        if prepare.user_k_core > 1 or prepare.item_k_core > 1:
            self._require_events(self.counts["kept"])
            before = self.counts.pop("kept")
            kept = self.workspace.materialize(k_core(kept, prepare, self.workspace), "k-core")
            self.counts["kept"] = kept.count()
            self.counts["k_core"] = before - self.counts["kept"]
        self.counts.pop("accepted")
        self.counts["kept"] = self.counts.pop("kept")
        self._require_events(self.counts["kept"])
        seed = self.config.seed
        events = split_events(kept, prepare.split, seed, self.has_time, self.workspace)
        rows = events.groupBy(c.SPLIT).agg(
            F.count("*").alias("rows"), F.min(c.TIME).alias("min"), F.max(c.TIME).alias("max")
        )
        found = {row[c.SPLIT]: row for row in rows.collect()}
        for name in (c.TRAIN, c.VALID, c.TEST, KNOWN):
            self.counts[name] = found[name]["rows"] if name in found else 0
        require_rows(
            {name: self.counts[name] for name in (c.TRAIN, c.VALID, c.TEST)}, prepare.split
        )
        self.times = {
            "min": float(min(row["min"] for row in found.values())),
            "max": float(max(row["max"] for row in found.values())),
        }
        return events

    def _require_events(self, kept: int) -> None:
        if kept:
            return
        told = ", ".join(f"{name} {number}" for name, number in self.counts.items() if number)
        raise DataError(
            f"filtering must leave users. Received: none; rows by step: {told}. Loosen "
            "event_types, min_rating, user_k_core or item_k_core of [prepare]."
        )

    def _examples(
        self,
        events: DataFrame,
        users: Entities,
        items: Entities,
        fitted: dict[str, tuple[FittedFeature, ...]],
    ) -> Examples:
        unknown = F.lit(c.UNKNOWN_INDEX).cast("long")
        indexed = (
            events.join(items.frame.select(c.ITEM_ID, c.ITEM_INDEX), c.ITEM_ID, "left")
            .join(users.frame.select(c.USER_ID, c.USER_INDEX), c.USER_ID, "inner")
            .withColumns(
                {
                    c.ITEM_INDEX: F.coalesce(c.ITEM_INDEX, unknown),
                    c.LABEL: F.col(c.LABEL).cast("float"),
                    c.WEIGHT: F.col(c.WEIGHT).cast("float"),
                }
            )
        )
        described = encode(users.frame, fitted["user"]).drop(c.USER_INDEX, TRAIN_COUNT)
        if fitted["user"]:
            described = self.workspace.materialize(described, "user-features")
        split = self.prepare.split.method
        return Examples(
            events=self.workspace.materialize(encode(indexed, fitted["context"]), "indexed"),
            user_features=described,
            user=fitted["user"],
            context=fitted["context"],
            length=self.prepare.history_length,
            has_time=self.has_time,
            by_time=self.has_time and split in BY_TIME,
        )

    # --- writing ---------------------------------------------------------------------------------

    def _num_files(self, num_rows: int) -> int:
        return max(1, -(-num_rows // self.prepare.rows_per_file))

    def _write_shuffled(
        self, frame: DataFrame, name: str, columns: list[str], keys: list[str], num_rows: int
    ) -> None:
        placed = shuffled(frame, keys, self.config.seed, num_rows)
        files = self._num_files(num_rows)
        with stage(f"write {name}"):
            self.written[name] = write_files(placed, name, columns, num_rows, files, self.workspace)

    def _write_examples(self, examples: Examples, users: Entities) -> None:
        keys = [column for column in examples.events.columns if column != c.SPLIT]
        rows = self.counts[c.TRAIN]
        # numbered while the rows are still thin
        train = shuffled(examples.of(c.TRAIN), keys, self.config.seed, rows)
        train = examples.with_user_features(examples.with_histories(train, c.TRAIN))
        files = num_train_files(rows, self.prepare.num_files, self.prepare.rows_per_file)
        with stage(f"write {c.TRAIN}"):
            self.written[c.TRAIN] = write_files(
                train, c.TRAIN, examples.example_columns, rows, files, self.workspace
            )
        for split, queries in ((c.VALID, c.VALID_QUERIES), (c.TEST, c.TEST_QUERIES)):
            held = examples.with_histories(examples.of(split), split)
            held = self.workspace.materialize(held, split)
            columns = examples.example_columns
            described = examples.with_user_features(held)
            self._write_shuffled(described, split, columns, keys, self.counts[split])
            asked = self.workspace.materialize(examples.queries(held, split), queries)
            described = examples.with_user_features(asked)
            columns = examples.query_columns
            self._write_shuffled(described, queries, columns, [c.USER_ID], asked.count())
        now = examples.users_now(users.frame, int(self.times["max"]))
        self._write_shuffled(now, c.USERS, examples.user_columns, [c.USER_ID], users.num_rows)

    def _write_items(self, items: Entities, fitted: tuple[FittedFeature, ...]) -> None:
        encoded = encode(items.frame, fitted).withColumnsRenamed({TRAIN_COUNT: c.COUNT})
        columns = [c.ITEM_ID, c.ITEM_INDEX, c.TITLE, c.COUNT]
        columns += [feature.spec.column for feature in fitted]
        self.written[c.ITEMS] = write_files(
            encoded.withColumn(POSITION, F.col(c.ITEM_INDEX) - c.FIRST_INDEX),
            c.ITEMS, columns, items.num_rows, self._num_files(items.num_rows), self.workspace,
            contiguous=True,
        )  # fmt: skip

    def _write_vocabulary(self, vocabulary: FittedVocabulary) -> None:
        name, rows = f"vocab/{vocabulary.name}", vocabulary.num_values
        self.written[name] = write_files(
            vocabulary.frame.withColumn(POSITION, F.col(c.ID) - c.FIRST_INDEX),
            name, [c.VALUE, c.ID, c.COUNT], rows, self._num_files(rows), self.workspace,
            contiguous=True,
        )  # fmt: skip

    def _write_rejects(self) -> None:
        columns = [c.SOURCE, c.REASON, c.RAW_ROW]
        if not self.audit.rejected:
            self.written[c.REJECTS] = Written(dict.fromkeys(columns, "string"))
            return
        whole = self.audit.rejected[0]
        for more in self.audit.rejected[1:]:
            whole = whole.unionByName(more)
        rows = sum(self.audit.reasons.values())
        self._write_shuffled(whole, c.REJECTS, columns, columns, rows)

    def _manifest(
        self,
        users: Entities,
        items: Entities,
        fitted: dict[str, tuple[FittedFeature, ...]],
        vocabularies: list[FittedVocabulary],
    ) -> DatasetManifest:
        files = entries(self.workspace, self.written)
        features = [feature for side in fitted.values() for feature in side]
        statistics = {one.spec.column: one.statistics for one in features if one.statistics}
        if self.has_time:
            statistics[c.TIME] = self.times
        tables = {vocabulary.name: f"vocab/{vocabulary.name}" for vocabulary in vocabularies}
        sections = self.config.model_dump(mode="json")
        return DatasetManifest(
            distrec_version=__version__,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            config_hash=section_hash(self.config, *CONFIG_SECTIONS),
            config={name: sections[name] for name in CONFIG_SECTIONS},
            schemas={
                name: one.schema
                for name, one in self.written.items()
                if name not in tables.values()
            },
            splits={name: as_split(files[name]) for name in files if name not in tables.values()},
            features=tuple(feature.spec for feature in features),
            vocabularies={
                one.name: Vocabulary(
                    name=one.name,
                    num_embeddings=one.num_embeddings,
                    sha256=vocabulary_hash(one),
                    files=files[tables[one.name]],
                )
                for one in vocabularies
            },
            num_users=users.vocabulary.num_embeddings,
            num_trained_items=items.vocabulary.num_embeddings,
            num_items=items.num_rows + c.FIRST_INDEX,
            history_length=self.prepare.history_length,
            has_time=self.has_time,
            has_labels=self.prepare.events.label is not None or self.prepare.label_from_rating,
            counts=self.counts,
            rejects=self.audit.reasons,
            statistics=statistics,
        )
