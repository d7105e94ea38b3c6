"""Datasets that extend one another: who keeps an id, who loses it, who gets a used one."""

from __future__ import annotations

import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from distrec import forget, prepare
from distrec.config import Config, parse_config
from distrec.dataset import DatasetManifest, FileEntry, read_manifest
from distrec.errors import ConfigError, DataError
from distrec.forget.dataset import extended_after_forgetting
from distrec.prepare.extend import Continuation, OldVocabulary, open_previous
from distrec.prepare.vocabulary import fit_vocabulary, vocabulary_hash
from distrec.prepare.workspace import Workspace

# what all tests share is made with the first: it takes minutes on a slow machine
pytestmark = pytest.mark.timeout(600)

DAY = 86_400
# user, item, day, split. An item needs two train events; values unseen for ten days have no id.
EVENTS = (
    """
    u1 a 1 train|u2 a 1 train|u3 a 1 train|u1 b 2 train|u2 b 2 train|u1 c 3 train|u2 c 3 train
    u1 d 3 train|u3 b 4 test
    """,
    # newest 20: what was last seen before 10 is too old. b, u3 and y are; g is too old to begin
    """
    u1 a 15 train|u4 c 12 train|u1 d 11 train|u2 d 11 train|u1 e 12 train|u2 e 12 train
    u4 e 12 train|u4 f 13 train|u1 g 3 train|u2 g 3 train|u3 g 3 train|u1 f 20 test
    """,
    # newest 30: c, e and u2 are too old
    """
    u1 a 25 train|u5 d 25 train|u1 f 26 train|u5 f 26 train|u1 h 27 train|u5 h 27 train
    u4 h 27 train|u1 b 28 train|u5 b 28 train|u5 a 30 test
    """,
)
# item, category, price, size, image, extra
ITEMS = """\
item,category,price,size,image,extra
a,x,{a},1,4,1
b,y,2,2,8,2
c,x,3,3,6,3
d,z,9,4,,4
e,w,1,1,1,5
f,v,1,1,1,6
g,q,1,1,1,7
h,x,1,1,1,8
"""
FEATURES = [
    {"column": "category", "kind": "categorical"},
    {"column": "price", "kind": "number"},
    {"column": "size", "kind": "number", "num_buckets": 2},
    {"column": "image", "kind": "vector", "dim": 1},
]


def config_of(folder: Path, generation: int, **prepare_keys: Any) -> Config:
    features = FEATURES + [{"column": "extra", "kind": "number"}] * (generation > 0)
    section = {
        "events": {
            "paths": [str(folder / f"events-{generation}.csv")], "user": "user", "item": "item",
            "time": "time", "split": "split",
        },
        "items": {
            "paths": [str(folder / f"items-{generation}.csv")], "id": "item", "features": features,
        },
        "split": {"method": "given"}, "min_item_count": 2, "evict_after_days": 10,
    }  # fmt: skip
    if generation:
        section["extend"] = str(folder / f"run-{generation - 1}" / "dataset")
    output = str(folder / f"run-{generation}")
    return parse_config({"name": "t", "output": output, "prepare": section | prepare_keys}, "t")


def write_raw(folder: Path) -> None:
    for generation, text in enumerate(EVENTS):
        rows = [row.split() for row in text.replace("\n", "|").split("|") if row.strip()]
        random.Random(generation).shuffle(rows)
        lines = [f"{user},{item},{int(day) * DAY},{part}" for user, item, day, part in rows]
        (folder / f"events-{generation}.csv").write_text(
            "\n".join(["user,item,time,split", *lines]) + "\n"
        )
        # another price of a: what is fitted anew would differ
        text = ITEMS.format(a=1 if generation == 0 else 100)
        (folder / f"items-{generation}.csv").write_text(text)


@pytest.fixture(scope="module")
def made(
    spark: SparkSession, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[DatasetManifest]]:
    """Three datasets, each of which extends the one before."""
    folder = tmp_path_factory.mktemp("extend")
    write_raw(folder)
    for generation in range(len(EVENTS)):
        prepare.run(spark, config_of(folder, generation))
    manifests = [
        read_manifest(folder / f"run-{generation}" / "dataset") for generation in range(len(EVENTS))
    ]
    return folder, manifests


