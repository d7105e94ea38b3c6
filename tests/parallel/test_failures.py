"""What goes wrong in a job of ranks: everybody stops, and the message names what and where."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from distrec import checkpoint, pulse
from distrec.config import Config
from distrec.errors import ConfigError, DistrecError, LaunchError
from distrec.launch import train_locally
from distrec.sharding.collectives import Collectives, OneProcess
from distrec.trainer import train
from distrec.trainer.watchdog import Watchdog
from tests.parallel.harness import ROOT, run_ranks
from tests.training import losses, make_config, write_config
from tests.unit.test_trainer import rewrite_ages

LONG = {"train": {"max_epochs": 10_000, "checkpoint_every_steps": 20, "log_every_steps": 100,
                  "evaluate_every_steps": 100_000, "decay": "none"}}  # fmt: skip


def caught(config: Config, collectives: Collectives) -> str:
    try:
        train(config, collectives)
    except DistrecError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def body(collectives: Collectives, directory: str) -> dict[str, str]:
    """Failures after which all ranks go on together, each rank's message."""
    rank = collectives.world.rank
    folder = Path(directory)
    answers = {}
    own = {"train": {"max_steps": 2, "learning_rate": 0.01 * (1 + rank)}}
    answers["configuration"] = caught(make_config(folder / "good", own), collectives)
    # rank 1 looks at another dataset
    answers["dataset"] = caught(make_config(folder / ("good", "other")[rank]), collectives)
    own = {"train": {"metric": ("ndcg@10", "ndgc@10")[rank]}}
    answers["one rank refuses"] = caught(make_config(folder / "good", own), collectives)
    bad = {"reader": {"shuffle": False}, "train": {"checkpoint_every_steps": 3}}
    answers["not finite"] = caught(make_config(folder / "nan", bad), collectives)
    bad["train"] = {"on_bad_loss": "skip", "checkpoint_every_steps": 3}
    answers["skipped"] = caught(make_config(folder / "skip", bad), collectives)
    return answers


def test_all_ranks_stop_with_the_reason(tmp_path: Path) -> None:
    make_config(tmp_path / "good")
    make_config(tmp_path / "other", num_users=61)
    # the last row lies in the last of 12 lanes, which rank 1 of 2 reads
    for name in ("nan", "skip"):
        rewrite_ages(make_config(tmp_path / name).dataset_directory, float("nan"))
    answers = run_ranks(
        2, "tests.parallel.test_failures:body", {"directory": str(tmp_path)}, tmp_path
    )
    messages = dict(answers[0])
    assert messages["configuration"].startswith("TrainingError: all ranks train with the same")
    assert "[train] of ranks [1] differs from rank 0's" in messages["configuration"]
    assert "the dataset of ranks [1] differs" in messages["dataset"]
    assert messages["one rank refuses"].startswith("ConfigError: rank 1: a metric is one of")
    assert "on rank 1" in messages["not finite"] or "rank 1 (loss nan" in messages["not finite"]
    assert "rank 0 (" not in messages["not finite"]
    assert "step 6 (epoch 1, batch 6 of 6)" in messages["not finite"]
    newest = checkpoint.find(tmp_path / "nan" / "checkpoints", "newest")
    assert newest.name == "step-00000003"
    assert messages["skipped"] == "nothing was raised"
    for name, steps in (("nan", [6]), ("skip", [6, 12])):
        kept = sorted(path.name for path in (tmp_path / name / "bad_batches").iterdir())
        assert kept == [f"step-{step:08d}-rank-1.parquet" for step in steps]
    # both ranks leave out what one alone would
    keys = {"reader": {"shuffle": False}, "train": {"on_bad_loss": "skip"}}
    alone = make_config(tmp_path / "alone", keys)
    rewrite_ages(alone.dataset_directory, float("nan"))
    train(alone, OneProcess(torch.device("cpu")))
    assert losses(make_config(tmp_path / "skip")) == pytest.approx(losses(alone), rel=1e-4)


