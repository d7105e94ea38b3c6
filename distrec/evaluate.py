"""The evaluate job: one process measures a checkpoint and the baselines on valid and test.

All are measured by the same code on the same queries. ``metrics.json`` appears whole or not at all,
after ``query_ranks.parquet``, whose checksum it holds.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from distrec import checkpoint, columns
from distrec.baselines import check_baselines, chosen_baselines, fit_baseline
from distrec.batch import ItemBatch
from distrec.config import Config
from distrec.dataset import DatasetManifest, read_manifest
from distrec.errors import DataError
from distrec.files import fsync, replace_text, sha256
from distrec.metrics.candidates import GivenCandidates
from distrec.metrics.evaluation import (
    ModelScorer,
    Scorer,
    encode_catalogue,
    evaluate_examples,
    inference,
)
from distrec.metrics.examples import example_metrics
from distrec.metrics.item_vectors import item_vectors
from distrec.metrics.query_ranks import QueriesHash, QueryRanksWriter
from distrec.metrics.ranking import RankingMetrics
from distrec.reader import ExampleReader, check_files, read_items, read_queries
from distrec.scoring.model import ScoringModel, check_same_data, open_model
from distrec.user_key import key_of_dataset
from distrec.world import World

logger = logging.getLogger("distrec.evaluate")

MODEL = "distrec"
QUERIES = {columns.VALID: columns.VALID_QUERIES, columns.TEST: columns.TEST_QUERIES}
# what the indexes of queries stand for
_INDEXED = (columns.USER_ID, columns.ITEM_ID)
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
        candidates: Among which targets of test are ranked; None: the whole catalogue.
    """

    config: Config
    manifest: DatasetManifest
    items: ItemBatch
    vectors: torch.Tensor
    candidates: GivenCandidates | None

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
    check_files(config.dataset_directory, manifest, config.reader.verify)
    if not _num_queries(manifest, columns.TEST):
        raise DataError(
            "evaluate needs test queries. Received: none. Users may have too few events for the "
            "split: see prepare.split and the filters of [prepare]."
        )
    baselines = chosen_baselines(config, manifest)
    check_baselines(baselines, manifest)
    model = open_model(checkpoint.find(config.checkpoint_directory, config.score.checkpoint))
    check_same_data(model, manifest, config.dataset_directory)
    logger.info("checkpoint %s", model.version)
    inputs = _inputs(config, manifest)
    partial = config.query_ranks_path.with_name(f".{config.query_ranks_path.name}.{os.getpid()}")
    try:
        with inference(model.model), QueryRanksWriter(partial) as ranks:
            splits = _measure(inputs, model, baselines, ranks)
        fsync(partial)
        partial.rename(config.query_ranks_path)
    except OSError as error:
        raise DataError(
            f"evaluate writes {config.query_ranks_path}. Received: {error}. Free space, or set "
            "output to another directory."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    document = {
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": model.path.name,
        "model_version": model.version,
        "global_step": model.manifest.global_step,
        "dataset_hash": manifest.content_hash,
        "ks": sorted(set(config.evaluate.ks)),
        "query_ranks": {
            "path": config.query_ranks_path.name,
            "sha256": sha256(config.query_ranks_path),
        },
        "splits": splits,
    }
    if model.manifest.privacy is not None:
        document["privacy"] = model.manifest.privacy.model_dump()
    _write(config.metrics_path, document)
    return _summary(config, splits)


def measure_baselines(config: Config) -> dict[str, Any]:
    """What `run` finds of the baselines alone, from a dataset; no model, and nothing is written.

    Returns:
        As `splits` of metrics.json.
    """
    manifest = read_manifest(config.dataset_directory)
    check_files(config.dataset_directory, manifest, config.reader.verify)
    baselines = chosen_baselines(config, manifest)
    check_baselines(baselines, manifest)
    return _measure(_inputs(config, manifest), None, baselines, None)


def _inputs(config: Config, manifest: DatasetManifest) -> Inputs:
    items = read_items(config.dataset_directory, manifest)
    vectors = item_vectors(config.dataset_directory, manifest, items)
    candidates = None
    if config.evaluate.test_candidates is not None:
        path = Path(config.evaluate.test_candidates)
        key = key_of_dataset(manifest.user_key_digest, config.prepare)
        candidates = GivenCandidates(path, config.dataset_directory, manifest, key)
    return Inputs(config, manifest, items, vectors, candidates)


def _num_queries(manifest: DatasetManifest, split: str) -> int:
    queries = manifest.splits.get(QUERIES[split])
    return queries.num_rows if queries is not None else 0


def _device(config: Config) -> torch.device:
    """Where the products with the catalogue are made; encoding reads mapped tables on the CPU."""
    if config.launch.device != "cpu" and torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu")


def _model_scorer(inputs: Inputs, model: ScoringModel, split: str) -> ModelScorer:
    """Of the catalogue as it is when the split comes."""
    cpu = torch.device("cpu")
    items = read_items(inputs.config.dataset_directory, inputs.manifest, split)
    vectors = encode_catalogue(model.model, model.tables, items, _ITEMS_PER_LOOKUP, cpu)
    vectors = vectors.to(_device(inputs.config))
    return ModelScorer(model.model, model.tables, vectors, cpu)


def _measure(
    inputs: Inputs,
    model: ScoringModel | None,
    baselines: Sequence[str],
    ranks: QueryRanksWriter | None,
) -> dict[str, Any]:
    """Every split that has queries, with the model, if there is one, and the baselines."""
    scorers: dict[str, Scorer] = {}
    learnt_from: tuple[str, ...] = ()
    results = {}
    for split in QUERIES:
        if not _num_queries(inputs.manifest, split):
            continue
        if model is not None and (MODEL not in scorers or model.model.recent_weight != 0):
            scorers[MODEL] = _model_scorer(inputs, model, split)
        splits = _splits_for(inputs.config, split)
        if splits != learnt_from:
            for name in baselines:
                # some are large: none stands beside its successor
                scorers.pop(name, None)
                scorers[name] = fit_baseline(name, inputs.config, inputs.manifest, splits)
            learnt_from = splits
        results[split] = _measure_split(inputs, split, scorers, ranks)
        results[split]["baselines_fitted_on"] = list(splits)
    return results


def _splits_for(config: Config, split: str) -> tuple[str, ...]:
    """What the baselines learn from before they are measured on a split."""
    if split == columns.TEST and config.evaluate.fit_baselines_on_valid:
        return (columns.TRAIN, columns.VALID)
    return (columns.TRAIN,)


def _measure_split(
    inputs: Inputs,
    split: str,
    scorers: Mapping[str, Scorer],
    ranks: QueryRanksWriter | None,
) -> dict[str, Any]:
    """Every scorer on the queries of a split, which are read once; the model on its examples."""
    config, manifest = inputs.config, inputs.manifest
    total = _num_queries(manifest, split)
    metrics = {name: inputs.ranking_metrics() for name in scorers}
    queries = read_queries(
        config.dataset_directory, manifest, QUERIES[split], World(), config.evaluate.batch_size
    )
    candidates = inputs.candidates if split == columns.TEST else None
    known = [manifest.vocabularies[name].sha256 for name in _INDEXED]
    same = QueriesHash(known if candidates is None else [*known, candidates.sha256])
    done = 0
    started = last_line = time.monotonic()
    for read in queries:
        batch = read if candidates is None else candidates.restrict(read)
        same.add(batch)
        for name, score in scorers.items():
            scores = score(batch)
            if candidates is not None:
                scores = candidates.among(scores, batch)
            lists = metrics[name].update(scores, batch)
            if ranks is not None:
                ranks.add((split, name), done, batch, lists, metrics[name])
        done += batch.batch.batch_size
        now = time.monotonic()
        if done == total or now - last_line >= _SECONDS_BETWEEN_LINES:
            rate = done / max(now - started, 1e-9)
            logger.info("%s: %d of %d queries, %.0f/s", split, done, total, rate)
            last_line = now
    classification = _measure_examples(inputs, split, scorers.get(MODEL))
    return {
        "num_queries": max((one.num_queries for one in metrics.values()), default=0),
        "queries_hash": same.hexdigest(),
        "candidates": None if candidates is None else candidates.sha256,
        "models": {
            name: {
                "metrics": metrics[name].compute(),
                "slices": metrics[name].compute_slices(),
                "classification": classification if name == MODEL else None,
            }
            for name in scorers
        },
    }


def _measure_examples(inputs: Inputs, split: str, scorer: Scorer | None) -> dict[str, Any] | None:
    """Of the model: AUC, log loss and calibration where labels are 0 or 1, also those of further
    tasks that it predicts; RMSE of ratings."""
    config, manifest = inputs.config, inputs.manifest
    if not isinstance(scorer, ModelScorer):
        return None
    metrics = example_metrics(manifest, scorer.model.tasks, exact_auc=True)
    if metrics is None:
        return None
    reader = ExampleReader(
        config.dataset_directory, manifest, split, World(), config.reader,
        config.evaluate.batch_size, config.seed,
    )  # fmt: skip
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
