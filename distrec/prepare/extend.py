"""What a dataset takes over from the one that it extends, and what is too old to have an id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from distrec import columns as c
from distrec.config import Config, FeatureConfig
from distrec.dataset import MAX_ANCESTORS, DatasetManifest, Extension, FileEntry, read_manifest
from distrec.errors import ConfigError, DataError
from distrec.files import sha256, uri
from distrec.untrusted import plain_size
from distrec.user_key import check_same_key

SECONDS_PER_DAY = 86_400

# of FeatureConfig: what an encoded value means hangs on them
_MEANING = (
    "kind", "transform", "clip", "missing", "num_buckets", "num_hashes", "dim", "ngrams",
)  # fmt: skip


_SPLIT_OF_SIDE = {"item": c.ITEMS, "user": c.USERS, "context": c.TRAIN}


@dataclass(frozen=True)
class OldVocabulary:
    """A vocabulary of the previous dataset.

    Args:
        frame: value string, id int64, last_time int64.
        free: id int64, of no value: what new values are given first.
        reused: id int64, generation int64.
        num_values: Rows of frame.
        num_free: Rows of free.
        num_embeddings: The first id that nobody ever had.
    """

    frame: DataFrame
    free: DataFrame
    reused: DataFrame
    num_values: int
    num_free: int
    num_embeddings: int


@dataclass(frozen=True)
class Continuation:
    """What came before, and what is too long ago.

    Args:
        directory: Of the previous dataset.
        previous: Its manifest; None when nothing is extended.
        oldest: Unix seconds; a value that was seen last before that has no id. None: ids are kept.
    """

    directory: Path = Path()
    previous: DatasetManifest | None = None
    oldest: int | None = None

    @property
    def tracks_time(self) -> bool:
        """Whether vocabularies say when a value was seen last."""
        return self.oldest is not None

    @property
    def generation(self) -> int:
        """Of the new dataset."""
        return 0 if self.previous is None else self.previous.generation + 1

    def extension(self) -> Extension | None:
        """For the manifest of the new dataset."""
        if self.previous is None:
            return None
        before = () if self.previous.extends is None else self.previous.extends.ancestors
        return Extension(
            generation=self.generation,
            ancestors=(self.previous.as_ancestor(), *before)[:MAX_ANCESTORS],
        )

    def vocabulary(self, name: str, spark: SparkSession) -> OldVocabulary | None:
        """The previous dataset's vocabulary, or None where it has none of this name."""
        if self.previous is None or name not in self.previous.vocabularies:
            return None
        entry = self.previous.vocabularies[name]
        ids = f"{c.ID} bigint"
        frame = self._read(spark, f"{c.VALUE} string, {ids}, {c.LAST_TIME} bigint", entry.files)
        # a dataset without eviction does not say: no value was seen later than its last event
        latest = int(self.previous.statistics.get(c.TIME, {}).get("max", 0))
        last_time = F.coalesce(c.LAST_TIME, F.lit(latest)).cast("long").alias(c.LAST_TIME)
        return OldVocabulary(
            frame=frame.select(c.VALUE, c.ID, last_time),
            free=self._read(spark, ids, entry.free_files),
            reused=self._read(spark, f"{ids}, {c.GENERATION} bigint", entry.reused_files),
            num_values=sum(file.num_rows for file in entry.files),
            num_free=entry.num_free,
            num_embeddings=entry.num_embeddings,
        )

    def ids_in_use(self, side: str, column: str, spark: SparkSession) -> DataFrame | None:
        """The ids of a feature of several that the previous dataset has, each once: id."""
        if self.previous is None or column not in {one.column for one in self.previous.features}:
            return None
        files = self.previous.splits[_SPLIT_OF_SIDE[side]].files
        lists = self._read(spark, f"`{column}` array<bigint>", files)
        return lists.select(F.explode(column).alias(c.ID)).distinct()

    def statistics(self, column: str) -> dict[str, float] | None:
        """What the previous dataset fitted of a number or vector; None where it had none."""
        return None if self.previous is None else self.previous.statistics.get(column)

    def _read(self, spark: SparkSession, schema: str, files: tuple[FileEntry, ...]) -> DataFrame:
        if not files:
            return spark.createDataFrame([], schema)
        paths = [uri(self.directory / file.path) for file in files]
        # a column that the files do not have is null
        return spark.read.schema(schema).parquet(*paths)


