"""Raw events and catalogues to a dataset: spark-submit jobs/prepare.py --config conf/X.toml"""

from __future__ import annotations

import sys

from distrec import pipeline
from distrec.job import run_job

if __name__ == "__main__":
    sys.exit(
        run_job(
            "prepare",
            str(__doc__),
            pipeline.prepare,
            options={
                "--extend": (
                    "prepare.extend",
                    "an earlier dataset, whose values keep their ids; the same as prepare.extend",
                )
            },
        )
    )
