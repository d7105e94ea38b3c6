"""MovieLens-1M, ratings, five random folds: the unified model beside SVD.

    python benchmarks/quality/ml1m_ratings.py DATA_FOLDER [--folds 5]

DATA_FOLDER has ml-1m/ratings.dat.gz and movies.dat. A fifth of the ratings is test, each
in its turn. How long to train is chosen on a tenth of the others; then a model is trained so long
on all of them. The configuration is conf/ratings.toml. Published, by surprise: RMSE .873 of SVD,
.862 of SVD++.
"""

from __future__ import annotations

import argparse

from sources import NUM_FOLDS, RATINGS, catalogue
from unified import add_arguments, common, configure_logging, measure, spread

METRICS = ("rmse", "mae")
BARS = {"rmse": common.at_most(0.873)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_arguments(parser, "runs/quality")
    parser.add_argument("--folds", type=int, default=NUM_FOLDS, help="only the first of them")
    given = parser.parse_args()
    configure_logging()
    common.print_header(["torch", "horovod", "pyspark"], f"{given.ranks} ranks of 1 thread")
    chosen = ('prepare.split.method="given"', catalogue(given.data)[0])
    runs = [
        measure(name, "ratings.toml", given, 1, chosen, True, METRICS)
        for name in RATINGS[: given.folds]
    ]
    figures: dict[str, float] = {"folds": len(runs)}
    for metric in METRICS:
        values = [run["test"][metric] for run in runs]
        figures |= spread(metric, values)
    common.print_result("quality/ml1m_ratings", figures, BARS)


if __name__ == "__main__":
    main()
