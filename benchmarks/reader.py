"""Rows a second of shuffled batches beside plain pyarrow reading the same columns to NumPy.

    python benchmarks/reader.py [--quick] [--rows-per-file 100000] [--rounds 5]

Writes a data set (12 files, histories of up to 50 items with their times, two id features, one
list of ids, a number and a vector), then reads it in turns: pyarrow.parquet row group by row group
in the order of the files, and ExampleReader without its cache, in shuffled batches. Both decode on
one thread of Arrow, from a warm page cache; medians count. Sums over both readings are compared.
It ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import petastorm
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from distrec import columns as c
from distrec.config import ReaderConfig
from distrec.dataset import DatasetManifest, FeatureSpec, FileEntry, Split
from distrec.reader import ExampleReader
from distrec.reader.layout import example_layout
from distrec.world import World

NUM_FILES = 12
HISTORY_LENGTH = 50
VECTOR_DIM = 16
GLOBAL_BATCH_SIZE = 8192
# share of plain reading's speed that batches reach at least: shuffling and joining cost the rest
BAR = 0.5
FEATURES = (
    FeatureSpec(name="group", side="user", kind="categorical", column="user_group"),
    FeatureSpec(name="age", side="user", kind="number", column="user_age", dim=1),
    FeatureSpec(name="face", side="user", kind="vector", column="user_face", dim=VECTOR_DIM),
    FeatureSpec(name="hour", side="context", kind="categorical", column="context_hour"),
    FeatureSpec(name="tags", side="context", kind="multi_categorical", column="context_tags"),
)
Sums = tuple[int, int, int]


def make_table(num_rows: int, seed: int) -> pa.Table:
    """Rows of the shape that prepare writes."""
    rng = np.random.default_rng(seed)

    def ids(size: int) -> np.ndarray:
        return np.minimum(rng.zipf(1.2, size), 1_000_000) + c.FIRST_INDEX

    def ragged(longest: int, values: Callable[[int], np.ndarray]) -> pa.Array:
        lengths = np.random.default_rng((seed, longest)).integers(0, longest + 1, num_rows)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return pa.ListArray.from_arrays(offsets, pa.array(values(int(offsets[-1]))))

    def times(size: int) -> np.ndarray:
        return rng.integers(1_600_000_000, 1_700_000_000, size)

    vectors = rng.normal(size=num_rows * VECTOR_DIM).astype(np.float32)
    starts = np.arange(0, num_rows * VECTOR_DIM + 1, VECTOR_DIM, dtype=np.int32)
    return pa.table(
        {
            c.USER_INDEX: ids(num_rows),
            c.ITEM_INDEX: ids(num_rows),
            c.TIME: times(num_rows),
            c.LABEL: rng.integers(0, 2, num_rows).astype(np.float32),
            c.WEIGHT: np.ones(num_rows, np.float32),
            c.NUM_EVENTS: rng.integers(0, 500, num_rows),
            c.HISTORY: ragged(HISTORY_LENGTH, ids),
            c.HISTORY_TIMES: ragged(HISTORY_LENGTH, times),
            "user_group": rng.integers(2, 20, num_rows),
            "user_age": rng.normal(size=num_rows).astype(np.float32),
            "user_face": pa.ListArray.from_arrays(starts, pa.array(vectors)),
            "context_hour": rng.integers(2, 26, num_rows),
            "context_tags": ragged(5, ids),
        }
    )


def write_dataset(directory: Path, rows_per_file: int) -> DatasetManifest:
    """Write train and give the manifest of it."""
    entries = []
    for number in range(NUM_FILES):
        path = directory / f"train/part-{number:05d}.parquet"
        path.parent.mkdir(exist_ok=True)
        table = make_table(rows_per_file, number)
        pq.write_table(table, path, compression="zstd", row_group_size=50_000)
        entries.append(
            FileEntry(
                path=path.relative_to(directory).as_posix(),
                num_rows=rows_per_file,
                num_bytes=path.stat().st_size,
                sha256="",
            )
        )
    return DatasetManifest(
        distrec_version="benchmark",
        created_at="",
        config_hash="",
        config={},
        schemas={c.TRAIN: example_layout(FEATURES).types},
        splits={c.TRAIN: Split(num_rows=NUM_FILES * rows_per_file, files=tuple(entries))},
        features=FEATURES,
        vocabularies={},
        num_users=1_000_003,
        num_trained_items=1_000_003,
        num_items=1_000_003,
        history_length=HISTORY_LENGTH,
        has_time=True,
        has_labels=True,
        counts={},
        rejects={},
        statistics={},
    )


def read_plain(directory: Path, manifest: DatasetManifest) -> Sums:
    """Every column of every row group as NumPy: values, and offsets of lists."""
    names = list(example_layout(manifest.features).columns)
    num_rows = users = items = 0
    for entry in manifest.splits[c.TRAIN].files:
        with pq.ParquetFile(directory / entry.path) as file:
            for index in range(file.num_row_groups):
                table = file.read_row_group(index, columns=names)
                arrays = {}
                for name in names:
                    array = table.column(name).chunk(0)
                    if pa.types.is_list(array.type):
                        arrays[f"{name}.offsets"] = array.offsets.to_numpy()
                        array = array.values
                    arrays[name] = array.to_numpy()
                num_rows += table.num_rows
                users += int(arrays[c.USER_INDEX].sum())
                items += int(arrays[c.HISTORY].sum())
    return num_rows, users, items


def read_batches(reader: ExampleReader, epoch: int) -> Sums:
    """Every batch of an epoch."""
    num_rows = users = items = 0
    for batch in reader.batches(epoch):
        num_rows += batch.batch_size
        users += int(batch.user_index.sum())
        items += int(batch.history.values.sum())
    return num_rows, users, items


def processor() -> str:
    """Name of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def rate(function: Callable[[], Sums], expected: Sums) -> float:
    """Rows a second of one reading, which must give what every other gives."""
    start = time.perf_counter()
    received = function()
    elapsed = time.perf_counter() - start
    if received != expected:
        raise SystemExit(f"readings differ: {received}, expected {expected}")
    return received[0] / elapsed


