"""A plan as tables on the console, and as JSON."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from distrec.planner.memory import parts_of
from distrec.planner.plan import RankReport, Report, TableReport
from distrec.planner.units import format_bytes

# so many ranks are shown one by one; of more, the first, the last and the one that sends most
_SHOWN_RANKS = 8


def show(report: Report, console: Console) -> None:
    """Print a row a table, a row a rank, and what fits."""
    console.print(_tables(report))
    console.print(_ranks(report))
    first = report.ranks[0].memory
    parts = ", ".join(f"{name.replace('_', ' ')} {format_bytes(number)}"
                      for name, number in parts_of(first).items() if name != "total")  # fmt: skip
    console.print(f"Memory of rank 0: {parts}.")
    console.print(_hot_tier(report), soft_wrap=True, highlight=False)
    if report.bandwidth is not None:
        most = max(rank.network_bytes for rank in report.ranks)
        milliseconds = most / report.bandwidth * 1000
        console.print(
            f"Network: the rank that sends most needs {milliseconds:.2f} ms a step at "
            f"{report.bandwidth * 8 / 1e9:g} Gbit/s."
        )
    if report.memory_per_rank is not None:
        console.print(_fit(report, report.memory_per_rank))


def _tables(report: Report) -> Table:
    table = Table(
        title=f"{report.name}: {report.world_size} ranks, {report.examples_per_rank:,.0f} examples "
        "a rank and step"
    )
    table.add_column("table", overflow="fold")
    for name in (
        "rows", "width", "bytes", "placement", "ids/step", "distinct rows/step", "sent/step",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for entry in report.tables:
        plan, cost = entry.plan, entry.cost
        table.add_row(
            plan.name, f"{plan.num_embeddings:,}", str(plan.embedding_dim),
            format_bytes(entry.num_bytes), _placement(report, entry), f"{entry.num_ids:,.0f}",
            f"{cost.distinct_rows:,.0f}", format_bytes(cost.sent_bytes.mean()),
        )  # fmt: skip
    table.caption = (
        "bytes: weights and optimizer state on all ranks together; the last three: of one rank"
    )
    return table


def _placement(report: Report, entry: TableReport) -> str:
    plan = entry.plan
    hot = plan.hot_on(report.world_size)
    parts = [plan.placement, *([f"{hot:,} hot"] if hot else [])]
    if plan.composition is not None:
        parts.append(f"{plan.num_ids:,} ids by {plan.composition.method}")
    return ", ".join(parts)


def _hot_tier(report: Report) -> str:
    best = {
        entry.plan.name: entry.best_hot_rows for entry in report.tables if entry.best_hot_rows > 0
    }
    if not best:
        return "A hot tier would not send fewer bytes of any table."
    tables = ", ".join(f"{name} = {number}" for name, number in best.items())
    saved = 1 - report.best_network_bytes / report.table_network_bytes
    return (
        f'Hot tiers that send the fewest bytes: sharding.hot_rows = {{ {tables} }} or "auto", '
        f"{saved:.1%} less for the tables than as planned."
    )


def _ranks(report: Report) -> Table:
    table = Table(title="each rank")
    for name in ("rank", "memory", "tables", "sent/step", "network/step", "share of rows"):
        table.add_column(name, justify="right")
    for number in _shown(report):
        rank = report.ranks[number]
        held = rank.memory.table_weights + rank.memory.table_state
        table.add_row(
            str(number), format_bytes(rank.memory.total), format_bytes(held),
            format_bytes(rank.sent_bytes), format_bytes(rank.network_bytes), f"{rank.share:.2%}",
        )  # fmt: skip
    table.caption = "network: with the gradients of the dense part, sums as a ring sends them"
    return table


def _shown(report: Report) -> list[int]:
    number = len(report.ranks)
    if number <= _SHOWN_RANKS:
        return list(range(number))
    busiest = max(range(number), key=lambda rank: report.ranks[rank].network_bytes)
    return sorted({0, busiest, number - 1})


def _fit(report: Report, memory: int) -> str:
    if not report.fewest_ranks:
        return (
            f"No number of ranks up to {report.most_ranks:,} fits {format_bytes(memory)} a rank: "
            "what is on every rank is too large. Spread more tables, or take a smaller batch."
        )
    fits = report.ranks[0].memory.total <= memory
    return (
        f"{report.world_size} ranks {'fit' if fits else 'do not fit'} {format_bytes(memory)} a "
        f"rank. The least number that fits: {report.fewest_ranks}."
    )


def as_json(report: Report) -> str:
    """The plan for programs; bytes are expected values a step unless they are memory."""
    document: dict[str, Any] = {
        "name": report.name,
        "world_size": report.world_size,
        "examples_per_rank": report.examples_per_rank,
        "tables": [
            {
                "name": entry.plan.name,
                "num_embeddings": entry.plan.num_embeddings,
                "num_ids": entry.plan.num_ids,
                "embedding_dim": entry.plan.embedding_dim,
                "num_bytes": entry.num_bytes,
                "placement": entry.plan.placement,
                "hot_rows": entry.plan.hot_on(report.world_size),
                "best_hot_rows": entry.best_hot_rows,
                "ids_per_step": entry.num_ids,
                "distinct_rows_per_step": entry.cost.distinct_rows,
                "sent_bytes_per_step": entry.cost.sent_bytes.tolist(),
            }
            for entry in report.tables
        ],
        "ranks": [_rank_document(rank) for rank in report.ranks],
        "table_network_bytes_per_step": report.table_network_bytes,
        "best_hot_tier_network_bytes_per_step": report.best_network_bytes,
        "memory_per_rank": report.memory_per_rank,
        "fewest_ranks": report.fewest_ranks,
        "bandwidth_bytes_per_second": report.bandwidth,
    }
    return json.dumps(document, indent=1)


def _rank_document(rank: RankReport) -> dict[str, Any]:
    return {
        "memory_bytes": dict(parts_of(rank.memory)),
        "sent_bytes_per_step": rank.sent_bytes,
        "network_bytes_per_step": rank.network_bytes,
        "share": rank.share,
    }
