"""A whole dataset from raw files, against values that were worked out by hand."""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from distrec import prepare
from distrec.config import Config, parse_config
from distrec.dataset import DatasetManifest, read_manifest
from distrec.reader import read_items
from distrec.user_key import ENVIRONMENT, hashed, key_digest

# user, item, time, stars, kind, device, weight. Sorted by user and time the first three users have:
# u1 a10 b20 c20 d30 e40; u2 b11 a12 c13 x14; u3 a5 b6. Leave-one-out: test e, x; valid d, c.
EVENTS = """\
u1,a,10,5,view,tv,1
u1,b,20,5,buy,tv,0.5
u1,c,20,5,view,tv,1
u1,d,30,5,buy,tv,1
u1,e,40,5,view,tv,1
u2,b,11,4,buy,web,1
u2,a,12,4,view,web,1
u2,c,13,4,buy,car,1
u2,x,14,4,view,web,1
u3,a,5,3,view,web,1
u3,b,6,3,view,web,1
u1,a,3,5,view,tv,1
u3,b,6,3,view,web,1
u1,z,41,5,ping,tv,1
u3,d,42,1,view,web,1
,a,10,5,view,tv,1
u1,a,soon,5,view,tv,1
u1,a,2000,5,view,tv,1
u1,a,10,five,view,tv,1
u1,a,10,5,view,tv,-1
u1,a,10
""".splitlines()
E1, E3 = math.expm1(2), math.expm1(4)
ITEMS = f"""\
item,title,tags,price,size,image
c,Tree,,{E3},3,
a,"Red ""dog"", barking",x|y,0,1,1 2
z,Zoo,nowhere,1e9,2,5 5
d,,y| w |y,,9,0 0
b,Red dog,y,{E1},2,3 4
e,Sea,x,-{E1},,7 7
a,Another,x,1,1,1 1
"""
USERS = "id\tage\tcountry\nu3\t\tse\nu1\t20\tno\nu9\t100\tdk\nu2\t40\tse\n"


def features(*rows: tuple[str, str], **more: Any) -> list[dict[str, Any]]:
    return [{"column": name, "kind": kind, **more.get(name, {})} for name, kind in rows]


def config_of(output: Path, **sections: Any) -> Config:
    return parse_config({"name": "tests", "output": str(output), **sections}, "tests")


def rows(manifest: DatasetManifest, directory: Path, split: str) -> list[dict[str, Any]]:
    return [
        row
        for entry in manifest.splits[split].files
        for row in pq.read_table(directory / entry.path).to_pylist()
    ]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    lines = [line.encode() for line in EVENTS] + [b"u\xff,a,10,5,view,tv,1"]
    random.Random(3).shuffle(lines)
    header = b"user,item,when,stars,kind,device,weight"
    (folder / "events.csv").write_bytes(b"\n".join([header, *lines]) + b"\n")
    (folder / "items.csv").write_text(ITEMS)
    (folder / "users.tsv").write_text(USERS)
    return folder


@pytest.fixture(scope="module")
def made(
    spark: SparkSession, raw: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DatasetManifest, Path]:
    """The dataset of the files above."""
    events = {
        "paths": [str(raw / "*.csv").replace("*", "events")],
        "user": "user", "item": "item", "time": "when", "rating": "stars", "event_type": "kind",
        "weight": "weight", "context": features(("device", "categorical")),
    }  # fmt: skip
    item_features = features(
        ("tags", "multi_categorical"), ("price", "number"), ("size", "number"), ("image", "vector"),
        ("title", "text"),
        price={"transform": "log", "clip": [-100.0, 100.0]}, size={"num_buckets": 2},
        image={"dim": 2, "separator": " "}, title={"num_buckets": 1000},
    )  # fmt: skip
    hashed = {"column": "title", "name": "maker", "kind": "hashed", "num_buckets": 50}
    item_features.append({**hashed, "num_hashes": 3})
    items = {
        "paths": [str(raw / "items.csv")], "id": "item", "title": "title", "duplicates": "first",
        "features": item_features,
    }  # fmt: skip
    users = {
        "paths": [str(raw / "users.tsv")], "separator": "\t", "id": "id",
        "features": features(("age", "number"), ("country", "categorical")),
    }  # fmt: skip
    section = {
        "events": events, "items": items, "users": users, "min_rating": 2.0,
        "event_types": ["view", "buy"], "history_length": 3, "max_reject_share": 0.5,
        "latest_time": 1000,
    }  # fmt: skip
    config = config_of(tmp_path_factory.mktemp("run of läden"), prepare=section)
    manifest = prepare.run(spark, config)
    assert read_manifest(config.dataset_directory) == manifest
    return manifest, config.dataset_directory


