"""Top-K of the whole catalogue for every user: spark-submit jobs/score.py --config conf/X.toml"""

from __future__ import annotations

import sys

from distrec import pipeline
from distrec.job import run_job

if __name__ == "__main__":
    sys.exit(run_job("score", __doc__, pipeline.score))
