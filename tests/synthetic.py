"""A small dataset after the contract of distrec.dataset, made without Spark, with a planted signal.

Users and items belong to one of four groups; a user takes items of their own group nine times out
of ten. Whatever learns the groups ranks the withheld item among the first quarter.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distrec import columns as c
from distrec.dataset import (
    MANIFEST,
    DatasetManifest,
    FeatureSpec,
    FileEntry,
    Split,
    TrainRows,
    Vocabulary,
)

NUM_GROUPS = 4
START = 1_600_000_000
RECENT_AFTER = START + 7_000_000
FEATURES = (
    FeatureSpec(
        name="group", side="user", kind="categorical", column="user_group", num_embeddings=6
    ),
    FeatureSpec(name="age", side="user", kind="number", column="user_age", dim=1),
    FeatureSpec(
        name="tags", side="item", kind="multi_categorical", column="item_tags", num_embeddings=6
    ),
    FeatureSpec(name="image", side="item", kind="vector", column="item_image", dim=3),
    FeatureSpec(
        name="hour", side="context", kind="categorical", column="context_hour", num_embeddings=26
    ),
)


def _entry(directory: Path, name: str, table: pa.Table, row_group_size: int) -> FileEntry:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)
    data = path.read_bytes()
    return FileEntry(
        path=name,
        num_rows=table.num_rows,
        num_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def _write(
    directory: Path, split: str, rows: list[dict], schema: pa.Schema, num_files: int, group: int
) -> Split:
    cuts = np.linspace(0, len(rows), num_files + 1).astype(int)
    files = []
    for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
        table = pa.Table.from_pylist(rows[start:stop], schema=schema)
        files.append(_entry(directory, f"{split}/part-{number:05d}.parquet", table, group))
    return Split(num_rows=len(rows), files=tuple(files))


def _state(positives: list[int], times: list[int], history_length: int) -> dict:
    return {
        c.NUM_EVENTS: len(positives),
        c.HISTORY: positives[-history_length:],
        c.HISTORY_TIMES: times[-history_length:],
    }


def _window(rows: list[dict], stop: int, history_length: int) -> dict:
    """The events of a user that end before `stop`, the last history_length of them, as one row."""
    before = rows[max(0, stop - 1 - history_length) : stop - 1]
    return {
        **rows[stop - 1],
        c.NUM_EVENTS: stop - 1,
        c.HISTORY: [row[c.ITEM_INDEX] for row in before],
        c.HISTORY_TIMES: [row[c.TIME] for row in before],
    }


def event_type(item: int, time: int, num_types: int) -> int:
    """Of which kind an event is, where there are kinds."""
    return c.FIRST_INDEX + (item + time) % num_types


def write_dataset(
    directory: Path,
    *,
    num_users: int = 60,
    num_items: int = 40,
    num_cold_items: int = 4,
    events_per_user: int = 12,
    history_length: int = 8,
    num_files: int = 3,
    row_group_size: int = 64,
    labels: bool = False,
    ratings: bool = False,
    tasks: bool = False,
    train_rows: TrainRows = "events",
    event_types: tuple[str, ...] = (),
    seed: int = 0,
) -> DatasetManifest:
    """Write a dataset directory and return its manifest.

    Every user has events_per_user events in train, one in valid, one in test. The last
    num_cold_items items of the catalogue occur in no event. Recent are events after RECENT_AFTER,
    before every split. With ratings, what is of a user's group
    is rated 4.5, else 1. With tasks there is one more, like, which is 1 of what is of a user's
    group, and in train known of the first quarter of the rows only. With event_types the kind of an
    event follows from its item and time (event_type).
    """
    assert not (labels and train_rows == "windows")
    rng = np.random.default_rng(seed)
    item_ids = np.arange(c.FIRST_INDEX, c.FIRST_INDEX + num_items)
    total_items = num_items + num_cold_items
    group_of_item = (np.arange(total_items + c.FIRST_INDEX) - c.FIRST_INDEX) % NUM_GROUPS
    ids = pa.list_(pa.int64())
    histories = [(c.HISTORY, ids), (c.HISTORY_TIMES, ids)]
    histories += [(c.HISTORY_TYPES, ids)] if event_types else []
    user_fields = [("user_group", pa.int64()), ("user_age", pa.float32())]
    context_fields = [("context_hour", pa.int64())]
    example_schema = pa.schema(
        [(c.USER_INDEX, pa.int64()), (c.ITEM_INDEX, pa.int64()), (c.TIME, pa.int64()),
         (c.LABEL, pa.float32()), (c.WEIGHT, pa.float32()), (c.NUM_EVENTS, pa.int64()),
         *histories, *user_fields, *context_fields,
         *([(c.task_column("like"), pa.float32())] if tasks else [])]
    )  # fmt: skip
    state_fields = [
        (c.USER_ID, pa.string()), (c.USER_INDEX, pa.int64()), (c.TIME, pa.int64()),
        (c.NUM_EVENTS, pa.int64()), *histories, (c.SEEN, ids),
    ]  # fmt: skip
    query_schema = pa.schema([*state_fields, (c.TARGETS, ids), *user_fields, *context_fields])
    user_schema = pa.schema([*state_fields, *user_fields, *context_fields])
    item_schema = pa.schema(
        [(c.ITEM_ID, pa.string()), (c.ITEM_INDEX, pa.int64()), (c.TITLE, pa.string()),
         (c.COUNT, pa.int64()), *((c.recent_column(split), pa.int64()) for split in c.RECENT_POOLS),
         ("item_tags", ids), ("item_image", pa.list_(pa.float32()))]
    )  # fmt: skip

    rows: dict[str, list[dict]] = {
        name: [] for name in (c.TRAIN, c.VALID, c.TEST, c.VALID_QUERIES, c.TEST_QUERIES, c.USERS)
    }
    counts = np.zeros(total_items + c.FIRST_INDEX, dtype=np.int64)
    recent = {split: np.zeros_like(counts) for split in c.RECENT_POOLS}
    for number in range(num_users):
        group = number % NUM_GROUPS
        own = item_ids[group_of_item[item_ids] == group]
        size = events_per_user + 2
        pick_own = rng.random(size) < 0.9
        taken = np.where(pick_own, rng.choice(own, size), rng.choice(item_ids, size))
        times = START + np.sort(rng.integers(0, 10_000_000, size))
        features = {"user_group": group + 2, "user_age": float(rng.normal())}
        user = {c.USER_ID: f"u{number}", c.USER_INDEX: number + c.FIRST_INDEX}
        positives: list[int] = []
        positive_times: list[int] = []

        for position, (item, time) in enumerate(zip(taken.tolist(), times.tolist(), strict=True)):
            split = (
                c.TRAIN if position < events_per_user
                else c.VALID if position == events_per_user else c.TEST
            )  # fmt: skip
            label = 1.0
            if labels and split == c.TRAIN and group_of_item[item] != group:
                label = 0.0
            if ratings:
                label = 4.5 if group_of_item[item] == group else 1.0
            hour = {"context_hour": int(time // 3600 % 24) + 2}
            shared = {c.USER_INDEX: user[c.USER_INDEX], c.TIME: time, **features, **hour}
            rows[split].append(
                {**shared, c.ITEM_INDEX: item, c.LABEL: label, c.WEIGHT: 1.0,
                 c.task_column("like"): float(group_of_item[item] == group),
                 **_state(positives, positive_times, history_length)}
            )  # fmt: skip
            if split != c.TRAIN:
                before = _state(positives, positive_times, history_length)
                sets = {c.SEEN: sorted(set(positives)), c.TARGETS: [item]}
                rows[f"{split}_queries"].append({**shared, **user, **before, **sets})
            else:
                counts[item] += 1
            if label and time > RECENT_AFTER:
                for later, pool in c.RECENT_POOLS.items():
                    recent[later][item] += split in pool
            if label:
                positives.append(item)
                positive_times.append(time)
        if train_rows == "windows":
            own_rows = rows[c.TRAIN][-events_per_user:]
            del rows[c.TRAIN][-events_per_user:]
            rows[c.TRAIN] += [
                _window(own_rows, stop, history_length)
                for stop in range(events_per_user, 0, -history_length)
            ]
        rows[c.USERS].append(
            {**user, **features, "context_hour": 0, c.TIME: int(times[-1]) + 1,
             **_state(positives, positive_times, history_length), c.SEEN: sorted(set(positives))}
        )  # fmt: skip
    for row in itertools.chain.from_iterable(rows.values()):
        events = zip(row[c.HISTORY], row[c.HISTORY_TIMES], strict=True)
        if event_types:
            row[c.HISTORY_TYPES] = [event_type(*event, len(event_types)) for event in events]
    item_rows = [
        {
            c.ITEM_ID: f"i{index}",
            c.ITEM_INDEX: index,
            c.TITLE: f"Item {index}",
            c.COUNT: int(counts[index]),
            **{c.recent_column(split): int(found[index]) for split, found in recent.items()},
            "item_tags": [int(group_of_item[index]) + 2],
            "item_image": [float(group_of_item[index] == k) for k in range(3)],
        }
        for index in range(c.FIRST_INDEX, c.FIRST_INDEX + total_items)
    ]
    order = rng.permutation(len(rows[c.TRAIN]))
    rows[c.TRAIN] = [rows[c.TRAIN][index] for index in order]
    for row in rows[c.TRAIN][len(order) // 4 :]:
        row[c.task_column("like")] = float("nan")

    schemas = {
        c.TRAIN: example_schema, c.VALID: example_schema, c.TEST: example_schema,
        c.VALID_QUERIES: query_schema, c.TEST_QUERIES: query_schema, c.USERS: user_schema,
        c.ITEMS: item_schema,
    }  # fmt: skip
    rows[c.ITEMS] = item_rows
    splits = {
        name: _write(
            directory, name, rows[name], schema, num_files if name == c.TRAIN else 1, row_group_size
        )
        for name, schema in schemas.items()
    }
    vocabularies = {}
    for name, prefix, size in ((c.USER_ID, "u", num_users), (c.ITEM_ID, "i", num_items)):
        start = 0 if prefix == "u" else c.FIRST_INDEX
        table = pa.table(
            {
                c.VALUE: [f"{prefix}{start + k}" for k in range(size)],
                c.ID: pa.array(range(c.FIRST_INDEX, c.FIRST_INDEX + size), pa.int64()),
                c.COUNT: pa.array([1] * size, pa.int64()),
            }
        )
        entry = _entry(directory, f"vocab/{name}/part-00000.parquet", table, 1024)
        vocabularies[name] = Vocabulary(
            name=name, num_embeddings=size + c.FIRST_INDEX, sha256=entry.sha256, files=(entry,)
        )
    manifest = DatasetManifest(
        distrec_version="test",
        created_at="2026-01-01T00:00:00Z",
        config_hash="test",
        config={},
        schemas={
            name: {field.name: str(field.type).replace("item: ", "").replace("element: ", "")
                   for field in schema}
            for name, schema in schemas.items()
        },
        splits=splits,
        features=FEATURES,
        vocabularies=vocabularies,
        num_users=num_users + c.FIRST_INDEX,
        num_trained_items=num_items + c.FIRST_INDEX,
        num_items=total_items + c.FIRST_INDEX,
        history_length=history_length,
        has_time=True,
        has_labels=labels,
        rating_scale=(1.0, 4.5) if ratings else None,
        train_rows=train_rows,
        event_types=event_types,
        tasks=("like",) if tasks else (),
        counts={"read": len(rows[c.TRAIN])},
        rejects={},
        statistics={},
        recent_after=dict.fromkeys(c.RECENT_POOLS, RECENT_AFTER),
    )  # fmt: skip
    (directory / MANIFEST).write_text(json.dumps(manifest.model_dump(mode="json"), indent=1))
    return manifest
