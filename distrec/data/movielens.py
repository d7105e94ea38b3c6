"""MovieLens-100K (Harper and Konstan 2015, doi:10.1145/2827872), from either of two sources.

Zip codes are left out, for nothing here needs where a person lives.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Sequence

from distrec.data.sources import EVENTS, ITEMS, USERS, DataSet, Tables, from_url, from_wheel

OFFICIAL_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
OFFICIAL_SHA256 = "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229"

# a package that carries a copy
WHEEL = "recbole==1.2.1"
WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
_WHEEL_FILES = "recbole/dataset_example/ml-100k/ml-100k"

_HEADERS = {
    EVENTS: "user_id\titem_id\trating\ttimestamp",
    ITEMS: "item_id\ttitle\tyear\tgenres",
    USERS: "user_id\tage\tgender\toccupation",
}

# flags of u.item from the sixth column on
_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western",
)  # fmt: skip
_TITLE = re.compile(r"(?P<title>.*?)\s*\((?P<year>\d{4})\)(?:\s*\(V\))?")


def tables_of_official(archive: bytes) -> Tables:
    """The canonical files from the bytes of ml-100k.zip."""
    with zipfile.ZipFile(io.BytesIO(archive)) as members:
        data = members.read("ml-100k/u.data")
        # the files of 1998 are in Latin-1
        item_lines = members.read("ml-100k/u.item").decode("latin-1").splitlines()
        user_lines = members.read("ml-100k/u.user").decode("latin-1").splitlines()
    items = []
    for line in filter(None, item_lines):
        item_id, title, _, _, _, *flags = line.split("|")
        genres = [genre for genre, flag in zip(_GENRES, flags, strict=True) if flag == "1"]
        items.append((item_id, *_title_and_year(title), "|".join(genres)))
    users = [tuple(line.split("|")[:4]) for line in user_lines if line]
    return _canonical(data, items, users)


def tables_of_wheel(archive: bytes) -> Tables:
    """The canonical files from the bytes of the wheel that carries a copy."""
    with zipfile.ZipFile(io.BytesIO(archive)) as members:
        data = members.read(f"{_WHEEL_FILES}.inter").partition(b"\n")[2]
        item_lines = members.read(f"{_WHEEL_FILES}.item").decode().splitlines()[1:]
        user_lines = members.read(f"{_WHEEL_FILES}.user").decode().splitlines()[1:]
    items = []
    for line in filter(None, item_lines):
        item_id, title, year, genres = line.split("\t")
        # the copy cut the title at its last bracket: put together what it took apart
        full = "unknown" if title == "unkonwn" else f"{title} ({year})"
        items.append((item_id, *_title_and_year(full), genres.replace(" ", "|")))
    users = [tuple(line.split("\t")[:4]) for line in user_lines if line]
    return _canonical(data, items, users)


def _title_and_year(text: str) -> tuple[str, str]:
    """Take "Toy Story (1995)" apart; a title without a year keeps an empty one."""
    text = " ".join(text.split())
    match = _TITLE.fullmatch(text)
    return (match["title"], match["year"]) if match else (text, "")


def _canonical(
    data: bytes, items: Sequence[tuple[str, ...]], users: Sequence[tuple[str, ...]]
) -> Tables:
    def table(file: str, rows: Sequence[tuple[str, ...]]) -> bytes:
        return ("\n".join([_HEADERS[file], *("\t".join(row) for row in rows)]) + "\n").encode()

    return {
        EVENTS: _HEADERS[EVENTS].encode() + b"\n" + data,
        ITEMS: table(ITEMS, items),
        USERS: table(USERS, users),
    }


MOVIELENS_100K = DataSet(
    headers=_HEADERS,
    num_rows={EVENTS: 100_000, ITEMS: 1_682, USERS: 943},
    # the u.data that GroupLens publishes
    sha256={EVENTS: "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490"},
    sources={
        OFFICIAL_URL: lambda: tables_of_official(from_url(OFFICIAL_URL, OFFICIAL_SHA256)),
        WHEEL: lambda: tables_of_wheel(from_wheel(WHEEL, WHEEL_SHA256)),
    },
)
