"""Reading real Parquet files: every row once, the same on any number of ranks, faults refused."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distrec import columns as c
from distrec.batch import Batch, Jagged, QueryBatch
from distrec.config import ReaderConfig
from distrec.dataset import DatasetManifest, FeatureSpec, FileEntry, Split
from distrec.errors import ConfigError, DataError
from distrec.planner.dataset import read_sample
from distrec.reader import (
    ExampleReader,
    check_files,
    decode_queries,
    files,
    read_items,
    read_queries,
)
from distrec.reader.decode import decode
from distrec.reader.layout import Layout
from distrec.world import World
from tests.synthetic import event_type, write_dataset

# of the stress test, on each number of ranks; `make fuzz` takes hundreds
NUM_PASSES = int(os.environ.get("DISTREC_PASSES", "6"))
IDS = (c.USER_INDEX, c.ITEM_INDEX, c.TIME)
WORLD = World()
WORDS = FeatureSpec(
    name="words", side="context", kind="text", column="context_words", num_embeddings=9
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DatasetManifest]:
    directory = tmp_path_factory.mktemp("dataset")
    return directory, write_dataset(directory)


@pytest.fixture
def copied(dataset: tuple[Path, DatasetManifest], tmp_path: Path) -> tuple[Path, DatasetManifest]:
    """A copy of the dataset that a test may break."""
    return Path(shutil.copytree(dataset[0], tmp_path / "dataset")), dataset[1]


def open_reader(
    directory: Path,
    manifest: DatasetManifest,
    world: World = WORLD,
    batch: int = 50,
    lanes: int | None = None,
    seed: int = 1,
    **config: Any,
) -> ExampleReader:
    return ExampleReader(
        directory, manifest, c.TRAIN, world, ReaderConfig(**config), batch, seed, lanes
    )


def lists(bags: Jagged) -> list[list[int]]:
    return [part.tolist() for part in torch.split(bags.values, bags.lengths.tolist())]


def rows_of(batch: Batch) -> list[tuple]:
    """Everything that a batch says of each example, as Python values."""
    columns = [
        batch.user_index.tolist(), batch.item_index.tolist(), batch.time.tolist(),
        batch.labels[:, 0].tolist(), batch.weights.tolist(), batch.num_events.tolist(),
        lists(batch.history), lists(batch.history_times),
        *(lists(bags) for bags in batch.ids.values()), batch.dense.tolist(),
    ]  # fmt: skip
    return [tuple(map(str, row)) for row in zip(*columns, strict=True)]


# --- what is read ------------------------------------------------------------------------------


def test_batches_hold_what_pyarrow_reads(dataset: tuple[Path, DatasetManifest]) -> None:
    directory, manifest = dataset
    expected = [
        tuple(map(str, (
            row[c.USER_INDEX], row[c.ITEM_INDEX], row[c.TIME], row[c.LABEL], row[c.WEIGHT],
            row[c.NUM_EVENTS], row[c.HISTORY], row[c.HISTORY_TIMES], [row["user_group"]],
            [row["context_hour"]], [row["user_age"]],
        )))
        for entry in manifest.splits[c.TRAIN].files
        for row in pq.ParquetFile(directory / entry.path).read().to_pylist()
    ]  # fmt: skip
    for shuffle in (False, True):
        reader = open_reader(directory, manifest, lanes=1, shuffle=shuffle)
        batches = list(reader.batches(epoch=0))
        received = [row for batch in batches for row in rows_of(batch)]
        assert (received == expected) is not shuffle
        assert sorted(received) == sorted(expected)
        assert reader.rows_read == reader.rows_planned() == 720
        assert [batch.batch_size for batch in batches] == [50] * 14 + [20]
    first = batches[0]
    assert first.labels.shape == (50, 1)
    assert {first.labels.dtype, first.weights.dtype, first.dense.dtype} == {torch.float32}
    assert {first.user_index.dtype, first.history.values.dtype} == {torch.int64}


def write_train(
    directory: Path, manifest: DatasetManifest, row_groups: list[list[int]]
) -> DatasetManifest:
    """Replace train by files with these row groups; row r has time r, r % 4 items, r % 3 words."""
    schema = pq.read_schema(directory / manifest.splits[c.TRAIN].files[0].path)
    schema = schema.append(pa.field(WORDS.column, pa.list_(pa.int64())))
    entries, row = [], 0
    for number, groups in enumerate(row_groups):
        path = directory / "train" / f"{number}.parquet"
        with pq.ParquetWriter(path, schema) as writer:
            for size in groups:
                rows = [
                    {
                        field.name: [
                            100 * r + k for k in range(r % (3 if field.name == WORDS.column else 4))
                        ]
                        if pa.types.is_list(field.type)
                        else r
                        for field in schema
                    }
                    for r in range(row, row + size)
                ]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                row += size
        entries.append(
            FileEntry(
                path=f"train/{number}.parquet",
                num_rows=sum(groups),
                num_bytes=path.stat().st_size,
                sha256="",
            )
        )
    splits = {**manifest.splits, c.TRAIN: Split(num_rows=row, files=tuple(entries))}
    train_schema = {**manifest.schemas[c.TRAIN], WORDS.column: "list<int64>"}
    return manifest.model_copy(
        update={
            "splits": splits,
            "schemas": {**manifest.schemas, c.TRAIN: train_schema},
            "features": (*manifest.features, WORDS),
        }
    )


@settings(max_examples=40, deadline=None)
@given(
    row_groups=st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=7),
    lanes=st.integers(5, 13),
    global_batch_size=st.integers(1, 30),
    epoch=st.integers(0, 2),
    shuffle=st.booleans(),
    data=st.data(),
)
def test_every_row_once_and_global_batches_equal_on_any_number_of_ranks(
    dataset: tuple[Path, DatasetManifest],
    row_groups: list[list[int]],
    lanes: int,
    global_batch_size: int,
    epoch: int,
    shuffle: bool,
    data: st.DataObject,
) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        shutil.copytree(dataset[0] / "train", directory / "train")
        manifest = write_train(directory, dataset[1], row_groups)
        num_rows = sum(map(sum, row_groups))
        global_batches = {}
        for world_size in range(1, 6):
            readers = [
                open_reader(
                    directory, manifest, World(rank, world_size), global_batch_size, lanes,
                    shuffle=shuffle,
                )
                for rank in range(world_size)
            ]  # fmt: skip
            ranks = [list(reader.batches(epoch)) for reader in readers]
            steps = -(-num_rows // global_batch_size)
            assert [len(batches) for batches in ranks] == [steps] * world_size
            assert sum(reader.rows_read for reader in readers) == num_rows
            global_batches[world_size] = [
                sorted(row for batch in step for row in batch.time.tolist())
                for step in zip(*ranks, strict=True)
            ]
            for batch in (batch for batches in ranks for batch in batches):
                expected = [[100 * r + k for k in range(r % 4)] for r in batch.time.tolist()]
                assert lists(batch.history) == lists(batch.history_times) == expected
                assert lists(batch.ids[WORDS.column]) == [
                    [100 * r + k for k in range(r % 3)] for r in batch.time.tolist()
                ]
                assert batch.dense[:, 0].tolist() == batch.time.tolist()
        one = global_batches[1]
        assert sorted(row for step in one for row in step) == list(range(num_rows))
        assert [len(step) for step in one[:-1]] == [global_batch_size] * max(len(one) - 1, 0)
        assert all(global_batches[world_size] == one for world_size in range(2, 6))

        start = data.draw(st.integers(0, steps))
        tail = list(readers[-1].batches(epoch, start_step=start))
        assert [rows_of(batch) for batch in tail] == [rows_of(batch) for batch in ranks[-1][start:]]


def test_a_batch_without_rows_has_shapes_and_types(dataset: tuple[Path, DatasetManifest]) -> None:
    directory, manifest = dataset
    with tempfile.TemporaryDirectory() as name:
        shutil.copytree(directory / "train", Path(name) / "train")
        manifest = write_train(Path(name), manifest, [[1], []])
        readers = [open_reader(Path(name), manifest, World(rank, 2)) for rank in range(2)]
        full, empty = sorted(
            (next(iter(reader.batches(0))) for reader in readers), key=lambda b: -b.batch_size
        )
    assert (full.batch_size, empty.batch_size) == (1, 0)
    assert full.ids.keys() == empty.ids.keys() == {"user_group", "context_hour", WORDS.column}
    for name in ("user_index", "item_index", "time", "labels", "weights", "num_events", "dense"):
        one, none = getattr(full, name), getattr(empty, name)
        assert (none.dtype, none.shape) == (one.dtype, (0, *one.shape[1:])), name
    for bags in (empty.history, empty.history_times, *empty.ids.values()):
        assert bags.offsets.tolist() == [0]
        assert bags.values.shape == (0,)
        assert bags.values.dtype == bags.offsets.dtype == torch.int64


def test_epochs_and_seeds_give_other_orders(dataset: tuple[Path, DatasetManifest]) -> None:
    def order(seed: int, epoch: int) -> list[tuple]:
        reader = open_reader(*dataset, seed=seed)
        return [row for batch in reader.batches(epoch) for row in rows_of(batch)]

    first = order(1, 0)
    assert first == order(1, 0)
    assert first != order(1, 1)
    assert first != order(2, 0)
    assert sorted(first) == sorted(order(2, 1))


def ids_of(batches: Iterable[Batch]) -> list[tuple[int, ...]]:
    """User, item and time of each example."""
    return [
        row
        for batch in batches
        for row in zip(*(getattr(batch, name).tolist() for name in IDS), strict=True)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_no_pass_loses_rows(dataset: tuple[Path, DatasetManifest], world_size: int) -> None:
    """Ranks that read at the same time; petastorm's thread pool loses rows in one pass of seven."""
    directory, manifest = dataset
    entries = manifest.splits[c.TRAIN].files
    tables = [pq.read_table(directory / entry.path, columns=list(IDS)) for entry in entries]
    expected = sorted(tuple(row[name] for name in IDS) for t in tables for row in t.to_pylist())
    assert len(expected) == manifest.splits[c.TRAIN].num_rows == 720
    readers = [
        open_reader(directory, manifest, World(rank, world_size), cache_mib=0)
        for rank in range(world_size)
    ]
    with ThreadPoolExecutor(world_size) as ranks:
        for epoch in range(NUM_PASSES):
            read = list(ranks.map(lambda reader, epoch=epoch: list(reader.batches(epoch)), readers))
            assert [len(batches) for batches in read] == [15] * world_size
            assert sorted(row for batches in read for row in ids_of(batches)) == expected


