"""Whom to score, as rows of the dataset's users/: known users from there, new ones made like them.

A new user's history and raw features go through the same functions as in prepare, with what prepare
has fitted, so that the model sees what it saw in training.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from distrec import columns as c
from distrec.config import FeatureConfig, PrepareConfig
from distrec.dataset import DatasetManifest, FeatureSpec
from distrec.errors import DataError
from distrec.files import uri
from distrec.prepare.door import hashed_column
from distrec.prepare.features import FittedFeature, encode
from distrec.prepare.histories import last
from distrec.prepare.read import PLACE
from distrec.prepare.validate import Checks, raw_column
from distrec.prepare.vocabulary import FittedVocabulary
from distrec.reader.layout import query_layout
from distrec.scoring.lists import accepted, materialize

logger = logging.getLogger("distrec.score")

KEY = "score.users"
_SEPARATOR = "|"
_ENCODED = {
    "categorical": "bigint",
    "multi_categorical": "array<bigint>",
    "text": "array<bigint>",
    "hashed": "array<bigint>",
    "number": "float",
    "vector": "array<float>",
}
_RAW = {
    "categorical": "string",
    "multi_categorical": "array<string>",
    "text": "string",
    "hashed": "string",
    "number": "double",
    "vector": "array<double>",
}


@dataclass(frozen=True)
class Users:
    """Whom to score.

    Args:
        frame: user_id and the columns of `reader.decode_queries`, one row a user.
        num_users: Rows of the frame.
    """

    frame: DataFrame
    num_users: int


@dataclass(frozen=True)
class ListedUsers:
    """Makes users of the rows of a list.

    Args:
        spark: The session.
        directory: Of the dataset.
        manifest: Of the dataset.
        known: Its users/.
        items: item_id and item_index of its catalogue.
        work: Directory for intermediate tables.
        key: With which the dataset's users are hashed; None: they are not.
    """

    spark: SparkSession
    directory: Path
    manifest: DatasetManifest
    known: DataFrame
    items: DataFrame
    work: Path
    key: bytes | None = None

    def users(self, checks: Checks, path: str) -> Users:
        """One row for each distinct user_id of the list.

        Args:
            checks: From `open_list`.
            path: Of the list, for messages.

        Raises:
            DataError: The list has no rows, or one that cannot be used.
        """
        encoded, raw = self._feature_columns(checks)
        listed = self._typed(checks, path, encoded, raw)
        num_users = listed.count()
        if not num_users:
            raise DataError(
                f"{KEY} must name at least one user. Received: {path}, which has no rows. Unset "
                f"{KEY} to score every known user."
            )
        columns = user_columns(self.manifest)
        known = self.known.join(listed.select(c.USER_ID), c.USER_ID, "left_semi").select(*columns)
        new = listed.join(self.known.select(c.USER_ID), c.USER_ID, "left_anti")
        new = materialize(self.spark, new, self.work / "new")
        num_new = new.count()
        logger.info("users: %d listed, %d of them known", num_users, num_users - num_new)
        if not num_new:
            return Users(known, num_users)
        made = self._with_features(self._with_history(new), encoded, raw)
        return Users(known.unionByName(made.select(*columns)), num_users)

    # --- reading ---------------------------------------------------------------------------------

    def _features(self) -> tuple[FeatureSpec, ...]:
        return self.manifest.features_of("user", "context")

    def _feature_configs(self) -> dict[str, FeatureConfig]:
        """How prepare read the user features, by dataset column; empty when nobody knows."""
        if "prepare" not in self.manifest.config:
            return {}
        text = json.dumps(self.manifest.config["prepare"])
        try:
            table = PrepareConfig.model_validate_json(text).users
        except ValidationError as error:
            raise DataError(
                "a dataset's manifest holds the section [prepare] that it was made with. Received: "
                f"{self.directory}: {error}. Run prepare again."
            ) from error
        features = table.features if table else ()
        return {c.feature_column("user", one.feature_name): one for one in features}

    def _feature_columns(
        self, checks: Checks
    ) -> tuple[list[FeatureSpec], dict[str, FeatureConfig]]:
        """The features that the list brings encoded, and those that it brings as raw values.

        A column named as in the raw user table is raw, whatever its type.
        """
        kinds = {field.name: field.dataType.simpleString() for field in checks.frame.schema.fields}
        configs = self._feature_configs()
        raw = {name: one for name, one in configs.items() if one.column in kinds}
        encoded = []
        for spec in self._features():
            if spec.column in raw or spec.column not in kinds:
                continue
            if kinds[spec.column] != _ENCODED[spec.kind]:
                raise DataError(
                    f"column {spec.column!r} of {KEY} holds the encoded feature, of type "
                    f"{_ENCODED[spec.kind]}. Received: {kinds[spec.column]}. Bring the raw value "
                    "under the name that it has in the user table, or leave it out."
                )
            encoded.append(spec)
        return encoded, raw

    def _typed(
        self,
        checks: Checks,
        path: str,
        encoded: list[FeatureSpec],
        raw: dict[str, FeatureConfig],
    ) -> DataFrame:
        """user_id, history (array<string>) and the features; the first row of each user."""
        typed = {c.USER_ID: checks.text(c.USER_ID)}
        has_history = c.HISTORY in checks.frame.columns
        nothing = F.array().cast("array<string>")
        history = checks.values(c.HISTORY, _SEPARATOR) if has_history else nothing
        typed[c.HISTORY] = F.coalesce(history, nothing)
        for spec in encoded:
            value = F.col(spec.column)
            checks.reject(_outside(spec, value), f"column {spec.column!r} is outside its range")
            typed[spec.column] = F.coalesce(value, _default(spec))
        for column, config in raw.items():
            typed[f"raw_{column}"] = checks.feature(config)
        checked = checks.finish(typed, None if self.key is None else c.USER_ID)
        if self.key is not None:
            checked = checked.withColumn(c.USER_ID, hashed_column(F.col(c.USER_ID), self.key))
        rows = accepted(self.spark, checked, path, KEY, self.work)
        first = rows.groupBy(c.USER_ID).agg(
            F.min_by(F.struct(*(name for name in typed if name != c.USER_ID)), PLACE).alias("row")
        )
        return materialize(self.spark, first.select(c.USER_ID, "row.*"), self.work / "listed")

    # --- making rows -----------------------------------------------------------------------------

    def _with_history(self, new: DataFrame) -> DataFrame:
        """Replace raw item ids by all that users/ holds of a user's past."""
        exploded = new.select(c.USER_ID, F.posexplode(c.HISTORY).alias("place", c.ITEM_ID))
        missing = exploded.join(self.items, c.ITEM_ID, "left_anti").count()
        if missing:
            logger.info("histories: %d entries are in no catalogue and are left out", missing)
        events = exploded.join(self.items, c.ITEM_ID, "inner")
        duplicates = self.manifest.config.get("prepare", {}).get("duplicates", "keep_last")
        if duplicates != "keep_all":
            kept = F.min("place") if duplicates == "keep_first" else F.max("place")
            events = events.groupBy(c.USER_ID, c.ITEM_INDEX).agg(kept.alias("place"))
        event = F.struct("place", c.ITEM_INDEX)
        grouped = events.groupBy(c.USER_ID).agg(F.sort_array(F.collect_list(event)).alias("events"))
        past = new.drop(c.HISTORY).join(grouped, c.USER_ID, "left")
        none = F.array().cast("array<bigint>")
        indexes = F.coalesce(F.transform("events", lambda one: one[c.ITEM_INDEX]), none)
        history = last(indexes, self.manifest.history_length)
        zero, unknown = (F.lit(value).cast("long") for value in (0, c.UNKNOWN_INDEX))
        return past.withColumns(
            {
                c.USER_INDEX: unknown,
                # nobody has said when, or of which kind
                c.TIME: zero,
                c.NUM_EVENTS: F.size(indexes).cast("long"),
                c.HISTORY: history,
                c.HISTORY_TIMES: F.transform(history, lambda _: zero),
                c.HISTORY_TYPES: F.transform(history, lambda _: unknown),
                c.SEEN: F.sort_array(F.array_distinct(indexes)),
            }
        ).drop("events")

    def _with_features(
        self, rows: DataFrame, encoded: list[FeatureSpec], raw: dict[str, FeatureConfig]
    ) -> DataFrame:
        configs = self._feature_configs()
        given = {spec.column for spec in encoded}
        fitted = []
        for spec in self._features():
            if spec.column in given:
                continue
            if spec.side == "user" and spec.column in configs:
                fitted.append(self._fitted(spec, configs[spec.column]))
                if spec.column not in raw:
                    nothing = F.lit(None).cast(_RAW[configs[spec.column].kind])
                    rows = rows.withColumn(raw_column("user", spec.name), nothing)
            else:
                rows = rows.withColumn(spec.column, _default(spec))
        return encode(rows, fitted)

    def _fitted(self, spec: FeatureSpec, config: FeatureConfig) -> FittedFeature:
        """A feature as prepare has fitted it, from what the dataset keeps of it."""
        statistics = self.manifest.statistics.get(spec.column, {})
        edges = sorted(value for name, value in statistics.items() if name.startswith("edge_"))
        vocabulary = None
        if config.kind in ("categorical", "multi_categorical"):
            entry = self.manifest.vocabularies[spec.column]
            schema = f"{c.VALUE} string, {c.ID} bigint, {c.COUNT} bigint"
            paths = [uri(self.directory / file.path) for file in entry.files]
            frame = self.spark.read.schema(schema).parquet(*paths)
            vocabulary = FittedVocabulary(
                spec.column, frame, sum(file.num_rows for file in entry.files)
            )
        return FittedFeature(
            config=config,
            spec=spec,
            raw=raw_column("user", spec.name),
            vocabulary=vocabulary,
            statistics=statistics,
            edges=tuple(edges),
            stand_in=tuple(statistics.get(f"mean_{place}", 0.0) for place in range(spec.dim))
            if spec.kind == "vector"
            else (),
        )


def user_columns(manifest: DatasetManifest) -> list[str]:
    """user_id and what scoring reads of a user."""
    layout = query_layout(manifest.features, manifest.event_types, targets=False)
    return [c.USER_ID, *layout.columns]


def _default(spec: FeatureSpec) -> Column:
    """Padding, nothing or zero."""
    if spec.kind == "vector":
        return F.array_repeat(F.lit(0.0).cast("float"), spec.dim)
    if spec.has_several_ids:
        return F.array().cast("array<bigint>")
    return F.lit(0).cast(_ENCODED[spec.kind])


def _outside(spec: FeatureSpec, value: Column) -> Column:
    """Whether an encoded value is none of its feature; null when there is none."""

    def not_an_id(one: Column) -> Column:
        return one.isNull() | (one < 0) | (one >= spec.num_embeddings)

    def not_a_number(one: Column) -> Column:
        return one.isNull() | F.isnan(one) | (F.abs(one) == float("inf"))

    if spec.kind == "categorical":
        return value.isNotNull() & not_an_id(value)
    if spec.kind == "number":
        return value.isNotNull() & not_a_number(value)
    if spec.kind == "vector":
        return (F.size(value) != spec.dim) | F.exists(value, not_a_number)
    return F.exists(value, not_an_id)
