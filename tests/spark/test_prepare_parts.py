"""The parts of prepare on tiny frames: reading, splits, k-core, ranks, histories, files."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from functools import reduce
from operator import xor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from distrec import columns as c
from distrec.config import EventsConfig, FeatureConfig, PrepareConfig, SplitConfig
from distrec.dataset import FeatureSpec
from distrec.prepare import rank, write
from distrec.prepare.examples import Examples
from distrec.prepare.extend import Continuation
from distrec.prepare.features import TRAIN_COUNT, encode, fit_features, hashed_ngrams
from distrec.prepare.histories import attach_before, windows
from distrec.prepare.k_core import k_core
from distrec.prepare.read import read_source, wanted_columns
from distrec.prepare.split import split_events
from distrec.prepare.validate import raw_column, typed_events
from distrec.prepare.vocabulary import NEW, fit_vocabulary, vocabulary_hash
from distrec.prepare.workspace import Workspace
from tests.synthetic import write_dataset


def shuffled_frame(spark: SparkSession, rows: list[tuple[Any, ...]], schema: str) -> DataFrame:
    rows = list(rows)
    random.Random(5).shuffle(rows)
    return spark.createDataFrame(rows, schema).repartition(3)


# --- reading -------------------------------------------------------------------------------------

EXPECTED = {("1", "é", 60, 4.5), ("2", "b", 120, None)}


def make_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The same two events in every way that they can be written down."""
    (folder / "a.dat").write_text("1::é::60::4.5\n2::b::120::\n", encoding="utf-8")
    with gzip.open(folder / "b.tsv.gz", "wt", encoding="utf-8") as stream:
        stream.write("item\trating\tuser\ttime\né\t4.5\t1\t60\nb\t\t2\t120\n")
    (folder / "c.json").write_text(
        '{"user": 1, "item": "é", "time": 60, "rating": 4.5}\n'
        '{"user": "2", "item": "b", "time": "120", "rating": null}\n'
    )
    (folder / "d.csv").write_text(
        "user;item;time;rating\n1;é;1970-01-01 00:01:00;4,5\n", encoding="windows-1252"
    )
    table = pa.table(
        {"user": [1.0, 2.0], "item": ["é", "b"], "time": [60_000, 120_999], "rating": [4.5, None]}
    )
    pq.write_table(table, folder / "e.parquet")
    names = ["user", "item", "time", "rating"]
    return {
        "a.dat": {"separator": "::", "header": False, "column_names": names},
        "b.tsv.gz": {"separator": "\t"},
        "c.json": {"format": "json"},
        "e.parquet": {"format": "parquet", "time_format": "unix_milliseconds"},
    }


def read_events(spark: SparkSession, path: Path, **keys: Any) -> DataFrame:
    source = EventsConfig.model_validate(
        {"paths": (str(path),), "user": "user", "item": "item", "time": "time", "rating": "rating"}
        | {key: tuple(v) if isinstance(v, list) else v for key, v in keys.items()}
    )
    frame = read_source(spark, source, source.paths, "events", wanted_columns(source))
    return typed_events(frame, source, latest=10**10, rating_required=False)


def test_every_format_gives_the_same_rows(spark: SparkSession, tmp_path: Path) -> None:
    for name, keys in make_files(tmp_path).items():
        frame = read_events(spark, tmp_path / name, **keys)
        found = frame.select("user_id", "item_id", "time", "rating", "reason").collect()
        assert {tuple(row)[:4] for row in found} == EXPECTED, name
        assert {row.reason for row in found} == {None}, name


def test_patterns_code_pages_and_numbers(spark: SparkSession, tmp_path: Path) -> None:
    make_files(tmp_path)
    spark.conf.set("spark.sql.legacy.javaCharsets", "true")
    (row,) = read_events(
        spark, tmp_path / "d.csv", separator=";", encoding="windows-1252",
        time_format="yyyy-MM-dd HH:mm:ss",
    ).collect()  # fmt: skip
    spark.conf.unset("spark.sql.legacy.javaCharsets")
    assert (row.user_id, row.item_id, row.time) == ("1", "é", 60)
    # a decimal comma is no number
    assert row.reason == "column 'rating' is not a number"
    assert json.loads(row.raw_row)["rating"] == "4,5"