def open_previous(config: Config, user_key: bytes | None = None) -> Continuation:
    """Read the manifest of the dataset that is extended, if one is.

    Args:
        config: Of the run.
        user_key: With which users are hashed; None: they are not.

    Raises:
        ConfigError: It is this run's own, or a feature, the kinds of event or the key of users are
            others now.
        DataError: There is none.
    """
    extend = config.prepare.extend
    if extend is None:
        return Continuation()
    directory = Path(extend)
    if directory.resolve() == config.dataset_directory.resolve():
        raise ConfigError(
            "prepare.extend names another run's dataset, for this run's own is replaced. Received: "
            f"{extend}. Set output or name so that the new dataset lies elsewhere."
        )
    previous = read_manifest(directory)
    check_same_key(user_key, previous.user_key_digest)
    _check_features(config, previous, directory)
    _check_event_types(config, previous, directory)
    _check_files(previous, directory)
    return Continuation(directory, previous)


def _check_files(previous: DatasetManifest, directory: Path) -> None:
    """Every file of the vocabularies is whole: a changed id would stand for another value."""
    for one in previous.vocabularies.values():
        for entry in (*one.files, *one.free_files, *one.reused_files):
            size = plain_size(directory, entry.path, DataError)
            if size != entry.num_bytes or sha256(directory / entry.path) != entry.sha256:
                raise DataError(
                    "the vocabularies of an extended dataset are whole. Received: "
                    f"{directory / entry.path}, which is not the file of the manifest. Copy it "
                    "again, or extend another one."
                )


def _check_features(config: Config, previous: DatasetManifest, directory: Path) -> None:
    """Old rows mean the same only while a feature is made in the same way."""
    old = _stored_features(previous)
    for side, features in config.prepare.features_by_side():
        for feature in features:
            column = c.feature_column(side, feature.feature_name)
            if column not in old:
                continue
            for key in _MEANING:
                was, now = old[column].get(key), feature.model_dump(mode="json")[key]
                if was != now:
                    raise ConfigError(
                        "a feature of an extended dataset keeps its meaning. Received: "
                        f"{key} = {now!r} for {side} feature {feature.feature_name!r}, which has "
                        f"{was!r} in {directory}. Put it back, or give the feature another name."
                    )


def _check_event_types(config: Config, previous: DatasetManifest, directory: Path) -> None:
    """A kind of event is told by its place, which it keeps."""
    now, was = config.prepare.told_event_types, previous.event_types
    if now[: len(was)] != was:
        raise ConfigError(
            "the kinds of event of an extended dataset keep their places. Received: "
            f"prepare.event_types = {list(config.prepare.event_types)}, where {directory} has "
            f"{list(was)}. Begin with these, in this order, and keep events.time."
        )


def _stored_features(previous: DatasetManifest) -> dict[str, dict[str, object]]:
    """Feature column -> its configuration, as the previous dataset keeps it."""
    stored = previous.config.get("prepare", {})
    found = {}
    try:
        lists = {
            "user": (stored.get("users") or {}).get("features", []),
            "item": (stored.get("items") or {}).get("features", []),
            "context": (stored.get("events") or {}).get("context", []),
        }
        for side, features in lists.items():
            for entry in features:
                name = str(entry.get("name") or entry["column"])
                # keys that it did not know yet have their defaults
                defaults = {key: FeatureConfig.model_fields[key].default for key in _MEANING}
                found[c.feature_column(side, name)] = {**defaults, **entry}
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(
            "the manifest of an extended dataset holds the section [prepare] that it was made "
            f"with. Received: {error!r}. Extend another dataset."
        ) from error
    return found