def test_counts_of_every_step(made: tuple[DatasetManifest, Path]) -> None:
    manifest, _ = made
    assert manifest.counts == {
        "read": 22, "rejected": 7, "other_event_type": 1, "duplicates": 2, "below_min_rating": 1,
        "k_core": 0, "kept": 11, "train": 7, "valid": 2, "test": 2, "known": 0, "users": 4,
        "items": 6,
    }  # fmt: skip
    assert (manifest.num_users, manifest.num_trained_items, manifest.num_items) == (5, 5, 8)
    assert manifest.has_time
    assert not manifest.has_labels


def test_rejects_have_a_reason_and_the_row(made: tuple[DatasetManifest, Path]) -> None:
    manifest, directory = made
    assert manifest.rejects == {
        "events: bytes that are not UTF-8": 1,
        "events: column 'stars' is not a number": 1,
        "events: column 'user' is empty": 1,
        "events: column 'weight' is negative": 1,
        "events: column 'when' is not a time": 1,
        "events: column 'when' lies in the future": 1,
        "events: wrong number of columns": 1,
        "items: id stands more than once": 1,
    }
    found = {
        f"{row['source']}: {row['reason']}": json.loads(row["raw_row"])
        for row in rows(manifest, directory, "rejects")
    }
    assert found.keys() == manifest.rejects.keys()
    assert found["events: column 'when' is not a time"]["when"] == "soon"
    assert found["events: wrong number of columns"] == {"line": "u1,a,10"}
    assert found["items: id stands more than once"]["title"] == "Another"


def test_vocabularies_by_descending_count_in_train(made: tuple[DatasetManifest, Path]) -> None:
    manifest, directory = made
    expected = {
        "user_id": [("u1", 2, 3), ("u2", 3, 2), ("u3", 4, 2)],
        "item_id": [("a", 2, 3), ("b", 3, 3), ("c", 4, 1)],
        "user_country": [("se", 2, 4), ("no", 3, 3)],
        "item_tags": [("y", 2, 6), ("x", 3, 3)],
        "item_size": [("(-inf, 2]", 2, 6), ("(2, inf]", 3, 1)],
        "context_device": [("web", 2, 4), ("tv", 3, 3)],
    }
    assert list(manifest.vocabularies) == list(expected)
    for name, values in expected.items():
        vocabulary = manifest.vocabularies[name]
        tables = [pq.read_table(directory / entry.path) for entry in vocabulary.files]
        found = [tuple(row.values()) for table in tables for row in table.to_pylist()]
        assert found == values, name
        assert vocabulary.num_embeddings == len(values) + 2


def test_items_and_their_encoded_features(made: tuple[DatasetManifest, Path]) -> None:
    manifest, directory = made
    found = {row["item_id"]: row for row in rows(manifest, directory, "items")}
    # trained ones by count, then the others of the catalogue by xxhash64
    assert list(found) == ["a", "b", "c", "e", "d", "z"]
    assert [row["item_index"] for row in found.values()] == [2, 3, 4, 5, 6, 7]
    assert [row["count"] for row in found.values()] == [3, 3, 1, 0, 0, 0]
    # all is of one day; c and d are in valid, and e in test
    assert [row["recent_valid"] for row in found.values()] == [3, 3, 1, 0, 0, 0]
    assert [row["recent_test"] for row in found.values()] == [3, 3, 2, 0, 1, 0]
    assert [row["recent_users"] for row in found.values()] == [3, 3, 2, 1, 1, 0]
    assert found["a"]["title"] == 'Red "dog", barking'
    assert found["d"]["title"] == ""
    assert [row["item_tags"] for row in found.values()] == [[3, 2], [2], [], [3], [2, 1], [1]]
    # logs of the prices of a, b, c: 0, 2, 4
    std = math.sqrt(8 / 3)
    prices = [-2 / std, 0, 2 / std, -4 / std, 0, (math.log(101) - 2) / std]
    assert [row["item_price"] for row in found.values()] == pytest.approx(prices, abs=1e-6)
    assert manifest.statistics["item_price"] == pytest.approx(
        {"mean": 2, "std": std, "min": 0, "max": 4, "missing": 0}
    )
    # the median of 1, 2, 3 is the edge; e has no size
    assert [row["item_size"] for row in found.values()] == [2, 2, 3, 0, 3, 2]
    # c has no image: the mean of those of a and b
    images = [[1, 2], [3, 4], [2, 3], [7, 7], [0, 0], [5, 5]]
    assert [row["item_image"] for row in found.values()] == images


