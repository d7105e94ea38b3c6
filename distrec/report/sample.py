"""The browsable sample: some users with their history and their recommendations, by title.

Users, items and scores may be larger than memory: only the rows of the sample are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.dataset as pads

from distrec import columns as c
from distrec.config import Config
from distrec.dataset import DatasetManifest, FeatureSpec
from distrec.report.choice import among, choose_users, open_scores
from distrec.report.data import open_split, scan
from distrec.report.files import RunFiles, finite

# shown of a history, the latest; and of recommendations, the first
MAX_HISTORY = 40
MAX_RECOMMENDATIONS = 20
MAX_FACTS = 4
MAX_TAGS = 4


def _rows(
    dataset: pads.Dataset | None, names: Sequence[str], column: str, values: Iterable[Any]
) -> list[dict[str, Any]]:
    """The rows whose `column` is among `values`, with those of the columns that exist."""
    wanted = set(values)
    if dataset is None or not wanted:
        return []
    present = [name for name in names if name in dataset.schema.names]
    return [
        row for batch in scan(dataset, present, among(column, wanted)) for row in batch.to_pylist()
    ]


def read_sample(config: Config, files: RunFiles) -> dict[str, Any] | None:
    """What the page's script shows; None when there are neither users nor scores.

    Returns:
        towers: names; items: [title, tags, train events or None]; users: each with id, kind (known,
        cold or new), events, facts, history [item, date] newest first, and recommendations
        [item, score, share by tower]; items are positions in `items`.
    """
    manifest, directory = files.manifest, config.dataset_directory
    users = open_split(directory, manifest, c.USERS) if manifest else None
    scores = open_scores(config.scores_directory, files.score_manifest)
    limit = config.evaluate.cold_user_events
    ids = choose_users(users, scores, config.report.sample_users, limit, config.seed)
    if not ids:
        return None
    features = [] if manifest is None else _shown_features(manifest, "user")
    user_rows = {
        row[c.USER_ID]: row
        for row in _rows(
            users,
            [c.USER_ID, c.USER_INDEX, c.NUM_EVENTS, c.HISTORY, c.HISTORY_TIMES,
             *(feature.column for feature in features)],
            c.USER_ID,
            ids,
        )
    }  # fmt: skip
    score_rows: dict[str, list[dict[str, Any]]] = {user: [] for user in ids}
    for row in _rows(scores, [c.USER_ID, c.RANK, c.ITEM_ID, c.SCORE, c.REASONS], c.USER_ID, ids):
        score_rows[row[c.USER_ID]].append(row)
    items = _Items(directory, manifest)
    items.read(user_rows.values(), (row for rows in score_rows.values() for row in rows))
    towers = _towers(config, score_rows.values())
    words = _Words(directory, manifest, features, user_rows.values())
    return {
        "towers": towers,
        "users": [
            _user(user, user_rows.get(user), score_rows[user], items, towers, words, limit)
            for user in ids
        ],
        "items": items.shown,
    }


def _user(
    user: str,
    row: Mapping[str, Any] | None,
    scored: Sequence[Mapping[str, Any]],
    items: _Items,
    towers: Sequence[str],
    words: _Words,
    limit: int,
) -> dict[str, Any]:
    kind, history = "new", []
    if row is not None:
        cold = row[c.NUM_EVENTS] <= limit or row[c.USER_INDEX] <= c.UNKNOWN_INDEX
        kind = "cold" if cold else "known"
        times = row.get(c.HISTORY_TIMES) or [0] * len(row[c.HISTORY])
        pairs = list(zip(row[c.HISTORY], times, strict=False))[::-1][:MAX_HISTORY]
        history = [[items.by_index(index), _date(time)] for index, time in pairs]
    first = sorted(scored, key=lambda entry: entry[c.RANK])[:MAX_RECOMMENDATIONS]
    return {
        "id": user,
        "kind": kind,
        "events": None if row is None else row[c.NUM_EVENTS],
        "facts": [] if row is None else words.facts(row),
        "history": history,
        "recommendations": [
            [
                items.by_id(entry[c.ITEM_ID]),
                round(float(entry[c.SCORE]), 4),
                [round(finite(_reasons(entry).get(tower)) or 0.0, 4) for tower in towers],
            ]
            for entry in first
        ],
    }


def _date(time: int) -> str:
    if not time:
        return ""
    try:
        return datetime.fromtimestamp(time, UTC).date().isoformat()
    except (OverflowError, ValueError, OSError):
        return ""


def _reasons(row: Mapping[str, Any]) -> dict[str, Any]:
    """Tower -> share; Arrow gives a map as pairs."""
    value = row.get(c.REASONS) or {}
    return dict(value)


def _towers(config: Config, rows_by_user: Iterable[Sequence[Mapping[str, Any]]]) -> list[str]:
    """The towers that have shares, those of the configuration first, in its order."""
    found = {name for rows in rows_by_user for row in rows for name in _reasons(row)}
    order = [name for name in config.model.towers if name in found]
    return [*order, *sorted(found.difference(order))]


def _shown_features(manifest: DatasetManifest, side: str) -> list[FeatureSpec]:
    """Features of ids whose vocabulary says in words what they mean."""
    return [
        feature
        for feature in manifest.features_of(side)
        if feature.kind in ("categorical", "multi_categorical")
        and feature.column in manifest.vocabularies
    ]


class _Words:
    """Encoded features back to the words of their vocabularies, for the rows given."""

    def __init__(
        self,
        directory: Path,
        manifest: DatasetManifest | None,
        features: Sequence[FeatureSpec],
        rows: Iterable[Mapping[str, Any]],
    ) -> None:
        self._features = features
        self._words: dict[str, dict[int, str]] = {}
        rows = list(rows)
        for feature in features:
            assert manifest is not None
            wanted = {index for row in rows for index in _ids(row, feature)}
            files = [str(directory / f.path) for f in manifest.vocabularies[feature.column].files]
            table = pads.dataset(files, format="parquet") if files else None
            self._words[feature.column] = {
                row[c.ID]: plain_bucket(str(row[c.VALUE]))
                for row in _rows(table, [c.ID, c.VALUE], c.ID, wanted)
            }

    def values(self, row: Mapping[str, Any], feature: FeatureSpec) -> list[str]:
        words = self._words[feature.column]
        return [words[index] for index in _ids(row, feature) if index in words]

    def facts(self, row: Mapping[str, Any]) -> list[str]:
        """``occupation: student``, one a feature."""
        found = [(feature.name, self.values(row, feature)) for feature in self._features]
        return [f"{name}: {', '.join(words[:MAX_TAGS])}" for name, words in found if words][
            :MAX_FACTS
        ]

    def tags(self, row: Mapping[str, Any]) -> str:
        """The words of all features, without their names."""
        found = [word for feature in self._features for word in self.values(row, feature)]
        return ", ".join(found[:MAX_TAGS])


def plain_bucket(value: str) -> str:
    """``(-inf, 21]`` and ``(50, inf]``, as buckets of numbers are called, in plain signs."""
    if value.startswith("(-inf, ") and value.endswith("]"):
        return f"≤ {value[7:-1]}"
    if value.startswith("(") and value.endswith(", inf]"):
        return f"> {value[1:-6]}"
    return value


def _ids(row: Mapping[str, Any], feature: FeatureSpec) -> list[int]:
    value = row.get(feature.column)
    values = value if isinstance(value, list) else [value]
    return [index for index in values if isinstance(index, int) and index >= c.FIRST_INDEX]


class _Items:
    """The items that the sample names, each once, with title, tags and number of train events."""

    def __init__(self, directory: Path, manifest: DatasetManifest | None) -> None:
        self._directory, self._manifest = directory, manifest
        self._by_index: dict[int, int] = {}
        self._by_id: dict[str, int] = {}
        self.shown: list[list[Any]] = []

    def read(
        self, user_rows: Iterable[Mapping[str, Any]], score_rows: Iterable[Mapping[str, Any]]
    ) -> None:
        """Look up everything that histories (by index) and recommendations (by id) name."""
        indexes = {index for row in user_rows for index in row[c.HISTORY][-MAX_HISTORY:]}
        ids = {row[c.ITEM_ID] for row in score_rows if row[c.RANK] <= MAX_RECOMMENDATIONS}
        if self._manifest is None:
            return
        table = open_split(self._directory, self._manifest, c.ITEMS)
        features = _shown_features(self._manifest, "item")
        names = [c.ITEM_ID, c.ITEM_INDEX, c.TITLE, c.COUNT, *(f.column for f in features)]
        rows = {
            row[c.ITEM_INDEX]: row
            for column, values in ((c.ITEM_INDEX, indexes), (c.ITEM_ID, ids))
            for row in _rows(table, names, column, values)
        }
        words = _Words(self._directory, self._manifest, features, rows.values())
        for index, row in sorted(rows.items()):
            self._by_index[index] = self._by_id[row[c.ITEM_ID]] = len(self.shown)
            title = row.get(c.TITLE) or row[c.ITEM_ID]
            self.shown.append([title, words.tags(row), row.get(c.COUNT)])

    def by_id(self, item: str) -> int:
        """Position of an item by its raw id; one that the dataset lacks is shown by its id."""
        if item not in self._by_id:
            self._by_id[item] = len(self.shown)
            self.shown.append([item, "", None])
        return self._by_id[item]

    def by_index(self, index: int) -> int:
        """Position of an item by its index."""
        if index not in self._by_index:
            self._by_index[index] = len(self.shown)
            self.shown.append([f"item {index}", "", None])
        return self._by_index[index]
