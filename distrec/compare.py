"""Runs side by side: means of metrics over users, with intervals from resampling the users.

Users are drawn with replacement, as many as there are, again and again; an interval holds the
middle 95 % of the means of the draws. Models that were measured on the same users are seen through
the same draws, so that the interval of a difference leaves out what is only the luck of who was
drawn. It does not hold the luck of training: compare seeds for that.

Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 6 and 13.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distrec.columns import TEST, USER_INDEX, VALID
from distrec.errors import ConfigError, DataError
from distrec.files import sha256
from distrec.metrics.names import ACCURACY, MetricName, parse_metric_name
from distrec.metrics.query_ranks import values_of
from distrec.metrics.ranking import GROUPS

CONFIDENCE = 0.95
SPLITS = (TEST, VALID)
_MODEL = "distrec"
_DEFAULT = ("ndcg", "hr", "recall", "mrr")
_K = 10
_FIX = "Run distrec evaluate on its configuration again."

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """What evaluate left of one run.

    Args:
        name: Under which it is shown.
        document: metrics.json.
        ranks: query_ranks.parquet.
    """

    name: str
    document: dict[str, Any]
    ranks: pa.Table


@dataclass(frozen=True)
class Interval:
    """A mean and where it lies with a confidence of CONFIDENCE."""

    mean: float
    low: float
    high: float


@dataclass
class Row:
    """One model of one run on one slice of one split.

    Args:
        label: Under which it is shown.
        run: Name of the run.
        model: distrec or a baseline.
        num_queries: Users that the means are over.
        values: By metric.
        differences: By metric, to the reference; empty for the reference itself.
        is_paired: Whether the reference was measured on the same users.
    """

    label: str
    run: str
    model: str
    num_queries: int
    values: dict[str, Interval] = field(default_factory=dict)
    differences: dict[str, Interval] = field(default_factory=dict)
    is_paired: bool = True


@dataclass(frozen=True)
class Comparison:
    """Rows by split and slice.

    Args:
        metrics: Names, such as ndcg@10.
        resamples: Draws of users.
        reference: Label of what the differences are to: the model of the first run.
        parts: (split, group of ranking.GROUPS) -> rows, in the order in which the runs were given.
    """

    metrics: tuple[str, ...]
    resamples: int
    reference: str
    parts: dict[tuple[str, str], list[Row]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON and for the page."""
        return {
            "confidence": CONFIDENCE,
            "resamples": self.resamples,
            "reference": self.reference,
            "metrics": list(self.metrics),
            "parts": [
                {"split": split, "slice": group, "rows": [asdict(row) for row in rows]}
                for (split, group), rows in self.parts.items()
            ],
        }


def read_run(directory: Path, name: str) -> Run:
    """Read what evaluate wrote into the directory of a run.

    Raises:
        DataError: It is not there, or the two files are not of one evaluation.
    """
    path = directory / "metrics.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        entry = document["query_ranks"]
        ranks_path = directory / entry["path"]
        received = sha256(ranks_path)
        if received != entry["sha256"]:
            raise DataError(
                f"metrics.json and {ranks_path.name} are written by one evaluate. Received: "
                f"{ranks_path} with SHA-256 {received}, expected {entry['sha256']}. {_FIX}"
            )
        return Run(name, document, pq.read_table(ranks_path))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(
            "compare reads metrics.json and query_ranks.parquet of a run. Received: "
            f"{directory}: {type(error).__name__}: {error}. {_FIX}"
        ) from error


def compare(
    directories: Sequence[Path],
    metrics: Sequence[str] = (),
    resamples: int = 1000,
    seed: int = 1,
) -> Comparison:
    """Compare every model of the given runs.

    A baseline that found the same in several runs is shown once.

    Args:
        directories: Of the runs; the first one's model is what the others are compared with.
        metrics: Such as ndcg@10; by default NDCG, hit rate, recall and MRR at 10, or at the highest
            cut-off that all runs have when that is lower.
        resamples: Draws of users.
        seed: Of the draws.

    Raises:
        ConfigError: A metric cannot be had from the runs.
        DataError: A run has not been evaluated.
    """
    names = [path.name or str(path) for path in directories]
    if len(set(names)) < len(names):
        names = [str(path) for path in directories]
    runs = [read_run(path, name) for path, name in zip(directories, names, strict=True)]
    largest = min(max(run.document["ks"]) for run in runs)
    chosen = [parse_metric_name(name) for name in metrics]
    chosen = chosen or [MetricName(name, min(_K, largest)) for name in _DEFAULT]
    for metric in chosen:
        if metric.k is None or metric.k > largest:
            raise ConfigError(
                f"compare takes ranking metrics up to K = {largest}, the highest that all runs "
                f"have. Received: {metric}. Choose another, or raise evaluate.ks and evaluate."
            )
    parts: dict[tuple[str, str], list[Row]] = {}
    for split in SPLITS:
        if all(split in run.document["splits"] for run in runs):
            for group in GROUPS:
                parts[split, group] = _compare(runs, split, group, chosen, resamples, seed)
    return Comparison(tuple(map(str, chosen)), resamples, runs[0].name, parts)


