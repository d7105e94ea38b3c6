"""Amazon-Book in the split of KGAT, events without order: the unified model beside KGAT.

    python benchmarks/quality/amazon_book.py DATA_FOLDER [--seeds 3]

DATA_FOLDER has amazon-book/train.txt and test.txt, the files of KGAT. How long to train is chosen
on a tenth of the train events; then a model is trained so long on all of them. All items that the
user does not have are candidates. The configuration is conf/unordered.toml with CHOSEN. Published:
KGAT .1503 (its log), GF-CF .1691 (Shen et al. 2021, arXiv:2108.07567).
"""

from __future__ import annotations

from unified import arguments, common, report

METRICS = ("recall@20", "ndcg@20")
BARS = {"recall@20": common.at_least(0.150)}

CHOSEN = (
    'prepare.split.method="given"', 'train.metric="recall@20"', "loss.num_negatives=2048",
    "train.max_epochs=2", "model.embedding_dim=256", "model.id_dropout=0.0",
)  # fmt: skip

if __name__ == "__main__":
    given = arguments(__doc__, "runs/quality")
    report(
        "quality/amazon_book", "amazon-book", "unordered.toml", given, BARS, CHOSEN,
        refits=True, metrics=METRICS,
    )  # fmt: skip
