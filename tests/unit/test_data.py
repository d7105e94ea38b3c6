"""MovieLens-100K from either source gives the same files; no network is used here."""

from __future__ import annotations

import hashlib
import io
import urllib.error
import zipfile
from pathlib import Path

import pytest

from distrec import data
from distrec.errors import ConfigError, DataError

EVENTS = b"196\t242\t3\t881250949\n186\t302\t3\t891717742\n"
# the lines of these films and people as the two sources have them
OFFICIAL_ITEMS = (
    "1|Toy Story (1995)|01-Jan-1995||http://x|0|0|0|1|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
    "242|Kolya (1996)|24-Jan-1997||http://x|0|0|0|0|0|1|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
    "267|unknown||||1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
    "543|Misérables, Les (1995)|01-Jan-1995||http://x|0|0|0|0|0|0|0|0|1|0|0|0|1|0|0|0|0|0|0\n"
    "1412|Land Before Time III: The Time of the Great Giving (1995) (V)|01-Jan-1995||http://x"
    "|0|0|0|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
)
WHEEL_ITEMS = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    "1\tToy Story\t1995\tAnimation Children's Comedy\n"
    "242\tKolya\t1996\tComedy\n"
    "267\tunkonwn\tunkonwn\tunknown\n"
    "543\tMisérables, Les\t1995\tDrama Musical\n"
    "1412\tLand Before Time III: The Time of the Great Giving (1995)\tV\tAnimation Children's\n"
)
ITEMS = (
    "item_id\ttitle\tyear\tgenres\n"
    "1\tToy Story\t1995\tAnimation|Children's|Comedy\n"
    "242\tKolya\t1996\tComedy\n"
    "267\tunknown\t\tunknown\n"
    "543\tMisérables, Les\t1995\tDrama|Musical\n"
    "1412\tLand Before Time III: The Time of the Great Giving\t1995\tAnimation|Children's\n"
)
TABLES = {
    "events.tsv": b"user_id\titem_id\trating\ttimestamp\n" + EVENTS,
    "items.tsv": ITEMS.encode(),
    "users.tsv": b"user_id\tage\tgender\toccupation\n1\t24\tM\ttechnician\n",
}


def archive(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return stream.getvalue()


OFFICIAL = archive(
    {
        "ml-100k/u.data": EVENTS,
        "ml-100k/u.item": OFFICIAL_ITEMS.encode("latin-1"),
        "ml-100k/u.user": b"1|24|M|technician|85711\n",
    }
)
FOLDER = "recbole/dataset_example/ml-100k/ml-100k"
WHEEL = archive(
    {
        f"{FOLDER}.inter": b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        + EVENTS,
        f"{FOLDER}.item": WHEEL_ITEMS.encode(),
        f"{FOLDER}.user": b"user_id:token\tage:token\tgender:token\toccupation:token\t"
        b"zip_code:token\n1\t24\tM\ttechnician\t85711\n",
    }
)


def test_both_sources_give_the_same_files() -> None:
    assert data.tables_of_official(OFFICIAL) == TABLES
    assert data.tables_of_wheel(WHEEL) == TABLES


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Expect the small tables; the official site is out of reach. Gives what was asked for."""
    asked = []
    monkeypatch.setattr(data, "_NUM_ROWS", {"events.tsv": 2, "items.tsv": 5, "users.tsv": 1})
    monkeypatch.setattr(data, "_EVENTS_SHA256", hashlib.sha256(EVENTS).hexdigest())

    def official() -> data.Tables:
        asked.append("official")
        raise urllib.error.URLError("no route")

    def wheel() -> data.Tables:
        asked.append("wheel")
        return dict(TABLES)

    monkeypatch.setattr(data, "_from_official", official)
    monkeypatch.setattr(data, "_from_wheel", wheel)
    return asked


def test_fetch_falls_back_mends_and_then_does_nothing(small: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "data" / "movielens-100k"
    assert data.fetch("movielens-100k", folder) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == TABLES
    assert [path.name for path in folder.parent.iterdir()] == ["movielens-100k"]
    assert small == ["official", "wheel"]
    data.fetch("movielens-100k", folder)
    assert small == ["official", "wheel"]
    (folder / "events.tsv").write_bytes(TABLES["events.tsv"].replace(b"242", b"243"))
    data.fetch("movielens-100k", folder)
    assert small == ["official", "wheel"] * 2
    assert (folder / "events.tsv").read_bytes() == TABLES["events.tsv"]


def test_neither_source(small: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data, "_from_wheel", lambda: TABLES | {"users.tsv": b"user_id\n"})
    with pytest.raises(DataError, match=r"no route.*users\.tsv must have 1 rows"):
        data.fetch("movielens-100k", tmp_path / "ml")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="Received: 'movielens'"):
        data.fetch("movielens", tmp_path / "ml")


def test_another_file_than_the_published_one() -> None:
    with pytest.raises(DataError, match=r"must have SHA-256 50d2a982.*Received: "):
        data._require_sha256(OFFICIAL, data.OFFICIAL_SHA256, "the archive")
