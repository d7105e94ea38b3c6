"""What each tower is worth: the model without it, and it alone, on one dataset.

Every variant and seed is a run of its own in ``ablation/`` below the run's directory. What is up to
date is not done again, so that an ablation that was cut off goes on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distrec import pipeline
from distrec.columns import TEST, VALID
from distrec.compare import (
    Run,
    bootstrap_means,
    counted_mean,
    interval,
    read_run,
    user_values,
)
from distrec.config import Config
from distrec.errors import ConfigError
from distrec.files import replace_text
from distrec.metrics.names import MetricName, parse_metric_name
from distrec.variants import derived, link_dataset

DIRECTORY = "ablation"
ALL = "all"
MODEL = "distrec"
_RESAMPLES = 1000
# where a tower that lives on features is to show; those that nobody is in are left out
_SLICES = ("cold_users", "cold_items", "new_items")
_FALLBACK = "ndcg@10"

logger = logging.getLogger("distrec.ablate")


@dataclass(frozen=True)
class Variant:
    """A choice of towers.

    Args:
        name: all, without-<tower> or only-<tower>.
        towers: Those that are on.
    """

    name: str
    towers: tuple[str, ...]


def variants(towers: Sequence[str]) -> list[Variant]:
    """All towers, then without each, then each alone; what is the same choice stands once.

    Example:
        >>> [variant.name for variant in variants(["cf", "deep"])]
        ['all', 'only-cf', 'only-deep']
    """
    named = [Variant(ALL, tuple(towers))]
    if len(towers) > 2:
        for tower in towers:
            rest = tuple(other for other in towers if other != tower)
            named.append(Variant(f"without-{tower}", rest))
    named += [Variant(f"only-{tower}", (tower,)) for tower in towers]
    return named


def run(config: Config, seeds: Sequence[int]) -> tuple[int, Path]:
    """Train and measure every variant with every seed, and write the tables.

    Args:
        config: Of the run; its towers are taken apart.
        seeds: Of training; the dataset is that of config.seed.

    Returns:
        The exit code of the stage that failed, or 0; the directory with ablation.md and
        ablation.json.

    Raises:
        ConfigError: There is only one tower, or a variant cannot be configured.
    """
    if len(config.model.towers) < 2:
        raise ConfigError(
            "an ablation takes towers away, and leaves one. Received: model.towers = "
            f"{list(config.model.towers)}. Name at least two."
        )
    directory = config.directory / DIRECTORY
    metric = _metric(config)
    chosen = variants(config.model.towers)
    # a variant that cannot be is refused before the first is trained
    runs = {
        (variant.name, seed): _configured(config, variant, seed, directory, metric)
        for variant in chosen
        for seed in seeds
    }
    code, _ = pipeline.run_stages(config, only=["prepare"])
    for place, ((name, seed), one) in enumerate(runs.items(), 1):
        if code:
            return code, directory
        logger.info("%d of %d: %s, seed %d", place, len(runs), name, seed)
        link_dataset(config, one)
        code, _ = pipeline.run_stages(one, only=["train", "evaluate"])
    if code:
        return code, directory
    read = {key: read_run(one.directory, one.name) for key, one in runs.items()}
    table = summarize(chosen, seeds, read, str(metric), config.train.metric)
    replace_text(directory / f"{DIRECTORY}.json", json.dumps(table, indent=1) + "\n")
    replace_text(directory / f"{DIRECTORY}.md", as_markdown(table))
    return 0, directory


def _metric(config: Config) -> MetricName:
    """The ranking metric of the table: what training goes by, or NDCG where that is of labels."""
    metric = parse_metric_name(config.train.metric)
    return parse_metric_name(_FALLBACK) if metric.needs_labels else metric


def _configured(
    config: Config, variant: Variant, seed: int, directory: Path, metric: MetricName
) -> Config:
    changes: dict[str, Any] = {
        "model.towers": list(variant.towers),
        "seed": seed,
        "evaluate.ks": sorted({*config.evaluate.ks, metric.k}),
    }
    if variant.name != ALL:
        # baselines depend on no tower: they are measured beside all of them
        changes["evaluate.baselines"] = []
    return derived(config, directory / f"{variant.name}-seed-{seed}", changes)


def summarize(
    chosen: Sequence[Variant],
    seeds: Sequence[int],
    runs: Mapping[tuple[str, int], Run],
    metric: str,
    train_metric: str,
) -> dict[str, Any]:
    """Means and spread over seeds, and how far each variant is from all towers.

    Args:
        chosen: The variants, all towers first.
        seeds: With which each was trained.
        runs: By variant and seed; all measured on the same users.
        metric: Ranking metric of the table.
        train_metric: What training goes by: shown beside it where it is one of labels.

    Returns:
        metric, seeds, columns (split, slice, metric, and num_users of a slice) and rows: name,
        towers (none for a baseline) and a cell a column, with mean, spread (standard deviation
        over seeds, None of one) and difference to all towers (mean, low, high; None for all towers
        themselves, for baselines and for metrics of labels). The interval is that of compare, over
        users, of what each has on average over the seeds.
    """
    first = runs[ALL, seeds[0]].document["splits"]
    columns = [(split, "all", metric) for split in (VALID, TEST) if split in first]
    sizes = {
        group: part["num_queries"] for group, part in first[TEST]["models"][MODEL]["slices"].items()
    }
    columns += [(TEST, group, metric) for group in _SLICES if sizes[group]]
    if train_metric != metric:
        columns += [(split, "all", train_metric) for split in (VALID, TEST) if split in first]
    rows: list[dict[str, Any]] = [
        {"name": variant.name, "towers": list(variant.towers), "cells": []} for variant in chosen
    ]
    baselines = [model for model in first[TEST]["models"] if model != MODEL]
    rows += [{"name": name, "towers": [], "cells": []} for name in baselines]
    for split, group, name in columns:
        cells: list[dict[str, Any] | None]
        if name == metric:
            cells = _ranking_cells(chosen, seeds, runs, split, group, parse_metric_name(name))
            for model in baselines:
                run = runs[ALL, seeds[0]]
                values = user_values(run, split, model, group, [parse_metric_name(name)])
                cells.append({"mean": counted_mean(values[:, 0]), "spread": None})
        else:
            cells = [
                _over_seeds([_labelled(runs[variant.name, seed], split, name) for seed in seeds])
                for variant in chosen
            ]
            cells += [None] * len(baselines)
        for row, cell in zip(rows, cells, strict=True):
            row["cells"].append(cell)
    return {
        "metric": metric,
        "seeds": list(seeds),
        "columns": [
            {"split": split, "slice": group, "metric": name}
            | ({"num_users": sizes[group]} if group in sizes else {})
            for split, group, name in columns
        ],
        "rows": rows,
    }


def _ranking_cells(
    chosen: Sequence[Variant],
    seeds: Sequence[int],
    runs: Mapping[tuple[str, int], Run],
    split: str,
    group: str,
    metric: MetricName,
) -> list[dict[str, Any] | None]:
    """One cell a variant; the users of all are drawn together."""
    # [variant][seed]: float64, (N,)
    values = [
        [user_values(runs[one.name, seed], split, MODEL, group, [metric])[:, 0] for seed in seeds]
        for one in chosen
    ]
    together = np.stack([np.mean(of_seeds, axis=0) for of_seeds in values], axis=1)
    draws = bootstrap_means(together, _RESAMPLES, np.random.default_rng(1))
    cells: list[dict[str, Any] | None] = []
    for place, of_seeds in enumerate(values):
        cell = _over_seeds([counted_mean(one) for one in of_seeds])
        if place:
            difference = counted_mean(together[:, place]) - counted_mean(together[:, 0])
            cell["difference"] = asdict(interval(difference, draws[:, place] - draws[:, 0]))
        cells.append(cell)
    return cells


def _labelled(run: Run, split: str, name: str) -> float:
    return float(run.document["splits"][split]["models"][MODEL]["classification"][name])


def _over_seeds(values: Sequence[float]) -> dict[str, Any]:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "spread": spread}


def as_markdown(table: Mapping[str, Any]) -> str:
    """The table for people."""
    heads = [
        f"{column['metric']} {column['split']}"
        + (
            f", {column['slice'].replace('_', ' ')} ({column['num_users']:,} users)"
            if "num_users" in column
            else ""
        )
        for column in table["columns"]
    ]
    seeds = ", ".join(map(str, table["seeds"]))
    lines = [
        f"Mean of seeds {seeds}, ± their standard deviation; in brackets the difference to all "
        "towers with its 95 % interval over users.",
        "",
        f"| towers | {' | '.join(heads)} |",
        f"|---|{'---|' * len(heads)}",
    ]
    for row in table["rows"]:
        cells = " | ".join(_as_text(cell) for cell in row["cells"])
        name = row["name"] if row["towers"] else f"*{row['name']}*"
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines) + "\n"


def _as_text(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "–"
    text = f"{cell['mean']:.4f}"
    if cell["spread"] is not None:
        text += f" ± {cell['spread']:.4f}"
    if "difference" in cell:
        mean, low, high = (cell["difference"][key] for key in ("mean", "low", "high"))
        text += f" ({mean:+.4f}, {low:+.4f} to {high:+.4f})"
    return text
