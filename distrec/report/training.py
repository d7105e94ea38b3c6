"""The sections on training: learning curves, where table rows lie, time by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distrec.report import charts, glossary, scales
from distrec.report.files import finite, mapping
from distrec.report.scales import Axis, NumberFormat
from distrec.report.settings import mask

MAX_CURVE_POINTS = 240
# more ranks or tables than this would be unreadable; the rest is added up or told in words
MAX_RANKS = 16
MAX_TABLES = charts.NUM_COLORS - 1


def thin(
    points: Sequence[tuple[float, float]], most: int = MAX_CURVE_POINTS
) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of its neighbours."""
    if len(points) <= most:
        return list(points)
    kept = []
    for index in range(most):
        part = points[index * len(points) // most : (index + 1) * len(points) // most]
        kept.append((sum(p[0] for p in part) / len(part), sum(p[1] for p in part) / len(part)))
    return kept


def curves_section(
    steps: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]], metric: str
) -> dict[str, Any] | None:
    """Charts over steps; None when nothing was logged."""
    figures = [
        _step_curve(steps, "loss", "Training loss", "loss", scales.number),
        _validation_curve(validations, metric),
        _step_curve(steps, "learning_rate", "Learning rate", "learning rate", scales.number),
        _step_curve(
            steps, "examples_per_second", "Throughput", "examples a second", scales.compact
        ),
        _weight_curves(validations),
    ]
    drawn = [figure for figure in figures if figure is not None]
    if not drawn:
        return None
    last = steps[-1] if steps else {}
    epoch = finite(last.get("epoch"))
    return {
        "figures": drawn,
        "steps": finite(last.get("step")),
        # the log counts epochs from 0
        "epoch": None if epoch is None else epoch + 1,
        "averaged": len(steps) > MAX_CURVE_POINTS,
    }


