"""The metrics sections: model against baselines, by slice, beyond accuracy, and the verdict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distrec.report import charts, glossary, scales
from distrec.report.files import finite, mapping
from distrec.report.scales import Axis

MODEL = "distrec"
SPLIT_ORDER = ("test", "valid")
# the columns of the slice table, which is long enough with these
SLICE_METRICS = ("ndcg", "recall", "hr", "mrr")


def verdict(metrics: Mapping[str, Any], wanted: str) -> dict[str, Any] | None:
    """Model against the best baseline in one sentence, or None when it was not measured.

    Args:
        metrics: The content of metrics.json.
        wanted: Metric to judge by; NDCG at the smallest of the usual cut-offs when it is not there.

    Returns:
        text, value, metric label; ratio to and name of the best baseline where there is one.
    """
    splits = mapping(metrics.get("splits"))
    name = next((split for split in SPLIT_ORDER if split in splits), None)
    if name is None:
        return None
    models = mapping(splits[name]).get("models")
    own = _values(models, MODEL)
    chosen = next(
        (key for key in (wanted, "ndcg@10", *sorted(own)) if finite(own.get(key)) is not None), None
    )
    if chosen is None:
        return None
    value = float(own[chosen])
    result = {"metric": glossary.label(chosen), "value": scales.metric(value), "split": name}
    others = {
        model: number
        for model in mapping(models)
        if model != MODEL and (number := finite(_values(models, model).get(chosen))) is not None
    }
    lower = glossary.describe(glossary.split_name(chosen)[0]).better == "lower"
    if not others:
        return result | {"text": f"{result['metric']} on {name} is {result['value']}."}
    best = min(others, key=lambda m: (others[m] if lower else -others[m], m))
    return result | _comparison(result, value, best, others[best], lower)


def _comparison(
    result: Mapping[str, Any], value: float, best: str, other: float, lower: bool
) -> dict[str, Any]:
    ahead = value < other if lower else value > other
    ratio = value / other if other else None
    word = "ahead of" if ahead else "level with" if value == other else "behind"
    text = (
        f"{result['metric']} on {result['split']} is {result['value']}, {word} the best baseline, "
        f"{glossary.model_label(best)} ({scales.metric(other)})"
    )
    if ratio is not None:
        text += f": {ratio:.2f} times its value"
    return {
        "text": f"{text}.",
        "ratio": None if ratio is None else f"{ratio:.2f}×",
        "baseline": glossary.model_label(best),
        "ahead": ahead,
    }


def metrics_section(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """Panels by split and cut-off, charts by cut-off, classification metrics; None if empty."""
    splits = mapping(metrics.get("splits"))
    names = [name for name in SPLIT_ORDER if name in splits]
    names += [name for name in splits if name not in names]
    splits = {name: splits[name] for name in names if mapping(splits[name]).get("models")}
    if not splits:
        return None
    cutoffs = sorted({cutoff for name in splits for cutoff in _cutoffs(splits[name])})
    return {
        "splits": list(splits),
        "cutoffs": cutoffs,
        "default_cutoff": 10 if 10 in cutoffs else next(iter(cutoffs), None),
        "queries": {name: mapping(splits[name]).get("num_queries") for name in splits},
        "panels": [
            _panel(name, splits[name]["models"], cutoff) for name in splits for cutoff in cutoffs
        ],
        "charts": [
            {
                "split": name,
                "ranking": _charts(splits[name]["models"], cutoffs, ("ndcg", "recall", "mrr")),
                "beyond": _charts(
                    splits[name]["models"], cutoffs, ("coverage", "popularity", "diversity")
                ),
            }
            for name in splits
        ],
        "legend": charts.legend(
            [glossary.model_label(model) for model in _models(splits[names[0]]["models"])]
        ),
        "classification": [
            table for name in splits for table in _classification(name, splits[name]["models"])
        ],
        "glossary": _glossary(splits.values()),
    }


def _models(models: Any) -> list[str]:
    """The model first, then the baselines as they come."""
    return sorted(mapping(models), key=lambda name: name != MODEL)


def _values(models: Any, model: str) -> Mapping[str, Any]:
    return mapping(mapping(mapping(models).get(model)).get("metrics"))


def _cutoffs(split: Mapping[str, Any]) -> set[int]:
    return {
        cutoff
        for model in mapping(split["models"])
        for name in _values(split["models"], model)
        if (cutoff := glossary.split_name(name)[1]) is not None
    }


def _bases(models: Any, family: str) -> list[str]:
    """Metrics of a family that some model has, in the glossary's order, then the others."""
    found = {
        base
        for model in mapping(models)
        for name in _values(models, model)
        for base, cutoff in [glossary.split_name(name)]
        if cutoff is not None and glossary.describe(base).family == family
    }
    order = list(glossary.METRICS)
    return sorted(found, key=lambda base: (order.index(base) if base in order else 99, base))


def _panel(split: str, models: Any, cutoff: int) -> dict[str, Any]:
    return {
        "split": split,
        "cutoff": cutoff,
        "ranking": _table(models, _bases(models, "ranking"), cutoff),
        "beyond": _table(models, _bases(models, "beyond"), cutoff),
        "slices": _slices(models, cutoff),
    }