def test_what_fits_the_cache_is_read_once(copied: tuple[Path, DatasetManifest]) -> None:
    directory, manifest = copied
    kept, dropped = open_reader(directory, manifest), open_reader(directory, manifest, cache_mib=0)
    for reader in (kept, dropped):
        assert sum(batch.batch_size for batch in reader.batches(0)) == 720
    shutil.rmtree(directory / "train")
    assert sum(batch.batch_size for batch in kept.batches(1)) == 720
    with pytest.raises(DataError, match=r"row group \d+ of .*train/part-\d+.parquet cannot be"):
        list(dropped.batches(1))


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_petastorm_warns_of_nothing(dataset: tuple[Path, DatasetManifest]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(open_reader(*dataset).batches(0))


# --- the background threads ---------------------------------------------------------------------


def reading_threads() -> list[str]:
    names = sorted(thread.name for thread in threading.enumerate())
    return [name for name in names if name.endswith("-train")]


def test_the_threads_end_when_the_consumer_stops(dataset: tuple[Path, DatasetManifest]) -> None:
    # more blocks than are read ahead, so that both threads are in the middle of their work
    batches = open_reader(*dataset, batch=1, prefetch_batches=2, lanes=1).batches(0)
    next(batches)
    assert reading_threads() == ["join-train", "read-train"]
    with contextlib.closing(batches):
        next(batches)
    assert reading_threads() == []


def test_an_error_of_a_thread_is_raised_in_the_consumer(
    copied: tuple[Path, DatasetManifest],
) -> None:
    directory, manifest = copied
    reader = open_reader(directory, manifest, lanes=1, shuffle=False, prefetch_batches=1)
    path = directory / manifest.splits[c.TRAIN].files[2].path
    path.write_bytes(path.read_bytes()[:1000])
    batches = reader.batches(0)
    sizes = []

    def consume() -> None:
        sizes.extend(batch.batch_size for batch in batches)

    with pytest.raises(DataError, match=str(path)):
        consume()
    # the first two files, 480 rows, were whole
    assert sum(sizes) == 450
    assert reading_threads() == []


# --- what is refused ---------------------------------------------------------------------------


def edit_first_file(
    directory: Path, manifest: DatasetManifest, edit: Callable[[pa.Table], pa.Table]
) -> DatasetManifest:
    """Rewrite the first train file; the manifest agrees with its size and row count."""
    entry, *others = manifest.splits[c.TRAIN].files
    path = directory / entry.path
    table = edit(pq.ParquetFile(path).read())
    pq.write_table(table, path)
    entry = entry.model_copy(update={"num_bytes": path.stat().st_size})
    split = manifest.splits[c.TRAIN].model_copy(update={"files": (entry, *others)})
    return manifest.model_copy(update={"splits": {**manifest.splits, c.TRAIN: split}})


def with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


def nulled(table: pa.Table, name: str) -> pa.Table:
    column = table.column(name).to_pylist()
    return with_column(table, name, pa.array([None, *column[1:]], table.column(name).type))


def test_a_rank_refuses_a_drifted_file_of_which_it_reads_nothing(
    copied: tuple[Path, DatasetManifest],
) -> None:
    manifest = edit_first_file(*copied, lambda t: t.drop([c.LABEL]))
    with pytest.raises(DataError, match=r"column 'label' of .*: no such column, expected: float"):
        open_reader(copied[0], manifest, World(11, 12))


def test_nulls_in_lists_are_found_when_they_are_read(copied: tuple[Path, DatasetManifest]) -> None:
    for edit in (
        lambda t: nulled(t, c.HISTORY),
        lambda t: with_column(
            t, c.HISTORY, pa.array([[None]] + [[2]] * (len(t) - 1), pa.list_(pa.int64()))
        ),
    ):
        manifest = edit_first_file(*copied, edit)
        with pytest.raises(DataError, match=r"1 nulls in column 'history' \(.*00000.parquet\)"):
            list(open_reader(copied[0], manifest).batches(0))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)


