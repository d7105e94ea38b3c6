"""`distrec run` killed at seeded random moments and run again: the scores of a good night.

DISTREC_RANDOM_POINTS in the environment is the number of moments, 50 where it is not given.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from distrec.config import load_config
from tests.faults.conftest import ROWS
from tests.faults.processes import below, command_of, gone, kill, wait_until
from tests.faults.test_faults import ALL
from tests.faults.test_spark_faults import CODE, scored
from tests.integration.raw import write_raw
from tests.integration.test_jobs import ROOT, environment

pytestmark = [
    pytest.mark.skipif(not ALL, reason="one of make faults"),
    pytest.mark.timeout(4 * 3600),
]

POINTS = int(os.environ.get("DISTREC_RANDOM_POINTS", "50"))
MOST_STARTS = 3


def start(path: Path, output: Path) -> subprocess.Popen[bytes]:
    """`distrec run`, with its output elsewhere."""
    return subprocess.Popen(
        [sys.executable, "-c", CODE, "run", str(path), "--set", f"output={output}",
         "--set", "train.checkpoint_every_steps=4", "--set", "train.max_epochs=4"],
        stdout=subprocess.DEVNULL, stderr=output.with_suffix(".log").open("ab"), cwd=ROOT,
        env=environment(SPARK_LOCAL_IP="127.0.0.1"),
    )  # fmt: skip


def what(pid: int) -> str:
    """A process in a word."""
    command = command_of(pid)
    for part, name in (
        ("distrec.trainer", "a rank"), ("horovodrun", "horovodrun"), ("java", "the JVM"),
        ("pyspark", "a Python worker"), ("distrec.cli", "distrec run"),
    ):  # fmt: skip
        if part in command:
            return name
    return "a helper"


def scores(output: Path, path: Path) -> pa.Table:
    return scored(load_config(path, [f"output={output}"]))


def test_random_points(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "raw", tmp_path / "unused")
    good = tmp_path / "good"
    started = time.monotonic()
    assert start(path, good).wait(600) == 0, good.with_suffix(".log").read_text()[-4000:]
    usual = time.monotonic() - started
    expected = scores(good, path)
    for seed in range(POINTS):
        chance = random.Random(seed)
        output = tmp_path / f"run-{seed}"
        moment = chance.uniform(0.0, usual)
        began = time.monotonic()
        job = start(path, output)
        time.sleep(moment)
        killed, others = "nothing, for it was done", []
        if job.poll() is None:
            others = below(job.pid)
            victim = chance.choice(others)
            killed = what(victim)
            try:
                kill(victim)
            except ProcessLookupError:
                killed = "nothing, for it was gone"
        codes = [job.wait(600)]
        # whoever is left would write beside the next start
        wait_until(partial(gone, others), 120)
        while codes[-1] != 0 and len(codes) <= MOST_STARTS:
            job = start(path, output)
            codes.append(job.wait(600))
        assert codes[-1] == 0, (seed, codes, output.with_suffix(".log").read_text()[-4000:])
        lost = time.monotonic() - began - usual
        name = f"random point {seed}: {killed} killed after {moment:.0f} of {usual:.0f} s"
        ROWS.append((name, f"exit codes {codes}", f"{lost:+.0f} s"))
        assert scores(output, path).equals(expected), name
