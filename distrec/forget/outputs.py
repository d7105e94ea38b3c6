"""What is made from datasets and checkpoints, without some people: scores, ranks, exports, logs."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distrec import columns as c
from distrec.dataset import MANIFEST, read_manifest
from distrec.errors import DataError
from distrec.files import commit, describe_file, fsync, replace_text, sha256, staging
from distrec.forget.found import Found
from distrec.forget.rows import NO_IDS, Ids, among, change_file, integers, without
from distrec.job import JOBS_LOG
from distrec.metrics.query_ranks import QueriesHash
from distrec.model.towers import USER_TABLE
from distrec.model.unified import USER_BIAS_TABLE
from distrec.people import names_somebody
from distrec.reader import read_queries
from distrec.world import World

logger = logging.getLogger("distrec.forget")

METRICS = "metrics.json"
_QUERIES = {c.VALID: c.VALID_QUERIES, c.TEST: c.TEST_QUERIES}
# in the metadata of a file of ranks: the dataset whose queries it counts
_DATASET = b"distrec.dataset"
_QUERIES_AT_ONCE = 1024


def read_json(path: Path) -> dict[str, Any]:
    """A small file of ours; empty when it is not there.

    Raises:
        DataError: It is damaged.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}. Delete it.") from error


def _scored(people: frozenset[str], table: pa.Table) -> pa.Table:
    return without(table, among(table, c.USER_ID, people))