def read(folder: Path, generation: int, files: tuple[FileEntry, ...]) -> list[dict[str, Any]]:
    directory = folder / f"run-{generation}" / "dataset"
    return [row for file in files for row in pq.read_table(directory / file.path).to_pylist()]


def ids(made: tuple[Path, list[DatasetManifest]], generation: int, name: str) -> dict[str, int]:
    folder, manifests = made
    rows = read(folder, generation, manifests[generation].vocabularies[name].files)
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    return {row["value"]: row["id"] for row in rows}


def test_old_values_keep_their_ids_and_new_ones_get_the_next(
    made: tuple[Path, list[DatasetManifest]],
) -> None:
    assert ids(made, 0, "item_id") == {"a": 2, "b": 3, "c": 4}
    # c has one event only, yet is there already; b is too old, and its id waits
    assert ids(made, 1, "item_id") == {"a": 2, "c": 4, "e": 5, "d": 6}
    assert ids(made, 0, "user_id") == {"u1": 2, "u2": 3, "u3": 4}
    assert ids(made, 1, "user_id") == {"u1": 2, "u2": 3, "u4": 5}
    assert ids(made, 0, "item_category") == {"x": 2, "y": 3, "z": 4}
    assert ids(made, 1, "item_category") == {"x": 2, "z": 4, "w": 5, "v": 6}


def test_a_free_id_goes_to_a_new_value_one_extension_later(
    made: tuple[Path, list[DatasetManifest]],
) -> None:
    folder, manifests = made
    # h is the most frequent of the new ones, and gets b's id; b itself comes back as a new value
    assert ids(made, 2, "item_id") == {"a": 2, "h": 3, "d": 6, "b": 7, "f": 8}
    assert ids(made, 2, "user_id") == {"u1": 2, "u5": 4, "u4": 5}
    expected = {
        (1, "item_id"): ([3], [], 2, 1, 0, 7),
        (1, "user_id"): ([4], [], 1, 1, 0, 6),
        (2, "item_id"): ([4, 5], [(3, 2)], 3, 2, 1, 9),
        (2, "user_id"): ([3], [(4, 2)], 1, 1, 1, 6),
    }
    for (generation, name), values in expected.items():
        entry = manifests[generation].vocabularies[name]
        free = [row["id"] for row in read(folder, generation, entry.free_files)]
        reused = read(folder, generation, entry.reused_files)
        found = (
            free, [(row["id"], row["generation"]) for row in reused], entry.num_admitted,
            entry.num_evicted, entry.num_reused, entry.num_embeddings,
        )  # fmt: skip
        assert found == values
        assert entry.num_free == len(free)


def test_items_have_a_row_an_index(made: tuple[Path, list[DatasetManifest]]) -> None:
    folder, manifests = made
    rows = read(folder, 1, manifests[1].splits["items"].files)
    assert [(row["item_id"], row["item_index"], row["count"]) for row in rows] == [
        ("a", 2, 1), ("", 3, -1), ("c", 4, 1), ("e", 5, 3), ("d", 6, 2),
        ("b", 7, 0), ("h", 8, 0), ("g", 9, 3), ("f", 10, 1),
    ]  # fmt: skip
    # y of b and q of g are of no recent event
    assert [row["item_category"] for row in rows] == [2, 0, 2, 5, 4, 1, 2, 1, 6]
    assert (manifests[1].num_trained_items, manifests[1].num_items) == (7, 11)
    assert manifests[1].counts["items"] == 8
    train = read(folder, 1, manifests[1].splits["train"].files)
    pairs = {(row["user_index"], row["item_index"]) for row in train}
    assert {(1, 9), (2, 9), (5, 4), (5, 10)} <= pairs
    assert 3 not in {item for _, item in pairs}


