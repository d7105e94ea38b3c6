"""Peak resident memory of training ranks against rows, ranks and what the planner says.

    python benchmarks/memory.py [--quick] [--rows 1000000 4000000] [--ranks 1 2 4]

Writes a data set of 60,000 examples whose user table has the given number of rows of width 64, and
trains on it in real processes (horovodrun beyond one rank) for 20 steps, with a validation and a
checkpoint. Each rank reports the largest resident memory that the kernel saw. Without another
library on the other side, the two sides of the ratio are the planner's number and the measured one;
and how much a byte of rank r's 1/N of the table adds to its peak. Peaks repeat within 1 %, so each
shape runs once. It ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distrec import columns as c
from distrec.config import Config, dump_config, load_config, parse_config
from distrec.dataset import MANIFEST, DatasetManifest, FileEntry, Split
from distrec.launch import horovodrun_command
from distrec.planner import plan_run
from distrec.reader.layout import example_layout, item_layout, query_layout

NUM_EXAMPLES, NUM_ITEMS, NUM_QUERIES, HISTORY_LENGTH = 60_000, 2_000, 500, 20
EMBEDDING_DIM, NUM_STEPS, BATCH_SIZE = 64, 20, 2_048
# largest distance of the prediction from the measured peak, as a share of the peak
BAR = 0.10


def examples(num_rows: int, num_users: int, seed: int) -> dict[str, Any]:
    """Columns of examples: any user is as likely as any other, items are not."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(0, HISTORY_LENGTH + 1, num_rows))])
    items = np.minimum(rng.zipf(1.2, int(offsets[-1])), NUM_ITEMS) + c.FIRST_INDEX - 1
    starts = offsets.astype(np.int32)
    return {
        c.USER_INDEX: rng.integers(c.FIRST_INDEX, num_users, num_rows),
        c.ITEM_INDEX: np.minimum(rng.zipf(1.2, num_rows), NUM_ITEMS) + c.FIRST_INDEX - 1,
        c.TIME: rng.integers(1_600_000_000, 1_700_000_000, num_rows),
        c.LABEL: np.ones(num_rows, np.float32),
        c.WEIGHT: np.ones(num_rows, np.float32),
        c.NUM_EVENTS: np.diff(offsets),
        c.HISTORY: pa.ListArray.from_arrays(starts, pa.array(items)),
        c.HISTORY_TIMES: pa.ListArray.from_arrays(starts, pa.array(np.sort(items))),
    }


def write_dataset(directory: Path, num_users: int) -> None:
    """Train, queries of valid, and the catalogue, as prepare writes them."""
    train = pa.table(examples(NUM_EXAMPLES, num_users, 1))
    queries = pa.table(examples(NUM_QUERIES, num_users, 2))
    for name in (c.SEEN, c.TARGETS):
        queries = queries.append_column(name, queries[c.HISTORY])
    queries = queries.append_column(c.USER_ID, pa.array([str(k) for k in range(NUM_QUERIES)]))
    queries = queries.drop_columns([c.ITEM_INDEX, c.LABEL, c.WEIGHT])
    index = np.arange(c.FIRST_INDEX, c.FIRST_INDEX + NUM_ITEMS)
    counts = np.sort(np.bincount(train[c.ITEM_INDEX], minlength=len(index) + 2)[2:])[::-1]
    items = pa.table({c.ITEM_INDEX: index, c.COUNT: counts})
    splits = {}
    for name, table in ((c.TRAIN, train), (c.VALID_QUERIES, queries), (c.ITEMS, items)):
        path = directory / f"{name}/part-00000.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(table, path, row_group_size=10_000)
        entry = FileEntry(
            path=f"{name}/{path.name}",
            num_rows=len(table),
            num_bytes=path.stat().st_size,
            sha256="",
        )
        splits[name] = Split(num_rows=len(table), files=(entry,))
    layouts = {
        c.TRAIN: example_layout(()), c.VALID_QUERIES: query_layout(()), c.ITEMS: item_layout(()),
    }  # fmt: skip
    schemas = {name: dict(layout.types) for name, layout in layouts.items()}
    schemas[c.VALID_QUERIES][c.USER_ID] = "string"
    manifest = DatasetManifest(
        distrec_version="benchmark", created_at="", config_hash="", config={}, schemas=schemas,
        splits=splits, features=(), vocabularies={}, num_users=num_users,
        num_trained_items=NUM_ITEMS + c.FIRST_INDEX, num_items=NUM_ITEMS + c.FIRST_INDEX,
        history_length=HISTORY_LENGTH, has_time=True, has_labels=False, counts={}, rejects={},
        statistics={},
    )  # fmt: skip
    (directory / MANIFEST).write_text(json.dumps(manifest.model_dump(mode="json")))


