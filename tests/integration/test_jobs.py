"""Each job as a cluster runs it: spark-submit to a standalone master with workers, horovodrun."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pyspark
import pytest

from distrec.checkpoint import find
from distrec.config import load_config
from distrec.dataset import read_manifest
from tests.integration.raw import write_raw
from tests.java import QUICK_JAVA

ROOT = Path(__file__).parents[2]
SPARK = Path(pyspark.__file__).parent
SCRIPTS = Path(sysconfig.get_path("scripts"))
TIMEOUT_SECONDS = 240


def environment(**extra: str) -> dict[str, str]:
    """Of the jobs: this repository's code, this environment's Python on every executor."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_HOME": str(SPARK),
        "OMP_NUM_THREADS": "1",
        "JAVA_TOOL_OPTIONS": QUICK_JAVA,
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
        **extra,
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(log: Path, text: str, count: int) -> None:
    deadline = time.monotonic() + 240
    while log.read_text(errors="replace").count(text) < count:
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
        time.sleep(0.2)


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a standalone master on the loopback, with two workers of one core each."""
    folder = tmp_path_factory.mktemp("cluster")
    port = free_port()
    address = f"spark://127.0.0.1:{port}"
    deploy = "org.apache.spark.deploy"
    commands = [
        [f"{deploy}.master.Master", "--host", "127.0.0.1", "--port", str(port),
         "--webui-port", str(free_port())],
        *(
            [f"{deploy}.worker.Worker", "--host", "127.0.0.1", "--cores", "1", "--memory", "1g",
             "--webui-port", str(free_port()), "--work-dir", str(folder / f"worker-{k}"), address]
            for k in range(2)
        ),
    ]  # fmt: skip
    processes = []
    log = folder / "master.log"
    with log.open("w") as stream:
        for number, command in enumerate(commands):
            output = stream if number == 0 else subprocess.DEVNULL
            processes.append(
                subprocess.Popen(
                    [str(SPARK / "bin" / "spark-class"), *command],
                    stdout=output,
                    stderr=output,
                    env=environment(SPARK_LOCAL_IP="127.0.0.1"),
                )
            )
            if number == 0:
                wait_for(log, "I have been elected leader", 1)
    try:
        wait_for(log, "Registering worker", 2)
        yield address
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(timeout=20)


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    return write_raw(folder / "raw", folder / "run")


def finish(command: list[str], **extra: str) -> dict[str, object]:
    """Run a job; its line of JSON."""
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env=environment(**extra),
        cwd=ROOT,
    )
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    lines = [line for line in result.stdout.splitlines() if '{"job"' in line]
    assert lines, result.stdout
    entry: dict[str, object] = json.loads(lines[-1][lines[-1].index("{") :])
    return entry


def submit(master: str, *arguments: str) -> dict[str, object]:
    return finish(
        [
            str(SPARK / "bin" / "spark-submit"), "--master", master, "--driver-memory", "1g",
            "--conf", "spark.executor.memory=700m", "--conf", "spark.driver.host=127.0.0.1",
            "--conf", "spark.ui.enabled=false", *arguments,
        ],
        SPARK_LOCAL_IP="127.0.0.1",
    )  # fmt: skip


# four jobs with a start of Spark each: 208 s on a slow machine with nothing beside it
@pytest.mark.timeout(600)
def test_the_four_jobs_one_after_another(master: str, config_path: Path) -> None:
    config = load_config(config_path)
    entry = submit(master, "jobs/prepare.py", "--config", str(config_path))
    assert entry["job"] == "prepare"
    manifest = read_manifest(config.dataset_directory)
    assert manifest.num_users == 122
    assert manifest.num_items == manifest.num_trained_items + 1

    train = [
        str(SCRIPTS / "horovodrun"), "-np", "2", "--gloo", "--network-interfaces", "lo",
        sys.executable, "jobs/train.py", "--config", str(config_path),
    ]  # fmt: skip
    assert finish(train)["job"] == "train"
    assert find(config.checkpoint_directory, "best").is_dir()

    evaluate = [sys.executable, "jobs/evaluate.py", "--config", str(config_path)]
    assert finish(evaluate)["job"] == "evaluate"
    models = json.loads(config.metrics_path.read_text())["splits"]["test"]["models"]
    assert models["distrec"]["metrics"]["ndcg@10"] > models["popularity"]["metrics"]["ndcg@10"]

    entry = submit(master, "jobs/score.py", "--config", str(config_path), "--set", "score.k=3")
    assert entry["job"] == "score"
    table = pq.read_table(list(config.scores_directory.rglob("*.parquet")))
    assert table.num_rows == 3 * 120
    assert len(set(table["user_id"].to_pylist())) == 120


def test_ranks_on_spark_executors(master: str, config_path: Path) -> None:
    config = load_config(config_path)
    if not config.dataset_directory.exists():
        submit(master, "jobs/prepare.py", "--config", str(config_path))
    shutil.rmtree(config.checkpoint_directory, ignore_errors=True)
    entry = submit(
        master, "jobs/train.py", "--launcher", "spark", "--config", str(config_path),
        "--set", "train.max_epochs=1",
    )  # fmt: skip
    assert entry["job"] == "train"
    assert find(config.checkpoint_directory, "best").is_dir()


@pytest.mark.parametrize("job", ["prepare", "train", "evaluate", "score"])
def test_help_and_bad_configuration(job: str, config_path: Path) -> None:
    """Neither starts Spark or ranks; a bad configuration has its own exit code."""
    script = [sys.executable, f"jobs/{job}.py"]
    shown = subprocess.run(
        [*script, "--help"], capture_output=True, text=True, env=environment(), cwd=ROOT
    )
    assert shown.returncode == 0
    for option in ("--config", "--set", "exit codes"):
        assert option in shown.stdout
    refused = subprocess.run(
        [*script, "--config", str(config_path), "--set", "score.kk=1"],
        capture_output=True, text=True, env=environment(), cwd=ROOT,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "unknown key 'score.kk'" in refused.stderr
    assert "Traceback" not in refused.stderr
