"""Amazon Toys and Games, leave-one-out, the whole catalogue: the model beside Markov and EASE.

    python benchmarks/quality/toys.py DATA_FOLDER [--seeds 3]

DATA_FOLDER has toys/Toys_and_Games.txt, the file of S3-Rec. A user's last event is test, the one
before it valid; neither is trained on. The configuration is conf/sequence.toml with CHOSEN. The
bars are what first-order Markov (.0551) and EASE (.0443) reach on the same train events; see
baselines.py.
"""

from __future__ import annotations

from unified import arguments, common, report

BARS = {"ndcg@10": common.at_least(0.0551)}

CHOSEN = (
    'model.towers=["autoencoder", "sequence"]', "loss.towers=1.0",
)  # fmt: skip

if __name__ == "__main__":
    given = arguments(__doc__, "runs/quality")
    report("quality/toys", "toys", "sequence.toml", given, BARS, CHOSEN)
