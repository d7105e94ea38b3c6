"""Names of metrics, and what is said about wrong ones."""

from __future__ import annotations

import pytest

from distrec.errors import ConfigError
from distrec.metrics.names import metric_names, parse_metric_name


@pytest.mark.parametrize(
    ("text", "name", "k", "higher", "labels"),
    [
        ("ndcg@10", "ndcg", 10, True, False),
        ("map@7", "map", 7, True, False),
        ("auc", "auc", None, True, True),
        ("log_loss", "log_loss", None, False, True),
        ("rmse", "rmse", None, False, True),
        ("mae", "mae", None, False, True),
        ("auc:bought", "auc", None, True, True),
        ("log_loss:a-b", "log_loss", None, False, True),
    ],
)
def test_names_are_taken_apart(
    text: str, name: str, k: int | None, higher: bool, labels: bool
) -> None:
    metric = parse_metric_name(text)
    assert (metric.name, metric.k) == (name, k)
    assert (metric.higher_is_better, metric.needs_labels) == (higher, labels)
    assert str(metric) == text


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [
        ("ngcd@20", "'ndcg@20'"),
        ("NDCG@5", "'ndcg@5'"),
        ("recall", "'recall@10'"),
        ("hr@0", "'hr@10'"),
        ("hr@-1", "'hr@10'"),
        ("hr@x", "'hr@10'"),
        ("logloss", "'log_loss'"),
        ("auc@10", "'auc'"),
        ("auc:", "'auc'"),
        ("rmse:bought", "'ndcg@10'"),
        ("", "'ndcg@10'"),
    ],
)
def test_wrong_names_get_a_suggestion(text: str, suggestion: str) -> None:
    with pytest.raises(ConfigError, match=f"Received: '{text}'. Did you mean {suggestion}"):
        parse_metric_name(text)


def test_what_is_only_reported_cannot_be_optimised() -> None:
    with pytest.raises(ConfigError, match="coverage is reported by evaluate"):
        parse_metric_name("coverage@10")


def test_names_stand_in_the_order_of_the_report() -> None:
    assert metric_names([1, 2], ["hr", "map"]) == ("hr@1", "hr@2", "map@1", "map@2")
