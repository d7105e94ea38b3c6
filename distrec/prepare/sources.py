"""Everything raw, read and checked: the events and, where they are given, the two catalogues."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from distrec import columns as c
from distrec.config import EventsConfig, PrepareConfig, TableConfig
from distrec.prepare.clean import Audit, one_row_an_id
from distrec.prepare.faults import translated
from distrec.prepare.read import read_source, wanted_columns
from distrec.prepare.validate import check_time_format, typed_events, typed_table
from distrec.prepare.workspace import Workspace, concurrently


@dataclass(frozen=True)
class Sources:
    """What is left of the sources after checking.

    Args:
        events: Of typed_events, without rejected rows.
        users: Of typed_table, or None.
        items: Of typed_table, or None.
        audit: What was read and rejected.
    """

    events: DataFrame
    users: DataFrame | None
    items: DataFrame | None
    audit: Audit


def read_sources(prepare: PrepareConfig, workspace: Workspace) -> Sources:
    """Read and check all sources.

    Raises:
        ConfigError: The pattern of the times is none.
        DataError: A source is missing, empty, damaged, or breaks its contract too often.
    """
    check_time_format(workspace.spark, prepare.events.time_format)
    audit = Audit(prepare.max_reject_share)
    functions = [partial(_read_events, prepare, workspace, audit)]
    for table, name, side in ((prepare.users, "users", "user"), (prepare.items, "items", "item")):
        functions.append(partial(_read_table, table, name, side, workspace, audit))
    events, users, items = concurrently(*functions)
    return Sources(events, users, items, audit)


def _read_events(prepare: PrepareConfig, workspace: Workspace, audit: Audit) -> DataFrame:
    source, split = prepare.events, prepare.split
    rating_required = prepare.min_rating is not None or prepare.predict_ratings
    latest = int(time.time()) if prepare.latest_time is None else prepare.latest_time
    parts = {"": source.paths}
    if split.method == "given" and split.test_paths:
        parts = {c.TRAIN: source.paths, c.VALID: split.valid_paths, c.TEST: split.test_paths}
    whole: DataFrame | None = None
    for name, paths in parts.items():
        if not paths:
            continue
        part = _read(source, paths, "events", workspace)
        part = typed_events(part, source, latest, rating_required)
        if name:
            part = part.withColumn(c.SPLIT, F.lit(name))
        whole = part if whole is None else whole.unionByName(part)
    assert whole is not None
    with translated("events"):
        return audit.split_off(workspace.materialize(whole, "events"), "events")


def _read_table(
    source: TableConfig | None, name: str, side: str, workspace: Workspace, audit: Audit
) -> DataFrame | None:
    if source is None:
        return None
    typed = typed_table(_read(source, source.paths, name, workspace), source, side)
    with translated(name):
        checked = one_row_an_id(workspace.materialize(typed, name), source, name)
        return audit.split_off(checked, name)


def _read(
    source: EventsConfig | TableConfig, paths: tuple[str, ...], name: str, workspace: Workspace
) -> DataFrame:
    return read_source(workspace.spark, source, paths, name, wanted_columns(source))
