"""Raw data that prepare refuses, and rows of otherwise good data that it sends to rejects."""

from __future__ import annotations

import gzip
import io
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.bad_inputs.case import CONFIG, DATA, Case
from tests.bad_inputs.datasets import Payload
from tests.synthetic import write_dataset

GOOD = "user_id,item_id,time\n" + "".join(f"u{k % 3},i{k},{k}\n" for k in range(12))
JSON = '{"user_id": "u", "item_id": "i", "time": 3}\n'


def files(**contents: str | bytes) -> Callable[[Path], None]:
    """Writes raw files; two underscores of a name stand for a dot."""

    def make(run: Path) -> None:
        for name, content in contents.items():
            data = content.encode() if isinstance(content, str) else content
            (run / name.replace("__", ".")).write_bytes(data)

    return make


def events(content: str | bytes) -> Callable[[Path], None]:
    return files(events__csv=content)


def parquet() -> bytes:
    columns = {"user_id": ["u"] * 99, "item_id": list(range(99)), "time": list(range(99))}
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def pickled(run: Path) -> None:
    (run / "events.parquet").write_bytes(pickle.dumps(Payload(run)))


def extended(spoil: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Good events, and an earlier dataset that is not."""

    def make(run: Path) -> None:
        events(GOOD)(run)
        write_dataset(run / "earlier")
        spoil(run / "earlier")

    return make


def of_format_999(earlier: Path) -> None:
    path = earlier / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 999}))


def flipped_vocabulary(earlier: Path) -> None:
    path = earlier / "vocab" / "item_id" / "part-00000.parquet"
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)


def forged_features(earlier: Path) -> None:
    path = earlier / "manifest.json"
    document = json.loads(path.read_text())
    document["config"] = {"prepare": {"users": {"features": [3]}}}
    path.write_text(json.dumps(document))


def refused(
    name: str, make: Callable[[Path], None], message: str, *settings: str, code: int = DATA
) -> Case:
    return Case(name, "prepare", make, message, code, settings)


AS_JSON = "prepare.events.format=json"
AS_PARQUET = ("prepare.events.format=parquet", 'prepare.events.paths=["{run}/events.parquet"]')
GZIPPED = 'prepare.events.paths=["{run}/events.csv.gz"]'
ITEMS = 'prepare.items={{paths=["{run}/items.csv"], id="item_id"}}'
EXTEND = 'prepare.extend="{run}/earlier"'
WHOLE = "every file of events must be whole and of its format. Received: "
CASES = (
    refused("a missing file", lambda run: None,
            "every path of events must match a file. Received: /no such/ö events.csv, which",
            'prepare.events.paths=["/no such/ö events.csv"]'),
    refused("a column that is not there", events(GOOD),
            "prepare.events.user must name a column of ... Received: 'user'; the columns there are "
            "['user_id', 'item_id', 'time']. Did you mean 'user_id'", "prepare.events.user=user"),
    refused("an empty file", events(""), "events must have rows. ... which is empty"),
    refused("only a header", events("user_id,item_id,time\n"), "events must have rows. Received"),
    refused("headers that differ",
            files(events__csv=GOOD, other__csv="item_id,user_id,time\ni,u,1\n"),
            "all files of events must have the same header",
            'prepare.events.paths=["{run}/*.csv"]'),
    refused("text for a time", events(GOOD + "u1,i1,never\n"),
            "at most 1.00% ... Received: 1 of 13 rows of events: 1 x column 'time' is not a time, "
            'for example {"user_id":"u1","item_id":"i1","time":"never"}'),
    refused("times in the future", events(GOOD),
            "1 of 12 rows of events: 1 x column 'time' lies in the future",
            "prepare.latest_time=10"),
    refused("milliseconds for seconds", events(GOOD.replace(",1\n", ",1600000000000\n")),
            "1 x column 'time' lies in the future"),
    refused("labels that are none", events(GOOD),
            "10 of 12 rows of events: 10 x column 'time' is not 0 or 1",
            "prepare.events={{paths=['{run}/events.csv'], label='time'}}",
            "prepare.split.method=random"),
    refused("Latin-1 for UTF-8", events(GOOD.encode() + b"u\xe9,i1,1\n"),
            "1 x bytes that are not UTF-8"),
    refused("UTF-16 for UTF-8", events(GOOD.encode("utf-16")),
            "The text has another encoding: set prepare.events.encoding"),
    refused("an encoding that nobody knows", events(GOOD),
            "prepare.events.encoding must be one that Java knows. Received: 'utf-99'",
            "prepare.events.encoding=utf-99", code=CONFIG),
    refused("a pattern of times that is none", events(GOOD),
            "prepare.events.time_format must be ... Received: 'when?'",
            "prepare.events.time_format=when?", code=CONFIG),
    refused("lines that are not JSON", events(JSON + '{"user_id": 1'),
            '1 of 2 rows of events: 1 x line is not JSON, for example {"line":"{\\"user_id\\": 1"}',
            AS_JSON),
    refused("Latin-1 in JSON", events(JSON.encode().replace(b'"u"', b'"\xe9"')),
            "1 x bytes that are not UTF-8", AS_JSON),
    refused("a JSON bomb", events(JSON + "[" * 200_000 + "\n"), "1 x line is not JSON", AS_JSON),
    refused("JSON columns that differ in case alone",
            events(JSON + '{"user_id": "u", "User_ID": "v", "x": 1}\n'),
            "columns of events differ in more than upper and lower case. Received: ", AS_JSON,
            "prepare.events.context=[{{column='User_ID', kind='categorical'}}]"),
    refused("empty JSON", events(""), "events must have rows, each a line with a JSON object",
            AS_JSON),
    refused("a Parquet file cut short", files(events__parquet=parquet()[:500]),
            f"{WHOLE}...events.parquet", *AS_PARQUET),
    refused("a 4 GB footer in a small file",
            files(events__parquet=parquet()[:-8] + b"\xff\xff\xff\x7fPAR1"),
            f"{WHOLE}...events.parquet", *AS_PARQUET),
    refused("a pickle in place of Parquet", pickled, f"{WHOLE}...events.parquet", *AS_PARQUET),
    refused("a gzip file cut short",
            files(events__csv__gz=gzip.compress(GOOD.encode() * 100, mtime=0)[:90]),
            f"{WHOLE}...events.csv.gz", GZIPPED),
    refused("a gzip file that is none", files(events__csv__gz=GOOD), f"{WHOLE}...events.csv.gz",
            GZIPPED),
    refused("an item twice in the catalogue",
            files(events__csv=GOOD, items__csv="item_id\ni1\ni2\ni1\n"),
            "stands once in items. Received: 1 ids ... example 'i1'", ITEMS),
    refused("nobody left", events(GOOD),
            "filtering must leave users. Received: none; rows by step: read 12, k_core 12",
            "prepare.user_k_core=5"),
    refused("nothing in test", events(GOOD),
            "prepare.split must leave rows in train and in test. Received: ... none in test",
            "prepare.split={{method='temporal', test_time=99, valid_time=50}}"),
    refused("an earlier dataset that is none", events(GOOD), "a dataset has a manifest.json",
            EXTEND),
    refused("an earlier dataset of format 999", extended(of_format_999), "Received: format 999",
            EXTEND),
    refused("a flipped bit in an earlier vocabulary", extended(flipped_vocabulary),
            "the vocabularies of an extended dataset are whole. Received: ...vocab/item_id/part-0",
            EXTEND),
    refused("an earlier dataset with forged features", extended(forged_features),
            "holds the section [prepare] that it was made with", EXTEND),
)  # fmt: skip

ROWS: Mapping[str, tuple[str, str]] = {
    "a value too few": ("u1,i1", "wrong number of columns"),
    "a value too many": ("u1,i1,5,1,2,3|4,x", "wrong number of columns"),
    "no user": (",i1,5,1,2,3|4", "column 'user_id' is empty"),
    "an item of spaces": ("u1,   ,5,1,2,3|4", "column 'item_id' is empty"),
    "an id of 2,000 letters": (
        f"{'u' * 2000},i1,5,1,2,3|4", "column 'user_id' is longer than 1000 letters"
    ),
    "bytes of another encoding": ("u\ufffd,i1,5,1,2,3|4", "bytes that are not UTF-8"),
    "no time": ("u1,i1,,1,2,3|4", "column 'time' is not a time"),
    "text for a time": ("u1,i1,noon,1,2,3|4", "column 'time' is not a time"),
    "an infinite time": ("u1,i1,1e999,1,2,3|4", "column 'time' is not a time"),
    "a time in the future": ("u1,i1,99999999999,1,2,3|4", "column 'time' lies in the future"),
    "NaN as weight": ("u1,i1,5,NaN,2,3|4", "column 'weight' is empty"),
    "a negative weight": ("u1,i1,5,-1,2,3|4", "column 'weight' is negative"),
    "infinity as weight": ("u1,i1,5,1e999,2,3|4", "column 'weight' is not a number"),
    "text for a number": ("u1,i1,5,1,two,3|4", "column 'hour' is not a number"),
    "hexadecimal for a number": ("u1,i1,5,1,0x1p3,3|4", "column 'hour' is not a number"),
    "no number where one is asked for": ("u1,i1,5,1,,3|4", "column 'hour' is empty"),
    "a vector that is too short": ("u1,i1,5,1,2,3", "column 'place' has not 2 values"),
    "a vector with NaN": ("u1,i1,5,1,2,3|NaN", "column 'place' is not a list of numbers"),
    "a vector with infinity": ("u1,i1,5,1,2,3|1e999", "column 'place' is not a list of numbers"),
}  # fmt: skip
"""Name -> a line of events.csv with the columns of ROW_COLUMNS, and why it is rejected."""
ROW_COLUMNS = "user_id,item_id,time,weight,hour,place"
ROW_SETTINGS = (
    "prepare.max_reject_share=1.0",
    "prepare.events.weight=weight",
    "prepare.events.context=[{{column='hour', kind='number', missing='reject'}}, "
    "{{column='place', kind='vector', dim=2}}]",
)


def write_rows(run: Path) -> None:
    """Good events with a line of each kind of bad row between them."""
    good = [f"u{k % 3},i{k},{k},1,2,3|4" for k in range(12)]
    lines = [ROW_COLUMNS, *good, *(line for line, _ in ROWS.values())]
    events("\n".join(lines) + "\n")(run)
