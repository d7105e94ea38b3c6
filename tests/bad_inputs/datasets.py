"""Datasets that were damaged, mixed up or forged; train looks at them before its first step."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distrec import columns as c
from distrec.files import sha256
from tests.bad_inputs.case import CONFIG, DATA, Case

FILE = "train/part-00001.parquet"
RAN = "code-ran"


class Payload:
    """Unpickling it makes a file: whoever unpickles runs what a stranger wrote."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.run / RAN),)


def file_of(run: Path) -> Path:
    return run / "dataset" / FILE


def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Edits the manifest."""

    def make(run: Path) -> None:
        path = run / "dataset" / "manifest.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return make


def manifest_text(text: str | bytes) -> Callable[[Path], None]:
    """Puts something else in place of the manifest."""
    data = text.encode() if isinstance(text, str) else text
    return lambda run: (run / "dataset" / "manifest.json").write_bytes(data) and None


def table(change: Callable[[pa.Table], pa.Table], name: str = FILE) -> Callable[[Path], None]:
    """Rewrites a file; size and checksum of the manifest are those of the new one."""

    def make(run: Path) -> None:
        path = run / "dataset" / name
        pq.write_table(change(pq.ParquetFile(path).read()), path)
        agree(run, name)

    return make


def agree(run: Path, name: str) -> None:
    """Has the manifest give the size and checksum that a file has now."""
    path = run / "dataset" / name

    def change(document: dict[str, Any]) -> None:
        for split in document["splits"].values():
            for entry in split["files"]:
                if entry["path"] == name:
                    entry |= {"num_bytes": path.stat().st_size, "sha256": sha256(path)}

    manifest(change)(run)


def with_column(rows: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return rows.set_column(rows.column_names.index(name), name, values)


def first(name: str, value: Any) -> Callable[[pa.Table], pa.Table]:
    """Another value in the first row of a column."""

    def change(rows: pa.Table) -> pa.Table:
        column = rows.column(name)
        values = pa.array([value, *column.to_pylist()[1:]], column.type)
        return with_column(rows, name, values)

    return change


def cut(run: Path) -> None:
    file_of(run).write_bytes(file_of(run).read_bytes()[:-100])


def cut_and_agree(run: Path) -> None:
    cut(run)
    agree(run, FILE)


def flip(run: Path) -> None:
    data = bytearray(file_of(run).read_bytes())
    data[200] ^= 1
    file_of(run).write_bytes(data)


def empty(run: Path) -> None:
    file_of(run).write_bytes(b"")


def zeros(run: Path) -> None:
    file_of(run).write_bytes(b"0" * file_of(run).stat().st_size)
    agree(run, FILE)


def huge_footer(run: Path) -> None:
    data = file_of(run).read_bytes()
    file_of(run).write_bytes(data[:-8] + struct.pack("<I4s", 2**32 - 1, b"PAR1"))
    agree(run, FILE)


def link(run: Path) -> None:
    moved = run / "elsewhere.parquet"
    file_of(run).rename(moved)
    file_of(run).symlink_to(moved)


def linked_folder(run: Path) -> None:
    folder = file_of(run).parent
    folder.rename(run / "elsewhere")
    folder.symlink_to(run / "elsewhere")


def linked_manifest(run: Path) -> None:
    path = run / "dataset" / "manifest.json"
    path.rename(run / "elsewhere.json")
    path.symlink_to(run / "elsewhere.json")


def folder_for_file(run: Path) -> None:
    file_of(run).unlink()
    file_of(run).mkdir()


def metadata(run: Path) -> None:
    (run / "dataset" / "train" / "_common_metadata").write_bytes(pickle.dumps(Payload(run)))


def pickled_file(run: Path) -> None:
    file_of(run).write_bytes(pickle.dumps(Payload(run)))
    agree(run, FILE)


def entry(**change: Any) -> Callable[[dict[str, Any]], None]:
    """Edits the manifest's entry of the file."""
    return lambda document: document["splits"]["train"]["files"][1].update(change)


def refused(name: str, make: Callable[[Path], None], message: str, code: int = DATA) -> Case:
    # every file is looked at, so that no case hangs on the luck of the draw
    return Case(name, "train", make, message, code, ("reader.verify=sha256", "train.max_steps=6"))


