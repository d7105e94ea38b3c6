"""The data section: rows by stage, rejects, splits, popularity and history lengths.

Item and user tables may be large: they are read in batches, one column at a time, and only the
number of rows by value is kept.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from markupsafe import Markup

from distrec import columns as c
from distrec.dataset import DatasetManifest
from distrec.report import charts, scales
from distrec.report.scales import Axis

BATCH_ROWS = 65_536
NUM_CURVE_POINTS = 60
SPLIT_LABELS = {
    c.TRAIN: "train",
    c.VALID: "valid",
    c.TEST: "test",
    c.VALID_QUERIES: "valid queries",
    c.TEST_QUERIES: "test queries",
    c.ITEMS: "items",
    c.USERS: "users",
    c.REJECTS: "rejects",
}


def open_split(directory: Path, manifest: DatasetManifest, split: str) -> pads.Dataset | None:
    """The files of a split that the manifest names, or None when it has none."""
    entry = manifest.splits.get(split)
    if entry is None or not entry.files:
        return None
    paths = [str(directory / file.path) for file in entry.files]
    return pads.dataset(paths, format="parquet")


def scan(
    dataset: pads.Dataset, names: Sequence[str], where: pads.Expression | None = None
) -> Iterator[pa.RecordBatch]:
    """Chosen columns in small batches, so that memory does not grow with the table."""
    scanner = dataset.scanner(
        columns=list(names),
        filter=where,
        batch_size=BATCH_ROWS,
        batch_readahead=2,
        fragment_readahead=1,
    )
    yield from scanner.to_batches()


def value_counts(dataset: pads.Dataset, column: str) -> dict[int, int]:
    """Rows by value of an integer column, values ascending."""
    counts: Counter[int] = Counter()
    for batch in scan(dataset, [column]):
        values, numbers = np.unique(
            batch.column(0).to_numpy(zero_copy_only=False), return_counts=True
        )
        for value, amount in zip(values.tolist(), numbers.tolist(), strict=True):
            counts[int(value)] += amount
    return dict(sorted(counts.items()))


def popularity_points(items_by_count: dict[int, int]) -> list[tuple[float, float]]:
    """(rank, events) of items by descending events, thinned to evenly spaced log ranks.

    Args:
        items_by_count: Number of items by their number of events; items without any are left out.
    """
    values = sorted((value for value in items_by_count if value > 0), reverse=True)
    if not values:
        return []
    ends = np.cumsum([items_by_count[value] for value in values])
    ranks = np.unique(np.geomspace(1, ends[-1], NUM_CURVE_POINTS).round().astype(np.int64))
    places = np.searchsorted(ends, ranks)
    return [
        (float(rank), float(values[place]))
        for rank, place in zip(ranks.tolist(), places.tolist(), strict=True)
    ]


def share_of_top(items_by_count: dict[int, int], share: float) -> float:
    """Share of all events that fall to the most popular `share` of the items."""
    total_items = sum(items_by_count.values())
    total_events = sum(value * amount for value, amount in items_by_count.items())
    left = max(1, round(share * total_items))
    taken = 0
    for value in sorted(items_by_count, reverse=True):
        amount = min(left, items_by_count[value])
        taken += amount * value
        left -= amount
        if left == 0:
            break
    return taken / total_events if total_events else 0.0


def length_bins(users_by_length: dict[int, int]) -> tuple[list[str], list[int]]:
    """Labels and users of bins 0, 1, 2, 3-5, 6-10 ... 501-1k ... that cover all lengths."""
    longest = max(users_by_length, default=0)
    bounds = [0, 1, 2, 5]
    while bounds[-1] < longest:
        bounds.append(bounds[-1] * 2 if str(bounds[-1])[0] in "51" else bounds[-1] * 5 // 2)
    edges = [-1, *bounds]
    labels, amounts = [], []
    for low, high in itertools.pairwise(edges):
        amount = sum(number for value, number in users_by_length.items() if low < value <= high)
        end = f"{high // 1000}k" if high >= 1000 else str(high)
        labels.append(end if high - low == 1 else f"{low + 1}-{end}")
        amounts.append(amount)
    while amounts and amounts[0] == 0:
        labels, amounts = labels[1:], amounts[1:]
    while amounts and amounts[-1] == 0:
        labels, amounts = labels[:-1], amounts[:-1]
    return labels, amounts


def median_of(counts: dict[int, int]) -> float:
    """The median of values given by how often each occurs, ascending; lower one of two."""
    half, seen = (sum(counts.values()) + 1) // 2, 0
    for value, amount in counts.items():
        seen += amount
        if seen >= half:
            return float(value)
    return 0.0


def data_section(directory: Path, manifest: DatasetManifest) -> dict[str, Any]:
    """Everything the template shows about the dataset."""
    return {
        "counts": _with_bars(
            (name.replace("_", " "), rows)
            for name, rows in manifest.counts.items()
            if name not in manifest.splits
        ),
        "rejects": _with_bars(
            sorted(manifest.rejects.items(), key=lambda entry: (-entry[1], entry[0]))
        ),
        "splits": [
            {
                "name": SPLIT_LABELS.get(name, name),
                "rows": split.num_rows,
                "files": len(split.files),
                "bytes": scales.num_bytes(sum(file.num_bytes for file in split.files)),
            }
            for name, split in manifest.splits.items()
        ],
        "vocabularies": [
            {"name": name, "size": vocabulary.num_embeddings}
            for name, vocabulary in manifest.vocabularies.items()
        ],
        "popularity": _popularity(directory, manifest),
        "lengths": _lengths(directory, manifest),
    }


def _with_bars(counts: Iterable[tuple[str, int]]) -> list[dict[str, Any]]:
    pairs = list(counts)
    largest = max((amount for _, amount in pairs), default=0)
    return [
        {
            "name": name,
            "rows": amount,
            "bar": charts.cell_bar(amount / largest if largest else 0.0),
        }
        for name, amount in pairs
    ]


def _popularity(directory: Path, manifest: DatasetManifest) -> dict[str, Any] | None:
    items = open_split(directory, manifest, c.ITEMS)
    if items is None:
        return None
    counts = value_counts(items, c.COUNT)
    # indexes that stand for no item
    counts.pop(c.FREE_COUNT, None)
    points = popularity_points(counts)
    chart = charts.line_chart(
        "Popularity curve: train events of an item by its popularity rank, both axes logarithmic.",
        [charts.Series("items", points)],
        Axis("popularity rank", log=True),
        Axis("train events", log=True),
    )
    return {
        "chart": chart,
        "top": scales.percent(share_of_top(counts, 0.01)),
        "top_ten": scales.percent(share_of_top(counts, 0.1)),
        "without": counts.get(0, 0),
        "num_items": sum(counts.values()),
    }


def _lengths(directory: Path, manifest: DatasetManifest) -> dict[str, Any] | None:
    users = open_split(directory, manifest, c.USERS)
    if users is None:
        return None
    counts = value_counts(users, c.NUM_EVENTS)
    labels, amounts = length_bins(counts)
    chart: Markup = charts.column_chart(
        "Users by the number of their positive events.",
        labels,
        ["users"],
        [[float(amount) for amount in amounts]],
        "events of a user",
        Axis("users"),
    )
    total = sum(counts.values())
    mean = sum(value * amount for value, amount in counts.items()) / total if total else 0.0
    longer = sum(amount for value, amount in counts.items() if value > manifest.history_length)
    return {
        "chart": chart,
        "median": scales.number(median_of(counts)),
        "mean": f"{mean:.1f}",
        "cut": scales.percent(longer / total if total else 0.0),
        "limit": manifest.history_length,
    }
