"""Public data sets as they are handed around, to the events that [prepare] reads."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from random import Random
from typing import Any

from distrec.files import replace_text

SEQUENCES = {"toys": "Toys_and_Games.txt", "lastfm": "LastFM.txt"}
"""One user a line, the user and their items in order of time, as S3-Rec publishes them."""
FINAL = "-final"
"""Ending of a name: with a given test, the same without valid, which is part of train."""
NUM_FOLDS = 5
RATINGS = tuple(f"ml-1m-ratings-{fold}" for fold in range(NUM_FOLDS))
"""Ratings of MovieLens-1M; a fifth of them, drawn by lot, is test."""
CLICKS = "ml-1m-clicks"
"""Label 1 for ratings above 3, 0 for those below; a tenth is valid, a tenth test."""
FIVE_STARS = "five_stars"
TASKS = "ml-1m-tasks"
"""The same with a further task, FIVE_STARS: 1 for ratings of 5."""
LABELLED = tuple(f"{CLICKS}-{percent}" for percent in (1, 10, 100))
"""The same, but of train only so many per cent have a label; all others, ratings of 3 among them,
are there for the histories, with a weight of 0."""
WATCHED = "ml-1m-watched"
"""The ratings of MovieLens-1M as events without labels, divided as CLICKS are."""
_GIVEN = ("ml-1m-ncf", "amazon-book", *RATINGS, CLICKS, TASKS, *LABELLED, WATCHED)
NAMES = (*SEQUENCES, "ml-1m", *_GIVEN, *(f"{name}{FINAL}" for name in _GIVEN))
# of the train events of a given split without valid, one in so many is valid
_VALID_ONE_IN = 10
_SEED = 1


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
    header = ["user_id", "item_id"]
    if name.startswith(RATINGS):
        header += ["rating"]
    elif name in LABELLED:
        header += ["label", "weight"]
    elif name == CLICKS:
        header += ["label"]
    elif name == TASKS:
        header += ["label", FIVE_STARS]
    elif not name.startswith(("amazon-book", WATCHED)):
        header += ["time"]
    if name.startswith(_GIVEN):
        header += ["split"]
    if not path.exists():
        lines = ["\t".join(header), *_rows(name, data)]
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, "\n".join(lines) + "\n")
    section: dict[str, Any] = {"paths": [str(path)], "separator": "\t"}
    section |= {key: key for key in header[2:]}
    if name == TASKS:
        section["tasks"] = [section.pop(FIVE_STARS)]
    return section


def catalogue(data: Path) -> tuple[str, str]:
    """key=value of the files of items and users of MovieLens-1M."""
    paths = {"items": data / "ml-1m" / "movies.dat", "users": data / "ml-1m" / "users.dat"}
    items, users = (
        f"prepare.{name}.paths={json.dumps([str(path.resolve())])}" for name, path in paths.items()
    )
    return items, users


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


def write_catalogue(data: Path, directory: Path, leave: Collection[str]) -> None:
    """Write what MovieLens-1M tells of its films and users, as conf/unified.toml reads it.

    Args:
        data: Folder with a folder for each data set.
        directory: Where items.tsv and users.tsv are written.
        leave: Films that are left out.
    """
    items, users = ["item_id\ttitle\tyear\tgenres"], ["user_id\tage\tgender\toccupation"]
    for line in (data / "ml-1m" / "movies.dat").read_text("latin-1").splitlines():
        item, title, genres = line.split("::")
        if item not in leave:
            items.append(f"{item}\t{title[:-7]}\t{title[-5:-1]}\t{genres}")
    for line in (data / "ml-1m" / "users.dat").read_text("latin-1").splitlines():
        user, gender, age, occupation, _ = line.split("::")
        users.append(f"{user}\t{age}\t{gender}\t{occupation}")
    for name, lines in (("items.tsv", items), ("users.tsv", users)):
        replace_text(directory / name, "\n".join(lines) + "\n")


def _rows(name: str, data: Path) -> Iterator[str]:
    if name in SEQUENCES:
        for line in (data / name / SEQUENCES[name]).read_text().splitlines():
            user, *items = line.split()
            yield from (f"{user}\t{item}\t{place}" for place, item in enumerate(items))
        return
    if name.startswith("amazon-book"):
        yield from _amazon_book(data / "amazon-book", name.endswith(FINAL))
        return
    ratings = data / "ml-1m" / "ratings.dat.gz"
    if name.startswith(RATINGS):
        fold = int(name.removesuffix(FINAL).rpartition("-")[2])
        yield from _rated(ratings, fold, name.endswith(FINAL))
        return
    if name in (CLICKS, TASKS):
        yield from _clicks(ratings, name == TASKS)
        return
    if name in LABELLED:
        yield from _labelled(ratings, int(name.rpartition("-")[2]) / 100)
        return
    if name == WATCHED:
        yield from (f"{user}\t{item}\t{split}" for user, item, _, split in _divided(ratings))
        return
    rows = movielens_events(ratings)
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


def _amazon_book(directory: Path, is_final: bool) -> Iterator[str]:
    """The split of KGAT. A tenth of a user's train events, drawn by lot, is valid: never the
    first one drawn, so that nobody is without train events."""
    random = Random(_SEED)
    for split in ("train", "test"):
        for line in (directory / f"{split}.txt").read_text().splitlines():
            user, *items = line.split()
            random.shuffle(items)
            for place, item in enumerate(dict.fromkeys(items)):
                is_valid = split == "train" and place > 0 and not random.randrange(_VALID_ONE_IN)
                own = "valid" if is_valid and not is_final else split
                yield f"{user}\t{item}\t{own}"


def _rated(path: Path, fold: int, is_final: bool) -> Iterator[str]:
    random = Random(_SEED)
    for user, item, rating, _ in _ratings(path):
        split = "test" if random.randrange(NUM_FOLDS) == fold else "train"
        if not random.randrange(_VALID_ONE_IN) and split == "train" and not is_final:
            split = "valid"
        yield f"{user}\t{item}\t{rating}\t{split}"


def _divided(path: Path) -> Iterator[tuple[str, str, int, str]]:
    """User, item, rating and split."""
    random = Random(_SEED)
    splits = ("valid", "test", *["train"] * 8)
    for user, item, rating, _ in _ratings(path):
        yield user, item, rating, random.choice(splits)


def _clicks(path: Path, with_task: bool) -> Iterator[str]:
    for user, item, rating, split in _divided(path):
        if rating != 3:
            task = f"{int(rating == 5)}\t" if with_task else ""
            yield f"{user}\t{item}\t{int(rating > 3)}\t{task}{split}"


def _labelled(path: Path, share: float) -> Iterator[str]:
    random = Random(_SEED)
    for user, item, rating, split in _divided(path):
        has_label = rating != 3 and (split != "train" or random.random() < share)
        if has_label:
            yield f"{user}\t{item}\t{int(rating > 3)}\t1\t{split}"
        elif split == "train":
            yield f"{user}\t{item}\t1\t0\t{split}"


def _ratings(path: Path) -> Iterator[tuple[str, str, int, int]]:
    """User, item, rating and time, in the order of the file."""
    with gzip.open(path, "rt") as lines:
        for line in lines:
            user, item, rating, time = line.rstrip().split("::")
            yield user, item, int(rating), int(time)


def movielens_events(path: Path) -> dict[str, list[tuple[str, int]]]:
    """Items and times by user, of MovieLens-1M's ratings.dat.gz.

    Every rating is an event. Most of a user's share their second with others: they keep the order
    of the file, and each is put at least a second after the one before it.
    """
    ratings: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for place, (user, item, _, time) in enumerate(_ratings(path)):
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
    for user, item, *_ in _ratings(data / "ml-1m" / "ratings.dat.gz"):
        users[user] = items[item] = None
    return list(users), list(items)


def _ncf_test(data: Path) -> dict[str, str]:
    """The item of test by user."""
    users, items = _ncf_ids(data)
    rows = [row.split() for row in (data / "ml-1m" / "ml-1m.test.rating").read_text().splitlines()]
    return {users[int(user)]: items[int(item)] for user, item, *_ in rows}
