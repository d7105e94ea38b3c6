"""Baselines that a model has to beat, learnt from the same dataset and measured by the same code.

Each learns from the positive events of train (or of train and valid) alone and gives scores for
queries like any model. None sees a user's index: a user is what the query tells of them, as for our
model, so that a test query brings the valid event along. ``item_knn``, ``ease`` and ``als`` take
all items that the user has had (with labels, the positives of the history), ``markov`` the last of
the history in their order, ``popularity`` nothing.
"""

from distrec.baselines.als import ALS
from distrec.baselines.ease import EASE
from distrec.baselines.fit import check_baselines, chosen_baselines, fit_baseline
from distrec.baselines.item_knn import ItemKNN
from distrec.baselines.markov import Markov
from distrec.baselines.popularity import Popularity

__all__ = [
    "ALS",
    "EASE",
    "ItemKNN",
    "Markov",
    "Popularity",
    "check_baselines",
    "chosen_baselines",
    "fit_baseline",
]
