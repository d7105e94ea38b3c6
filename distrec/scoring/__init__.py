"""The best items for every user, by Spark: from a checkpoint and a dataset to Parquet."""

from distrec.scoring.run import run
from distrec.scoring.write import ScoreManifest

__all__ = ["ScoreManifest", "run"]
