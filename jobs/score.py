"""Top-K of the whole catalogue for every user: spark-submit jobs/score.py --config conf/X.toml"""

from __future__ import annotations

import sys
from typing import Any

from distrec import scoring
from distrec.config import Config
from distrec.job import run_job
from distrec.spark import session


def main(config: Config) -> dict[str, Any]:
    """Score the users of the run."""
    manifest = scoring.run(session(config, "score"), config)
    return {
        "scores": str(config.scores_directory),
        "num_users": manifest.num_users,
        "num_rows": manifest.num_rows,
        "model_version": manifest.model_version,
    }


if __name__ == "__main__":
    sys.exit(run_job("score", __doc__, main))