def pid_once_saved(config: Config, rank: int) -> int:
    """The process of a rank, after the first checkpoint."""
    heartbeat = config.logs_directory / f"heartbeat-{rank}.json"
    deadline = time.monotonic() + 240
    while not checkpoint.committed(config.checkpoint_directory):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(json.loads(heartbeat.read_text())["pid"])


def signal_later(config: Config, rank: int, number: int, sent: list[float]) -> threading.Thread:
    def work() -> None:
        os.kill(pid_once_saved(config, rank), number)
        sent.append(time.monotonic())

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_killed_rank_is_named_and_the_others_stop(tmp_path: Path) -> None:
    config = make_config(
        tmp_path, {**LONG, "launch": {"device": "cpu", "num_ranks": 2, "max_restarts": 0}}
    )
    sent: list[float] = []
    thread = signal_later(config, 1, signal.SIGKILL, sent)
    with pytest.raises(LaunchError, match=r"rank 1 died with exit code 137 \(SIGKILL") as error:
        train_locally(config)
    thread.join()
    assert time.monotonic() - sent[0] < 30
    assert error.value.exit_code == 6
    assert "last seen at: " in str(error.value)
    for rank in (0, 1):
        pid = json.loads((config.logs_directory / f"heartbeat-{rank}.json").read_text())["pid"]
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ranks_end_with_their_launcher(num_ranks: int, number: int, tmp_path: Path) -> None:
    config = make_config(tmp_path, {**LONG, "launch": {"device": "cpu", "num_ranks": num_ranks}})
    command = [sys.executable, "jobs/train.py", "--launcher", "local"]
    process = subprocess.Popen(
        [*command, "--config", str(write_config(config))],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        pids = [pid_once_saved(config, rank) for rank in range(num_ranks)]
    except BaseException:
        process.terminate()
        raise
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while (left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []
    if number == signal.SIGTERM:
        assert process.returncode == 7
        line = json.loads(output.splitlines()[-1])
        assert line["error"] == "StoppedError"


def moving_body(collectives: Collectives, directory: str) -> str:
    """Rank 0 works longer than a rank may be silent, and rank 1 waits for it."""
    rank = collectives.world.rank
    with Watchdog(rank, 4, Path(directory), lambda message, waits: None):
        if rank == 0:
            for _ in range(100):
                time.sleep(0.1)
                pulse.beat()
        collectives.barrier("test.moving")
    return "met"


def test_a_rank_waits_for_one_that_moves(tmp_path: Path) -> None:
    arguments = {"directory": str(tmp_path)}
    answers = run_ranks(2, "tests.parallel.test_failures:moving_body", arguments, tmp_path)
    assert answers == ["met", "met"]


def test_a_frozen_rank_is_named(tmp_path: Path) -> None:
    keys: dict[str, Any] = {**LONG, "launch": {"device": "cpu", "num_ranks": 2, "max_restarts": 0}}
    # a busy machine takes seconds to read a dataset for the first time
    keys["launch"]["timeout_seconds"] = 20
    config = make_config(tmp_path, keys)
    sent: list[float] = []
    thread = signal_later(config, 1, signal.SIGSTOP, sent)
    with pytest.raises(LaunchError, match="rank 1 ") as error:
        train_locally(config)
    thread.join()
    assert "rank 0 died" not in str(error.value)
    assert time.monotonic() - sent[0] < 60


def test_an_error_of_the_ranks_comes_with_its_class_and_exit_code(tmp_path: Path) -> None:
    config = make_config(
        tmp_path, {"train": {"metric": "auc"}, "launch": {"device": "cpu", "num_ranks": 2}}
    )
    with pytest.raises(ConfigError, match="auc needs labels") as error:
        train_locally(config)
    assert error.value.exit_code == 2
    assert not (tmp_path / "checkpoints").exists()