def test_hashed_values_have_no_vocabulary(
    spark: SparkSession, made: tuple[DatasetManifest, Path]
) -> None:
    manifest, directory = made
    (feature,) = (feature for feature in manifest.features if feature.name == "maker")
    assert (feature.kind, feature.column, feature.num_embeddings) == ("hashed", "item_maker", 52)
    found = {row["item_id"]: row["item_maker"] for row in rows(manifest, directory, "items")}
    # whole values, capitals and marks included; three hash functions each; d has no title
    titles = {"a": 'Red "dog", barking', "b": "Red dog", "c": "Tree", "e": "Sea", "z": "Zoo"}
    for item, title in titles.items():
        hashes = ", ".join(f"pmod(xxhash64('{title}', {k}), 50) + 2" for k in range(3))
        assert found.pop(item) == list(spark.sql(f"SELECT {hashes}").first())
    assert found == {"d": []}


def test_users_as_of_now(made: tuple[DatasetManifest, Path]) -> None:
    manifest, directory = made
    found = {row["user_id"]: row for row in rows(manifest, directory, "users")}
    u1, u2, u9 = found["u1"], found["u2"], found["u9"]
    assert (u1["user_index"], u1["num_events"], u1["time"]) == (2, 5, 41)
    assert (u1["history"], u1["history_times"]) == ([4, 6, 5], [20, 30, 40])
    assert [found[user]["history_types"] for user in ("u1", "u2", "u3", "u9")] == [
        [2, 3, 2], [2, 3, 2], [2, 2], [],
    ]  # fmt: skip
    assert u1["seen"] == [2, 3, 4, 5, 6]
    # x is in no catalogue: unknown in the history, and nothing that could be masked
    assert (u2["history"], u2["seen"]) == ([2, 4, 1], [2, 3, 4])
    assert (u9["user_index"], u9["num_events"], u9["history"], u9["time"]) == (1, 0, [], 41)
    # no user of train waits longer than ten seconds
    assert (u2["history_times"][-1], u2["time"]) == (14, 24)
    # age: mean 30, deviation 10 of u1 and u2; u3 has none
    assert [found[user]["user_age"] for user in ("u1", "u2", "u3", "u9")] == [-1, 1, 0, 7]
    assert [found[user]["user_country"] for user in ("u1", "u2", "u3", "u9")] == [3, 2, 2, 1]
    assert {row["context_device"] for row in found.values()} == {0}


def test_examples_know_only_what_lies_strictly_before(made: tuple[DatasetManifest, Path]) -> None:
    manifest, directory = made
    found = {
        (split, row["user_index"], row["item_index"]): row
        for split in ("train", "valid", "test")
        for row in rows(manifest, directory, split)
    }
    columns = ("history", "history_times", "history_types")
    histories = {key: tuple(row[name] for name in columns) for key, row in found.items()}
    assert manifest.event_types == ("view", "buy")
    assert histories == {
        ("train", 2, 2): ([], [], []),
        # b and c at the same time do not see each other
        ("train", 2, 3): ([2], [10], [2]),
        ("train", 2, 4): ([2], [10], [2]),
        ("valid", 2, 6): ([2, 3, 4], [10, 20, 20], [2, 3, 2]),
        ("test", 2, 5): ([3, 4, 6], [20, 20, 30], [3, 2, 3]),
        ("train", 3, 3): ([], [], []),
        ("train", 3, 2): ([3], [11], [3]),
        ("valid", 3, 4): ([3, 2], [11, 12], [3, 2]),
        ("test", 3, 1): ([3, 2, 4], [11, 12, 13], [3, 2, 3]),
        ("train", 4, 2): ([], [], []),
        ("train", 4, 3): ([2], [5], [2]),
    }
    assert found["test", 2, 5]["num_events"] == 4
    assert found["train", 2, 3]["weight"] == 0.5
    # "car" is not in train
    assert found["valid", 3, 4]["context_device"] == 1
    assert found["train", 2, 2]["user_age"] == -1


