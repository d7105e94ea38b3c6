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
NAMES = (*SEQUENCES, "ml-1m")


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
    if not path.exists():
        lines = ["user_id\titem_id\ttime", *_rows(name, data)]
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, "\n".join(lines) + "\n")
    return {"paths": [str(path)], "separator": "\t", "time": "time"}


def _rows(name: str, data: Path) -> Iterator[str]:
    if name in SEQUENCES:
        for line in (data / name / SEQUENCES[name]).read_text().splitlines():
            user, *items = line.split()
            yield from (f"{user}\t{item}\t{place}" for place, item in enumerate(items))
        return
    yield from _movielens(data / "ml-1m" / "ratings.dat.gz")


def _movielens(path: Path) -> Iterator[str]:
    """Every rating is an event. Most of a user's share their second with others: they keep the
    order of the file, and each is put at least a second after the one before it."""
    ratings: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    with gzip.open(path, "rt") as lines:
        for place, line in enumerate(lines):
            user, item, _, time = line.rstrip().split("::")
            ratings[user].append((int(time), place, item))
    for user, rated in ratings.items():
        latest = 0
        for time, _, item in sorted(rated):
            latest = max(time, latest + 1)
            yield f"{user}\t{item}\t{latest}"
