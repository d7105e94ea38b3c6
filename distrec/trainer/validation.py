"""Validation inside training, by the code that the evaluate job measures with."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from distrec import columns
from distrec.batch import ItemBatch, QueryBatch
from distrec.config import Config
from distrec.dataset import DatasetManifest
from distrec.errors import ConfigError, DataError
from distrec.metrics.evaluation import (
    ModelScorer,
    encode_catalogue,
    evaluate_examples,
    evaluate_queries,
    inference,
)
from distrec.metrics.examples import example_metrics
from distrec.metrics.names import RATING, MetricName, parse_metric_name
from distrec.metrics.ranking import RankingMetrics
from distrec.model import UnifiedModel
from distrec.reader import ExampleReader, has_both_labels, read_queries
from distrec.sharding.collectives import Collectives
from distrec.trainer.tower_weights import choose_held_out, fit_tower_weights

if TYPE_CHECKING:
    from distrec.sharding.tables import EmbeddingTables


def predicted_tasks(config: Config, manifest: DatasetManifest) -> tuple[str, ...]:
    """What the model of a run predicts beside the label."""
    return manifest.tasks if config.model.multi_task != "none" else ()


def check_metric(config: Config, manifest: DatasetManifest) -> MetricName:
    """The metric of train.metric.

    Raises:
        ConfigError: There is no such metric, or it needs labels that the data does not have, or a
            task that is not predicted.
    """
    name = config.train.metric
    metric = parse_metric_name(name)
    tasks = predicted_tasks(config, manifest)
    if metric.task and metric.task not in tasks:
        raise ConfigError(
            f"a metric is of a task that is predicted: {list(tasks)}. Received: train.metric = "
            f"{name!r}. Name one of them, or set model.multi_task."
        )
    if metric.name in RATING:
        if manifest.rating_scale is None:
            raise ConfigError(
                f"{metric.name} needs ratings. Received: train.metric = {name!r} and a dataset "
                "without. Set prepare.predict_ratings, or use a ranking metric such as ndcg@10."
            )
    elif metric.needs_labels and not manifest.has_labels:
        raise ConfigError(
            f"{metric.name} needs labels. Received: train.metric = {name!r} and a dataset without. "
            "Name prepare.events.label, or use a ranking metric such as ndcg@10."
        )
    return metric


def check_labels(config: Config, manifest: DatasetManifest) -> None:
    """Refuse a metric that would turn out to be undefined after the first epoch.

    Raises:
        DataError: AUC is to be measured on a valid split with one label only, or a damaged one.
    """
    split = manifest.splits.get(columns.VALID)
    metric = parse_metric_name(config.train.metric)
    if metric.name != "auc" or not split or not split.num_rows:
        return
    directory = config.dataset_directory
    column = columns.task_column(metric.task) if metric.task else columns.LABEL
    if not has_both_labels(directory, manifest, columns.VALID, column):
        raise DataError(
            "auc is measured on positives and negatives. Received: train.metric = "
            f"{config.train.metric!r} and a valid split with one label only ({directory}). Use "
            "log_loss, or prepare a larger valid split."
        )


logger = logging.getLogger("distrec.train")

Element = TypeVar("Element")


def _beating(elements: Iterable[Element], beat: Callable[[], None]) -> Iterator[Element]:
    for element in elements:
        beat()
        yield element


def slack(value: float, num_queries: int) -> float:
    """By how much a mean over queries of numbers in [0, 1] may differ and say nothing.

    Half of the largest standard error that it can have: two lists of one user are much alike, so
    their difference is known better than either.
    """
    value = min(max(value, 0.0), 1.0)
    return 0.5 * math.sqrt(value * (1.0 - value) / max(num_queries, 1))


class Validator:
    """Measures the model on the valid split, over all ranks.

    Args:
        config: Of the run.
        manifest: Of the dataset.
        items: The whole catalogue.
        collectives: Of the job.

    Attributes:
        metric: The one that decides.
        has_data: Whether the split has anything to measure `metric` on.
    """

    def __init__(
        self,
        config: Config,
        manifest: DatasetManifest,
        items: ItemBatch,
        collectives: Collectives,
    ) -> None:
        self.config = config
        self.manifest = manifest
        self.items = items
        self.collectives = collectives
        self.metric = check_metric(config, manifest)
        self._num_queries = self._rows(columns.VALID_QUERIES)
        has_metrics = example_metrics(manifest) is not None
        self._num_examples = self._rows(columns.VALID) if has_metrics else 0
        self.has_data = bool(self._num_examples if self.metric.needs_labels else self._num_queries)

    def _rows(self, split: str) -> int:
        return self.manifest.splits[split].num_rows if split in self.manifest.splits else 0

    def measure(
        self, model: UnifiedModel, tables: EmbeddingTables, beat: Callable[[], None]
    ) -> dict[str, float]:
        """Metrics by name, the same on every rank. Collective.

        Args:
            model: The dense part.
            tables: The embedding tables.
            beat: Called with each batch, for a watchdog.

        Returns:
            Ranking metrics at the cut-offs of evaluate.ks and train.metric; auc, log_loss and
            calibration where there are labels, and as auc:<task> of further tasks that are
            predicted; rmse and mae of ratings. What is not defined is left out.
        """
        with inference(model):
            vectors = encode_catalogue(
                model, tables, self.items, self.config.score.item_block, self.collectives.device
            )
            scorer = ModelScorer(model, tables, vectors)
            values: dict[str, float | None] = {}
            if self._num_queries:
                values |= self._lists(model, scorer, beat)
            if self._num_examples:
                values |= self._of_examples(scorer, beat)
        return {
            name: float(value)
            for name, value in values.items()
            if value is not None and math.isfinite(value)
        }

    def _lists(
        self, model: UnifiedModel, scorer: ModelScorer, beat: Callable[[], None]
    ) -> dict[str, float]:
        """Ranking metrics, with fitted weights unless these are clearly worse."""
        if not self.fits_weights(model):
            return self._ranking(scorer, beat)
        model.weigh(model.given_weights())
        given = self._ranking(scorer, beat)
        held_out = choose_held_out(
            model, scorer, _beating(self._queries(), beat), self._num_queries,
            self.config.evaluate.exclude_seen,
        )  # fmt: skip
        weights = fit_tower_weights(
            model, held_out, scorer.item_vectors, self.items.count < 0, self.collectives
        )
        model.weigh(weights)
        parts = model.named_weights()
        fitted = self._ranking(scorer, beat)
        name = str(self.metric)
        is_kept = fitted[name] >= given[name] - slack(given[name], self._num_queries)
        if not is_kept:
            model.weigh(model.given_weights())
        if self.collectives.world.is_first:
            logger.info(
                "towers weighed by valid (%s): %s %.4f in place of %.4f%s",
                " ".join(f"{part} {weight:.2f}" for part, weight in parts.items()),
                name, fitted[name], given[name], "" if is_kept else ": left as they are",
            )  # fmt: skip
        return fitted if is_kept else given

    def fits_weights(self, model: UnifiedModel) -> bool:
        """Whether the valid split weighs the towers."""
        config = self.config
        return (
            config.train.fit_tower_weights and config.privacy is None and not model.spec.is_absolute
        )

    def _queries(self) -> Iterator[QueryBatch]:
        return read_queries(
            self.config.dataset_directory,
            self.manifest,
            columns.VALID_QUERIES,
            self.collectives.world,
            self.config.evaluate.batch_size,
        )

    def _ranking(self, scorer: ModelScorer, beat: Callable[[], None]) -> dict[str, float]:
        options = self.config.evaluate
        cut_offs = {*options.ks, *([] if self.metric.k is None else [self.metric.k])}
        metrics = RankingMetrics(
            sorted(cut_offs),
            self.manifest.num_items,
            self.items.count,
            exclude_seen=options.exclude_seen,
            cold_user_events=options.cold_user_events,
            cold_item_count=options.cold_item_count,
            beyond_accuracy=False,
        )
        evaluate_queries(scorer, _beating(self._queries(), beat), metrics)
        metrics.load_state_vector(
            self.collectives.allreduce(metrics.state_vector(), "valid.ranking")
        )
        return metrics.compute()

    def _of_examples(
        self, scorer: ModelScorer, beat: Callable[[], None]
    ) -> dict[str, float | None]:
        reader = ExampleReader(
            self.config.dataset_directory,
            self.manifest,
            columns.VALID,
            self.collectives.world,
            self.config.reader,
            self.config.evaluate.batch_size * self.collectives.world.world_size,
            self.config.seed,
        )
        metrics = example_metrics(self.manifest, predicted_tasks(self.config, self.manifest))
        assert metrics is not None
        evaluate_examples(scorer, _beating(reader.batches(epoch=0), beat), metrics)
        metrics.load_state_vector(
            self.collectives.allreduce(metrics.state_vector(), "valid.examples")
        )
        return metrics.compute()