def test_checksums_are_shared_out_over_the_ranks(copied: tuple[Path, DatasetManifest]) -> None:
    """Each rank finds what is wrong with its own files, and no file is left out."""
    directory, manifest = copied
    splits = [split.files for split in manifest.splits.values()]
    groups = splits + [one.files for one in manifest.vocabularies.values()]
    files = [entry for group in groups for entry in group]
    for entry in files:
        path = directory / entry.path
        whole = path.read_bytes()
        flip(path)
        found = []
        for rank in range(3):
            try:
                check_files(directory, manifest, "sha256", World(rank, 3))
            except DataError as error:
                found.append(str(error))
        path.write_bytes(whole)
        assert len(found) == 1
        assert str(path) in found[0]
    check_files(directory, manifest, "sha256")


def test_a_sample_of_each_split_is_read(
    copied: tuple[Path, DatasetManifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, manifest = copied
    monkeypatch.setattr(files, "_SAMPLED_IN", 2)
    for path in (directory / "train").iterdir():
        flip(path)
    # of three files two are read, and all of them are damaged
    with pytest.raises(DataError, match=r"train/part-0000\d.parquet with [0-9a-f]{64}, expected"):
        check_files(directory, manifest, "sampled")
    check_files(directory, manifest, "size")
    for path in (directory / "train").iterdir():
        flip(path)
    flip(directory / "vocab/item_id/part-00000.parquet")
    with pytest.raises(DataError, match="vocab/item_id/part-00000"):
        check_files(directory, manifest, "sampled")


def test_impossible_requests_are_refused(dataset: tuple[Path, DatasetManifest]) -> None:
    directory, manifest = dataset
    with pytest.raises(ConfigError, match="Received: 2 lanes, 3 ranks"):
        open_reader(directory, manifest, World(0, 3), lanes=2)
    with pytest.raises(DataError, match=r"a split is one of .*Received: 'trial'"):
        ExampleReader(directory, manifest, "trial", WORLD, ReaderConfig(), 5, 1)
    with pytest.raises(DataError, match=r"train needs column 'seen' of type list<int64>"):
        read_queries(directory, manifest, c.TRAIN, WORLD, 5)


# --- queries and items -------------------------------------------------------------------------


def query_rows(queries: QueryBatch) -> list[tuple]:
    return [
        (*row, str(seen), str(targets))
        for row, seen, targets in zip(
            rows_of(queries.batch), lists(queries.seen), lists(queries.targets), strict=True
        )
    ]


@pytest.mark.parametrize(
    ("world_size", "batch_size"), [(1, 60), (1, 7), (2, 16), (3, 20), (4, 6), (7, 4)]
)
@pytest.mark.parametrize("split", [c.TEST_QUERIES, c.USERS])
def test_every_query_once_in_equally_many_batches(
    dataset: tuple[Path, DatasetManifest], split: str, world_size: int, batch_size: int
) -> None:
    directory, manifest = dataset
    ranks = [
        list(read_queries(directory, manifest, split, World(rank, world_size), batch_size))
        for rank in range(world_size)
    ]
    longest = -(-60 // world_size)
    assert [len(batches) for batches in ranks] == [-(-longest // batch_size)] * world_size
    assert all(q.batch.batch_size <= batch_size for batches in ranks for q in batches)
    received = [row for batches in ranks for q in batches for row in query_rows(q)]
    table = pq.ParquetFile(directory / manifest.splits[split].files[0].path).read()
    expected = [
        (
            str(row[c.USER_INDEX]), "0", str(row[c.TIME]), "0.0", "0.0", str(row[c.NUM_EVENTS]),
            str(row[c.HISTORY]), str(row[c.HISTORY_TIMES]), str([row["user_group"]]),
            str([row["context_hour"]]), str([row["user_age"]]), str(row[c.SEEN]),
            str(row.get(c.TARGETS, [])),
        )
        for row in table.to_pylist()
    ]  # fmt: skip
    assert received == expected
    # scoring decodes what Spark hands it: slices of record batches, with columns of its own
    more = table.append_column("partition", table.column(c.TIME))
    for part in (more.slice(11, 20), more.combine_chunks().to_batches()[0].slice(11, 20)):
        assert query_rows(decode_queries(part, manifest.features)) == expected[11:31]


def test_items_are_all_there_in_order(dataset: tuple[Path, DatasetManifest]) -> None:
    directory, manifest = dataset
    items = read_items(directory, manifest)
    rows = pq.ParquetFile(directory / manifest.splits[c.ITEMS].files[0].path).read().to_pylist()
    assert items.item_index.tolist() == list(range(2, 46))
    assert items.count.tolist() == [row[c.COUNT] for row in rows]
    assert lists(items.ids["item_tags"]) == [row["item_tags"] for row in rows]
    assert items.dense.tolist() == [row["item_image"] for row in rows]


def items_without(
    copied: tuple[Path, DatasetManifest], edit: Callable[[pa.Table], pa.Table]
) -> DatasetManifest:
    directory, manifest = copied
    path = directory / manifest.splits[c.ITEMS].files[0].path
    table = edit(pq.ParquetFile(path).read())
    pq.write_table(table, path)
    entry = (
        manifest.splits[c.ITEMS]
        .files[0]
        .model_copy(update={"num_bytes": path.stat().st_size, "num_rows": len(table)})
    )
    split = Split(num_rows=len(table), files=(entry,))
    return manifest.model_copy(update={"splits": {**manifest.splits, c.ITEMS: split}})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: pa.concat_tables([t[:5], t[6:]]), r"43 items, at row 5 \[8\] where 7 is exp"),
        (lambda t: pa.concat_tables([t[:5], t[4:]]), r"45 items, at row 5 \[6\] where 7 is exp"),
        (lambda t: t[:-1], r"43 items, at row 43 the end where 45 is expected"),
        (lambda t: pa.concat_tables([t[1:2], t[:1], t[2:]]), r"44 items, at row 0 \[3\] where 2"),
        (
            lambda t: with_column(
                t, "item_image", pa.array([[1.0, 2.0]] + [[0.0] * 3] * (len(t) - 1),
                                          pa.list_(pa.float32()))
            ),
            r"vectors of column 'item_image' have 3 numbers. Received: one with 2",
        ),
    ],
    ids=["gap", "twice", "end", "order", "vector"],
)  # fmt: skip
def test_an_incomplete_catalogue_is_refused(
    copied: tuple[Path, DatasetManifest], edit: Callable[[pa.Table], pa.Table], message: str
) -> None:
    manifest = items_without(copied, edit)
    with pytest.raises(DataError, match=message):
        read_items(copied[0], manifest)


@pytest.mark.parametrize("order", [[2, 0], [1, 1], [1], [], [0, 1, 2]])
def test_rows_are_decoded_in_the_order_that_is_asked_for(order: list[int]) -> None:
    layout = Layout(
        integers=("a", "b"),
        floats=("f",),
        lists=("words", "times"),
        dense=(FeatureSpec(name="face", side="user", kind="vector", column="face", dim=2),),
    )
    words, times = [[5, 6], [], [7]], [[], [], [8, 9, 10]]
    # of a slice, whose lists do not start at offset 0
    table = pa.table(
        {
            "a": [0, 10, 11, 12],
            "b": [0, 20, 21, 22],
            "f": pa.array([0.0, 0.5, 1.5, 2.5], pa.float32()),
            "words": pa.array([[1], *words], pa.list_(pa.int64())),
            "times": pa.array([[2, 3], *times], pa.list_(pa.int64())),
            "face": pa.array([[0, 0], [1, 2], [3, 4], [5, 6]], pa.list_(pa.float32())),
        }
    ).slice(1)
    rows = decode(table, layout, "a table", np.array(order, dtype=np.int64))
    assert rows.integers.tolist() == [[[10, 11, 12][i] for i in order], [20 + i for i in order]]
    assert rows.floats.tolist() == [[[0.5, 1.5, 2.5][i] for i in order]]
    assert rows.dense.tolist() == [[[1, 2], [3, 4], [5, 6]][i] for i in order]
    for name, wanted in (("words", words), ("times", times)):
        found = rows.lists[name]
        assert [part.tolist() for part in np.split(found.values, found.offsets[1:])] == [
            *(wanted[i] for i in order), []
        ]  # fmt: skip
        assert (found.values.dtype, found.offsets.dtype) == (np.int64, np.int64)


def test_features_of_several_values_and_vectors_of_users(
    dataset: tuple[Path, DatasetManifest],
) -> None:
    table = pq.ParquetFile(dataset[0] / dataset[1].splits[c.USERS].files[0].path).read()[:3]
    table = table.append_column("user_words", pa.array([[5, 6], [], [7]]))
    table = table.append_column(
        "user_face", pa.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], pa.list_(pa.float32()))
    )
    features = (
        FeatureSpec(name="face", side="user", kind="vector", column="user_face", dim=2),
        *dataset[1].features,
        FeatureSpec(name="words", side="user", kind="text", column="user_words", num_embeddings=9),
    )
    batch = decode_queries(table, features).batch
    assert list(batch.ids) == ["user_group", "context_hour", "user_words"]
    assert lists(batch.ids["user_words"]) == [[5, 6], [], [7]]
    ages = table.column("user_age").to_pylist()
    assert batch.dense.tolist() == [[1.0, 2.0, ages[0]], [3.0, 4.0, ages[1]], [5.0, 6.0, ages[2]]]
    without = table.drop([c.SEEN])
    with pytest.raises(DataError, match=r"rows have a column 'seen' of type list<int64>"):
        decode_queries(without, features)