def make_config(output: Path, num_ranks: int) -> Config:
    """A short run on the data set in `output`."""
    return parse_config(
        {
            "name": "memory",
            "output": str(output),
            "prepare": {"events": {"paths": ["none.csv"], "time": "time"}},
            "model": {"embedding_dim": EMBEDDING_DIM},
            "train": {
                "global_batch_size": BATCH_SIZE, "max_steps": NUM_STEPS, "log_every_steps": 100,
                "keep_checkpoints": 1,
            },
            "launch": {"num_ranks": num_ranks, "device": "cpu"},
        },
        "the benchmark",
    )  # fmt: skip


def run_rank(config_path: Path, answers: Path) -> None:
    """What each rank does: train, then write down its peak."""
    # only the ranks train
    from distrec.trainer.rank import rank_of_environment, run_rank

    run_rank(load_config(config_path))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (answers / f"peak-{rank_of_environment()}").write_text(str(peak))


def measure(directory: Path, num_users: int, num_ranks: int) -> list[int]:
    """Peak resident memory of each rank, in bytes."""
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        output = Path(folder)
        (output / "dataset").symlink_to(directory / f"dataset-{num_users}")
        config = make_config(output, num_ranks)
        path = output / "config.toml"
        path.write_text(dump_config(config))
        command = [sys.executable, __file__, "--rank", str(path), str(output)]
        if num_ranks > 1:
            command = horovodrun_command(config) + command
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{shlex.join(command)} ended with {done.returncode}\n{done.stderr[-4000:]}")
        return [int((output / f"peak-{rank}").read_text()) for rank in range(num_ranks)]


def compare(directory: Path, num_users: int, num_ranks: int) -> dict[str, Any]:
    """Measured and predicted peaks of one shape."""
    peaks = measure(directory, num_users, num_ranks)
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        (Path(folder) / "dataset").symlink_to(directory / f"dataset-{num_users}")
        report = plan_run(make_config(Path(folder), num_ranks), num_ranks)
    predicted = [rank.memory.total for rank in report.ranks]
    tables = [rank.memory.table_weights + rank.memory.table_state for rank in report.ranks]
    ratios = [ours / real for ours, real in zip(predicted, peaks, strict=True)]
    worst = max(ratios, key=lambda ratio: abs(ratio - 1))
    print(
        f"{num_users:,} rows x {EMBEDDING_DIM}, {num_ranks} ranks: measured "
        f"{[round(peak / 2**20) for peak in peaks]} MiB, predicted "
        f"{[round(number / 2**20) for number in predicted]} MiB (tables "
        f"{[round(number / 2**20) for number in tables]}): {worst:.3f} of what was measured",
        flush=True,
    )
    return {
        "rows": num_users, "ranks": num_ranks, "measured_bytes": peaks,
        "predicted_bytes": predicted, "table_bytes": tables, "ratio": round(worst, 4),
    }  # fmt: skip


def constant_growth(shapes: list[dict[str, Any]]) -> float:
    """How much a row more adds to the peak of a rank, over its bytes in the table: 1 is 1/N.

    Between the smallest and the largest table, so that what does not depend on rows drops out; the
    number of ranks that is farthest from 1.
    """
    found = []
    for ranks in sorted({shape["ranks"] for shape in shapes}):
        same = sorted((s for s in shapes if s["ranks"] == ranks), key=lambda s: s["rows"])
        first, last = same[0], same[-1]
        if first is not last:
            peak = max(last["measured_bytes"]) - max(first["measured_bytes"])
            found.append(peak / (max(last["table_bytes"]) - max(first["table_bytes"])))
    return max(found, key=lambda slope: abs(slope - 1))


def main() -> None:
    """Measure every shape and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small tables, about a minute")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 4_000_000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        run_rank(Path(arguments.rank[0]), Path(arguments.rank[1]))
        return
    if arguments.quick:
        arguments.rows, arguments.ranks = [200_000, 1_000_000], [1, 2]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    print(f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, CPU ranks, one thread")
    versions = {name: version(name) for name in ("torch", "fbgemm-gpu-cpu", "horovod", "pyarrow")}
    print(", ".join(f"{name} {number}" for name, number in versions.items()))
    command = shlex.join(["python", *sys.argv])
    print(command)
    shapes = []
    with tempfile.TemporaryDirectory() as folder:
        for num_users in arguments.rows:
            write_dataset(Path(folder) / f"dataset-{num_users}", num_users)
            shapes += [compare(Path(folder), num_users, ranks) for ranks in arguments.ranks]
    worst = max((shape["ratio"] for shape in shapes), key=lambda ratio: abs(ratio - 1))
    slope = constant_growth(shapes)
    bars = {"prediction_within": BAR, "peak_a_table_byte_at_most": 1 + BAR}
    print(f"predicted over measured: {worst:.3f}; a table byte adds {slope:.3f} bytes to the peak")
    print(
        json.dumps(
            {
                "benchmark": "memory", "command": command, "cores": os.cpu_count(),
                "versions": versions,
                "figures": {"ratio": worst, "peak_a_table_byte": round(slope, 4), "shapes": shapes},
                "bars": bars,
                "met": bool(abs(worst - 1) <= BAR and slope <= 1 + BAR),
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