def measure(directory: Path, manifest: DatasetManifest, rounds: int) -> dict[str, float]:
    """Median rows a second of each side, in turns."""

    def reader(cache_mib: int) -> ExampleReader:
        config = ReaderConfig(cache_mib=cache_mib)
        return ExampleReader(directory, manifest, c.TRAIN, World(), config, GLOBAL_BATCH_SIZE, 1)

    uncached, cached = reader(0), reader(1 << 16)
    expected = read_plain(directory, manifest)
    read_batches(uncached, 0)
    read_batches(cached, 0)
    rates: dict[str, list[float]] = {"pyarrow": [], "batches": [], "batches, cached": []}
    for epoch in range(1, rounds + 1):
        rates["pyarrow"].append(rate(lambda: read_plain(directory, manifest), expected))
        for name, source in (("batches", uncached), ("batches, cached", cached)):
            rates[name].append(rate(lambda s=source, e=epoch: read_batches(s, e), expected))
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows-per-file", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small files, three rounds")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rows_per_file, arguments.rounds = 20_000, 3
    pa.set_cpu_count(1)
    torch.set_num_threads(1)
    print(f"hardware  {processor()}, {os.cpu_count()} cores")
    print(
        f"versions  Python {platform.python_version()}, pyarrow {pa.__version__}, petastorm "
        f"{petastorm.__version__}, numpy {np.__version__}, torch {torch.__version__}"
    )
    print(f"command   python {shlex.join(sys.argv)}")
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_dataset(Path(folder), arguments.rows_per_file)
        rates = measure(Path(folder), manifest, arguments.rounds)
    ratio = rates["batches"] / rates["pyarrow"]
    print(f"rows      {manifest.splits[c.TRAIN].num_rows:,} in {NUM_FILES} files")
    for name, value in rates.items():
        print(f"{name:>16} {value:12,.0f} rows/s  {value / rates['pyarrow']:5.2f} of pyarrow")
    result = {
        "benchmark": "reader",
        "figures": {
            "ratio_to_pyarrow": round(ratio, 3),
            "cached_ratio_to_pyarrow": round(rates["batches, cached"] / rates["pyarrow"], 3),
            "rows_per_second": {name: round(value) for name, value in rates.items()},
        },
        "bars": {"ratio_to_pyarrow": BAR},
        "met": ratio >= BAR,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
