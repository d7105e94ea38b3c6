"""What a dataset holds of the people: their ids, and which rows of each split are theirs.

A user whom train does not know has no id: all such users share UNKNOWN_INDEX, and their rows in
train, valid and test do not say whose they are. There a row is taken for a person's if it could be:
if its items, its number of events and, where the dataset shows them, its times are among those that
``users/`` has of the person. So none of theirs is left, and a stranger's row may go with them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distrec import columns as c
from distrec.dataset import DatasetManifest, FeatureSpec, FileEntry
from distrec.forget.rows import NO_IDS, Ids, among, flat_integers, integers, row_groups
from distrec.people import names_somebody

# as prepare's vocabulary_hash: of each pair's SHA-256 so many words of so many hexadecimal digits
_WORDS, _DIGITS = 4, 15
EXAMPLES = (c.TRAIN, c.VALID, c.TEST)
WITH_USER_ID = (c.USERS, c.VALID_QUERIES, c.TEST_QUERIES)


@dataclass(frozen=True)
class Stranger:
    """A person without an id, as users/ knows them.

    Args:
        items: All that they had, and UNKNOWN_INDEX.
        pairs: (item, time) of their last positive events.
        num_events: Of their positive events.
        last_time: At or after that of any event.
    """

    items: frozenset[int]
    pairs: frozenset[tuple[int, int]]
    num_events: int
    last_time: int

    def could_be(self, row: Mapping[str, object], has_negatives: bool) -> bool:
        """Whether an example could be theirs.

        Args:
            row: item_index, time, label, num_events, history, history_times.
            has_negatives: Whether events of label 0 or less are in no history.
        """
        pairs = [(row[c.ITEM_INDEX], row[c.TIME])]
        if has_negatives and float(row[c.LABEL]) <= 0:  # type: ignore[arg-type]
            pairs = []
        pairs += zip(row[c.HISTORY], row[c.HISTORY_TIMES], strict=False)  # type: ignore[call-overload]
        items = {row[c.ITEM_INDEX], *row[c.HISTORY]}  # type: ignore[misc]
        is_shown_whole = self.num_events <= len(self.pairs)
        return (
            items <= self.items
            and row[c.NUM_EVENTS] <= self.num_events  # type: ignore[operator]
            and row[c.TIME] <= self.last_time  # type: ignore[operator]
            and (not is_shown_whole or self.pairs.issuperset(pairs))
        )


@dataclass
class Found:
    """What of the people is in a dataset.

    Args:
        people: Values, as the dataset has them; where it has hashes, the raw ones too.
        manifest: Of the dataset.
        ids: Vocabulary -> ids that nobody has any more, ascending: those of the people, and those
            of features that no one else has.
        known: Values that are in the dataset.
        strangers: People without an id.
        num_events: Train events by item index, of all that goes.
        recent: valid, test, users -> recent events by item index, of all that goes.
        rows: Split -> which rows go, by number.
        hashes: Vocabulary -> SHA-256 without those ids, where there are any.
    """

    people: frozenset[str]
    manifest: DatasetManifest
    ids: dict[str, Ids] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    strangers: list[Stranger] = field(default_factory=list)
    num_events: Counter[int] = field(default_factory=Counter)
    recent: dict[str, Counter[int]] = field(default_factory=dict)
    rows: dict[str, Ids] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Rows that go, over all splits."""
        return sum(len(rows) for rows in self.rows.values())

    @property
    def is_there(self) -> bool:
        """Whether anything of them is."""
        return bool(self.num_rows or self.known)

    def gone(self, split: str, table: pa.Table) -> NDArray[np.bool_]:
        """Which rows of a row group of a split are theirs."""
        if split in WITH_USER_ID:
            return among(table, c.USER_ID, self.people)
        if split == c.REJECTS:
            rows = table.select([c.SOURCE, c.RAW_ROW]).to_pylist()
            marks = (
                row[c.SOURCE] != c.ITEMS and names_somebody(row[c.RAW_ROW], self.people)
                for row in rows
            )
            return np.fromiter(marks, np.bool_, len(rows))
        if split not in EXAMPLES:
            return np.zeros(len(table), np.bool_)
        users = integers(table, c.USER_INDEX)
        gone = np.isin(users, self.ids[c.USER_ID])
        if self.strangers:
            places = np.flatnonzero(users == c.UNKNOWN_INDEX)
            has_negatives = self.manifest.has_labels or self.manifest.rating_scale is not None
            for place, row in zip(places, table.take(pa.array(places)).to_pylist(), strict=True):
                gone[place] = any(one.could_be(row, has_negatives) for one in self.strangers)
        return gone


def find(directory: Path, manifest: DatasetManifest, people: frozenset[str]) -> Found:
    """Look for the people in a dataset; nothing is changed.

    Raises:
        DataError: A file is missing or damaged.
    """
    found = Found(people, manifest)
    _find_ids(found, directory)
    _find_users(found, directory)
    features = [one for one in manifest.features if _is_a_value(one, manifest)]
    gone = {one.column: set[int]() for one in features}
    kept = {one.column: set[int]() for one in features}
    for split in sorted(manifest.splits):
        if split == c.ITEMS:
            continue
        own = [one for one in features if one.side in _sides(split)]
        _look_through(found, directory, split, own, gone, kept)
    for one in features:
        found.ids[one.column] = np.array(sorted(gone[one.column] - kept[one.column]), np.int64)
    for name, ids in found.ids.items():
        if len(ids):
            entries = manifest.vocabularies[name].files
            found.hashes[name] = hash_of_vocabulary(_pairs(directory, entries, ids))
    return found


