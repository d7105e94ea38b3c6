"""The names of metrics, such as ``ndcg@10`` and ``auc:purchased``, and which way each is better.

Imports no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from distrec.errors import ConfigError

ACCURACY = ("hr", "recall", "precision", "ndcg", "mrr", "map")
# the slice new_items once more, in lists of new items alone
AMONG_NEW = "among_new_items"
BEYOND_ACCURACY = ("coverage", "popularity", "diversity")
CLASSIFICATION = ("auc", "log_loss")
RATING = ("rmse", "mae")
_OF_EXAMPLES = CLASSIFICATION + RATING


@dataclass(frozen=True)
class MetricName:
    """A metric that can be optimised.

    Args:
        name: Of ACCURACY, CLASSIFICATION or RATING.
        k: Cut-off K; None for what is measured on examples.
        task: Further task on whose labels it is measured; "" for label.
    """

    name: str
    k: int | None
    task: str = ""

    @property
    def higher_is_better(self) -> bool:
        """False for log_loss, rmse and mae, which are minimised."""
        return self.name not in ("log_loss", *RATING)

    @property
    def needs_labels(self) -> bool:
        """Whether it is measured on labelled examples, not on queries."""
        return self.name in _OF_EXAMPLES

    def __str__(self) -> str:
        if self.task:
            return of_task(self.name, self.task)
        return self.name if self.k is None else f"{self.name}@{self.k}"


def of_task(name: str, task: str) -> str:
    """A metric's name on the labels of a further task: ``auc:purchased``."""
    return f"{name}:{task}"


def metric_names(ks: Sequence[int], names: Sequence[str] = ACCURACY) -> tuple[str, ...]:
    """Every name at every cut-off, in the order in which they are reported.

    Example:
        >>> metric_names([5, 10], ["hr", "ndcg"])
        ('hr@5', 'hr@10', 'ndcg@5', 'ndcg@10')
    """
    return tuple(f"{name}@{k}" for name in names for k in ks)


def parse_metric_name(text: str) -> MetricName:
    """Take ``ndcg@10``, ``auc``, ``auc:purchased`` or ``rmse`` apart.

    Raises:
        ConfigError: There is no such metric, or it lacks its cut-off or has one too many.

    Example:
        >>> parse_metric_name("ndcg@10").k
        10
    """
    of_labels, _, task = text.partition(":")
    if of_labels in CLASSIFICATION and task:
        return MetricName(of_labels, None, task)
    name, at, cut = text.partition("@")
    if name in _OF_EXAMPLES and not at:
        return MetricName(name, None)
    if name in ACCURACY and cut.isascii() and cut.isdecimal() and int(cut) >= 1:
        return MetricName(name, int(cut))
    if name in BEYOND_ACCURACY:
        raise ConfigError(
            f"{name} is reported by evaluate and cannot be optimised. Received: {text!r}. Use one "
            f"of {', '.join(ACCURACY)} with @K, or {', '.join(_OF_EXAMPLES)}."
        )
    near = difflib.get_close_matches(name.lower(), ACCURACY + _OF_EXAMPLES, n=1)
    suggestion = near[0] if near else "ndcg"
    if suggestion in ACCURACY:
        suggestion += f"@{cut}" if cut.isdecimal() and cut.isascii() and int(cut) >= 1 else "@10"
    raise ConfigError(
        f"a metric is one of {', '.join(ACCURACY)} with @K (K >= 1), or one of "
        f"{', '.join(_OF_EXAMPLES)}. Received: {text!r}. Did you mean {suggestion!r}?"
    )
