"""Peak resident memory of training ranks against rows, ranks and what the planner says.

    python benchmarks/memory.py [--quick] [--rows 1000000 4000000] [--width 64] [--ranks 1 2 4]
    python benchmarks/memory.py --rows 100000000 --width 16 --ranks 2 --resume

Writes a data set of 60,000 examples whose user table has the given number of rows, and trains on it
(row-wise Adagrad) in real processes (horovodrun beyond one rank) for 20 steps, with a validation
and a checkpoint; with --resume, other processes then go on from that checkpoint for 20 more. Each
rank reports the largest resident memory that the kernel saw. Without another library on the other
side, the two sides of the ratio are the planner's number and the measured one; and, given two
numbers of rows, how much a byte of rank r's 1/N of the table adds to its peak. Peaks repeat within
1 %, so each shape runs once. It ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import common
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distrec import columns as c
from distrec.attempt import horovodrun_command
from distrec.config import Config, dump_config, load_config, parse_config
from distrec.dataset import MANIFEST, DatasetManifest, FileEntry, Split
from distrec.planner import plan_run
from distrec.reader.layout import example_layout, item_layout, query_layout

NUM_EXAMPLES, NUM_ITEMS, NUM_QUERIES, HISTORY_LENGTH = 60_000, 2_000, 500, 20
NUM_STEPS, BATCH_SIZE = 20, 2_048
BARS = {
    # of a prediction from the measured peak, as a share of the peak
    "largest_distance": common.at_most(0.10),
    "peak_a_table_byte": common.at_most(1.10),
}


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


def make_config(output: Path, num_ranks: int, width: int, num_steps: int) -> Config:
    """A short run on the data set in `output`."""
    return parse_config(
        {
            "name": "memory",
            "output": str(output),
            "prepare": {"events": {"paths": ["none.csv"], "time": "time"}},
            "model": {"embedding_dim": width},
            "train": {
                "global_batch_size": BATCH_SIZE, "max_steps": num_steps, "log_every_steps": 100,
                # a run with another end is the same run
                "decay": "none", "keep_checkpoints": 1,
            },
            "launch": {"num_ranks": num_ranks, "device": "cpu"},
        },
        "the benchmark",
    )  # fmt: skip


def run_rank(config_path: Path, answers: Path) -> None:
    """What each rank does: train, then write down its peak and where the time went."""
    # only the ranks train
    from distrec.checkpoint import Series
    from distrec.trainer import loop, setup
    from distrec.trainer.rank import rank_of_environment, run_rank

    spent: dict[str, list[float]] = {"fill": [], "step": [], "save": [], "load": []}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **named)
            spent[name].append(time.perf_counter() - start)
            return result

        return call

    with (
        mock.patch.object(setup, "EmbeddingTables", timed("fill", setup.EmbeddingTables)),
        mock.patch.object(loop, "train_step", timed("step", loop.train_step)),
        mock.patch.object(loop, "load", timed("load", loop.load)),
        mock.patch.object(Series, "save", timed("save", Series.save)),
    ):
        run_rank(load_config(config_path))
    found = {name: statistics.median(times) for name, times in spent.items() if times}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (answers / f"{rank_of_environment()}.json").write_text(json.dumps({"peak": peak, **found}))


def measure(config: Config, output: Path) -> dict[str, Any]:
    """Train in `output`: peak resident memory of each rank in bytes, seconds of the slowest."""
    path = output / "config.toml"
    path.write_text(dump_config(config))
    command = [sys.executable, __file__, "--rank", str(path), str(output)]
    if config.launch.num_ranks > 1:
        command = horovodrun_command(config) + command
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} ended with {done.returncode}\n{done.stderr[-4000:]}")
    ranks = [
        json.loads((output / f"{rank}.json").read_text()) for rank in range(config.launch.num_ranks)
    ]
    peaks = [found.pop("peak") for found in ranks]
    seconds = {name: round(max(found[name] for found in ranks), 3) for name in ranks[0]}
    return {"measured_bytes": peaks, "seconds": seconds}


def compare(
    directory: Path, num_users: int, num_ranks: int, width: int, resume: bool
) -> list[dict[str, Any]]:
    """Measured and predicted peaks of one shape: of a run, and of the one that goes on from it."""
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        output = Path(folder)
        (output / "dataset").symlink_to(directory / f"dataset-{num_users}")
        report = plan_run(make_config(output, num_ranks, width, NUM_STEPS), num_ranks)
        shape = {
            "rows": num_users, "width": width, "ranks": num_ranks,
            "predicted_bytes": [rank.memory.total for rank in report.ranks],
            "table_bytes": [
                rank.memory.table_weights + rank.memory.table_state for rank in report.ranks
            ],
        }  # fmt: skip
        shapes = []
        for num_steps in [NUM_STEPS, 2 * NUM_STEPS][: 1 + resume]:
            found = measure(make_config(output, num_ranks, width, num_steps), output)
            assert not shapes or "load" in found["seconds"], "it did not go on from the checkpoint"
            shapes.append({**shape, "resumed": bool(shapes), **found})
            show(shapes[-1])
    return shapes


def show(shape: dict[str, Any]) -> None:
    """Add how good the prediction is, and print."""
    ratios = [
        predicted / peak
        for predicted, peak in zip(shape["predicted_bytes"], shape["measured_bytes"], strict=True)
    ]
    shape["ratio"] = round(max(ratios, key=lambda ratio: abs(ratio - 1)), 4)
    mib = {
        name: [round(number / 2**20) for number in shape[f"{name}_bytes"]]
        for name in ("measured", "predicted", "table")
    }
    print(
        f"{shape['rows']:,} rows x {shape['width']}, {shape['ranks']} ranks"
        f"{', resumed' if shape['resumed'] else ''}: measured {mib['measured']} MiB, predicted "
        f"{mib['predicted']} MiB (tables {mib['table']}): {shape['ratio']:.3f} of what was "
        f"measured; seconds: {shape['seconds']}",
        flush=True,
    )


def peak_a_table_byte(shapes: list[dict[str, Any]]) -> float | None:
    """How much a row more adds to the peak of a rank, over its bytes in the table: 1 is 1/N.

    Between the smallest and the largest table, so that what does not depend on rows drops out; the
    number of ranks that is farthest from 1. None with tables of one size.
    """
    found = []
    for ranks in sorted({shape["ranks"] for shape in shapes}):
        same = sorted((s for s in shapes if s["ranks"] == ranks), key=lambda s: s["rows"])
        first, last = same[0], same[-1]
        if first["rows"] < last["rows"]:
            peak = max(last["measured_bytes"]) - max(first["measured_bytes"])
            found.append(peak / (max(last["table_bytes"]) - max(first["table_bytes"])))
    return max(found, key=lambda slope: abs(slope - 1), default=None)


def main() -> None:
    """Measure every shape and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small tables, about a minute")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 4_000_000])
    parser.add_argument("--width", type=int, default=64, help="D")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--resume", action="store_true", help="go on from each run's checkpoint")
    parser.add_argument("--rank", nargs=2, help="set by the benchmark for its ranks")
    arguments = parser.parse_args()
    if arguments.rank:
        run_rank(Path(arguments.rank[0]), Path(arguments.rank[1]))
        return
    if arguments.quick:
        arguments.rows, arguments.ranks = [200_000, 1_000_000], [1, 2]
    common.print_header(("torch", "fbgemm-gpu-cpu", "horovod", "pyarrow"), "1 thread a rank")
    shapes = []
    with tempfile.TemporaryDirectory() as folder:
        for num_users in arguments.rows:
            write_dataset(Path(folder) / f"dataset-{num_users}", num_users)
            for ranks in arguments.ranks:
                shapes += compare(Path(folder), num_users, ranks, arguments.width, arguments.resume)
    figures = {
        "largest_distance": round(max(abs(shape["ratio"] - 1) for shape in shapes), 4),
        "peak_a_table_byte": peak_a_table_byte([s for s in shapes if not s["resumed"]]),
        "shapes": shapes,
    }
    bars = {name: bar for name, bar in BARS.items() if figures[name] is not None}
    common.print_result("memory", figures, bars)


if __name__ == "__main__":
    main()
