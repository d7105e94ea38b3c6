"""Whatever stands in raw files: only distrec's own errors come out, and every row is counted.

DISTREC_FUZZ in the environment is the number of spoiled files of each kind; `make fuzz` takes
thousands. A job of Spark takes seconds however small its files are, so many are read at once.
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from distrec import columns as c
from distrec import prepare
from distrec.config import Config, parse_config
from distrec.dataset import DatasetManifest
from distrec.errors import DataError, DistrecError
from distrec.prepare.clean import Audit
from distrec.prepare.sources import Sources, read_sources
from tests.bad_inputs.case import snapshot

# the module, not the function that the package calls run
RUN = importlib.import_module("distrec.prepare.run")
NUM_FILES = int(os.environ.get("DISTREC_FUZZ", "10"))
FILES_AT_ONCE = 100
COLUMNS = ("user_id", "item_id", "time", "weight", "hour", "place")
CONTEXT = [
    {"column": "hour", "kind": "number", "missing": "reject"},
    {"column": "place", "kind": "vector", "dim": 2},
]
ROLES = {"time": "time", "weight": "weight", "context": CONTEXT}
# what CSV, JSON, text and numbers stumble over
PIECES = (
    b'"', b",", b"\n", b"\r", b"\r\n", b"\n\n", b"\\", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xc3",
    b"\xed\xa0\x80", b"\\ud800", b"{", b"}", b"[", b"]", b"[" * 3000, b"null", b"NaN", b"1e999",
    b"9" * 40, b"-", b"0x1p3", b"x" * 2000, b"|", b" ", b"\t", b"\xc2\xa0", b'":"', b"#",
)  # fmt: skip


def rows(number: int) -> list[dict[str, Any]]:
    """Good events."""
    return [
        {"user_id": f"u{k % 4}", "item_id": f"i{number}-{k}", "time": 100 * number + k,
         "weight": 1, "hour": k, "place": "3|4"}
        for k in range(12)
    ]  # fmt: skip


def as_csv(number: int) -> bytes:
    return "".join(",".join(map(str, row.values())) + "\n" for row in rows(number)).encode()


def as_json(number: int) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows(number)).encode()


def as_parquet(number: int) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows(number)), sink, compression="none")
    return sink.getvalue()


GOOD = {"csv": as_csv, "json": as_json}


def spoiled(good: bytes, draw: random.Random) -> bytes:
    """Some bytes changed, cut off, or put in between."""
    data = bytearray(good)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(data)) if data else 0
        action = draw.choice(["change", "cut", "insert", "insert", "copy"])
        if action == "cut":
            del data[place : place + draw.choice([1, 5, 100, len(data)])]
        elif action == "insert":
            data[place:place] = draw.choice([*PIECES, draw.randbytes(5)])
        elif action == "copy":
            data[place:place] = data[: draw.randint(0, 60)]
        elif data:
            data[place] = draw.randrange(256)
    return bytes(data)


def num_rows(data: bytes, form: str) -> int:
    """Rows that a file stands for, counted without Spark: its lines that are not blank.

    A line ends where Hadoop ends it. Of CSV Java trims all up to the space, JSON has blanks of its
    own.
    """
    lines = data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    blank = bytes(range(33)) if form == "csv" else b" \t"
    return sum(bool(line.strip(blank)) for line in lines.split(b"\n"))


def describe(run: Path, events: str, items: str) -> Config:
    """A run whose raw files lie in directories that are named after their forms."""

    def source(form: str) -> dict[str, Any]:
        names = {"column_names": COLUMNS, "header": False} if form in ("csv", "csv.gz") else {}
        kind = {"header.csv": "csv", "csv.gz": "csv"}.get(form, form)
        return {"paths": [f"{run}/{form}/*"], "format": kind, **names}

    keys = {
        "max_reject_share": 1.0,
        "events": {**source(events), **ROLES},
        "items": {**source(items), "id": "item_id", "duplicates": "first"},
        "split": {"method": "random"},
    }
    return parse_config({"name": "fuzz", "output": f"{run}/out", "prepare": keys}, "fuzz")


def write(run: Path, form: str, contents: list[bytes]) -> int:
    """Raw files of a form; returns their rows."""
    (run / form).mkdir()
    for index, data in enumerate(contents):
        # Spark leaves out names that begin with a dot or a line
        (run / form / f"{index:04d}.{form}").write_bytes(data)
    return sum(num_rows(data, form) for data in contents)


def check_sources(sources: Sources, num_read: dict[str, int]) -> None:
    """Rows in are rows kept and rows rejected, by reason."""
    audit = sources.audit
    assert audit.num_read == num_read
    for name, frame in (("events", sources.events), ("items", sources.items)):
        reasons = [count for key, count in audit.reasons.items() if key.startswith(f"{name}: ")]
        assert frame is not None
        assert frame.count() == num_read[name] - sum(reasons)
        assert audit.num_rejected[name] == sum(reasons)


def check_dataset(manifest: DatasetManifest, directory: Path, audit: Audit) -> None:
    """The same of what is told in the manifest, and of what is written."""
    counts = manifest.counts
    steps = ("rejected", "other_event_type", "duplicates", "below_min_rating", "k_core", "kept")
    assert counts["read"] == audit.num_read["events"] == sum(counts.get(one, 0) for one in steps)
    assert counts["kept"] == sum(counts[name] for name in (c.TRAIN, c.VALID, c.TEST))
    assert manifest.rejects == audit.reasons
    written: Counter[str] = Counter()
    for entry in manifest.splits[c.REJECTS].files:
        for row in pq.read_table(directory / entry.path).to_pylist():
            written[f"{row[c.SOURCE]}: {row[c.REASON]}"] += 1
            json.loads(row[c.RAW_ROW])
    assert written == audit.reasons
    for split in (c.TRAIN, c.VALID, c.TEST):
        rows_written = sum(
            pq.read_metadata(directory / entry.path).num_rows
            for entry in manifest.splits[split].files
        )
        assert rows_written == counts[split]


@pytest.mark.parametrize("number", range(max(1, NUM_FILES // FILES_AT_ONCE)))
def test_spoiled_lines(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Events of one format and items of the other, in turn: spoiled files beside a good one."""
    forms = ("csv", "json") if number % 2 == 0 else ("json", "csv")
    draw, count = random.Random(number), min(NUM_FILES, FILES_AT_ONCE)
    num_read = {}
    for name, form in zip(("events", "items"), forms, strict=True):
        good = [GOOD[form](index) for index in range(count)]
        contents = [good[0], *(spoiled(one, draw) for one in good[1:])]
        num_read[name] = write(tmp_path, form, contents)
    found = []

    def checked(*arguments: Any) -> Sources:
        sources = read_sources(*arguments)
        check_sources(sources, num_read)
        found.append(sources.audit)
        return sources

    monkeypatch.setattr(RUN, "read_sources", checked)
    config = describe(tmp_path, *forms)
    manifest = prepare.run(spark, config)
    check_dataset(manifest, config.dataset_directory, found[0])
    # some of each were spoiled
    assert {key.partition(":")[0] for key in manifest.rejects} == {"events", "items"}


@pytest.mark.parametrize("number", range(max(1, NUM_FILES // 60)))
@pytest.mark.parametrize("form", ["header.csv", "csv.gz", "parquet"])
def test_spoiled_files(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, number: int
) -> None:
    """What is whole or broken as a file: it is read, or refused in our words."""
    draw = random.Random(f"{form} {number}")
    good = GOOD["csv"](0)
    if form == "parquet":
        content = spoiled(as_parquet(0), draw)
    elif form == "csv.gz":
        content = spoiled(gzip.compress(good, mtime=0), draw)
    else:
        content = spoiled(",".join(COLUMNS).encode() + b"\n" + good, draw)
    write(tmp_path, form, [content])
    config = describe(tmp_path, form, form)

    def enough(sources: Sources, *_: Any) -> None:
        sources.events.count()
        raise DataError("it was read")

    monkeypatch.setattr(RUN, "_filter", enough)
    before = snapshot(tmp_path)
    with pytest.raises(DistrecError):
        prepare.run(spark, config)
    (tmp_path / "out").rmdir()
    assert snapshot(tmp_path) == before
