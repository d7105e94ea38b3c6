"""LastFM, leave-one-out, the whole catalogue: the unified model beside EASE.

    python benchmarks/quality/lastfm.py DATA_FOLDER [--seeds 3]

DATA_FOLDER has lastfm/LastFM.txt, the file of S3-Rec. A user's last event is test, the one before
it valid. How long to train is chosen on valid; then a model is trained so long on all but test. The
configuration is conf/sequence.toml with CHOSEN: a thousand users are few, so more is withheld. The
bar is what EASE reaches without the valid events; with them it is among the baselines of the run.
"""

from __future__ import annotations

from unified import arguments, common, report

BARS = {"ndcg@10": common.at_least(0.0487)}

CHOSEN = (
    'model.towers=["cf", "autoencoder", "sequence"]', "model.id_dropout=0.3",
    "model.input_dropout=0.5", "model.dropout=0.5", "train.global_batch_size=64",
    "train.max_epochs=20", "train.early_stopping_patience=0", "loss.towers=1.0",
    "model.share_item_embedding=false",
)  # fmt: skip

if __name__ == "__main__":
    given = arguments(__doc__, "runs/quality")
    report("quality/lastfm", "lastfm", "sequence.toml", given, BARS, CHOSEN, refits=True)