SIZE = "a file has the size that the manifest gives. Received: ...part-00001.parquet with"
COLUMNS = "a file has the columns and types that the manifest gives. Received: column "
CASES = (
    refused(
        "no manifest", lambda run: (run / "dataset" / "manifest.json").unlink(),
        "a dataset has a manifest.json, written last",
    ),
    refused("an empty manifest", manifest_text(""), "is not a dataset manifest"),
    refused("half a manifest", manifest_text('{"format_version": 1, "spl'), "is not a dataset"),
    refused("a manifest in UTF-16", manifest_text("{}".encode("utf-16")), "cannot be read: 'utf"),
    refused("a manifest that is a list", manifest_text("[1]"), "is not a dataset manifest"),
    refused(
        "a JSON bomb as manifest", manifest_text("[" * 200_000), "is not a dataset manifest: maxim",
    ),
    refused(
        "a dataset of format 999", manifest(lambda d: d.update(format_version=999)),
        "this distrec reads datasets of format 1. Received: format 999",
    ),
    refused(
        "an unknown key in a manifest", manifest(lambda d: d.update(more=1)),
        "Extra inputs are not permitted",
    ),
    refused(
        "../ in a manifest", manifest(entry(path="../../secret.parquet")),
        "a manifest names files inside its dataset. Received: '../../secret.parquet'",
    ),
    refused(
        "an absolute path in a manifest", manifest(entry(path="/etc/passwd")),
        "a manifest names files inside its dataset. Received: '/etc/passwd'",
    ),
    refused(
        "a zero byte in a path", manifest(entry(path="train/\0.parquet")),
        "a manifest names files inside its dataset",
    ),
    refused(
        "a file named twice", manifest(entry(path="train/part-00000.parquet")),
        "a manifest names each file once",
    ),
    refused("a negative size", manifest(entry(num_bytes=-1)), "greater than or equal to 0"),
    refused(
        "more rows than files have", manifest(lambda d: d["splits"]["train"].update(num_rows=9**6)),
        "the files of a split have its rows. Received: 720 rows in files of train",
    ),
    refused(
        "2^60 users", manifest(lambda d: d.update(num_users=2**60)), "Input should be less than",
    ),
    refused(
        "more users than memory", manifest(lambda d: d.update(num_users=2**45)),
        "the tables of the ranks of one machine fit its memory", CONFIG,
    ),
    refused(
        "fewer items than trained items", manifest(lambda d: d.update(num_items=9)),
        "items that train saw are items",
    ),
    refused(
        "NaN in a manifest",
        manifest(lambda d: d["statistics"].update(user_age={"mean": float("nan")})),
        "fitted numbers are finite",
    ),
    refused("a link as manifest", linked_manifest, "is a plain file of at most"),
    refused("a link for a file", link, "holds no links. Received: ...part-00001.parquet is one"),
    refused("a link for a folder", linked_folder, "holds no links. Received: ...dataset/train is"),
    refused("a folder for a file", folder_for_file, "is a plain file. Received: something else"),
    refused("a missing file", lambda run: file_of(run).unlink(), "Received: no file ...part-00001"),
    refused("a file cut short", cut, SIZE),
    refused("an empty file", empty, f"{SIZE} 0 bytes"),
    refused("one flipped bit", flip, "a file has the SHA-256 that the manifest gives"),
    refused("a cut file and a forged manifest", cut_and_agree, "is not a whole Parquet file"),
    refused("no Parquet in a Parquet file", zeros, "is not a whole Parquet file"),
    refused("a 4 GB footer in a small file", huge_footer, "is not a whole Parquet file"),
    refused("a pickle in place of Parquet", pickled_file, "is not a whole Parquet file"),
    refused("a malicious _common_metadata", metadata, "a dataset holds no _common_metadata"),
    refused(
        "a column less", table(lambda t: t.drop([c.LABEL])),
        f"{COLUMNS}'label' of ... no such column, expected: float",
    ),
    refused(
        "a column more", table(lambda t: t.append_column("mood", t.column(c.TIME))),
        f"{COLUMNS}'mood' of ... int64, expected: no such column",
    ),
    refused(
        "a column of another type",
        table(lambda t: with_column(t, c.ITEM_INDEX, t.column(c.ITEM_INDEX).cast(pa.int32()))),
        f"{COLUMNS}'item_index' of ... int32, expected: int64",
    ),
    refused(
        "lists of another type",
        table(lambda t: with_column(t, c.HISTORY, t.column(c.HISTORY).cast(pa.list_(pa.int32())))),
        f"{COLUMNS}'history' of ... list<int32>, expected: list<int64>",
    ),
    refused(
        "a row less", table(lambda t: t.slice(1)), "with 239 rows, expected 240",
    ),
    refused("a null", table(first(c.TIME, None)), "Received: 1 nulls in column 'time' of"),
    refused("a null in a list", table(first(c.HISTORY, [None])), "Received: 1 nulls in column 'hi"),
    refused(
        "a user out of range", table(first(c.USER_INDEX, 10**9)),
        "ids of table 'user' lie in [0, 62)",
    ),
    refused("a negative item in a history", table(first(c.HISTORY, [-1])), "ids of table 'item"),
    refused("an item out of range", table(first(c.ITEM_INDEX, 10**9)),
        "items of examples lie in [0, 46). Received: 1 examples over all ranks with others"),
    refused("a feature out of range", table(first("user_group", 99)), "ids of table 'user_group'"),
    refused("NaN in a feature", table(first("user_age", float("nan"))), "the loss is finite", 5),
    refused("infinity as weight", table(first(c.WEIGHT, float("inf"))), "the loss is finite", 5),
    refused(
        "an item twice in the catalogue",
        table(lambda t: pa.concat_tables([t[:5], t[4:-1]]), "items/part-00000.parquet"),
        "items are 2 to 45, ascending, without a gap. Received: 44 items, at row 5 [6]",
    ),
    refused(
        "a vector that is too short",
        table(first("item_image", [1.0, 2.0]), "items/part-00000.parquet"),
        "vectors of column 'item_image' have 3 numbers. Received: one with 2",
    ),
    refused(
        "no rows in train",
        manifest(lambda d: d["splits"].update(train={"num_rows": 0, "files": []})),
        "training needs rows in train. Received: none",
    ),
    refused(
        "a damaged file of valid", lambda run: (
            run / "dataset/valid_queries/part-00000.parquet"
        ).write_bytes(b"x"), "part-00000.parquet with 1 bytes",
    ),
)  # fmt: skip
