"""The page of `distrec compare`: runs side by side, with the intervals of their metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from distrec import __version__
from distrec.report import charts, glossary, scales
from distrec.report.scales import Axis

WHOLE = "all"
_KEYS = ("mean", "low", "high")


def render_comparison(comparison: Mapping[str, Any]) -> str:
    """The page as text.

    Args:
        comparison: `distrec compare --json`: reference, metrics, resamples, confidence and parts,
            each with split, slice and rows.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": scales.number}
    files = resources.files("distrec.report")
    template = files.joinpath("comparison.html.j2").read_text(encoding="utf-8")
    metrics = comparison["metrics"]
    splits = list(dict.fromkeys(part["split"] for part in comparison["parts"]))
    labels = list(
        dict.fromkeys(row["label"] for part in comparison["parts"] for row in part["rows"])
    )
    text = environment.from_string(template).render(
        style=Markup(files.joinpath("report.css").read_text(encoding="utf-8")),
        version=__version__,
        reference=comparison["reference"],
        resamples=comparison["resamples"],
        confidence=scales.percent(comparison["confidence"]),
        heads=[{"label": glossary.label(name), "meaning": _meaning(name)} for name in metrics],
        unpaired=[
            label
            for label in labels
            if any(
                row["label"] == label and not row["is_paired"]
                for part in comparison["parts"]
                for row in part["rows"]
            )
        ],
        splits=[_split(split, comparison, labels) for split in splits],
    )
    return text + "\n"


def _meaning(name: str) -> str:
    return glossary.describe(glossary.split_name(name)[0]).meaning


def _split(split: str, comparison: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    parts = {part["slice"]: part for part in comparison["parts"] if part["split"] == split}
    metrics, whole = comparison["metrics"], parts[WHOLE]["rows"]
    first = metrics[0]
    return {
        "name": split,
        "queries": max(row["num_queries"] for row in whole),
        "rows": [_row(row, metrics) for row in whole],
        "charts": [_chart(name, split, whole, labels) for name in metrics],
        "slices": [
            {
                "name": glossary.slice_label(name),
                "rows": [_row(row, metrics) for row in part["rows"]],
                "queries": max(row["num_queries"] for row in part["rows"]),
                "chart": _chart(
                    first, f"{split}, {glossary.slice_label(name)}", part["rows"], labels
                ),
            }
            for name, part in parts.items()
            if name != WHOLE and any(row["num_queries"] for row in part["rows"])
        ],
    }


def _row(row: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    return {
        "label": row["label"],
        "cells": [_cell(row["values"][name], row["differences"].get(name)) for name in metrics],
    }


def _cell(value: Mapping[str, float], difference: Mapping[str, float] | None) -> dict[str, Any]:
    """Texts; the sign says which way the difference goes where its interval leaves out zero."""
    mean, low, high = (scales.metric(value[key]) for key in _KEYS)
    cell = {"text": mean, "range": f"{low} to {high}", "difference": "", "sure": False}
    if difference is not None:
        mean, low, high = (f"{difference[key]:+.4f}" for key in _KEYS)
        sure = difference["low"] > 0 or difference["high"] < 0
        cell |= {"difference": f"{mean} ({low} to {high})", "sure": sure}
    return cell


def _chart(
    name: str, where: str, rows: Sequence[Mapping[str, Any]], labels: Sequence[str]
) -> dict[str, Any]:
    label = glossary.label(name)
    chart = charts.interval_rows(
        f"{label} on {where} of {', '.join(row['label'] for row in rows)}, with intervals.",
        [row["label"] for row in rows],
        [tuple(row["values"][name][key] for key in _KEYS) for row in rows],
        Axis(label, exact=scales.metric),
        [labels.index(row["label"]) for row in rows],
    )
    return {"title": label, "note": where, "chart": chart}
