"""MovieLens-1M, the test of NCF with 99 given negatives: the unified model beside published rows.

    python benchmarks/quality/ml1m_ncf.py DATA_FOLDER [--seeds 3]

DATA_FOLDER has ml-1m/ratings.dat.gz, ml-1m.test.rating and ml-1m.test.negative.gz. A user's target
is ranked among the 99 items given for them. Of the other events the last is valid; how long to
train is chosen there, over the whole catalogue, and then a model is trained so long on all but
test. Settings are those of ml1m_whole.py. Published: EASE .7192/.4494, SLIM .7162/.4468, iALS
.7109/.4382, NeuMF .7093/.4349 (Ferrari Dacrema et al. 2021, "A Troubling Analysis of
Reproducibility and Progress in Recommender Systems Research", arXiv:1911.07698, appendix).
"""

from __future__ import annotations

import json

from ml1m_whole import CHOSEN
from sources import write_candidates
from unified import arguments, common, report

BARS = {"hr@10": common.at_least(0.730), "ndcg@10": common.at_least(0.460)}

if __name__ == "__main__":
    given = arguments(__doc__, "runs/quality")
    candidates = write_candidates(given.data, given.output / "ml-1m-ncf" / "raw").resolve()
    chosen = (
        *CHOSEN,
        'prepare.split.method="given"',
        f"evaluate.test_candidates={json.dumps(str(candidates))}",
    )
    report("quality/ml1m_ncf", "ml-1m-ncf", "sequence.toml", given, BARS, chosen, refits=True)
