"""ALS in Spark, beside Spark's own factors of users, and on a data set with planted groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pyspark.ml import recommendation
from pyspark.sql import SparkSession

from distrec.baselines import ALS, fit_baseline, profiles
from distrec.baselines.als import ALSOptions, positive_pairs
from distrec.columns import FIRST_INDEX, TRAIN, VALID
from distrec.dataset import read_manifest
from distrec.metrics.events import positive_events
from tests.synthetic import NUM_GROUPS, write_dataset
from tests.unit.test_baselines import make_config, make_queries, scores_of


def test_a_user_is_folded_in_as_spark_finds_their_factors(spark: SparkSession) -> None:
    rng = np.random.default_rng(0)
    dense = rng.random((25, 12)) < 0.3
    rows = [(int(user), int(item), 1.0) for user, item in zip(*dense.nonzero(), strict=True)]
    job = recommendation.ALS(
        rank=4, maxIter=3, regParam=0.3, alpha=7.0, implicitPrefs=True, seed=5,
        userCol="user", itemCol="item", ratingCol="rating",
    )  # fmt: skip
    model = job.fit(spark.createDataFrame(rows, "user int, item int, rating double"))
    items = {row.id: row.features for row in model.itemFactors.collect()}
    users = {row.id: row.features for row in model.userFactors.collect()}
    factors = np.array([items.get(item, [0.0] * 4) for item in range(12)], np.float32)
    options = ALSOptions(factors=4, iterations=3, regularization=0.3, alpha=7.0, seed=5)
    found = ALS(factors, options).user_factors(profiles.binary(*dense.nonzero(), dense.shape))
    expected = np.array([users.get(user, [0.0] * 4) for user in range(25)])
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("labels", [False, True])
def test_als_finds_the_planted_groups(spark: SparkSession, tmp_path: Path, labels: bool) -> None:
    config = make_config(tmp_path, als_factors=4, als_iterations=5)
    manifest = write_dataset(config.dataset_directory, num_users=200, labels=labels)
    profile = [[6, 10, 14], []]
    queries = make_queries(*((profile[::-1], profile) if labels else (profile, profile[::-1])))
    scores = scores_of(fit_baseline("als", config, manifest), queries)
    best = np.argsort(-scores[0])[:9] + FIRST_INDEX
    assert {int(index - FIRST_INDEX) % NUM_GROUPS for index in best} == {0}
    # of no user, and of the items that no event is of, nothing is known
    assert not scores[1].any()
    assert not scores[:, 40:].any()
    # the session was there before, and still is
    assert spark.range(3).count() == 3


@pytest.mark.parametrize("splits", [(TRAIN,), (TRAIN, VALID)])
def test_of_windows_every_event_counts(
    spark: SparkSession, tmp_path: Path, splits: tuple[str, ...]
) -> None:
    found = []
    for train_rows in ("events", "windows"):
        manifest = write_dataset(tmp_path / train_rows, events_per_user=11, train_rows=train_rows)
        pairs = positive_pairs(spark, tmp_path / train_rows, manifest, splits)
        found.append(sorted(map(tuple, pairs.collect())))
    assert found[0] == found[1]
    expected = set()
    manifest = read_manifest(tmp_path / "events")
    for users, items in positive_events(tmp_path / "events", manifest, splits):
        expected |= set(zip(users.tolist(), items.tolist(), [1.0] * len(users), strict=True))
    assert found[0] == sorted(expected)
