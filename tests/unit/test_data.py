"""Public data sets as canonical files; no network is used here."""

from __future__ import annotations

import hashlib
import io
import urllib.error
import zipfile
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distrec import data
from distrec.data import complete_journey, movielens
from distrec.data.sources import Tables, require_sha256
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
    assert movielens.tables_of_official(OFFICIAL) == TABLES
    assert movielens.tables_of_wheel(WHEEL) == TABLES


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Expect the small tables; the official site is out of reach. Gives what was asked for."""
    asked = []

    def official() -> Tables:
        asked.append("official")
        raise urllib.error.URLError("no route")

    def wheel() -> Tables:
        asked.append("wheel")
        return dict(TABLES)

    expect(
        monkeypatch, num_rows={"events.tsv": 2, "items.tsv": 5, "users.tsv": 1},
        sha256={"events.tsv": hashlib.sha256(EVENTS).hexdigest()},
        sources={"official": official, "wheel": wheel},
    )  # fmt: skip
    return asked


def expect(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    name = "movielens-100k"
    monkeypatch.setitem(data.DATA_SETS, name, replace(data.DATA_SETS[name], **changes))


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
    sources = dict(data.DATA_SETS["movielens-100k"].sources)
    sources["wheel"] = lambda: TABLES | {"users.tsv": b"user_id\n"}
    expect(monkeypatch, sources=sources)
    with pytest.raises(DataError, match=r"no route.*users\.tsv must have 1 rows"):
        data.fetch("movielens-100k", tmp_path / "ml")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="Received: 'movielens'"):
        data.fetch("movielens", tmp_path / "ml")


def test_another_file_than_the_published_one() -> None:
    with pytest.raises(DataError, match=r"must have SHA-256 50d2a982.*Received: "):
        require_sha256(OFFICIAL, movielens.OFFICIAL_SHA256, "the archive")


def test_the_tables_of_a_grocer() -> None:
    times = [datetime(2017, 1, 1, 11, 53, 26, 900), datetime(2017, 1, 2)]
    tables = {
        "transactions": {
            "household_id": [900, 906], "store_id": [330, 331], "product_id": [1095275, 9878513],
            "quantity": [1, 2], "transaction_timestamp": pa.array(times, pa.timestamp("ns")),
        },
        "products": {
            # the second one is sold to nobody
            "product_id": [1095275, 26081], "manufacturer_id": [2, 3],
            "department": ["MISC", "MISC"], "brand": ["National", "Private"],
            "product_category": pa.array([None, None], pa.string()),
            "product_type": ["ICE - CRUSHED/CUBED", ""], "package_size": ["22 LB", ""],
        },
        "demographics": {
            "household_id": [1], "age": ["65+"], "income": ["35-49K"],
            "home_ownership": pa.array([None], pa.string()), "marital_status": ["Married"],
            "household_size": ["2"], "kids_count": ["0"],
        },
    }  # fmt: skip
    members = {}
    for name, columns in tables.items():
        stream = io.BytesIO()
        pq.write_table(pa.table(columns), stream)
        members[f"{complete_journey.FOLDER}/{name}.parquet"] = stream.getvalue()
    found = complete_journey.tables_of_wheel(archive(members))
    assert {name: content.decode() for name, content in found.items()} == {
        "events.tsv": "user_id\titem_id\ttimestamp\tquantity\tstore_id\n"
        "900\t1095275\t1483271606\t1\t330\n906\t9878513\t1483315200\t2\t331\n",
        "items.tsv": "item_id\ttitle\tdepartment\tcategory\tbrand\tmanufacturer\tpackage_size\n"
        "1095275\tICE - CRUSHED/CUBED\tMISC\t\tNational\t2\t22 LB\n",
        "users.tsv": "user_id\tage\tincome\thome_ownership\tmarital_status\thousehold_size\tkids\n"
        "1\t65+\t35-49K\t\tMarried\t2\t0\n",
    }