def test_kinds_of_events_are_read_and_checked(tmp_path: Path) -> None:
    """In train, in queries and by the planner; a kind that there is not, and lists that differ."""
    manifest = write_dataset(tmp_path, num_files=1, event_types=("view", "cart", "buy"))
    (queries,) = read_queries(tmp_path, manifest, c.VALID_QUERIES, WORLD, 60)
    sample = read_sample(tmp_path, manifest, 1).batch
    batches = [*open_reader(tmp_path, manifest).batches(0), queries.batch, sample]
    for batch in batches:
        expected = [
            [event_type(*event, 3) for event in zip(items, times, strict=True)]
            for items, times in zip(lists(batch.history), lists(batch.history_times), strict=True)
        ]
        assert lists(batch.history_types) == expected
    assert {kind for batch in batches for kind in batch.history_types.values.tolist()} == {2, 3, 4}
    train = pq.ParquetFile(tmp_path / manifest.splits[c.TRAIN].files[0].path).read()
    longest = max(train[c.HISTORY_TYPES].to_pylist(), key=len)
    row = train[c.HISTORY_TYPES].to_pylist().index(longest)
    for wrong, message in (
        ([*longest[1:], 5], r"kinds of event in column 'history_types' lie in \[1, 5\).*: 5 \("),
        ([*longest[1:], 0], r"lie in \[1, 5\). Received: 0 \(.*part-00000.parquet\)"),
        (longest[1:], r"a history has one kind an event. Received: lists .* not as long as those"),
    ):
        values = train[c.HISTORY_TYPES].to_pylist()
        values[row] = wrong
        kinds = pa.array(values, pa.list_(pa.int64()))
        edited = edit_first_file(
            tmp_path, manifest, lambda t, kinds=kinds: with_column(t, c.HISTORY_TYPES, kinds)
        )
        with pytest.raises(DataError, match=message):
            list(open_reader(tmp_path, edited).batches(0))


def test_queries_fail_at_the_call_and_not_with_the_first_batch(
    copied: tuple[Path, DatasetManifest],
) -> None:
    directory, manifest = copied
    path = directory / manifest.splits[c.TEST_QUERIES].files[0].path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"test_queries/part-00000.parquet with"):
        _: Iterator[QueryBatch] = read_queries(directory, manifest, c.TEST_QUERIES, WORLD, 5)