def test_queries(made: tuple[DatasetManifest, Path]) -> None:
    manifest, directory = made
    valid = {row["user_id"]: row for row in rows(manifest, directory, "valid_queries")}
    test = {row["user_id"]: row for row in rows(manifest, directory, "test_queries")}
    assert {user: (row["targets"], row["seen"]) for user, row in valid.items()} == {
        "u1": ([6], [2, 3, 4]), "u2": ([4], [2, 3]),
    }  # fmt: skip
    assert {user: (row["targets"], row["seen"]) for user, row in test.items()} == {
        "u1": ([5], [2, 3, 4, 6]), "u2": ([1], [2, 3, 4]),
    }  # fmt: skip
    assert (test["u1"]["time"], test["u1"]["num_events"]) == (40, 4)
    assert (test["u1"]["history"], test["u1"]["history_types"]) == ([3, 4, 6], [3, 2, 3])
    assert valid["u2"]["context_device"] == 1


def test_files_are_what_the_manifest_says(made: tuple[DatasetManifest, Path]) -> None:
    manifest, directory = made
    entries = [entry for split in manifest.splits.values() for entry in split.files]
    entries += [entry for one in manifest.vocabularies.values() for entry in one.files]
    for entry in entries:
        content = (directory / entry.path).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry.sha256
        footer = int.from_bytes(content[-8:-4], "little") + 8
        assert hashlib.sha256(content[:-footer]).hexdigest() == entry.pages_sha256
        assert (len(content), pq.read_metadata(directory / entry.path).num_rows) == (
            entry.num_bytes, entry.num_rows,
        )  # fmt: skip
    there = {
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()
    }
    assert there == {entry.path for entry in entries} | {"manifest.json"}
    # 7 rows in at most 12 files
    assert [entry.num_rows for entry in manifest.splits["train"].files] == [1] * 7
    for name, split in manifest.splits.items():
        for entry in split.files:
            schema = pq.read_schema(directory / entry.path)
            types = {field.name: str(field.type).replace("element: ", "") for field in schema}
            assert types == manifest.schemas[name]
            table = pq.read_table(directory / entry.path)
            assert all(column.null_count == 0 for column in table.columns)


def test_given_split_with_labels_and_without_times(spark: SparkSession, tmp_path: Path) -> None:
    """JSON lines with numbers as ids; negatives are no history, and order is by item id. Another
    task is known of some events, and one event that has a 2 for it is rejected."""
    lines = {
        "train": [(1, "i1", 1), (1, "i2", 0), (1, "i3", 1), (2, "i1", 1), (2, "i3", 0)],
        "test": [(1, "i4", 1), (1, "i5", 0), (2, "i4", 0)],
    }
    for name, events in lines.items():
        text = [
            json.dumps({"u": user, "i": item, "y": y, "bought": {"i2": 1, "i3": 0}.get(item)})
            for user, item, y in reversed(events)
        ]
        text += ['{"u": 2, "i": "i2", "y": 0, "bought": 2}'] * (name == "train")
        (tmp_path / f"{name}.json").write_text("\n".join(text))
    events = {
        "paths": [str(tmp_path / "train.json")], "format": "json", "user": "u", "item": "i",
        "label": "y", "tasks": ["bought"],
    }  # fmt: skip
    split = {"method": "given", "test_paths": [str(tmp_path / "test.json")]}
    section = {"events": events, "split": split, "max_reject_share": 0.2}
    config = config_of(tmp_path / "run", prepare=section)
    manifest = prepare.run(spark, config)
    directory = config.dataset_directory
    assert manifest.has_labels
    assert manifest.tasks == read_manifest(directory).tasks == ("bought",)
    assert manifest.rejects == {"events: column 'bought' is not 0, 1 or empty": 1}
    assert not manifest.has_time
    assert manifest.splits["valid"].num_rows == 0
    train = {
        (row["user_index"], row["item_index"]): (row["label"], row["history"], row["num_events"])
        for row in rows(manifest, directory, "train")
    }
    # i1 2 (twice), i3 3 (twice), i2 4; user 1 is 2, user 2 is 3
    assert train == {
        (2, 2): (1, [3], 1), (2, 4): (0, [2, 3], 2), (2, 3): (1, [2], 1),
        (3, 2): (1, [], 0), (3, 3): (0, [2], 1),
    }  # fmt: skip
    bought = {
        (row["user_index"], row["item_index"]): str(row["task_bought"])
        for row in rows(manifest, directory, "train")
    }
    assert bought == {(2, 2): "nan", (2, 4): "1.0", (2, 3): "0.0", (3, 2): "nan", (3, 3): "0.0"}
    assert all(math.isnan(row["task_bought"]) for row in rows(manifest, directory, "test"))
    (query,) = rows(manifest, directory, "test_queries")
    assert (query["user_id"], query["targets"], query["seen"]) == ("1", [1], [2, 3, 4])
    assert (query["history"], query["history_times"], query["time"]) == ([2, 3], [0, 0], 0)
    assert len(rows(manifest, directory, "test")) == 3


