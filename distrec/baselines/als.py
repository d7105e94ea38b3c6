"""Matrix factorisation of implicit feedback by alternating least squares, in a Spark job.

Only the factors of items are taken from Spark: users of queries are folded in, so that a user whose
history has grown since train, or whom train never saw, is one like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from torch import Tensor

from distrec.baselines.profiles import profiles
from distrec.batch import QueryBatch
from distrec.columns import FIRST_INDEX, HISTORY, ITEM_INDEX, LABEL, TRAIN, USER_INDEX
from distrec.config import Config
from distrec.dataset import DatasetManifest
from distrec.files import uri
from distrec.metrics.evaluation import rows_per_block

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession


@dataclass(frozen=True)
class ALSOptions:
    """What is minimised: sum over all pairs of c (p - x y)^2, plus the regularisation.

    Args:
        factors: Width of the factors.
        iterations: Over users and items.
        regularization: Weight of |x|^2, times the events of the user, and so for items.
        alpha: c = 1 + alpha and p = 1 for what a user has had; c = 1 and p = 0 for the rest.
        seed: Of the first factors.
    """

    factors: int
    iterations: int
    regularization: float
    alpha: float
    seed: int


class ALS:
    """An item scores the inner product of its factors with those that fit the user's items best.

    Args:
        item_factors: float32, (M, F); zeros for an item without events.
        options: With which they were found.
        use_history: As `profiles` has it.

    Source: Hu, Koren and Volinsky 2008, doi:10.1109/ICDM.2008.22; the regularisation is weighted
    as in Zhou et al. 2008, doi:10.1007/978-3-540-68880-8_32.
    """

    def __init__(
        self,
        item_factors: npt.NDArray[np.float32],
        options: ALSOptions,
        use_history: bool = False,
    ) -> None:
        self.options = options
        self.use_history = use_history
        self._items = item_factors.astype(np.float64)
        self._gram = self._items.T @ self._items

    @classmethod
    def fit(
        cls,
        config: Config,
        manifest: DatasetManifest,
        options: ALSOptions,
        splits: Sequence[str] = (TRAIN,),
    ) -> ALS:
        """Learn from a dataset with Spark; a session that this starts is stopped again.

        Raises:
            LaunchError: Spark does not start.
        """
        from pyspark.sql import SparkSession

        from distrec.spark import session

        active = SparkSession.getActiveSession()
        spark = session(config, "evaluate")
        try:
            factors = _fit(spark, config.dataset_directory, manifest, options, splits)
        finally:
            if active is None:
                spark.stop()
        return cls(factors, options, use_history=manifest.has_labels)

    def __call__(self, queries: QueryBatch) -> Iterator[Tensor]:
        """float32, (B, M), in blocks of rows."""
        users = self.user_factors(profiles(queries, len(self._items), self.use_history))
        items = torch.from_numpy(self._items.astype(np.float32))
        rows = rows_per_block(len(items))
        return (part @ items.T for part in torch.from_numpy(users).split(rows) if len(part))

    def user_factors(self, had: sparse.csr_matrix) -> npt.NDArray[np.float32]:
        """The least-squares step for users, as Spark makes it. float32, (B, F).

        Args:
            had: float32 zeros and ones, (B, M).
        """
        options = self.options
        identity = np.eye(options.factors)
        users = np.zeros((had.shape[0], options.factors), np.float32)
        for row in range(had.shape[0]):
            items = self._items[had.indices[had.indptr[row] : had.indptr[row + 1]]]
            if not len(items):
                continue
            left = self._gram + options.alpha * items.T @ items
            left += options.regularization * len(items) * identity
            users[row] = np.linalg.solve(left, (1.0 + options.alpha) * items.sum(axis=0))
        return users


def _fit(
    spark: SparkSession,
    directory: Path,
    manifest: DatasetManifest,
    options: ALSOptions,
    splits: Sequence[str],
) -> npt.NDArray[np.float32]:
    """Factors of all items of the catalogue. float32, (M, F)."""
    from pyspark.ml import recommendation

    job = recommendation.ALS(
        rank=options.factors, maxIter=options.iterations, regParam=options.regularization,
        alpha=options.alpha, implicitPrefs=True, seed=options.seed,
        userCol=USER_INDEX, itemCol=ITEM_INDEX, ratingCol="rating",
    )  # fmt: skip
    found = job.fit(positive_pairs(spark, directory, manifest, splits)).itemFactors.toArrow()
    factors = np.zeros((manifest.num_items - FIRST_INDEX, options.factors), np.float32)
    rows = found["id"].to_numpy() - FIRST_INDEX
    factors[rows] = np.stack(found["features"].to_numpy())
    return factors


def positive_pairs(
    spark: SparkSession, directory: Path, manifest: DatasetManifest, splits: Sequence[str]
) -> DataFrame:
    """user_index and item_index, int, of the positive events of known users and items, once each.

    With the column rating, which is 1.
    """
    from pyspark.sql import functions as F

    parts = []
    for split in splits:
        files = [uri(directory / entry.path) for entry in manifest.splits[split].files]
        rows = spark.read.parquet(*files)
        item = F.col(ITEM_INDEX)
        if split == TRAIN and manifest.train_rows == "windows":
            item = F.explode(F.concat(HISTORY, F.array(ITEM_INDEX)))
        if manifest.has_labels:
            rows = rows.filter(F.col(LABEL) > 0)
        parts.append(rows.select(USER_INDEX, item.alias(ITEM_INDEX)))
    events = reduce(lambda one, other: one.unionByName(other), parts)
    known = (F.col(USER_INDEX) >= FIRST_INDEX) & (F.col(ITEM_INDEX) >= FIRST_INDEX)
    pairs = events.filter(known).select(*(F.col(name).cast("int") for name in events.columns))
    return pairs.distinct().withColumn("rating", F.lit(1.0))
