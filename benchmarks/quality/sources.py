"""Public data sets as they are handed around, to the events that [prepare] reads."""

from __future__ import annotations

import gzip
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distrec.files import replace_text

SEQUENCES = {"toys": "Toys_and_Games.txt", "lastfm": "LastFM.txt"}
"""One user a line, the user and their items in order of time, as S3-Rec publishes them."""
FINAL = "-final"
"""Ending of a name: with a given test, the same without valid, which is part of train."""
NAMES = (*SEQUENCES, "ml-1m", "ml-1m-ncf", f"ml-1m-ncf{FINAL}")


def write_events(name: str, data: Path, directory: Path) -> dict[str, Any]:
    """Write the events of a data set, unless they are there.

    Args:
        name: Of NAMES.
        data: Folder with a folder for each data set.
        directory: Where the file is written.

    Returns:
        The section prepare.events of the configuration.
    """
    path = directory / "events.tsv"
    is_split = name.startswith("ml-1m-ncf")
    if not path.exists():
        header = ["user_id", "item_id", "time", *(["split"] if is_split else [])]
        lines = ["\t".join(header), *_rows(name, data)]
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, "\n".join(lines) + "\n")
    section = {"paths": [str(path)], "separator": "\t", "time": "time"}
    return {**section, "split": "split"} if is_split else section


def write_candidates(data: Path, directory: Path) -> Path:
    """Write the 99 negatives a user of the NCF test, as evaluate.test_candidates wants them."""
    path = directory / "candidates.csv"
    if not path.exists():
        users, items = _ncf_ids(data)
        lines = ["user_id,item_id"]
        with gzip.open(data / "ml-1m" / "ml-1m.test.negative.gz", "rt") as rows:
            for row in rows:
                pair, *negatives = row.split()
                user = users[int(pair.strip("()").split(",")[0])]
                lines += [f"{user},{items[int(negative)]}" for negative in negatives]
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, "\n".join(lines) + "\n")
    return path


def _rows(name: str, data: Path) -> Iterator[str]:
    if name in SEQUENCES:
        for line in (data / name / SEQUENCES[name]).read_text().splitlines():
            user, *items = line.split()
            yield from (f"{user}\t{item}\t{place}" for place, item in enumerate(items))
        return
    rows = _movielens(data / "ml-1m" / "ratings.dat.gz")
    if name == "ml-1m":
        for user, events in rows.items():
            yield from (f"{user}\t{item}\t{time}" for item, time in events)
        return
    tests = _ncf_test(data)
    before = "train" if name.endswith(FINAL) else "valid"
    for user, events in rows.items():
        known = [(item, time) for item, time in events if item != tests[user]]
        yield from (f"{user}\t{item}\t{time}\ttrain" for item, time in known[:-1])
        yield from (f"{user}\t{item}\t{time}\t{before}" for item, time in known[-1:])
        # after all others: of the events of the last second the test was chosen by chance
        yield f"{user}\t{tests[user]}\t{events[-1][1] + 1}\ttest"


def _ratings(path: Path) -> Iterator[tuple[str, str, int]]:
    """User, item and time, in the order of the file."""
    with gzip.open(path, "rt") as lines:
        for line in lines:
            user, item, _, time = line.rstrip().split("::")
            yield user, item, int(time)


def _movielens(path: Path) -> dict[str, list[tuple[str, int]]]:
    """Items and times by user. Every rating is an event. Most of a user's share their second with
    others: they keep the order of the file, and each is put at least a second after the one before
    it."""
    ratings: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for place, (user, item, time) in enumerate(_ratings(path)):
        ratings[user].append((time, place, item))
    found: dict[str, list[tuple[str, int]]] = {}
    for user, rated in ratings.items():
        latest = 0
        found[user] = []
        for time, _, item in sorted(rated):
            latest = max(time, latest + 1)
            found[user].append((item, latest))
    return found


def _ncf_ids(data: Path) -> tuple[list[str], list[str]]:
    """Users and items by the numbers of the NCF files: in order of first appearance."""
    users: dict[str, None] = {}
    items: dict[str, None] = {}
    for user, item, _ in _ratings(data / "ml-1m" / "ratings.dat.gz"):
        users[user] = items[item] = None
    return list(users), list(items)


def _ncf_test(data: Path) -> dict[str, str]:
    """The item of test by user."""
    users, items = _ncf_ids(data)
    rows = [row.split() for row in (data / "ml-1m" / "ml-1m.test.rating").read_text().splitlines()]
    return {users[int(user)]: items[int(item)] for user, item, *_ in rows}