def test_ratings_as_labels_of_hashed_users(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale is that of train; a row without a rating is rejected, and one is excluded."""
    monkeypatch.setenv(ENVIRONMENT, "a key of twenty bytes")
    lines = {"train": ["1,a,3", "1,b,4.5", "2,a,1", "2,c,", "3,a,9"], "test": ["1,c,5", "2,b,0.5"]}
    (tmp_path / "gone.txt").write_text("3\n")
    for name, events in lines.items():
        (tmp_path / f"{name}.csv").write_text("\n".join(["u,i,stars", *events]) + "\n")
    events = {
        "paths": [str(tmp_path / "train.csv")], "user": "u", "item": "i", "rating": "stars",
    }  # fmt: skip
    split = {"method": "given", "test_paths": [str(tmp_path / "test.csv")]}
    section = {"events": events, "split": split, "predict_ratings": True, "max_reject_share": 0.5}
    section |= {"hash_users": True, "exclude_users": str(tmp_path / "gone.txt")}
    config = config_of(tmp_path / "run", prepare=section)
    manifest = prepare.run(spark, config)
    assert manifest.rating_scale == (1.0, 4.5)
    assert not manifest.has_labels
    assert manifest.rejects == {"events: column 'stars' is empty": 1}
    directory = config.dataset_directory
    train = {
        (row["user_index"], row["item_index"]): row["label"]
        for row in rows(manifest, directory, "train")
    }
    assert sorted(train.values()) == [1.0, 3.0, 4.5]
    assert sorted(row["label"] for row in rows(manifest, directory, "test")) == [0.5, 5.0]
    key = b"a key of twenty bytes"
    users = {row["user_id"] for row in rows(manifest, directory, "users")}
    assert users == {hashed("1", key), hashed("2", key)}
    assert (manifest.user_key_digest, manifest.counts["excluded"]) == (key_digest(key), 1)
    assert key.decode() not in (directory / "manifest.json").read_text()


def test_a_new_item_is_seen_and_in_no_history(spark: SparkSession, tmp_path: Path) -> None:
    """Four users have items 0 to 7 in this order, the last of them in valid and test."""
    lines = [f"{user},{item},{item + 1}" for user in range(4) for item in range(8)]
    (tmp_path / "events.csv").write_text("\n".join(["u,i,t", *lines]) + "\n")
    (tmp_path / "items.csv").write_text("\n".join(["i,kind", *(f"{k},x" for k in range(8))]) + "\n")
    section = {
        "events": {"paths": [str(tmp_path / "events.csv")], "user": "u", "item": "i", "time": "t"},
        "items": {"paths": [str(tmp_path / "items.csv")], "id": "i",
                  "features": [{"column": "kind", "kind": "categorical"}]},
        "split": {"new_items_share": 0.4},
    }  # fmt: skip
    config = config_of(tmp_path / "run", prepare=section)
    manifest = prepare.run(spark, config)
    directory = config.dataset_directory
    items = rows(manifest, directory, "items")
    counts = {row["item_index"]: row["count"] for row in items}
    assert len(counts) == 8
    new = {index for index, count in counts.items() if count == 0}
    # also what is had in valid has not sold yet
    recent = {row["item_index"]: row["recent_users"] for row in items}
    assert {index for index, count in recent.items() if count == 0} == new
    old = {index for index, count in counts.items() if count == 4}
    assert min(new) == manifest.num_trained_items == 2 + len(old)
    train = rows(manifest, directory, "train")
    assert {row["item_index"] for row in train} == old
    assert manifest.counts["train"] + manifest.counts["withheld"] == 4 * 6
    assert manifest.counts["withheld"] > 0
    for query in rows(manifest, directory, "valid_queries"):
        assert set(query["history"]) == old
        # all but what is asked for in valid and test
        assert len(query["seen"]) == 6
        assert set(query["seen"]) > old
        assert query["num_events"] == len(old)


def test_recent_events_of_items_are_those_of_the_last_days_before_a_split(
    spark: SparkSession, tmp_path: Path
) -> None:
    day, last = 86_400, {"valid": 40, "test": 50, "users": 60}
    generator = random.Random(7)
    events = [
        (generator.randrange(9), generator.randrange(6), generator.randrange(60 * day),
         int(generator.random() < 0.8))
        for _ in range(600)
    ]  # fmt: skip
    # the last moment before each split: seven days are counted back from there
    ends = {split: days * day - 1 for split, days in last.items()}
    events += [(0, 0, end, 1) for end in ends.values()]
    # what is seven days old to the second is not recent
    events += [(1, 1, end - 7 * day, 1) for end in ends.values()]
    lines = [",".join(map(str, event)) for event in events]
    (tmp_path / "events.csv").write_text("\n".join(["u,i,t,y", *lines]) + "\n")
    section = {
        "events": {"paths": [str(tmp_path / "events.csv")], "user": "u", "item": "i", "time": "t",
                   "label": "y"},
        "duplicates": "keep_all", "recent_days": 7,
        "split": {"method": "temporal", "valid_time": 40 * day, "test_time": 50 * day},
    }  # fmt: skip
    config = config_of(tmp_path / "run", prepare=section)
    manifest = prepare.run(spark, config)
    after = {split: end - 7 * day for split, end in ends.items()}
    assert manifest.recent_after == after
    items = {row["item_id"]: row for row in rows(manifest, config.dataset_directory, "items")}
    for split, start in after.items():
        for item, row in items.items():
            expected = sum(
                str(one) == item and start < time <= ends[split] and label
                for _, one, time, label in events
            )
            assert 2 < expected == row[f"recent_{split}"]
        found = read_items(config.dataset_directory, manifest, split)
        assert found.recent.tolist() == [row[f"recent_{split}"] for row in items.values()]


def test_an_item_out_of_the_core_leaves_the_catalogue(spark: SparkSession, tmp_path: Path) -> None:
    """Everybody has a to c, one user has rare, nobody has new; then the rare one sells."""
    lines = [f"{user},{item},{when}" for user in range(4) for when, item in enumerate("abc", 1)]
    (tmp_path / "events.csv").write_text("\n".join(["u,i,t", "0,rare,0", *lines]) + "\n")
    items = [*"abc", "rare", "new"]
    (tmp_path / "items.csv").write_text("\n".join(["i,kind", *(f"{k},{k}" for k in items)]) + "\n")
    section = {
        "events": {"paths": [str(tmp_path / "events.csv")], "user": "u", "item": "i", "time": "t"},
        "items": {"paths": [str(tmp_path / "items.csv")], "id": "i",
                  "features": [{"column": "kind", "kind": "categorical"}]},
        "item_k_core": 2,
    }  # fmt: skip
    first = config_of(tmp_path / "first", prepare=section)
    manifest = prepare.run(spark, first)
    found = rows(manifest, first.dataset_directory, "items")
    assert [row["item_id"] for row in found] == ["a", "b", "c", "new"]
    assert manifest.counts["k_core"] == 1
    assert manifest.counts["items"] == 4
    plain = config_of(tmp_path / "plain", prepare={**section, "item_k_core": 1})
    everything = prepare.run(spark, plain)
    found = rows(everything, plain.dataset_directory, "items")
    assert sorted(row["item_id"] for row in found) == sorted(items)
    # what has an id already keeps it, and its features
    grown = {**section, "extend": str(plain.dataset_directory)}
    second = config_of(tmp_path / "second", prepare=grown)
    extended = prepare.run(spark, second)
    found = {row["item_id"]: row for row in rows(extended, second.dataset_directory, "items")}
    assert sorted(found) == sorted(items)
    assert found["rare"]["count"] == 0
    # 1 is the unknown one
    assert found["rare"]["item_kind"] not in (1, *(found[name]["item_kind"] for name in "abc"))