def test_columns_with_the_names_of_our_own(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user,item,time,rating,reason\n1,a,1,2,gift\n2,b,1,x,own\n")
    context = (FeatureConfig(column="reason", kind="categorical"),)
    rows = read_events(spark, tmp_path / "a.csv", context=context).collect()
    assert {(row.raw_context_reason, row.reason) for row in rows} == {
        ("gift", None), ("own", "column 'rating' is not a number"),
    }  # fmt: skip
    assert {row.raw_row and json.loads(row.raw_row)["reason"] for row in rows} == {None, "own"}


# --- splits --------------------------------------------------------------------------------------

EVENT = "user_id string, item_id string, time long, label double, weight double, split string"


def events_of(spark: SparkSession, times: dict[str, list[int]]) -> DataFrame:
    """User -> times; the items are i00, i01 ... in that order."""
    rows = [
        (user, f"i{k:02d}", time, 1.0, 1.0, None)
        for user, own in times.items()
        for k, time in enumerate(own)
    ]
    return shuffled_frame(spark, rows, EVENT)


def split_rows(
    spark: SparkSession, workspace: Workspace, times: dict[str, list[int]], **keys: Any
) -> dict[str, set[tuple[str, int]]]:
    """Split -> (user, time); asserts that no event is lost or doubled."""
    events = events_of(spark, times)
    split = split_events(events, SplitConfig(**keys), seed=1, has_time=True, workspace=workspace)
    found = split.select("split", "user_id", "item_id", "time").collect()
    assert sorted((row.user_id, row.item_id) for row in found) == sorted(
        (user, f"i{k:02d}") for user, own in times.items() for k in range(len(own))
    )
    parts: dict[str, set[tuple[str, int]]] = {}
    for row in found:
        parts.setdefault(row.split, set()).add((row.user_id, row.time))
    return parts


def test_leave_one_out_with_ties(spark: SparkSession, workspace: Workspace) -> None:
    # i01 and i02 of u1 at one time: the greater item id is the later one
    events = split_events(
        events_of(spark, {"u1": [1, 7, 7], "u2": [1, 2]}), SplitConfig(), 1, True, workspace
    )
    found = {(row.user_id, row.item_id): row.split for row in events.collect()}
    assert found == {
        ("u1", "i00"): "train", ("u1", "i01"): "valid", ("u1", "i02"): "test",
        ("u2", "i00"): "train", ("u2", "i01"): "train",
    }  # fmt: skip


def test_leave_one_out_for_a_final_model(spark: SparkSession, workspace: Workspace) -> None:
    times = {"u1": [1, 2, 3], "u2": [1, 2]}
    parts = split_rows(spark, workspace, times, valid_share=0.0)
    train = {("u1", 1), ("u1", 2), ("u2", 1), ("u2", 2)}
    assert parts == {"train": train, "test": {("u1", 3)}}


def test_temporal_by_shares_and_by_times(spark: SparkSession, workspace: Workspace) -> None:
    times = {"u1": [1, 2, 3, 4, 5], "u2": [6, 7, 8, 9, 10]}
    by_share = split_rows(spark, workspace, times, method="temporal")
    assert by_share["test"] == {("u2", 10)}
    assert by_share["valid"] == {("u2", 9)}
    by_time = split_rows(spark, workspace, times, method="temporal", valid_time=4, test_time=6)
    assert by_time["valid"] == {("u1", 4), ("u1", 5)}
    assert by_time["test"] == {("u2", time) for time in (6, 7, 8, 9, 10)}
    # a tie is never divided: all of the last time goes to neither or one side
    tied = split_rows(spark, workspace, {"u": [1, 2, 3, 4, 5, 6, 7, 8, 9, 9]}, method="temporal",
                      valid_share=0.0, test_share=0.15)  # fmt: skip
    assert "test" not in tied or len(tied["test"]) == 1


def test_random_shares_of_each_user(spark: SparkSession, workspace: Workspace) -> None:
    times = {"u1": list(range(20)), "u2": list(range(10)), "u3": [1]}
    parts = split_rows(spark, workspace, times, method="random", test_share=0.2, valid_share=0.1)
    sizes = {
        (split, user): sum(name == user for name, _ in found)
        for split, found in parts.items()
        for user in times
    }
    assert (sizes["test", "u1"], sizes["valid", "u1"], sizes["train", "u1"]) == (4, 2, 14)
    assert (sizes["test", "u2"], sizes["valid", "u2"], sizes["train", "u2"]) == (2, 1, 7)
    # the only event of a user stays in train
    assert sizes["train", "u3"] == 1


def test_held_out_users(spark: SparkSession, workspace: Workspace) -> None:
    times = {f"u{k}": [10, 20, 30, 40, 50] for k in range(10)} | {"one": [1]}
    parts = split_rows(spark, workspace, times, method="held_out_users", test_share=0.2)
    users = {split: {user for user, _ in found} for split, found in parts.items()}
    assert (len(users["test"]), len(users["valid"])) == (2, 1)
    assert not users["train"] & (users["test"] | users["valid"] | users["known"])
    assert "one" in users["train"]
    # the earliest four of five are known
    assert parts["test"] == {(user, 50) for user in users["test"]}
    assert {time for _, time in parts["known"]} == {10, 20, 30, 40}


# --- k-core, ranks, vocabularies -----------------------------------------------------------------


def test_new_items_are_taken_out_of_train_alone(spark: SparkSession, workspace: Workspace) -> None:
    times = {f"u{number}": list(range(1, 9)) for number in range(6)}
    found = {}
    for share in (0.0, 0.4):
        config = SplitConfig(new_items_share=share)
        rows = split_events(events_of(spark, times), config, 1, True, workspace).collect()
        found[share] = {(row.split, row.user_id, row.item_id) for row in rows}
    withheld = {row for row in found[0.4] if row[0] == "withheld"}
    lost = found[0.0] - found[0.4]
    assert {split for split, _, _ in lost} == {"train"}
    assert {row[1:] for row in lost} == {row[1:] for row in withheld}
    assert len(found[0.0]) == len(found[0.4])
    new = {item for _, _, item in withheld}
    assert 0 < len(new) < 6
    left = {item for split, _, item in found[0.4] if split == "train"}
    # i06 and i07 are in valid and test of everybody, new or not
    assert left == {f"i{k:02d}" for k in range(6)} - new


def test_k_core_goes_on_until_nothing_changes(spark: SparkSession, workspace: Workspace) -> None:
    # dropping u4 leaves item d with one event, whose loss leaves u3 with one
    pairs = [("u1", "a"), ("u1", "b"), ("u2", "a"), ("u2", "b"), ("u3", "a"), ("u3", "d"),
             ("u4", "d")]  # fmt: skip
    events = shuffled_frame(spark, pairs, "user_id string, item_id string")
    config = PrepareConfig.model_validate(
        {"events": {"paths": ("x",), "time": "t"}, "user_k_core": 2, "item_k_core": 2}
    )
    found = {tuple(row) for row in k_core(events, config, workspace).collect()}
    assert found == {("u1", "a"), ("u1", "b"), ("u2", "a"), ("u2", "b")}


@pytest.mark.parametrize("rows_per_task", [2, 1000])
def test_vocabulary_in_many_parts(
    spark: SparkSession, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, rows_per_task: int
) -> None:
    """The way of a billion values gives what the short way gives."""
    monkeypatch.setattr(rank, "ROWS_PER_TASK", rows_per_task)
    counts = {"e": 5, "b": 3, "a": 3, "z": 9, "d": 1, "c": 1, "y": 1, "x": 3, "w": 2}
    frame = shuffled_frame(spark, list(counts.items()), "value string, count long")
    fitted = fit_vocabulary(frame, "item_id", 2, workspace)
    found = {row["value"]: row["id"] for row in fitted.frame.collect()}
    assert found == {"z": 2, "e": 3, "a": 4, "b": 5, "x": 6, "w": 7}
    assert fitted.num_embeddings == 8
    digests = [hashlib.sha256(f"{id}\t{value}".encode()).hexdigest() for value, id in found.items()]
    words = [reduce(xor, (int(d[k : k + 15], 16) for d in digests)) for k in (0, 15, 30, 45)]
    text = ",".join(map(str, [6, *words]))
    assert vocabulary_hash(fitted) == hashlib.sha256(text.encode()).hexdigest()


# --- text ----------------------------------------------------------------------------------------

MASK = (1 << 64) - 1
P1, P2, P3, P4, P5 = (
    0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63,
    0x27D4EB2F165667C5,
)  # fmt: skip


def rotate(value: int, by: int) -> int:
    return ((value << by) | (value >> (64 - by))) & MASK


def xxh64(data: bytes, seed: int = 42) -> int:
    """XXH64 of fewer than 32 bytes, after its published description; signed."""
    value, place = (seed + P5 + len(data)) & MASK, 0
    while place + 8 <= len(data):
        word = int.from_bytes(data[place : place + 8], "little")
        value ^= rotate(word * P2 & MASK, 31) * P1 & MASK
        value = (rotate(value, 27) * P1 + P4) & MASK
        place += 8
    if place + 4 <= len(data):
        value ^= int.from_bytes(data[place : place + 4], "little") * P1 & MASK
        value = (rotate(value, 23) * P2 + P3) & MASK
        place += 4
    for byte in data[place:]:
        value ^= byte * P5 & MASK
        value = rotate(value, 11) * P1 & MASK
    value ^= value >> 33
    value = value * P2 & MASK
    value ^= value >> 29
    value = value * P3 & MASK
    value ^= value >> 32
    return value - (1 << 64) if value >> 63 else value


def test_text_is_hashed_by_words_and_pairs(spark: SparkSession) -> None:
    config = FeatureConfig(column="t", kind="text", ngrams=2)
    frame = spark.createDataFrame([("Été, the DOG's",), ("",), (None,)], "t string")
    found = [row[0] for row in frame.select(hashed_ngrams(F.col("t"), config, 1000)).collect()]
    grams = ["été", "the", "dog", "s", "été the", "the dog", "dog s"]
    assert found == [[2 + xxh64(gram.encode()) % 1000 for gram in grams], [], []]
    pairs = FeatureConfig(column="t", kind="text", ngrams=3)
    (row,) = (
        spark.createDataFrame([("a b c",)], "t string")
        .select(hashed_ngrams(F.col("t"), pairs, 1 << 40))
        .collect()
    )
    grams = ["a", "b", "c", "a b", "b c", "a b c"]
    assert row[0] == [2 + xxh64(gram.encode()) % (1 << 40) for gram in grams]


def test_ngrams_that_few_rows_of_train_have_are_left_out(
    workspace: Workspace, tmp_path: Path
) -> None:
    """Words of three rows of train; then those of a dataset that was made before."""
    texts = ["b a", "a b", "c A!", "a", "c d", "new a c", ""]
    in_train = [1, 2, 1, 0, 0, 0, 0]
    frame = workspace.spark.createDataFrame(
        [
            (place, text or None, count)
            for place, (text, count) in enumerate(zip(texts, in_train, strict=True))
        ],
        f"place int, {raw_column('item', 't')} string, {TRAIN_COUNT} long",
    )
    config = FeatureConfig(column="t", kind="text", ngrams=1, num_buckets=1000, min_df=2)

    def encoded(config: FeatureConfig, continuation: Continuation = NEW) -> list[list[int]]:
        fitted = fit_features(frame, "item", [config], workspace, continuation)
        rows = encode(frame, fitted).orderBy("place").collect()
        return [row["item_t"] for row in rows]

    of = {word: 2 + xxh64(word.encode()) % 1000 for word in ("a", "b", "c", "d", "new")}
    assert len(set(of.values())) == 5
    both = [[of["b"], of["a"]], [of["a"], of["b"]]]
    found = encoded(config)
    assert found == [*both, [of["a"]], [of["a"]], [], [of["a"]], []]
    first = encoded(config.model_copy(update={"max_values": 1}))
    assert first[:3] == [[of["b"]], [of["a"]], [of["a"]]]
    everything = encoded(config.model_copy(update={"min_df": 1}))
    assert everything[5] == [of["new"], of["a"], of["c"]]
    manifest = write_dataset(tmp_path / "old")
    path = manifest.splits[c.ITEMS].files[0].path
    table = pq.read_table(tmp_path / "old" / path).slice(0, 1)
    words = pa.array([[of["d"]]], pa.list_(pa.int64()))
    pq.write_table(table.append_column("item_t", words), tmp_path / "old" / path)
    feature = FeatureSpec(name="t", side="item", kind="text", column="item_t", num_embeddings=1002)
    previous = manifest.model_copy(update={"features": (*manifest.features, feature)})
    after = encoded(config, Continuation(tmp_path / "old", previous))
    assert after == [*both, [of["a"]], [of["a"]], [of["d"]], [of["a"]], []]


# --- histories -----------------------------------------------------------------------------------

INDEXED = (
    "user_id string, user_index long, item_id string, item_index long, time long, label float, "
    "weight float, split string"
)


def indexed(spark: SparkSession, rows: list[tuple[int, int, float, str]]) -> DataFrame:
    """(item index, time, label, split) of one user."""
    return shuffled_frame(
        spark,
        [("u", 2, f"i{item:02d}", item, time, y, 1.0, split) for item, time, y, split in rows],
        INDEXED,
    )


def with_kinds(events: DataFrame) -> DataFrame:
    return events.withColumn("event_type", 2 + F.col("item_index") % 3)


def make_examples(spark: SparkSession, events: DataFrame, by_time: bool) -> Examples:
    features = spark.createDataFrame([("u",)], "user_id string")
    return Examples(events, features, (), (), (), length=3, has_time=True, by_time=by_time)


def test_histories_equal_a_plain_loop(spark: SparkSession) -> None:
    """Many ties, negatives between positives, more events than L."""
    generator = random.Random(11)
    rows = [
        (item, generator.randrange(12), float(generator.random() < 0.5), "train")
        for item in range(2, 42)
    ]
    events = with_kinds(indexed(spark, rows))
    found = {row.item_index: row for row in attach_before(events, events, 3).collect()}
    assert len(found) == len(rows)
    for item, time, _, _ in rows:
        past = sorted((t, i) for i, t, label, _ in rows if label and t < time)
        assert found[item].num_events == len(past)
        assert found[item].history == [i for _, i in past[-3:]], (item, time)
        assert found[item].history_times == [t for t, _ in past[-3:]]
        assert found[item].history_types == [2 + i % 3 for _, i in past[-3:]]


def test_windows_hold_every_event_once(spark: SparkSession) -> None:
    """Two users of 11 and 3 events, with ties, some of one item, in windows of 3."""
    # item and kind; each window of u ends between two kinds of one event
    users = {
        "u": [(2, 2), (3, 2), (3, 3), (4, 3), (5, 2), (5, 3), (6, 2), (7, 2), (7, 3), (8, 3),
              (9, 2)],
        "v": [(20, 3), (21, 2), (22, 2)],
    }  # fmt: skip
    # two items at a time
    events = {user: [(item // 2, item, kind) for item, kind in own] for user, own in users.items()}
    rows = [
        (user, ord(user), f"i{item:02d}", item, time, 1.0, 1.0, "train", kind)
        for user, own in events.items()
        for time, item, kind in own
    ]
    found = windows(shuffled_frame(spark, rows, f"{INDEXED}, event_type long"), 3).collect()
    assert len(found) == 4 + 1
    ends = {"u": [11, 8, 5, 2], "v": [3]}
    for row in found:
        own = events[row.user_id]
        last = (row.time, row.item_index, row.event_type)
        end = next(n for n in ends[row.user_id] if own[n - 1] == last)
        ends[row.user_id].remove(end)
        # the last event of the window before, and the window's own
        before = own[max(0, end - 4) : end - 1]
        assert row.num_events == end - 1
        assert row.history == [item for _, item, _ in before]
        assert row.history_times == [time for time, _, _ in before]
        assert row.history_types == [kind for _, _, kind in before]
        assert (row.user_index, row.weight) == (ord(row.user_id), 1.0)


def test_temporal_test_sees_valid_and_no_other_test(spark: SparkSession) -> None:
    rows = [(2, 10, 1.0, "train"), (3, 20, 1.0, "valid"), (4, 25, 1.0, "valid"),
            (5, 30, 1.0, "test"), (6, 40, 1.0, "test")]  # fmt: skip
    examples = make_examples(spark, indexed(spark, rows), by_time=True)
    valid = examples.with_histories(examples.of("valid"), "valid")
    assert {row.item_index: row.history for row in valid.collect()} == {3: [2], 4: [2]}
    test = examples.with_histories(examples.of("test"), "test")
    assert {row.item_index: row.history for row in test.collect()} == {5: [2, 3, 4], 6: [2, 3, 4]}
    (query,) = examples.queries(test, "test").collect()
    assert (query.time, query.targets, query.seen) == (30, [5, 6], [2, 3, 4])


def test_queries_of_a_split_that_is_not_by_time(spark: SparkSession) -> None:
    """All that train has is known, and the query comes after it; negatives are seen, no history."""
    rows = [(2, 10, 1.0, "train"), (3, 50, 1.0, "train"), (4, 60, 0.0, "train"),
            (5, 20, 1.0, "test"), (1, 21, 1.0, "test")]  # fmt: skip
    examples = make_examples(spark, with_kinds(indexed(spark, rows)), by_time=False)
    test = examples.with_histories(examples.of("test"), "test")
    (query,) = examples.queries(test, "test").collect()
    assert (query.history, query.history_times) == ([2, 3], [10, 50])
    assert query.history_types == [2 + 2 % 3, 2 + 3 % 3]
    assert (query.time, query.num_events) == (61, 2)
    assert (query.targets, query.seen) == ([1, 5], [2, 3, 4])


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_rows", "num_files"), [(103, 12), (5, 5), (7, 1)])
def test_files_of_equal_row_counts(
    spark: SparkSession, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, num_rows: int,
    num_files: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(write, "ROWS_PER_TASK", 10)
    frame = spark.range(num_rows).withColumn("name", F.col("id").cast("string"))
    orders = []
    for name, parts in (("first", 4), ("again", 7)):
        placed = write.shuffled(frame.repartition(parts), ["id"], seed=1, num_rows=num_rows)
        done = write.write_files(placed, name, ["id", "name"], num_rows, num_files, workspace)
        assert done.schema == {"id": "int64", "name": "string"}
        assert done.paths == [f"{name}/part-{k:05d}.parquet" for k in range(num_files)]
        tables = [pq.read_table(workspace.root / path)["id"].to_pylist() for path in done.paths]
        assert [len(table) for table in tables] == done.num_rows
        assert max(done.num_rows) - min(done.num_rows) <= 1
        orders.append([value for table in tables for value in table])
    # each row once, not as they came, and the same order however the input lay
    assert sorted(orders[0]) == list(range(num_rows))
    assert orders[0] != sorted(orders[0])
    assert orders[0] == orders[1]


def test_contiguous_files(spark: SparkSession, workspace: Workspace) -> None:
    frame = spark.range(10).repartition(3).withColumn(write.POSITION, F.col("id"))
    done = write.write_files(frame, "items", ["id"], 10, 4, workspace, contiguous=True)
    tables = [pq.read_table(workspace.root / path)["id"].to_pylist() for path in done.paths]
    assert [value for table in tables for value in table] == list(range(10))
    assert [len(table) for table in tables] == done.num_rows
    assert done.num_rows == [3, 3, 2, 2]