def test_statistics_are_those_of_the_previous_dataset(
    made: tuple[Path, list[DatasetManifest]],
) -> None:
    folder, manifests = made
    first = manifests[0].statistics
    # a, b, c and d occur in train: prices 1, 2, 3, 9; images 4, 8, 6
    std = math.sqrt((1 + 4 + 9 + 81) / 4 - 3.75**2)
    assert first["item_price"]["mean"] == pytest.approx(3.75)
    assert first["item_image"] == {"mean_0": pytest.approx(6)}
    for manifest in manifests[1:]:
        for column in ("item_price", "item_size", "item_image"):
            assert manifest.statistics[column] == first[column]
    sizes = [manifest.vocabularies["item_size"].sha256 for manifest in manifests]
    assert sizes == sizes[:1] * 3
    items = {row["item_id"]: row for row in read(folder, 1, manifests[1].splits["items"].files)}
    assert items["c"]["item_price"] == pytest.approx((3 - 3.75) / std)
    assert items["a"]["item_price"] == pytest.approx((100 - 3.75) / std)
    assert items["d"]["item_image"] == [6]
    # a feature that is new is fitted on what train has now: a, c, d, e, f, g
    assert manifests[1].statistics["item_extra"]["mean"] == pytest.approx(26 / 6)
    assert manifests[2].statistics["item_extra"] == manifests[1].statistics["item_extra"]


def test_the_manifest_names_what_it_extends(made: tuple[Path, list[DatasetManifest]]) -> None:
    _, manifests = made
    assert manifests[0].extends is None
    extends = manifests[2].extends
    assert extends is not None
    assert extends.generation == manifests[2].generation == 2
    assert [one.content_hash for one in extends.ancestors] == [
        manifests[1].content_hash, manifests[0].content_hash,
    ]  # fmt: skip
    for ancestor, manifest in zip(extends.ancestors, manifests[1::-1], strict=True):
        assert {name: one.sha256 for name, one in ancestor.vocabularies.items()} == {
            name: one.sha256 for name, one in manifest.vocabularies.items()
        }
        assert ancestor.vocabularies["item_id"].num_embeddings == manifest.num_trained_items


def test_without_eviction_nobody_loses_an_id(
    spark: SparkSession, made: tuple[Path, list[DatasetManifest]], workspace: Workspace
) -> None:
    folder, _ = made
    before = open_previous(config_of(folder, 1))
    assert before.oldest is None
    counts = spark.createDataFrame(
        [("n", 1), ("b", 9), ("m", 2), ("k", 2)], "value string, count long"
    )
    fitted = fit_vocabulary(counts, "item_id", 2, workspace, before)
    found = {row["value"]: (row["id"], row["count"]) for row in fitted.frame.collect()}
    assert found == {"a": (2, 0), "b": (3, 9), "c": (4, 0), "k": (5, 2), "m": (6, 2)}
    assert (fitted.num_embeddings, fitted.num_free) == (7, 0)
    # a dataset made without eviction says nothing of times: its last event stands for all values
    assert before.previous is not None
    files = before.previous.vocabularies["item_id"]
    timeless = before.directory / files.files[0].path
    table = pq.read_table(timeless).drop_columns(["last_time"])
    (workspace.root / "vocab").mkdir()
    pq.write_table(table, workspace.root / "vocab" / "part.parquet")
    entry = files.model_copy(
        update={"files": (files.files[0].model_copy(update={"path": "vocab/part.parquet"}),)}
    )
    old = before.previous.model_copy(update={"vocabularies": {"item_id": entry}})
    read_back = Continuation(workspace.root, old).vocabulary("item_id", spark)
    assert read_back is not None
    assert {row["last_time"] for row in read_back.frame.collect()} == {4 * DAY}
    kept = replace(before, oldest=4 * DAY + 1)
    timed = counts.selectExpr("value", "count", f"{5 * DAY} as last_time")
    fitted = fit_vocabulary(timed, "item_id", 2, workspace, kept)
    assert {row["value"] for row in fitted.frame.collect()} == {"b", "k", "m"}


class ThirdExtension(Continuation):
    """Of ids 2 to 7, of which 4, 6 and 7 are free, 4 and 5 after they have changed hands."""

    generation = 3

    def vocabulary(self, name: str, spark: SparkSession) -> OldVocabulary:
        values = "value string, id long, last_time long"
        return OldVocabulary(
            frame=spark.createDataFrame([("c", 5, 30), ("a", 2, 10), ("b", 3, 9)], values),
            free=spark.createDataFrame([(6,), (7,), (4,)], "id long"),
            reused=spark.createDataFrame([(4, 1), (5, 2)], "id long, generation long"),
            num_values=3,
            num_free=3,
            num_embeddings=8,
        )