def _step_curve(
    steps: Sequence[Mapping[str, Any]], key: str, title: str, label: str, tick: NumberFormat
) -> dict[str, Any] | None:
    points = [
        (float(entry["step"]), value)
        for entry in steps
        if (value := finite(entry.get(key))) is not None
    ]
    if not points:
        return None
    chart = charts.line_chart(
        f"{title} by step, from {scales.number(points[0][1])} at step "
        f"{scales.number(points[0][0])} to {scales.number(points[-1][1])} at step "
        f"{scales.number(points[-1][0])}.",
        [charts.Series(label, thin(points))],
        Axis("step"),
        Axis(label, tick=tick, zero=key != "loss"),
    )
    note = f"{scales.number(points[0][1])} at first, {scales.number(points[-1][1])} at the end"
    if key == "examples_per_second":
        typical = sorted(value for _, value in points)[len(points) // 2]
        note = f"median {scales.compact(typical)} examples a second over all ranks"
    elif key == "learning_rate":
        note = f"of the dense part, at most {scales.number(max(value for _, value in points))}"
    return {"title": title, "note": note, "chart": chart}


def _validation_curve(
    validations: Sequence[Mapping[str, Any]], metric: str
) -> dict[str, Any] | None:
    names = [name for entry in validations for name in mapping(entry.get("metrics"))]
    chosen = metric if metric in names else "ndcg@10" if "ndcg@10" in names else None
    chosen = chosen or next(iter(names), None)
    if chosen is None:
        return None
    points = [
        (float(entry["step"]), value)
        for entry in validations
        if (value := finite(mapping(entry.get("metrics")).get(chosen))) is not None
    ]
    if not points:
        return None
    lower = glossary.describe(glossary.split_name(chosen)[0]).better == "lower"
    best = (min if lower else max)(points, key=lambda point: point[1])
    label = glossary.label(chosen)
    chart = charts.line_chart(
        f"{label} on the validation queries by step, best {scales.metric(best[1])} at step "
        f"{scales.number(best[0])}.",
        [charts.Series(label, points)],
        Axis("step"),
        Axis(label, exact=scales.metric),
        best=best,
    )
    note = f"best {scales.metric(best[1])} at step {scales.number(best[0])}, marked with a ring"
    return {"title": f"Validation {label}", "note": note, "chart": chart}


def _weight_curves(validations: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How much each tower counts by step, where valid weighs them."""
    points: dict[str, list[tuple[float, float]]] = {}
    for entry in validations:
        for name, value in mapping(entry.get("weights")).items():
            # an addend of some items, not a factor
            if name != "new_item_bias" and (weight := finite(value)) is not None:
                points.setdefault(str(name), []).append((float(entry["step"]), weight))
    if not points:
        return None
    names = [name.replace("_", " ") for name in points]
    last = ", ".join(
        f"{name} {scales.metric(of_name[-1][1])}"
        for name, of_name in zip(names, points.values(), strict=True)
    )
    chart = charts.line_chart(
        f"Weight of each tower by step, at the end {last}.",
        [
            charts.Series(name, of_name)
            for name, of_name in zip(names, points.values(), strict=True)
        ],
        Axis("step"),
        Axis("weight", exact=scales.metric, zero=True),
    )
    note = "given by the validation queries; 1: as training weighs it"
    return {
        "title": "Weights of the towers", "note": note, "chart": chart,
        "legend": charts.legend(names),
    }  # fmt: skip


def tables_section(plan: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Embedding tables with their bytes, and a stacked bar of bytes a rank; None without tables."""
    tables = [table for table in plan if table.get("name")]
    if not tables:
        return None
    tables = sorted(tables, key=lambda table: (-sum(_by_rank(table)), str(table["name"])))
    ranks = max(len(_by_rank(table)) for table in tables)
    totals = [sum(_at(_by_rank(table), rank) for table in tables) for rank in range(ranks)]
    return {
        "rows": [_table_row(table) for table in tables],
        "num_ranks": ranks,
        "total": scales.num_bytes(sum(totals)),
        "spread": f"{max(totals) / min(totals):.2f}" if totals and min(totals) > 0 else None,
        "smallest": scales.num_bytes(min(totals, default=0)),
        "largest": scales.num_bytes(max(totals, default=0)),
        "shown_ranks": min(ranks, MAX_RANKS),
        **_rank_chart(tables, ranks),
    }


def _bytes(table: Mapping[str, Any], key: str) -> list[float]:
    value = table.get(key)
    return [finite(one) or 0.0 for one in value] if isinstance(value, list) else []


def _by_rank(table: Mapping[str, Any]) -> list[float]:
    """Bytes of weights and optimizer state on each rank."""
    weights, state = _bytes(table, "weight_bytes_by_rank"), _bytes(table, "state_bytes_by_rank")
    return [_at(weights, rank) + _at(state, rank) for rank in range(max(len(weights), len(state)))]


def _at(values: Sequence[float], index: int) -> float:
    return values[index] if index < len(values) else 0.0


def _table_row(table: Mapping[str, Any]) -> dict[str, Any]:
    by_rank = _by_rank(table)
    return {
        "name": str(table["name"]),
        "rows": finite(table.get("num_embeddings")),
        "width": finite(table.get("embedding_dim")),
        "placement": _placement(table),
        "weights": scales.num_bytes(sum(_bytes(table, "weight_bytes_by_rank"))),
        "state": scales.num_bytes(sum(_bytes(table, "state_bytes_by_rank"))),
        "largest": scales.num_bytes(max(by_rank, default=0)),
    }


def _placement(table: Mapping[str, Any]) -> str:
    placement = str(table.get("placement", "")).replace("_", "-")
    num_ids, method = finite(table.get("num_ids")), table.get("compression")
    if num_ids is None or method is None:
        return placement
    return f"{placement}, {num_ids:,.0f} ids by {str(method).replace('_', '-')}"


def _rank_chart(tables: Sequence[Mapping[str, Any]], ranks: int) -> dict[str, Any]:
    large, small = tables[:MAX_TABLES], tables[MAX_TABLES:]
    names = [str(table["name"]) for table in large] + (["all others"] if small else [])
    colors = [*range(len(large)), charts.NUM_COLORS][: len(names)]
    values = []
    for rank in range(min(ranks, MAX_RANKS)):
        row = [_at(_by_rank(table), rank) for table in large]
        rest = sum(_at(_by_rank(table), rank) for table in small)
        values.append([*row, rest] if small else row)
    labels = [f"rank {rank}" for rank in range(len(values))]
    chart = charts.stacked_rows(
        "Bytes of embedding weights and optimizer state on each rank, by table.",
        labels,
        names,
        values,
        scales.num_bytes,
        colors,
    )
    return {"chart": chart, "legend": charts.legend(names, colors)}


def timings_section(jobs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Seconds of the latest run of each job; None when none was logged."""
    if not jobs:
        return None
    lengths = [finite(job.get("seconds")) or 0.0 for job in jobs]
    chart = charts.stacked_rows(
        "Wall-clock time of each job.",
        [str(job["job"]) for job in jobs],
        ["wall-clock time"],
        [[length] for length in lengths],
        scales.seconds,
    )
    rows = [
        {
            "name": str(job["job"]),
            "started": str(job.get("started_at", "")).replace("T", " ").replace("+00:00", " UTC"),
            "length": scales.seconds(length),
            "code": job.get("exit_code"),
            "summary": _summary(job),
        }
        for job, length in zip(jobs, lengths, strict=True)
    ]
    return {"rows": rows, "chart": chart, "total": scales.seconds(sum(lengths))}


def _summary(job: Mapping[str, Any]) -> str:
    """The job's own words about what it did, as "name value" pairs."""
    if job.get("message"):
        return str(mask({"text": f"{job.get('error', 'error')}: {job['message']}"})["text"])
    pairs = []
    for name, value in mask(mapping(job.get("summary"))).items():
        if isinstance(value, float):
            value = scales.number(value)
        if isinstance(value, str | int) and not isinstance(value, bool):
            pairs.append(f"{name.replace('_', ' ')} {value}")
    return ", ".join(pairs)