def hash_of_vocabulary(pairs: Iterable[tuple[str, int]]) -> str:
    """As prepare hashes the (value, id) pairs of a vocabulary, whatever their order is."""
    words, count = [0] * _WORDS, 0
    for value, index in pairs:
        count += 1
        digits = hashlib.sha256(f"{index}\t{value}".encode()).hexdigest()
        for place in range(_WORDS):
            words[place] ^= int(digits[_DIGITS * place : _DIGITS * (place + 1)], 16)
    return hashlib.sha256(",".join(map(str, [count, *words])).encode()).hexdigest()


def _pairs(
    directory: Path, entries: Iterable[FileEntry], without: Ids
) -> Iterator[tuple[str, int]]:
    gone = set(without.tolist())
    for entry in entries:
        for table in row_groups(directory / entry.path, [c.VALUE, c.ID]):
            values, ids = table.column(c.VALUE).to_pylist(), table.column(c.ID).to_pylist()
            yield from (pair for pair in zip(values, ids, strict=True) if pair[1] not in gone)


def _find_ids(found: Found, directory: Path) -> None:
    ids = [NO_IDS]
    for entry in found.manifest.vocabularies[c.USER_ID].files:
        for table in row_groups(directory / entry.path, [c.VALUE, c.ID]):
            mine = table.filter(pa.array(among(table, c.VALUE, found.people)))
            found.known.update(mine.column(c.VALUE).to_pylist())
            ids.append(integers(mine, c.ID))
    found.ids[c.USER_ID] = np.sort(np.concatenate(ids))


def _find_users(found: Found, directory: Path) -> None:
    for entry in found.manifest.splits[c.USERS].files:
        for table in row_groups(directory / entry.path):
            for row in table.filter(pa.array(among(table, c.USER_ID, found.people))).to_pylist():
                found.known.add(row[c.USER_ID])
                if row[c.USER_INDEX] == c.UNKNOWN_INDEX:
                    pairs = zip(row[c.HISTORY], row[c.HISTORY_TIMES], strict=True)
                    items = frozenset({c.UNKNOWN_INDEX, *row[c.SEEN]})
                    found.strangers.append(
                        Stranger(items, frozenset(pairs), row[c.NUM_EVENTS], row[c.TIME])
                    )


def _is_a_value(feature: FeatureSpec, manifest: DatasetManifest) -> bool:
    """Whether ids of a feature of users or events are values that somebody wrote, not buckets."""
    edges = (name.startswith("edge_") for name in manifest.statistics.get(feature.column, {}))
    return feature.side != "item" and feature.column in manifest.vocabularies and not any(edges)


def _sides(split: str) -> tuple[str, ...]:
    """Of the features that are looked at in a split: users/ has every user once."""
    return {c.USERS: ("user",), c.TRAIN: ("context",), c.VALID: ("context",),
            c.TEST: ("context",)}.get(split, ())  # fmt: skip


def _look_through(
    found: Found,
    directory: Path,
    split: str,
    features: Iterable[FeatureSpec],
    gone: dict[str, set[int]],
    kept: dict[str, set[int]],
) -> None:
    """Mark the rows of a split, count the events that go, and collect the ids of features."""
    first, places = 0, [NO_IDS]
    for entry in found.manifest.splits[split].files:
        for table in row_groups(directory / entry.path):
            mine = found.gone(split, table)
            places.append(first + np.flatnonzero(mine))
            first += len(table)
            for part, sets in ((mine, gone), (~mine, kept)):
                rows = table.filter(pa.array(part))
                for one in features:
                    ids = np.unique(flat_integers(rows, one.column))
                    sets[one.column].update(ids[ids >= c.FIRST_INDEX].tolist())
            if split in EXAMPLES and mine.any():
                _count_events(found, split, table.filter(pa.array(mine)))
    found.rows[split] = np.concatenate(places)


def _count_events(found: Found, split: str, rows: pa.Table) -> None:
    """Add the events that rows of train, valid or test stand for."""
    items, times = integers(rows, c.ITEM_INDEX), integers(rows, c.TIME)
    is_positive = np.asarray(rows.column(c.LABEL).to_numpy()) > 0
    if split == c.TRAIN:
        if found.manifest.train_rows == "windows":
            parts = [(items, times)]
            for row in rows.select([c.NUM_EVENTS, c.HISTORY, c.HISTORY_TIMES]).to_pylist():
                # a later stretch begins with the last event of the one before
                overlap = int(row[c.NUM_EVENTS] > len(row[c.HISTORY]))
                past, since = (
                    np.array(row[name][overlap:], np.int64) for name in (c.HISTORY, c.HISTORY_TIMES)
                )
                parts.append((past, since))
            items, times = (np.concatenate(both) for both in zip(*parts, strict=True))
            # every event of a window is
            is_positive = np.ones(len(items), np.bool_)
        found.num_events.update(items.tolist())
    for later, pool in c.RECENT_POOLS.items():
        after = found.manifest.recent_after.get(later)
        if split in pool and after is not None:
            counts = found.recent.setdefault(later, Counter())
            counts.update(items[is_positive & (times > after)].tolist())