def test_the_least_free_ids_are_taken_and_the_others_wait(
    spark: SparkSession, workspace: Workspace
) -> None:
    # n was seen at the last moment that counts, as a of the old ones; p before it
    counts = spark.createDataFrame(
        [("n", 5, 10), ("c", 1, 20), ("p", 9, 9), ("o", 1, 40), ("m", 5, 11)],
        "value string, count long, last_time long",
    )
    fitted = fit_vocabulary(counts, "item_id", 2, workspace, ThirdExtension(oldest=10))
    rows = sorted(tuple(row) for row in fitted.frame.collect())
    assert rows == [("a", 2, 0, 10), ("c", 5, 1, 30), ("m", 4, 5, 11), ("n", 6, 5, 10)]
    growth = fitted.growth
    assert growth is not None
    assert sorted(row["id"] for row in growth.free.collect()) == [3, 7]
    assert sorted(tuple(row) for row in growth.reused.collect()) == [(4, 3), (5, 2), (6, 3)]
    assert (growth.num_free, growth.num_reused, fitted.num_embeddings) == (2, 2, 8)


def test_refusals(
    spark: SparkSession, made: tuple[Path, list[DatasetManifest]], tmp_path: Path
) -> None:
    folder, _ = made
    with pytest.raises(ConfigError, match=r"names another run's dataset.*run-0/dataset"):
        prepare.run(spark, config_of(folder, 0, extend=str(folder / "run-0" / "dataset")))
    with pytest.raises(DataError, match=r"has a manifest.json, written last"):
        prepare.run(spark, config_of(folder, 1, extend=str(tmp_path)))
    changed = [{**FEATURES[2], "num_buckets": 4}]
    items = {"paths": [str(folder / "items-1.csv")], "id": "item", "features": changed}
    with pytest.raises(
        ConfigError, match=r"keeps its meaning.*num_buckets = 4 for item feature 'size'.*has 2"
    ):
        prepare.run(spark, config_of(folder, 1, items=items))
    with pytest.raises(ConfigError, match=r"evict_after_days needs events\.time"):
        parse_config(
            {"name": "t", "prepare": {"events": {"paths": ["x"]}, "evict_after_days": 3,
                                      "split": {"method": "random"}}}, "t",
        )  # fmt: skip


def test_the_ids_of_forgotten_people_go_to_the_next_values(
    made: tuple[Path, list[DatasetManifest]], workspace: Workspace, tmp_path: Path
) -> None:
    folder, manifests = made
    shutil.copytree(folder / "run-0", tmp_path / "run-0")
    old = ids(made, 0, "user_id")
    forget.run(
        config_of(folder, 0).model_copy(update={"output": str(tmp_path / "run-0")}),
        frozenset({"u2"}),
    )
    rest = read_manifest(tmp_path / "run-0" / "dataset")
    continuation = Continuation(tmp_path / "run-0" / "dataset", rest)
    counts = workspace.spark.createDataFrame([("u9", 5), ("u1", 1)], "value string, count long")
    grown = fit_vocabulary(counts, "user_id", 1, workspace, continuation)
    found = {row["value"]: row["id"] for row in grown.frame.collect()}
    assert found == {"u1": old["u1"], "u3": old["u3"], "u9": old["u2"]}
    assert grown.growth is not None
    assert [tuple(row) for row in grown.growth.reused.collect()] == [(old["u2"], 1)]
    # the same hash as prepare's of the same pairs
    without = fit_vocabulary(counts.filter("value = 'u1'"), "user_id", 1, workspace, continuation)
    assert rest.vocabularies["user_id"].sha256 == vocabulary_hash(without)
    # a dataset that extends it learns of its new hashes
    extends = manifests[1].extends
    renewed = extended_after_forgetting(extends, rest)
    assert renewed is not None
    assert renewed.ancestors == (rest.as_ancestor(),)
    assert extended_after_forgetting(extends, manifests[0]) == extends
