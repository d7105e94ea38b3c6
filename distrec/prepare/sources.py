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
from distrec.prepare.door import EXCLUDED, Door
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


def read_sources(prepare: PrepareConfig, door: Door, workspace: Workspace) -> Sources:
    """Read and check all sources.

    Args:
        prepare: The section [prepare].
        door: What becomes of users first.
        workspace: For intermediate tables.

    Raises:
        ConfigError: The pattern of the times is none.
        DataError: A source is missing, empty, damaged, or breaks its contract too often.
    """
    check_time_format(workspace.spark, prepare.events.time_format)
    audit = Audit(prepare.max_reject_share)
    functions = [partial(_read_events, prepare, door, workspace, audit)]
    tables = ((prepare.users, "users", "user", door), (prepare.items, "items", "item", None))
    for table, name, side, passed in tables:
        functions.append(partial(_read_table, table, name, side, passed, workspace, audit))
    events, users, items = concurrently(*functions)
    return Sources(events, users, items, audit)


def _read_events(
    prepare: PrepareConfig, door: Door, workspace: Workspace, audit: Audit
) -> DataFrame:
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
        part = typed_events(part, source, latest, rating_required, door.hidden(source.user))
        if name:
            part = part.withColumn(c.SPLIT, F.lit(name))
        whole = part if whole is None else whole.unionByName(part)
    assert whole is not None
    with translated("events"):
        passed = workspace.materialize(door.passed(whole, c.USER_ID), "events")
        return audit.split_off(_admitted(passed, door, audit, "events"), "events")


def _admitted(passed: DataFrame, door: Door, audit: Audit, source: str) -> DataFrame:
    """Without those who are left out, who are counted."""
    if door.excluded:
        audit.num_excluded[source] = passed.filter(EXCLUDED).count()
    return passed.filter(~F.col(EXCLUDED)).drop(EXCLUDED)


def _read_table(
    source: TableConfig | None,
    name: str,
    side: str,
    door: Door | None,
    workspace: Workspace,
    audit: Audit,
) -> DataFrame | None:
    if source is None:
        return None
    hidden = None if door is None else door.hidden(source.id)
    typed = typed_table(_read(source, source.paths, name, workspace), source, side, hidden)
    if door is not None:
        typed = door.passed(typed, c.ID)
    with translated(name):
        stored = workspace.materialize(typed, name)
        if door is not None:
            stored = _admitted(stored, door, audit, name)
        checked = one_row_an_id(stored, source, name)
        return audit.split_off(checked, name)


def _read(
    source: EventsConfig | TableConfig, paths: tuple[str, ...], name: str, workspace: Workspace
) -> DataFrame:
    return read_source(workspace.spark, source, paths, name, wanted_columns(source))
