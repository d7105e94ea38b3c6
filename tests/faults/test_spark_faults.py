"""A Spark driver or executor that is killed: the same result, or last night's and an error."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distrec.config import Config, load_config
from distrec.dataset import read_manifest
from tests.bad_inputs.case import snapshot
from tests.faults.conftest import ROWS
from tests.faults.processes import below, gone, kill, running, wait_until
from tests.faults.test_faults import ALL
from tests.integration.raw import write_raw
from tests.integration.test_jobs import ROOT, environment, master

__all__ = ["master"]

pytestmark = pytest.mark.skipif(not ALL, reason="one of make faults")

EXECUTOR = "CoarseGrainedExecutorBackend"
DRIVER = "org.apache.spark.deploy.SparkSubmit"
CODE = "import sys; from distrec.cli import main; sys.exit(main())"
# a prepare that has begun to write, and one that is nearly done
MOMENTS = {"prepare": (".dataset-*/work/*", ".dataset-*/train"), "score": (".scores-*/top_k*",)}


def start(stage: str, config: Path, address: str) -> subprocess.Popen[bytes]:
    settings = [
        f"spark.master={address}",
        'spark.conf={"spark.executor.memory"="700m", "spark.driver.host"="127.0.0.1"}',
    ]
    arguments = [part for setting in settings for part in ("--set", setting)]
    return subprocess.Popen(
        [sys.executable, "-c", CODE, stage, str(config), *arguments],
        stdout=subprocess.DEVNULL, stderr=(config.parent / f"{stage}.log").open("ab"), cwd=ROOT,
        env=environment(SPARK_LOCAL_IP="127.0.0.1"),
    )  # fmt: skip


def finish(stage: str, config: Path, address: str) -> float:
    """Run a stage to its end; the seconds that it took."""
    started = time.monotonic()
    code = start(stage, config, address).wait(300)
    assert code == 0, (config.parent / f"{stage}.log").read_text()[-4000:]
    return time.monotonic() - started


def scored(config: Config) -> pa.Table:
    """The scores; their model's version has the time at which it was saved."""
    parts = [pq.read_table(path) for path in sorted((config.scores_directory / "top_k").iterdir())]
    table = pa.concat_tables(parts).drop(["model_version"])
    return table.sort_by([("user_id", "ascending"), ("rank", "ascending")])


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, master: str
) -> tuple[Path, str, pa.Table, dict[str, float]]:
    """A run that nothing happens to: configuration, hash of the data, scores, seconds a stage."""
    folder = tmp_path_factory.mktemp("spark")
    path = write_raw(folder / "raw", folder / "run")
    seconds = {"prepare": finish("prepare", path, master)}
    subprocess.run(
        [sys.executable, "-c", CODE, "train", str(path), "--set", "train.max_epochs=2"],
        check=True, cwd=ROOT, env=environment(), capture_output=True, timeout=300,
    )  # fmt: skip
    seconds["score"] = finish("score", path, master)
    config = load_config(path)
    return path, read_manifest(config.dataset_directory).content_hash, scored(config), seconds


@pytest.mark.parametrize(
    ("stage", "moment"), [(stage, place) for stage in MOMENTS for place in MOMENTS[stage]]
)
@pytest.mark.parametrize("victim", ["executor", "driver", "python"])
def test_a_job_whose_process_is_killed(
    stage: str,
    moment: str,
    victim: str,
    master: str,
    undisturbed: tuple[Path, str, pa.Table, dict[str, float]],
) -> None:
    path, content_hash, scores, seconds = undisturbed
    config = load_config(path)
    before = snapshot(config.directory)
    started = time.monotonic()
    job = start(stage, path, master)
    wait_until(lambda: any(config.directory.glob(moment)) or job.poll() is not None)
    assert job.poll() is None
    below_job = below(job.pid)[1:]
    if victim == "executor":
        kill(next(running(os.getpid(), EXECUTOR)))
    elif victim == "driver":
        kill(next(pid for pid in running(job.pid, DRIVER)))
    else:
        kill(job.pid)
    code = job.wait(300)
    if victim == "executor":
        assert code == 0, (path.parent / f"{stage}.log").read_text()[-4000:]
        outcome = "its tasks ran again"
    else:
        assert code != 0
        wait_until(lambda: gone(below_job), 60)
        after = snapshot(config.directory)
        rests = {name for name in after if name.startswith((".dataset-", ".scores-"))}
        assert {name: after[name] for name in after.keys() - rests} == before
        finish(stage, path, master)
        outcome = f"exit code {code}, last result intact, run again"
    took = time.monotonic() - started - seconds[stage]
    ROWS.append((f"{victim} of {stage}: kill at {moment}", outcome, f"{took:+.0f} s"))
    assert read_manifest(config.dataset_directory).content_hash == content_hash
    assert scored(config).equals(scores)
    assert not list(config.directory.glob(".*"))
