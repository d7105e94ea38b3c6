"""Raw events and catalogues to a dataset: spark-submit jobs/prepare.py --config conf/X.toml"""

from __future__ import annotations

import sys
from typing import Any

from distrec import prepare
from distrec.config import Config
from distrec.job import run_job
from distrec.spark import session


def main(config: Config) -> dict[str, Any]:
    """Prepare the dataset of the run."""
    manifest = prepare.run(session(config, "prepare"), config)
    return {"dataset": str(config.dataset_directory), "counts": manifest.counts}


if __name__ == "__main__":
    sys.exit(run_job("prepare", __doc__, main))