def _compare(
    runs: Sequence[Run],
    split: str,
    group: str,
    metrics: Sequence[MetricName],
    resamples: int,
    seed: int,
) -> list[Row]:
    """One split and slice: read the users' values, draw once for each set of users."""
    rows: list[Row] = []
    columns: list[Values] = []
    hashes: list[str] = []
    for run in runs:
        part = run.document["splits"][split]
        for model in part["models"]:
            values = user_values(run, split, model, group, metrics)
            same = [
                index
                for index, row in enumerate(rows)
                if row.model == model != _MODEL
                and hashes[index] == part["queries_hash"]
                and np.array_equal(columns[index], values, equal_nan=True)
            ]
            if same:
                rows[same[0]].label = model
                continue
            label = run.name if model == _MODEL else model
            if model != _MODEL and len(runs) > 1:
                label = f"{model} ({run.name})"
            rows.append(Row(label, run.name, model, int((~np.isnan(values[:, 0])).sum())))
            columns.append(values)
            hashes.append(part["queries_hash"])
    drawn: list[Values] = [np.empty(0)] * len(rows)
    for number, same_users in enumerate(dict.fromkeys(hashes)):
        members = [index for index, one in enumerate(hashes) if one == same_users]
        together = np.concatenate([columns[index] for index in members], axis=1)
        means = bootstrap_means(together, resamples, np.random.default_rng([seed, number]))
        for place, index in enumerate(members):
            drawn[index] = means[:, place * len(metrics) : (place + 1) * len(metrics)]
    for index, row in enumerate(rows):
        row.is_paired = hashes[index] == hashes[0]
        for place, metric in enumerate(map(str, metrics)):
            mean = counted_mean(columns[index][:, place])
            row.values[metric] = interval(mean, drawn[index][:, place])
            if index > 0:
                difference = mean - counted_mean(columns[0][:, place])
                draws = drawn[index][:, place] - drawn[0][:, place]
                row.differences[metric] = interval(difference, draws)
    return rows


def user_values(
    run: Run, split: str, model: str, group: str, metrics: Sequence[MetricName]
) -> Values:
    """Each user's metrics, NaN outside the slice: (N, len(metrics)).

    Where two runs have the same queries_hash, their users are in the same order.
    """
    chosen = run.ranks.filter((pc.field("split") == split) & (pc.field("model") == model))
    # runs with other seeds have their queries in another order; users without an index keep theirs
    chosen = chosen.sort_by([(USER_INDEX, "ascending"), ("query", "ascending")])
    ks = sorted({metric.k for metric in metrics if metric.k is not None})
    values = values_of(chosen, group, ks)
    return np.stack(
        [values[:, ACCURACY.index(one.name), ks.index(one.k or 0)] for one in metrics], axis=1
    )


def counted_mean(values: Values) -> float:
    """Mean of what is not NaN; zero when there is nothing."""
    counted = values[~np.isnan(values)]
    return float(counted.mean()) if len(counted) else 0.0


def bootstrap_means(values: Values, resamples: int, generator: np.random.Generator) -> Values:
    """Means of the columns over users who are drawn with replacement.

    Args:
        values: (N, S); NaN where a user does not count in a column.
        resamples: R.
        generator: Draws the users; all columns see the same draws.

    Returns:
        float64, (R, S). Zero where none of those drawn counts.
    """
    num_users = len(values)
    counted = ~np.isnan(values)
    filled = np.where(counted, values, 0.0)
    means = np.zeros((resamples, values.shape[1]))
    for draw in range(resamples if num_users else 0):
        times = np.bincount(generator.integers(num_users, size=num_users), minlength=num_users)
        times = times.astype(np.float64)
        means[draw] = (times @ filled) / np.maximum(times @ counted, 1.0)
    return means


def interval(mean: float, draws: Values) -> Interval:
    """The middle CONFIDENCE of the draws."""
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Interval(mean, float(low), float(high))