def replace_scores(directory: Path, people: frozenset[str]) -> int:
    """Take the people's rows out of the scored output, replaced as a whole.

    Returns:
        Rows that went.
    """
    manifest = read_json(directory / MANIFEST)
    if not manifest:
        return 0
    gone, users = 0, set[str]()
    with staging(directory) as root:
        files = []
        for entry in manifest["files"]:
            name = entry["path"]
            if change_file(directory / name, root / name, partial(_scored, people)):
                table = pq.read_table(directory / name, columns=[c.USER_ID])
                users.update(people.intersection(table.column(0).unique().to_pylist()))
                changed = describe_file(root, name)
                gone += entry["num_rows"] - changed.num_rows
                entry = changed.model_dump()
            files.append(entry)
        if not gone:
            return 0
        manifest |= {
            "files": files,
            "num_rows": manifest["num_rows"] - gone,
            "num_users": manifest["num_users"] - len(users),
        }
        (root / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        commit(root, directory)
    return gone


def replace_ranks(directory: Path, found: Found, rest: Path, content_hash: str) -> int:
    """Take the people's queries out of the ranks that evaluate keeps; metrics are as they were.

    Args:
        directory: Of a run.
        found: What goes from the dataset.
        rest: The dataset without them.
        content_hash: Of it.

    Returns:
        Rows that went.
    """
    document = read_json(directory / METRICS)
    name = document.get("query_ranks", {}).get("path")
    if not name or not (directory / name).is_file():
        return 0
    path, gone = directory / name, 0
    is_done = (pq.read_schema(path).metadata or {}).get(_DATASET) == content_hash.encode()
    if is_done and document["query_ranks"]["sha256"] == sha256(path):
        return 0
    if not is_done:
        table = pq.read_table(path)
        kept = table.filter(pa.array(~_gone_ranks(table, found)))
        gone = len(table) - len(kept)
        kept = kept.replace_schema_metadata({_DATASET: content_hash.encode()})
        _replace_parquet(path, _renumbered(kept, found))
    document["query_ranks"]["sha256"] = sha256(path)
    for split, values in document["splits"].items():
        if values.get("candidates") is None:
            values["queries_hash"] = _queries_hash(rest, split)
        else:
            # whose candidates were given is not known here: like no other's
            text = f"{values['queries_hash']} {content_hash}"
            values["queries_hash"] = hashlib.sha256(text.encode()).hexdigest()
    replace_text(directory / METRICS, json.dumps(document, indent=1) + "\n")
    return gone


def _replace_parquet(path: Path, table: pa.Table) -> None:
    partial_path = path.with_name(f".{path.name}.0")
    pq.write_table(table, partial_path, compression="zstd")
    fsync(partial_path)
    partial_path.rename(path)


def _gone_ranks(table: pa.Table, found: Found) -> np.ndarray[Any, np.dtype[np.bool_]]:
    splits, queries = table.column("split").to_pylist(), integers(table, "query")
    gone = np.zeros(len(table), np.bool_)
    for split, name in _QUERIES.items():
        own = np.array([one == split for one in splits], np.bool_)
        gone |= own & np.isin(queries, found.rows.get(name, NO_IDS))
    return gone


def _renumbered(table: pa.Table, found: Found) -> pa.Table:
    """Queries are numbered by their row in the split, of which some are gone."""
    splits, queries = table.column("split").to_pylist(), integers(table, "query")
    for split, name in _QUERIES.items():
        own = np.array([one == split for one in splits], np.bool_)
        before = np.searchsorted(found.rows.get(name, NO_IDS), queries)
        queries = np.where(own, queries - before, queries)
    place = table.schema.get_field_index("query")
    return table.set_column(place, table.schema.field(place), pa.array(queries))


def _queries_hash(rest: Path, split: str) -> str:
    manifest = read_manifest(rest)
    same = QueriesHash([manifest.vocabularies[name].sha256 for name in (c.USER_ID, c.ITEM_ID)])
    for batch in read_queries(rest, manifest, _QUERIES[split], World(), _QUERIES_AT_ONCE):
        same.add(batch)
    return same.hexdigest()


def exported_tables(logs: Path) -> Iterator[tuple[Path, str]]:
    """Files that `distrec export` wrote, as the log of jobs tells, and their table."""
    seen = set()
    for entry in _jobs(logs):
        summary = entry.get("summary", {})
        if entry.get("job") != "export" or "output" not in summary:
            continue
        path = Path(str(summary["output"]))
        if path.is_file() and path not in seen:
            seen.add(path)
            metadata = pq.read_schema(path).metadata or {}
            table = metadata.get(b"distrec.table", b"").decode()
            if table:
                yield path, table


def replace_exports(logs: Path, found: Found) -> int:
    """Take the rows of the people, and of values that are nobody's now, out of exported tables.

    Returns:
        Rows that went.
    """
    gone = 0
    for path, table in exported_tables(logs):
        name = vocabulary(table)
        ids = found.ids.get(name, NO_IDS)
        people = found.people if name == c.USER_ID else frozenset[str]()
        target = path.with_name(f".{path.name}.0")
        before = pq.read_metadata(path).num_rows
        if change_file(path, target, partial(_exported, ids, people)):
            fsync(target)
            gone += before - pq.read_metadata(target).num_rows
            target.rename(path)
        else:
            target.unlink()
    return gone


def vocabulary(table: str) -> str:
    """The vocabulary of a table, where it is of users or of their features."""
    return c.USER_ID if table in (USER_TABLE, USER_BIAS_TABLE) else table


def _exported(ids: Ids, people: frozenset[str], table: pa.Table) -> pa.Table:
    gone = np.isin(integers(table, c.ID), ids) | among(table, c.VALUE, people)
    return without(table, gone)


def _jobs(logs: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = (logs / JOBS_LOG).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            entry = {}
        if isinstance(entry, dict):
            yield entry


def named_in_log(logs: Path, people: frozenset[str]) -> int:
    """Lines of the log of jobs whose message names one of the people, as errors of data may."""
    return sum(names_somebody(str(entry.get("message", "")), people) for entry in _jobs(logs))


def replace_log(logs: Path, people: frozenset[str]) -> int:
    """Take such messages out; returns their number."""
    count = named_in_log(logs, people)
    if count:
        entries = list(_jobs(logs))
        for entry in entries:
            if names_somebody(str(entry.get("message", "")), people):
                entry["message"] = ""
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        replace_text(logs / JOBS_LOG, text)
    return count
