"""Metrics of labelled examples, those of several tasks beside one another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distrec.dataset import DatasetManifest
from distrec.metrics.classification import ClassificationMetrics
from distrec.metrics.names import of_task
from distrec.metrics.ratings import RatingMetrics


class ExampleMetrics:
    """Accumulates metrics over batches of examples; the states of several ranks add up.

    Args:
        of_label: Of the label.
        tasks: Further tasks, whose labels are 0, 1, or NaN where they are not known.
        exact_auc: Of further tasks, see `ClassificationMetrics`.
    """

    def __init__(
        self,
        of_label: ClassificationMetrics | RatingMetrics,
        tasks: Sequence[str] = (),
        exact_auc: bool = False,
    ) -> None:
        self._of_task: dict[str, ClassificationMetrics | RatingMetrics] = {"": of_label}
        self._of_task |= {task: ClassificationMetrics(exact_auc) for task in tasks}

    def update(self, scores: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Add n examples.

        Args:
            scores: Of the label and of each task, float32, (n, T).
            labels: float32, (n, T), or more of which the first count.
            weights: float32, (n,).

        Raises:
            DataError: A score is NaN.
        """
        for place, (task, metrics) in enumerate(self._of_task.items()):
            known = ~labels[:, place].isnan() if task else torch.ones(len(labels)).bool()
            metrics.update(scores[known, place], labels[known, place], weights[known])

    def state_vector(self) -> Tensor:
        """Everything accumulated, float64, 1-D: the sum over ranks is the state of the whole."""
        return torch.cat([metrics.state_vector() for metrics in self._of_task.values()])

    def load_state_vector(self, state: Tensor) -> None:
        """Replace what was accumulated, by the sum of vectors."""
        sizes = [len(metrics.state_vector()) for metrics in self._of_task.values()]
        for metrics, part in zip(self._of_task.values(), state.split(sizes), strict=True):
            metrics.load_state_vector(part)

    def compute(self) -> dict[str, float | None]:
        """By name, such as auc and auc:purchased; None for what is not defined."""
        return {
            of_task(name, task) if task else name: value
            for task, metrics in self._of_task.items()
            for name, value in metrics.compute().items()
        }


def example_metrics(
    manifest: DatasetManifest, tasks: Sequence[str] = (), exact_auc: bool = False
) -> ExampleMetrics | None:
    """Metrics of labelled examples that nothing has been added to; None where labels say nothing.

    Args:
        manifest: Of the dataset.
        tasks: Further tasks that a model predicts.
        exact_auc: See `ClassificationMetrics`.
    """
    if manifest.rating_scale is not None:
        return ExampleMetrics(RatingMetrics(manifest.rating_scale))
    if not manifest.has_labels:
        return None
    return ExampleMetrics(ClassificationMetrics(exact_auc), tasks, exact_auc)
