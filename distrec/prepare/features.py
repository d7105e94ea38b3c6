"""Features fitted on train and encoded: ids, hashes, standardised numbers, vectors.

Value counts of vocabularies are look-ups: one for every train event of the user or item, so that an
id is the rank of how often its row is used. Means, deviations and quantiles are over the users or
items that occur in train, each once (over train events for context features). A missing value of an
id feature is padding, one that is rare or new is unknown.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from distrec import columns as c
from distrec.config import FeatureConfig
from distrec.dataset import FeatureSpec
from distrec.prepare.extend import Continuation
from distrec.prepare.validate import raw_column
from distrec.prepare.vocabulary import NEW, FittedVocabulary, fit_vocabulary
from distrec.prepare.workspace import Workspace

HASH_BUCKETS = 65_536

# number of train events of a row: of a user, of an item; 1 or 0 for an event
TRAIN_COUNT = "train_count"

# names of statistics that are numbered: upper bounds of buckets, means of the places of a vector
_EDGE = "edge_"
_MEAN = "mean_"

Statistics = dict[str, float]


@dataclass(frozen=True)
class FittedFeature:
    """One feature with all that encoding needs.

    Args:
        config: As the user wrote it.
        spec: For the manifest.
        raw: Column that holds the typed value.
        vocabulary: Of categorical features.
        statistics: Of numbers and vectors, under the names of the manifest.
        edges: Of bucketed numbers: upper bounds, included, of all buckets but the last.
        stand_in: Of vectors: what a missing one becomes, (dim,).
        frequent: Of texts: id, of the n-grams that are kept; None keeps all.
    """

    config: FeatureConfig
    spec: FeatureSpec
    raw: str
    vocabulary: FittedVocabulary | None = None
    statistics: Statistics = field(default_factory=dict)
    edges: tuple[float, ...] = ()
    stand_in: tuple[float, ...] = ()
    frequent: DataFrame | None = None

    @property
    def is_bucketed(self) -> bool:
        """Whether a number becomes an id."""
        return self.config.kind == "number" and self.config.num_buckets > 1


def fit_features(
    frame: DataFrame,
    side: str,
    features: Sequence[FeatureConfig],
    workspace: Workspace,
    continuation: Continuation = NEW,
) -> tuple[FittedFeature, ...]:
    """Fit all features of a side.

    Args:
        frame: TRAIN_COUNT and the raw columns; a row a user, an item or an event. With
            continuation.tracks_time also last_time, null where nothing happened.
        side: user, item or context.
        continuation: What is extended: of its features, ids go on and statistics stay.
    """
    seen = frame.filter(F.col(TRAIN_COUNT) > 0)
    in_use = frame.filter(F.col(c.LAST_TIME).isNotNull()) if continuation.tracks_time else seen
    fitted = []
    for config in features:
        name = config.feature_name
        column = c.feature_column(side, name)
        base = FittedFeature(
            config=config,
            spec=FeatureSpec(name=name, side=side, kind=config.kind, column=column),  # type: ignore[arg-type]
            raw=raw_column(side, name),
        )
        if config.kind in ("categorical", "multi_categorical"):
            fitted.append(_fit_ids(base, in_use, workspace, continuation))
            continue
        if config.kind == "text":
            fitted.append(_fit_text(base, seen, workspace, continuation))
            continue
        fit = {
            "hashed": _fit_hashes,
            "number": _fit_number, "vector": _fit_vector,
        }[config.kind]  # fmt: skip
        fitted.append(fit(base, seen, workspace, continuation.statistics(column)))
    return tuple(fitted)


def _with_spec(base: FittedFeature, **values: object) -> FeatureSpec:
    return base.spec.model_copy(update=values)


def _fit_ids(
    base: FittedFeature, frame: DataFrame, workspace: Workspace, continuation: Continuation
) -> FittedFeature:
    value = F.col(base.raw)
    if base.config.kind == "multi_categorical":
        value = F.explode(value)
    aggregates = [F.sum(TRAIN_COUNT).alias(c.COUNT)]
    columns = [value.alias(c.VALUE), F.col(TRAIN_COUNT)]
    if continuation.tracks_time:
        aggregates.append(F.max(c.LAST_TIME).alias(c.LAST_TIME))
        columns.append(F.col(c.LAST_TIME))
    values = frame.select(*columns).filter(F.col(c.VALUE).isNotNull())
    counts = values.groupBy(c.VALUE).agg(*aggregates)
    vocabulary = fit_vocabulary(
        counts, base.spec.column, base.config.min_count, workspace, continuation
    )
    spec = _with_spec(base, num_embeddings=vocabulary.num_embeddings)
    return replace(base, spec=spec, vocabulary=vocabulary)


def _fit_hashes(
    base: FittedFeature, seen: DataFrame, workspace: Workspace, kept: Statistics | None
) -> FittedFeature:
    buckets = base.config.num_buckets or HASH_BUCKETS
    return replace(base, spec=_with_spec(base, num_embeddings=c.FIRST_INDEX + buckets))


def _fit_text(
    base: FittedFeature, seen: DataFrame, workspace: Workspace, continuation: Continuation
) -> FittedFeature:
    fitted = _fit_hashes(base, seen, workspace, None)
    if base.config.min_df == 1:
        return fitted
    ids = seen.select(F.explode(_ngram_ids(F.col(base.raw), fitted)).alias(c.ID))
    frequent = ids.groupBy(c.ID).count().filter(F.col("count") >= base.config.min_df).select(c.ID)
    old = continuation.ids_in_use(base.spec.side, base.spec.column, workspace.spark)
    if old is not None:
        frequent = frequent.union(old).distinct()
    name = f"ngrams-{base.spec.column}"
    return replace(fitted, frequent=workspace.materialize(frequent, name))


def _ngram_ids(text: Column, feature: FittedFeature) -> Column:
    return hashed_ngrams(text, feature.config, feature.spec.num_embeddings - c.FIRST_INDEX)


def _transformed(config: FeatureConfig, value: Column) -> Column:
    """Clip, then log; standardising comes after."""
    if config.clip is not None:
        low, high = (F.lit(bound) for bound in config.clip)
        # greatest and least pass over nulls, which must stay null
        value = F.when(value.isNotNull(), F.least(F.greatest(value, low), high))
    if config.transform == "log":
        value = F.signum(value) * F.log1p(F.abs(value))
    return value


def _fit_number(
    base: FittedFeature, seen: DataFrame, workspace: Workspace, kept: Statistics | None
) -> FittedFeature:
    statistics = _number_statistics(base, seen) if kept is None else kept
    if not base.is_bucketed:
        return replace(base, spec=_with_spec(base, dim=1), statistics=statistics)
    edges = tuple(sorted(value for name, value in statistics.items() if name.startswith(_EDGE)))
    spec = _with_spec(base, kind="categorical", num_embeddings=c.FIRST_INDEX + len(edges) + 1)
    bucketed = replace(base, spec=spec, statistics=statistics, edges=edges)
    return replace(bucketed, vocabulary=_bucket_vocabulary(bucketed, seen, workspace))


def _number_statistics(base: FittedFeature, seen: DataFrame) -> Statistics:
    """Mean and so on, and the edges of the buckets, as the manifest has them."""
    config = base.config
    value = _transformed(config, F.col(base.raw))
    shares = [k / config.num_buckets for k in range(1, config.num_buckets)]
    aggregates = [
        F.avg(value).alias("mean"),
        F.stddev_pop(value).alias("std"),
        F.min(value).alias("min"),
        F.max(value).alias("max"),
        F.count_if(value.isNull()).alias("missing"),
    ]
    if base.is_bucketed:
        aggregates.append(F.percentile_approx(value, shares).alias("edges"))
    row = seen.agg(*aggregates).collect()[0]
    statistics = {
        name: float(row[name] or 0.0) for name in ("mean", "std", "min", "max", "missing")
    }
    if base.is_bucketed:
        # equal quantiles make one bucket; nothing lies above the greatest value
        edges = sorted({float(edge) for edge in row["edges"] or ()} - {statistics["max"]})
        statistics |= {f"{_EDGE}{k}": edge for k, edge in enumerate(edges)}
    return statistics


def _bucket_vocabulary(
    feature: FittedFeature, seen: DataFrame, workspace: Workspace
) -> FittedVocabulary:
    """A readable name a bucket; ids go with the values, not with the counts."""
    bounds = [float("-inf"), *feature.edges, float("inf")]
    names = [f"({low:g}, {high:g}]" for low, high in itertools.pairwise(bounds)]
    buckets = seen.sparkSession.range(c.FIRST_INDEX, c.FIRST_INDEX + len(names))
    counts = seen.groupBy(_bucket(feature).alias(c.ID)).agg(F.sum(TRAIN_COUNT).alias(c.COUNT))
    value = F.element_at(
        F.array(*(F.lit(name) for name in names)), (F.col(c.ID) - c.FIRST_INDEX + 1).cast("int")
    )
    frame = buckets.join(counts, c.ID, "left").select(
        value.alias(c.VALUE), c.ID, F.coalesce(c.COUNT, F.lit(0)).cast("long").alias(c.COUNT)
    )
    name = feature.spec.column
    return FittedVocabulary(name, workspace.materialize(frame, f"vocab-{name}"), len(names))


def _fit_vector(
    base: FittedFeature, seen: DataFrame, workspace: Workspace, kept: Statistics | None
) -> FittedFeature:
    dim = base.config.dim
    stand_in = [0.0] * dim
    if kept is not None:
        stand_in = [kept[f"{_MEAN}{place}"] for place in range(dim)]
    elif base.config.missing == "mean":
        places = seen.select(F.posexplode(base.raw).alias("place", "number"))
        for row in places.groupBy("place").agg(F.avg("number").alias("mean")).collect():
            stand_in[row["place"]] = float(row["mean"])
    means = {f"{_MEAN}{place}": mean for place, mean in enumerate(stand_in)}
    # only a mean is fitted: zero stands for what is missing in every dataset
    statistics = means if base.config.missing == "mean" else {}
    spec = _with_spec(base, dim=dim)
    return replace(base, spec=spec, stand_in=tuple(stand_in), statistics=statistics)


# --- encoding ------------------------------------------------------------------------------------


def encode(frame: DataFrame, features: Sequence[FittedFeature]) -> DataFrame:
    """Put the encoded columns in the place of the raw ones; without nulls.

    Args:
        frame: With the raw columns; rows of which nothing is known have nulls there.
    """
    for feature in features:
        if feature.vocabulary is not None and not feature.is_bucketed:
            frame = _look_up(frame, feature)
        elif feature.frequent is not None:
            frame = _frequent_ngrams(frame, feature, feature.frequent)
        else:
            frame = frame.withColumn(feature.spec.column, _expression(feature))
    return frame.drop(*(feature.raw for feature in features))


def defaults(features: Sequence[FittedFeature]) -> list[Column]:
    """What stands for a feature where there is no event: padding, nothing and zero."""
    empty = {
        "categorical": F.lit(c.PADDING_INDEX).cast("long"),
        "multi_categorical": F.array().cast("array<bigint>"),
        "text": F.array().cast("array<bigint>"),
        "hashed": F.array().cast("array<bigint>"),
        "number": F.lit(0.0).cast("float"),
    }
    chosen = []
    for feature in features:
        if feature.spec.kind == "vector":
            value = F.array_repeat(F.lit(0.0).cast("float"), feature.spec.dim)
        else:
            value = empty[feature.spec.kind]
        chosen.append(value.alias(feature.spec.column))
    return chosen


def _expression(feature: FittedFeature) -> Column:
    kind, value = feature.config.kind, F.col(feature.raw)
    if kind == "text":
        return F.slice(_ngram_ids(value, feature), 1, feature.config.max_values)
    if kind == "hashed":
        return hashed_value(value, feature.config, feature.spec.num_embeddings - c.FIRST_INDEX)
    if kind == "vector":
        stand_in = F.array(*(F.lit(number) for number in feature.stand_in))
        return F.coalesce(value, stand_in).cast("array<float>")
    if feature.is_bucketed:
        return F.coalesce(_bucket(feature), F.lit(c.PADDING_INDEX).cast("long"))
    mean, std = feature.statistics["mean"], feature.statistics["std"]
    if feature.config.missing == "zero":
        value = F.coalesce(value, F.lit(0.0))
    number = F.coalesce(_transformed(feature.config, value), F.lit(mean))
    if feature.config.transform != "none":
        # a constant has no deviation, and becomes zero
        number = (number - mean) / (std or 1.0)
    return number.cast("float")


def _bucket(feature: FittedFeature) -> Column:
    """FIRST_INDEX + the number of edges below the value; null when it is missing."""
    value = F.col(feature.raw)
    if feature.config.missing == "zero":
        value = F.coalesce(value, F.lit(0.0))
    number = _transformed(feature.config, value)
    edges = F.array(*(F.lit(edge) for edge in feature.edges)).cast("array<double>")
    below = F.size(F.filter(edges, lambda edge: edge < number))
    return F.when(number.isNotNull(), (below + c.FIRST_INDEX).cast("long"))


def hashed_ngrams(text: Column, config: FeatureConfig, num_buckets: int) -> Column:
    """Ids of the word n-grams in [FIRST_INDEX, FIRST_INDEX + num_buckets), each once, words first.

    Words are runs of letters and digits, in lower case. The hash is Spark's xxhash64 of the n-gram,
    its words put together with one space.
    """
    words = F.filter(F.split(F.lower(text), r"[^\p{L}\p{N}]+"), lambda word: word != "")
    words = F.coalesce(words, F.array().cast("array<string>"))
    grams = words
    for length in range(2, config.ngrams + 1):
        starts = F.when(
            F.size(words) >= length, F.sequence(F.lit(1), F.size(words) - (length - 1))
        ).otherwise(F.array().cast("array<int>"))
        grams = F.concat(grams, F.transform(starts, _gram(words, length)))
    ids = F.transform(
        grams, lambda gram: F.pmod(F.xxhash64(gram), F.lit(num_buckets)) + c.FIRST_INDEX
    )
    return F.array_distinct(ids).cast("array<bigint>")


def hashed_value(value: Column, config: FeatureConfig, num_buckets: int) -> Column:
    """num_hashes ids in [FIRST_INDEX, FIRST_INDEX + num_buckets), or none of a missing value.

    Hash function k is Spark's xxhash64 of the pair of value and k.
    """
    hashes = [F.xxhash64(value, F.lit(k)) for k in range(config.num_hashes)]
    ids = F.array(*(F.pmod(one, F.lit(num_buckets)) + c.FIRST_INDEX for one in hashes))
    return F.when(value.isNull(), F.array()).otherwise(ids).cast("array<bigint>")


def _gram(words: Column, length: int) -> Callable[[Column], Column]:
    """From the place of its first word, 1-based, to an n-gram."""
    return lambda start: F.concat_ws(" ", F.slice(words, start, F.lit(length)))


def _look_up(frame: DataFrame, feature: FittedFeature) -> DataFrame:
    assert feature.vocabulary is not None
    ids = feature.vocabulary.frame.select(
        F.col(c.VALUE).alias("__value"), F.col(c.ID).alias("__id")
    )
    unknown = F.lit(c.UNKNOWN_INDEX).cast("long")
    raw, column = F.col(feature.raw), feature.spec.column
    if feature.config.kind == "categorical":
        index = F.when(raw.isNull(), F.lit(c.PADDING_INDEX).cast("long")).otherwise(
            F.coalesce("__id", unknown)
        )
        joined = frame.join(ids, raw == F.col("__value"), "left")
        return joined.withColumn(column, index).drop("__value", "__id")
    cells = frame.select(raw.alias("__cell")).filter(F.size("__cell") > 0).distinct()
    exploded = cells.select("__cell", F.posexplode("__cell").alias("__place", "__value"))
    index = F.coalesce("__id", unknown).alias("__id")
    found = exploded.join(ids, "__value", "left").select("__cell", "__place", index)
    return _with_ids_of_cells(frame, feature, found)


def _frequent_ngrams(frame: DataFrame, feature: FittedFeature, frequent: DataFrame) -> DataFrame:
    cells = frame.select(F.col(feature.raw).alias("__cell")).filter("__cell IS NOT NULL").distinct()
    ids = _ngram_ids(F.col("__cell"), feature)
    exploded = cells.select("__cell", F.posexplode(ids).alias("__place", "__id"))
    found = exploded.join(frequent.withColumnRenamed(c.ID, "__id"), "__id", "left_semi")
    return _with_ids_of_cells(frame, feature, found)


def _with_ids_of_cells(frame: DataFrame, feature: FittedFeature, found: DataFrame) -> DataFrame:
    """Put the ids of a cell, in their order, into every row that has it: many may.

    Args:
        frame: With the raw column.
        feature: Of several ids.
        found: __cell, __place, __id.
    """
    places = F.sort_array(F.collect_list(F.struct("__place", "__id")))
    encoded = (
        found.groupBy("__cell")
        .agg(places.alias("__places"))
        .select("__cell", F.transform("__places", lambda place: place["__id"]).alias("__ids"))
    )
    ids = F.array_distinct("__ids")
    if feature.config.kind == "text":
        ids = F.slice(ids, 1, feature.config.max_values)
    none = F.array().cast("array<bigint>")
    return (
        frame.join(encoded, F.col(feature.raw) == F.col("__cell"), "left")
        .withColumn(feature.spec.column, F.coalesce(ids, none))
        .drop("__cell", "__ids")
    )