def _table(models: Any, bases: Sequence[str], cutoff: int | None) -> dict[str, Any]:
    """Rows of models, a cell a metric with its bar; the best of each column is marked."""
    rows: list[dict[str, Any]] = [
        {"model": glossary.model_label(model), "cells": []} for model in _models(models)
    ]
    for base in bases:
        name = base if cutoff is None else f"{base}@{cutoff}"
        column = [finite(_values(models, model).get(name)) for model in _models(models)]
        for index, cell in enumerate(_cells(column, base)):
            rows[index]["cells"].append(cell)
    heads = [
        {
            "label": glossary.describe(base).label + ("" if cutoff is None else f"@{cutoff}"),
            "meaning": glossary.describe(base).meaning,
            "better": glossary.describe(base).better,
        }
        for base in bases
    ]
    return {"heads": heads, "rows": rows}


def _cells(column: Sequence[float | None], base: str) -> list[dict[str, Any]]:
    known = [value for value in column if value is not None]
    better = glossary.describe(base).better
    best = None
    if len(known) > 1 and better != "depends":
        best = max(known) if better == "higher" else min(known)
    largest = max(map(abs, known), default=0.0)
    written = scales.number if base.startswith("num_") else scales.metric
    return [
        {
            "text": "–" if value is None else written(value),
            "best": value is not None and value == best,
            "bar": charts.cell_bar(abs(value or 0.0) / largest if largest else 0.0, index),
        }
        for index, value in enumerate(column)
    ]


def _charts(models: Any, cutoffs: Sequence[int], wanted: Sequence[str]) -> list[dict[str, Any]]:
    """One chart a metric: groups of columns by K, a colour a model."""
    order = _models(models)
    drawn = []
    for base in wanted:
        values = [
            [finite(_values(models, model).get(f"{base}@{cutoff}")) for cutoff in cutoffs]
            for model in order
        ]
        if not any(value is not None for row in values for value in row):
            continue
        metric = glossary.describe(base)
        labels = [glossary.model_label(model) for model in order]
        chart = charts.column_chart(
            f"{metric.label} at each cut-off K of {', '.join(labels)}.",
            [str(cutoff) for cutoff in cutoffs],
            labels,
            values,
            "K",
            Axis(f"{metric.label}@K", exact=scales.metric),
        )
        drawn.append({"label": f"{metric.label} by K", "meaning": metric.meaning, "chart": chart})
    return drawn


def _slices(models: Any, cutoff: int) -> dict[str, Any]:
    """Rows of slices and models; the best model of each slice is marked.

    Lists of new items alone are in the table and not in the chart, whose scale they would set.
    """
    order = _models(models)
    names = list(
        dict.fromkeys(
            name for model in order for name in mapping(mapping(models[model]).get("slices"))
        )
    )
    bases = [base for base in SLICE_METRICS if base in _bases(models, "ranking")]
    groups = []
    drawn: list[str] = []
    values: list[list[float | None]] = [[] for _ in order]
    for name in names:
        parts = [
            mapping(mapping(mapping(models[model]).get("slices")).get(name)) for model in order
        ]
        queries = next((p["num_queries"] for p in parts if finite(p.get("num_queries"))), None)
        columns = [
            _cells([finite(mapping(p.get("metrics")).get(f"{base}@{cutoff}")) for p in parts], base)
            for base in bases
        ]
        if name not in glossary.OTHER_LISTS:
            drawn.append(glossary.slice_label(name))
            for index, part in enumerate(parts):
                first = bases[0] if bases else ""
                values[index].append(finite(mapping(part.get("metrics")).get(f"{first}@{cutoff}")))
        groups.append(
            {
                "name": glossary.slice_label(name),
                "queries": queries,
                "rows": [
                    {"model": glossary.model_label(model), "cells": [col[i] for col in columns]}
                    for i, model in enumerate(order)
                ],
            }
        )
    heads = [{"label": glossary.label(f"{base}@{cutoff}")} for base in bases]
    return {"heads": heads, "groups": groups, "chart": _slice_chart(drawn, order, values, heads)}


def _slice_chart(
    names: Sequence[str],
    order: Sequence[str],
    values: Sequence[Sequence[float | None]],
    heads: Sequence[Mapping[str, Any]],
) -> Any:
    if not names or not heads:
        return None
    labels = [glossary.model_label(model) for model in order]
    return charts.column_chart(
        f"{heads[0]['label']} of {', '.join(labels)} by slice.",
        names,
        labels,
        values,
        "slice",
        Axis(str(heads[0]["label"]), exact=scales.metric),
    )


def _classification(split: str, models: Any) -> list[dict[str, Any]]:
    """A table of the label, and one of each further task."""
    order = _models(models)
    parts = {model: mapping(mapping(models[model]).get("classification")) for model in order}
    by_task: dict[str, dict[str, None]] = {}
    for part in parts.values():
        for name in part:
            if finite(part.get(name)) is not None:
                base, _, task = name.partition(":")
                by_task.setdefault(task, {})[base] = None
    tables = []
    for task, bases in by_task.items():
        names = {base: f"{base}:{task}" if task else base for base in bases}
        of_task = {
            model: {"metrics": {base: part.get(name) for base, name in names.items()}}
            for model, part in parts.items()
        }
        tables.append({"split": split, "task": task} | _table(of_task, list(bases), None))
    return tables


def _glossary(splits: Iterable[Any]) -> list[dict[str, str]]:
    found: dict[str, None] = {}
    for split in splits:
        for model in mapping(split.get("models")).values():
            for name in [*mapping(model.get("metrics")), *mapping(model.get("classification"))]:
                found[glossary.split_name(name)[0].partition(":")[0]] = None
    order = list(glossary.METRICS)
    return [
        {"label": glossary.describe(base).label, "meaning": glossary.describe(base).meaning}
        for base in sorted(found, key=lambda b: (order.index(b) if b in order else 99, b))
    ]
