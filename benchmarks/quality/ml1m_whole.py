"""MovieLens-1M, leave-one-out by time, the whole catalogue: the unified model beside SASRec.

    python benchmarks/quality/ml1m_whole.py DATA_FOLDER [--seeds 3]

DATA_FOLDER has ml-1m/ratings.dat.gz. Every rating is an event; a user's last one is test, the one
before it valid. How long to train is chosen on valid; then a model is trained so long on all but
test, as the published ones are. All films that the user has not rated before are candidates. The
configuration is conf/sequence.toml with CHOSEN. Published: SASRec .2853/.1603, HSTU .3097/.1720,
HSTU-large .3294/.1893 (Zhai et al. 2024, arXiv:2402.17152, and the README of its code). As in HSTU,
and not in SASRec, a model is told when the event takes place that it is to predict.
"""

from __future__ import annotations

from unified import arguments, common, report

BARS = {"hr@10": common.at_least(0.285), "ndcg@10": common.at_least(0.160)}

CHOSEN = (
    'model.towers=["cf", "autoencoder", "sequence"]', "model.id_dropout=0.4",
    'model.sequence_attention="hstu"', "model.sequence_layers=4", "model.dropout=0.2",
    "prepare.history_length=200", "model.embedding_dim=64", "train.global_batch_size=64",
    "train.max_epochs=12", "loss.exclude_seen=true",
)  # fmt: skip

if __name__ == "__main__":
    given = arguments(__doc__, "runs/quality")
    report("quality/ml1m_whole", "ml-1m", "sequence.toml", given, BARS, CHOSEN, refits=True)
