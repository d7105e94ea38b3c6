"""What each metric means, how it is called and in which direction it is better."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """How a metric is shown.

    Args:
        label: Column heading; "@K" is added where there is a cut-off.
        meaning: One sentence.
        better: Which way is better; "depends" where neither is.
        family: ranking (is the withheld item found), beyond (what kind of list it is), or
            classification (are probabilities or ratings right).
    """

    label: str
    meaning: str
    better: Literal["higher", "lower", "depends"] = "higher"
    family: Literal["ranking", "beyond", "classification"] = "ranking"


METRICS = {
    "ndcg": Metric(
        "NDCG",
        "Normalised discounted cumulative gain: a withheld item counts the more, the higher it "
        "stands among the first K; 1 is the best possible order.",
    ),
    "recall": Metric("Recall", "Share of a user's withheld items found among the first K."),
    "hr": Metric("HR", "Hit rate: share of users with a withheld item among the first K."),
    "precision": Metric("Precision", "Share of the first K that are withheld items of the user."),
    "mrr": Metric(
        "MRR",
        "Mean reciprocal rank: 1 / rank of the first withheld item among the first K, else 0.",
    ),
    "map": Metric(
        "MAP", "Mean average precision: precision at the rank of each withheld item, averaged."
    ),
    "coverage": Metric(
        "Coverage",
        "Share of the catalogue that is recommended to somebody within the first K.",
        family="beyond",
    ),
    "popularity": Metric(
        "Popularity",
        "Mean number of train events of the recommended items; lower means less of the well known.",
        "depends",
        "beyond",
    ),
    "diversity": Metric(
        "Diversity",
        "Mean of 1 - cosine between the feature vectors of two items of one list; higher means "
        "that the items of a list are less alike.",
        family="beyond",
    ),
    "novelty": Metric(
        "Novelty", "Mean surprise of the recommended items, -log2 of their share.", family="beyond"
    ),
    "auc": Metric(
        "AUC",
        "Chance that a positive scores above a negative; 0.5 is guessing.",
        family="classification",
    ),
    "log_loss": Metric(
        "Log loss",
        "Mean negative log likelihood of the labels.",
        "lower",
        "classification",
    ),
    "calibration": Metric(
        "Calibration",
        "Mean predicted probability divided by the share of positives; 1 is right.",
        "depends",
        "classification",
    ),
    "calibration_error": Metric(
        "Calibration error",
        "Mean gap between predicted probability and the share of positives.",
        "lower",
        "classification",
    ),
    "positive_share": Metric(
        "Positives", "Share of positives among the examples.", "depends", "classification"
    ),
    "rmse": Metric(
        "RMSE",
        "Root of the mean squared difference between rating and prediction.",
        "lower",
        "classification",
    ),
    "mae": Metric(
        "MAE",
        "Mean absolute difference between rating and prediction.",
        "lower",
        "classification",
    ),
    "num_examples": Metric("Examples", "Labelled examples measured.", "depends", "classification"),
}
MODELS = {
    "distrec": "distrec",
    "popularity": "popularity",
    "item_knn": "item kNN",
    "markov": "Markov",
    "ease": "EASE",
    "als": "ALS",
}
# slices whose lists do not hold the whole catalogue
OTHER_LISTS = frozenset({"among_new_items"})
SLICES = {
    "cold_users": "cold users",
    "warm_users": "warm users",
    "cold_items": "cold items",
    "warm_items": "warm items",
    "new_items": "new items",
    "among_new_items": "new items, of these alone",
}


def split_name(name: str) -> tuple[str, int | None]:
    """``ndcg@10`` -> ("ndcg", 10); a name without a cut-off -> (name, None)."""
    base, at, cutoff = name.partition("@")
    return (base, int(cutoff)) if at and cutoff.isdigit() else (name, None)


def describe(base: str) -> Metric:
    """The entry of a metric; one that is not in the list is shown under its own name.

    That of a further task, such as auc:purchased, has the task in its label.
    """
    name, _, task = base.partition(":")
    known = METRICS.get(name)
    if known and task:
        return replace(known, label=f"{known.label} of {task}")
    return known or Metric(base.replace("_", " "), "Not described here.", "depends")


def label(name: str) -> str:
    """``ndcg@10`` -> ``NDCG@10``."""
    base, cutoff = split_name(name)
    return describe(base).label + (f"@{cutoff}" if cutoff is not None else "")


def model_label(name: str) -> str:
    """Name of a model for people."""
    return MODELS.get(name, name.replace("_", " "))


def slice_label(name: str) -> str:
    """Name of a slice for people."""
    return SLICES.get(name, name.replace("_", " "))
