"""Rows a second of shuffled batches beside plain pyarrow reading the same columns to NumPy.

    python benchmarks/reader.py [--quick] [--rows-per-file 60000] [--rounds 7]

Writes a data set (12 files; 13 numbers, 26 ids, a history of mean length 25 with its times), then
reads it in turns: pyarrow.parquet row group by row group in the order of the files, and
ExampleReader without its cache, in shuffled batches. Both decode on one thread of Arrow, from a
warm page cache, and ExampleReader has a second thread that shuffles and joins; medians count, and
sums over both readings are compared. Then a DLRM trains from the reader, and the share of its steps
that waits for input is measured. It ends with one line of JSON.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import common
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from dlrm_shape import NUM_NUMBERS, NUM_TABLES, Dense, pair_index, table_name
from torch import nn

from distrec import columns as c
from distrec.batch import Batch
from distrec.config import ReaderConfig, ShardingConfig
from distrec.dataset import DatasetManifest, FeatureSpec, FileEntry, Split
from distrec.reader import ExampleReader
from distrec.reader.layout import example_layout
from distrec.sharding.collectives import OneProcess
from distrec.sharding.lookup import Request
from distrec.sharding.plan import TableSpec, plan_tables
from distrec.sharding.tables import EmbeddingTables
from distrec.world import World

NUM_FILES = 12
HISTORY_LENGTH = 50
BATCH_SIZE, ROW_GROUP = 8192, 15_000
# of the DLRM
TRAINING_BATCH_SIZE, EMBEDDING_DIM, MAX_ID = 2048, 16, 200_000
TABLES = tuple(table_name(number) for number in range(NUM_TABLES))
FEATURES = (
    *(
        FeatureSpec(
            name=f"n{number}", side="context", kind="number", column=f"context_n{number}", dim=1
        )
        for number in range(NUM_NUMBERS)
    ),
    *(
        FeatureSpec(name=name, side="context", kind="categorical", column=f"context_{name}")
        for name in TABLES
    ),
)
BARS = {"ratio_to_pyarrow": common.at_least(0.8), "share_waiting": common.at_most(0.05)}
Sums = tuple[int, int, int]


def make_table(num_rows: int, seed: int) -> pa.Table:
    """Rows of the shape that prepare writes."""
    rng = np.random.default_rng(seed)

    def ids(size: int) -> np.ndarray:
        return np.minimum(rng.zipf(1.2, size), MAX_ID - c.FIRST_INDEX - 1) + c.FIRST_INDEX

    def times(size: int) -> np.ndarray:
        return rng.integers(1_600_000_000, 1_700_000_000, size)

    lengths = rng.integers(0, HISTORY_LENGTH + 1, num_rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    columns = {
        c.USER_INDEX: ids(num_rows),
        c.ITEM_INDEX: ids(num_rows),
        c.TIME: times(num_rows),
        c.LABEL: rng.integers(0, 2, num_rows).astype(np.float32),
        c.WEIGHT: np.ones(num_rows, np.float32),
        c.NUM_EVENTS: rng.integers(0, 500, num_rows),
        c.HISTORY: pa.ListArray.from_arrays(offsets, pa.array(ids(offsets[-1]))),
        c.HISTORY_TIMES: pa.ListArray.from_arrays(offsets, pa.array(times(offsets[-1]))),
    }
    for feature in FEATURES:
        number = feature.kind == "number"
        values = rng.normal(size=num_rows).astype(np.float32) if number else ids(num_rows)
        columns[feature.column] = values
    return pa.table(columns)


def write_dataset(directory: Path, rows_per_file: int) -> DatasetManifest:
    """Write train and give the manifest of it."""
    entries = []
    for number in range(NUM_FILES):
        path = directory / f"train/part-{number:05d}.parquet"
        path.parent.mkdir(exist_ok=True)
        table = make_table(rows_per_file, number)
        pq.write_table(table, path, compression="zstd", row_group_size=ROW_GROUP)
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
        num_users=MAX_ID,
        num_trained_items=MAX_ID,
        num_items=MAX_ID,
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


def rate(num_rows: int, expected: Sums, received: list[Sums], took: float) -> float:
    """Rows a second of one reading, which must give what every other gives."""
    if received != [expected]:
        raise SystemExit(f"readings differ: {received}, expected {expected}")
    return num_rows / took


def measure_reading(directory: Path, manifest: DatasetManifest, rounds: int) -> dict[str, float]:
    """Median rows a second of each side, in turns."""
    expected = read_plain(directory, manifest)
    epochs = iter(range(10 * rounds))
    uncached, cached = (
        ExampleReader(
            directory, manifest, c.TRAIN, World(), ReaderConfig(cache_mib=mib), BATCH_SIZE, 1
        )
        for mib in (0, 1 << 16)
    )

    def plain() -> float:
        found: list[Sums] = []
        took = common.seconds(lambda: found.append(read_plain(directory, manifest)))
        return rate(expected[0], expected, found, took)

    def batches(reader: ExampleReader) -> float:
        found: list[Sums] = []
        took = common.seconds(lambda: found.append(read_batches(reader, next(epochs))))
        return rate(expected[0], expected, found, took)

    sides = {
        "pyarrow": plain,
        "batches": lambda: batches(uncached),
        "batches, cached": lambda: batches(cached),
    }
    # the first round pays for memory that the later ones find
    common.alternate(sides, 1)
    return common.medians(common.alternate(sides, rounds))


class Training:
    """A DLRM whose history is one more bag, on one process."""

    def __init__(self) -> None:
        config = ShardingConfig()
        names = ["history", *TABLES]
        specs = [TableSpec(name, MAX_ID, EMBEDDING_DIM) for name in names]
        cpu = torch.device("cpu")
        self.tables = EmbeddingTables(
            plan_tables(specs, config, 1), OneProcess(cpu), config, 1, cpu
        )
        self.dense = Dense(EMBEDDING_DIM, pair_index(list(TABLES)))
        self.optimizer = torch.optim.SGD(self.dense.parameters(), lr=0.01)

    def step(self, batch: Batch) -> None:
        """One step."""
        self.optimizer.zero_grad()
        requests = {name: Request(name, batch.ids[f"context_{name}"], "sum") for name in TABLES}
        requests["history"] = Request("history", batch.history, "mean")
        rows = self.tables(requests)
        vectors = torch.stack([rows[name] for name in TABLES], dim=1)
        logits = self.dense(batch.dense, vectors + rows["history"].unsqueeze(1))
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels[:, 0])
        loss.backward()
        self.optimizer.step()


def measure_waiting(directory: Path, manifest: DatasetManifest, steps: int) -> float:
    """Share of the time of training that waits for the next batch; the first one is not counted."""
    reader = ExampleReader(
        directory, manifest, c.TRAIN, World(), ReaderConfig(cache_mib=0), TRAINING_BATCH_SIZE, 1
    )
    training, waited = Training(), 0.0
    batches = reader.batches(0)
    training.step(next(batches))
    start = time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        training.step(batch)
    took = time.perf_counter() - start
    batches.close()
    return waited / took


def main() -> None:
    """Measure and print."""
    parser = common.parser(__doc__, 7, "small files, five rounds")
    parser.add_argument("--rows-per-file", type=int, default=60_000)
    parser.add_argument("--steps", type=int, default=60, help="steps of training")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rows_per_file, arguments.rounds, arguments.steps = 30_000, 5, 20
    pa.set_cpu_count(1)
    torch.set_num_threads(1)
    threads = "1 thread of Arrow on each side, and 1 of ours that shuffles and joins"
    common.print_header(("pyarrow", "petastorm", "numpy", "torch"), threads)
    with tempfile.TemporaryDirectory() as name:
        manifest = write_dataset(Path(name), arguments.rows_per_file)
        rates = measure_reading(Path(name), manifest, arguments.rounds)
        waiting = measure_waiting(Path(name), manifest, arguments.steps)
    print(f"rows      {manifest.splits[c.TRAIN].num_rows:,} in {NUM_FILES} files")
    for name, value in rates.items():
        print(f"{name:>16} {value:12,.0f} rows/s  {value / rates['pyarrow']:5.2f} of pyarrow")
    print(f"{waiting:.1%} of a training step waits for input (batches of {TRAINING_BATCH_SIZE})")
    figures = {
        "ratio_to_pyarrow": round(rates["batches"] / rates["pyarrow"], 3),
        "cached_ratio_to_pyarrow": round(rates["batches, cached"] / rates["pyarrow"], 3),
        "share_waiting": round(waiting, 4),
        "rows_per_second": {name: round(value) for name, value in rates.items()},
    }
    common.print_result("reader", figures, BARS)


if __name__ == "__main__":
    main()
