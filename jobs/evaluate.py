"""Metrics of the model and of baselines: python jobs/evaluate.py --config conf/X.toml"""

from __future__ import annotations

import sys

from distrec import pipeline
from distrec.job import run_job

if __name__ == "__main__":
    sys.exit(run_job("evaluate", __doc__, pipeline.evaluate))
