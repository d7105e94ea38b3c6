"""Which baselines a run measures, which of them its dataset allows, and their fitting."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from distrec.baselines.als import ALS, ALSOptions
from distrec.baselines.ease import EASE
from distrec.baselines.item_knn import ItemKNN
from distrec.baselines.markov import Markov
from distrec.baselines.popularity import Popularity
from distrec.columns import FIRST_INDEX, TRAIN
from distrec.config import Config
from distrec.dataset import DatasetManifest
from distrec.errors import ConfigError
from distrec.metrics.evaluation import Scorer

CHEAP = ("popularity", "item_knn", "markov")
"""Measured unless the configuration says which."""
MAX_ITEMS = {"item_knn": 200_000, "ease": 30_000}
"""Largest catalogue: item_knn looks at every pair of items, ease holds a number for each."""
MAX_EVENTS = 100_000_000
"""Most events of those that hold them all in memory."""
_IN_MEMORY = ("item_knn", "markov", "ease")

logger = logging.getLogger("distrec.evaluate")


def chosen_baselines(config: Config, manifest: DatasetManifest) -> tuple[str, ...]:
    """The names of evaluate.baselines; without that key, those of CHEAP that the dataset allows."""
    if config.evaluate.baselines is not None:
        return config.evaluate.baselines
    chosen = []
    for name in CHEAP:
        fault = _fault(name, manifest)
        if fault is None:
            chosen.append(name)
        else:
            logger.info("left out: %s", fault)
    return tuple(chosen)


def check_baselines(names: Sequence[str], manifest: DatasetManifest) -> None:
    """Refuse what cannot be fitted, before anything is.

    Raises:
        ConfigError: The catalogue or train is too large for a baseline, or has no order.
    """
    for name in names:
        fault = _fault(name, manifest)
        if fault is not None:
            raise ConfigError(f"{fault} Take {name!r} out of evaluate.baselines.")


def _fault(name: str, manifest: DatasetManifest) -> str | None:
    """Why a baseline cannot be fitted on a dataset."""
    if name == "markov" and not manifest.has_time:
        return (
            "the baseline markov learns what comes after what. Received: a dataset without times."
        )
    num_items, num_events = manifest.num_items - FIRST_INDEX, manifest.splits[TRAIN].num_rows
    if manifest.train_rows == "windows":
        # at most
        num_events *= manifest.history_length
    max_items = MAX_ITEMS.get(name)
    if max_items is not None and num_items > max_items:
        return (
            f"the baseline {name} takes up to {max_items:,} items, for it compares every pair of "
            f"items in one process. Received: {num_items:,} items."
        )
    if name in _IN_MEMORY and num_events > MAX_EVENTS:
        return (
            f"the baseline {name} takes up to {MAX_EVENTS:,} train events, held in memory. "
            f"Received: {num_events:,} events."
        )
    return None


def fit_baseline(
    name: str, config: Config, manifest: DatasetManifest, splits: Sequence[str] = (TRAIN,)
) -> Scorer:
    """Learn one baseline from the positive events of the given splits.

    Raises:
        ConfigError: As `check_baselines`; or evaluate.ease_l2 is too small.
        DataError: A file of the dataset is damaged.
        LaunchError: als, and Spark does not start.
    """
    check_baselines([name], manifest)
    options, directory = config.evaluate, config.dataset_directory
    logger.info("fitting %s on %s", name, " and ".join(splits))
    if name == "popularity":
        return Popularity.fit(directory, manifest, splits)
    if name == "item_knn":
        return ItemKNN.fit(directory, manifest, options.knn_neighbors, splits)
    if name == "markov":
        length, decay = options.markov_length, options.markov_decay
        return Markov.fit(directory, manifest, length, decay, options.markov_smoothing, splits)
    if name == "ease":
        return EASE.fit(directory, manifest, options.ease_l2, splits)
    assert name == "als", name
    als = ALSOptions(
        options.als_factors, options.als_iterations, options.als_regularization,
        options.als_alpha, config.seed,
    )  # fmt: skip
    return ALS.fit(config, manifest, als, splits)
