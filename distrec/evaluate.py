"""The evaluate job: one process measures a checkpoint and the baselines on valid and test.

All are measured by the same code on the same queries, and ``metrics.json`` appears whole or not at
all.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from distrec import checkpoint, columns
from distrec.batch import ItemBatch
from distrec.config import Config
from distrec.dataset import DatasetManifest, read_manifest
from distrec.errors import DataError
from distrec.files import replace_text
from distrec.metrics.baselines import ItemKNN, Popularity, check_item_knn
from distrec.metrics.classification import ClassificationMetrics
from distrec.metrics.evaluation import (
    ModelScorer,
    Scorer,
    encode_catalogue,
    evaluate_examples,
    inference,
)
from distrec.metrics.item_vectors import item_vectors
from distrec.metrics.ranking import RankingMetrics
from distrec.reader import ExampleReader, read_items, read_queries
from distrec.scoring.model import ScoringModel, check_same_data, open_model
from distrec.world import World

logger = logging.getLogger("distrec.evaluate")

MODEL = "distrec"
QUERIES = {columns.VALID: columns.VALID_QUERIES, columns.TEST: columns.TEST_QUERIES}
_ITEMS_PER_LOOKUP = 1 << 15
_SUMMARY_K = 10
_SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True)
class Inputs:
    """What every part of the job reads.

    Args:
        config: Of the run.
        manifest: Of the dataset.
        items: The whole catalogue.
        vectors: float32, (M, F): which items are alike, for diversity.
    """

    config: Config
    manifest: DatasetManifest
    items: ItemBatch
    vectors: torch.Tensor

    def ranking_metrics(self) -> RankingMetrics:
        """Metrics that nothing has been added to."""
        options = self.config.evaluate
        return RankingMetrics(
            options.ks,
            self.manifest.num_items,
            self.items.count,
            exclude_seen=options.exclude_seen,
            cold_user_events=options.cold_user_events,
            cold_item_count=options.cold_item_count,
            item_vectors=self.vectors,
        )


def run(config: Config) -> dict[str, Any]:
    """Measure the run's checkpoint and write config.metrics_path.

    Returns:
        A summary: where the file is, and the test metrics at the cut-off nearest to 10, by model.

    Raises:
        CheckpointError: There is no checkpoint, or it is of another dataset.
        ConfigError: A baseline cannot take a dataset of this size.
        DataError: The dataset is damaged, or has no test queries.
    """
    manifest = read_manifest(config.dataset_directory)
    if not _num_queries(manifest, columns.TEST):
        raise DataError(
            "evaluate needs test queries. Received: none. Users may have too few events for the "
            "split: see prepare.split and the filters of [prepare]."
        )
    if "item_knn" in config.evaluate.baselines:
        check_item_knn(manifest)
    model = open_model(checkpoint.find(config.checkpoint_directory, config.score.checkpoint))
    check_same_data(model, manifest, config.dataset_directory)
    logger.info("checkpoint %s", model.version)
    items = read_items(config.dataset_directory, manifest)
    vectors = item_vectors(config.dataset_directory, manifest, items)
    inputs = Inputs(config, manifest, items, vectors)
    with inference(model.model):
        scorers = _scorers(inputs, model)
        splits = {
            split: _measure_split(inputs, split, scorers)
            for split in QUERIES
            if _num_queries(manifest, split)
        }
    document = {
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": model.path.name,
        "model_version": model.version,
        "global_step": model.manifest.global_step,
        "dataset_hash": manifest.content_hash,
        "ks": sorted(set(config.evaluate.ks)),
        "splits": splits,
    }
    _write(config.metrics_path, document)
    return _summary(config, splits)


def _num_queries(manifest: DatasetManifest, split: str) -> int:
    queries = manifest.splits.get(QUERIES[split])
    return queries.num_rows if queries is not None else 0


def _device(config: Config) -> torch.device:
    """Where the products with the catalogue are made; encoding reads mapped tables on the CPU."""
    if config.launch.device != "cpu" and torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu")


def _scorers(inputs: Inputs, model: ScoringModel) -> dict[str, Scorer]:
    """The model and the baselines, by the name under which they are reported."""
    config, manifest = inputs.config, inputs.manifest
    directory = config.dataset_directory
    cpu = torch.device("cpu")
    vectors = encode_catalogue(model.model, model.tables, inputs.items, _ITEMS_PER_LOOKUP, cpu)
    vectors = vectors.to(_device(config))
    scorers: dict[str, Scorer] = {MODEL: ModelScorer(model.model, model.tables, vectors, cpu)}
    if "popularity" in config.evaluate.baselines:
        scorers["popularity"] = Popularity.fit(directory, manifest)
    if "item_knn" in config.evaluate.baselines:
        logger.info("finding the neighbours of %d items", len(inputs.items.item_index))
        neighbors = config.evaluate.knn_neighbors
        scorers["item_knn"] = ItemKNN.fit(directory, manifest, neighbors)
    return scorers


def _measure_split(inputs: Inputs, split: str, scorers: Mapping[str, Scorer]) -> dict[str, Any]:
    """Every scorer on the queries of a split, which are read once; the model on its examples."""
    config, manifest = inputs.config, inputs.manifest
    total = _num_queries(manifest, split)
    metrics = {name: inputs.ranking_metrics() for name in scorers}
    queries = read_queries(
        config.dataset_directory, manifest, QUERIES[split], World(), config.evaluate.batch_size
    )
    done = 0
    started = last_line = time.monotonic()
    for batch in queries:
        for name, score in scorers.items():
            metrics[name].update(score(batch), batch)
        done += batch.batch.batch_size
        now = time.monotonic()
        if done == total or now - last_line >= _SECONDS_BETWEEN_LINES:
            rate = done / max(now - started, 1e-9)
            logger.info("%s: %d of %d queries, %.0f/s", split, done, total, rate)
            last_line = now
    classification = _measure_examples(inputs, split, scorers[MODEL])
    return {
        "num_queries": metrics[MODEL].num_queries,
        "models": {
            name: {
                "metrics": metrics[name].compute(),
                "slices": metrics[name].compute_slices(),
                "classification": classification if name == MODEL else None,
            }
            for name in scorers
        },
    }


def _measure_examples(inputs: Inputs, split: str, scorer: Scorer) -> dict[str, Any] | None:
    """AUC, log loss and calibration of the model where the data tells negatives from positives."""
    config, manifest = inputs.config, inputs.manifest
    if not manifest.has_labels or not isinstance(scorer, ModelScorer):
        return None
    reader = ExampleReader(
        config.dataset_directory, manifest, split, World(), config.reader,
        config.evaluate.batch_size, config.seed,
    )  # fmt: skip
    metrics = ClassificationMetrics(exact_auc=True)
    evaluate_examples(scorer, reader.batches(epoch=0), metrics)
    values = metrics.compute()
    logger.info("%s: %d labelled examples", split, values["num_examples"])
    return values


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write(path: Path, document: Mapping[str, Any]) -> None:
    text = json.dumps(_finite(dict(document)), indent=1, allow_nan=False) + "\n"
    replace_text(path, text)


def _summary(config: Config, splits: Mapping[str, Any]) -> dict[str, Any]:
    test = splits[columns.TEST]
    k = min(config.evaluate.ks, key=lambda cut: (abs(cut - _SUMMARY_K), cut))
    models = {
        name: {
            metric: round(value, 6)
            for metric, value in part["metrics"].items()
            if metric.endswith(f"@{k}")
        }
        for name, part in test["models"].items()
    }
    for name, values in models.items():
        logger.info(
            "test: %s ndcg@%d %.4f recall@%d %.4f",
            name, k, values[f"ndcg@{k}"], k, values[f"recall@{k}"],
        )  # fmt: skip
    return {"metrics": str(config.metrics_path), "num_queries": test["num_queries"], "test": models}
