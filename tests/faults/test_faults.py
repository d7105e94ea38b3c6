"""Whatever dies, and wherever: training ends with the weights of a run that nothing happened to.

`make test` takes a few cases; `make faults` takes them all and shows what each cost.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distrec import attempt, checkpoint
from distrec.config import Config
from distrec.errors import RankFailedError, StoppedError
from distrec.launch import RESTART, train_locally
from tests.faults.conftest import ROWS
from tests.faults.processes import gone, wait_until
from tests.faults.rank import FAULT
from tests.parallel.harness import ROOT
from tests.training import make_config, write_config

ALL = os.environ.get("DISTREC_FAULTS") == "all"
STEPS = 12
SECTIONS: dict[str, dict[str, Any]] = {
    # dropout is drawn by (seed, step, rank): a step done twice draws the same
    "model": {"dropout": 0.1, "id_dropout": 0.1},
    "train": {"checkpoint_every_steps": 3, "keep_checkpoints": 100},
    "launch": {
        "device": "cpu", "num_ranks": 2, "timeout_seconds": 30, "restart_backoff_seconds": 0.1,
        "grace_seconds": 60,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What a rank does at the n-th visit of a point."""

    rank: int
    point: str
    visit: int
    action: str = "kill"
    always: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.action} at {self.point} {self.visit}"


FAULTS = (
    Fault(1, "backward", 5, always=True),
    Fault(0, "before rename", 2, always=True),
    Fault(0, "read", 8),
    Fault(1, "forward", 2),
    Fault(1, "alltoall", 30),
    Fault(0, "update", 7),
    Fault(1, "validation", 1),
    Fault(1, "checkpoint write", 2),
    Fault(0, "checkpoint write", 1),
    Fault(0, "after rename", 2),
    Fault(1, "backward", 5, "fail"),
    Fault(0, "forward", 6, "kill horovodrun"),
    Fault(1, "forward", 6, "be stuck"),
    Fault(1, "backward", 8, "freeze"),
)


def faulty(monkeypatch: pytest.MonkeyPatch, directory: Path, fault: Fault, **launch: Any) -> Config:
    """A run whose ranks are those of tests.faults.rank."""
    monkeypatch.setenv(FAULT, json.dumps({
        "rank": fault.rank, "point": fault.point, "visit": fault.visit, "action": fault.action,
        "done": str(directory / "done"),
    }))  # fmt: skip
    monkeypatch.setattr(
        attempt,
        "rank_command",
        lambda path: [sys.executable, "-m", "tests.faults.rank", "--config", str(path)],
    )
    monkeypatch.chdir(ROOT)
    sections = {**SECTIONS, "launch": {**SECTIONS["launch"], **launch}}
    return make_config(directory, sections)


def supervised(config: Config) -> list[str]:
    """The command of `distrec train` with ranks of tests.faults.rank."""
    program = (
        "import sys\n"
        "from distrec import attempt, launch\n"
        "from distrec.config import load_config\n"
        "attempt.rank_command = lambda path: "
        "[sys.executable, '-m', 'tests.faults.rank', '--config', str(path)]\n"
        "from distrec.job import execute\n"
        "sys.exit(execute('train', load_config(sys.argv[1]), launch.train_locally))\n"
    )
    return [sys.executable, "-c", program, str(write_config(config))]


def weights(config: Config) -> dict[str, str]:
    """The SHA-256 of every file of the last checkpoint, which holds all that a run goes on from."""
    manifest = checkpoint.read_checkpoint_manifest(
        config.checkpoint_directory / checkpoint.checkpoint_name(STEPS)
    )
    return {name: entry.sha256 for name, entry in checkpoint.manifest.files_of(manifest)}


def restarts(config: Config) -> list[dict[str, Any]]:
    try:
        lines = (config.logs_directory / "jobs.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [entry for entry in map(json.loads, lines) if entry["job"] == RESTART]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], float, Any]:
    config = make_config(tmp_path_factory.mktemp("undisturbed"), SECTIONS)
    started = time.monotonic()
    summary = train_locally(config)
    assert summary["steps"] == STEPS
    assert summary["restarts"] == 0
    return weights(config), time.monotonic() - started, checkpoint.read_best(
        config.checkpoint_directory
    )  # fmt: skip


def check(config: Config, expected: tuple[dict[str, str], float, Any]) -> None:
    assert weights(config) == expected[0]
    best = checkpoint.read_best(config.checkpoint_directory)
    assert best is not None
    for key in ("checkpoint", "value"):
        assert best[key] == expected[2][key]
    assert not list(config.checkpoint_directory.glob(".*"))


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.always or ALL], ids=str)
def test_the_weights_are_those_of_an_undisturbed_run(
    fault: Fault,
    undisturbed: tuple[dict[str, str], float, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = faulty(monkeypatch, tmp_path, fault)
    started = time.monotonic()
    summary = train_locally(config)
    seconds = time.monotonic() - started - undisturbed[1]
    assert (tmp_path / "done").exists()
    entries = restarts(config)
    ROWS.append((str(fault), entries[0]["message"] if entries else "", f"+{seconds:.0f} s"))
    assert summary["restarts"] == 1
    assert len(entries) == 1
    if fault.action != "kill horovodrun":
        assert entries[0]["rank"] == fault.rank
        assert entries[0]["phase"]
    if fault.action == "be stuck":
        stacks = (config.logs_directory / f"stacks-{fault.rank}.txt").read_text()
        assert "in stuck" in stacks
    check(config, undisturbed)


def test_a_rank_that_is_told_to_stop_takes_the_others_along(
    undisturbed: tuple[dict[str, str], float, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault = Fault(1, "forward", 5, "ask to stop")
    config = faulty(monkeypatch, tmp_path, fault)
    with pytest.raises(StoppedError, match=r"after step [56] of 12, which is saved") as error:
        train_locally(config)
    assert error.value.exit_code == 7
    newest = checkpoint.find(config.checkpoint_directory, "newest")
    step = checkpoint.read_checkpoint_manifest(newest).global_step
    assert step in (5, 6)
    summary = train_locally(config)
    ROWS.append((str(fault), str(error.value), ""))
    assert summary["restarts"] == 0
    assert restarts(config) == []
    check(config, undisturbed)


@pytest.mark.skipif(not ALL, reason="one of make faults")
def test_a_supervisor_that_is_killed_takes_its_ranks_along(
    undisturbed: tuple[dict[str, str], float, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Fault(1, "backward", 8, "kill supervisor")
    config = faulty(monkeypatch, tmp_path, fault)
    started = time.monotonic()
    process = subprocess.Popen(supervised(config), cwd=ROOT)
    assert process.wait(120) == -signal.SIGKILL
    pids = [
        json.loads((config.logs_directory / f"heartbeat-{rank}.json").read_text())["pid"]
        for rank in (0, 1)
    ]
    wait_until(lambda: gone(pids), 60)
    # told to end, they may have saved first
    newest = checkpoint.find(config.checkpoint_directory, "newest").name
    assert "step-00000006" <= newest < checkpoint.checkpoint_name(STEPS)
    train_locally(config)
    seconds = time.monotonic() - started - undisturbed[1]
    ROWS.append((str(fault), "its ranks ended, run again", f"+{seconds:.0f} s"))
    check(config, undisturbed)


@pytest.mark.skipif(not ALL, reason="one of make faults")
def test_a_job_that_is_told_to_stop_goes_on_later(
    undisturbed: tuple[dict[str, str], float, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the frozen rank gives the signal time to be sent
    fault = Fault(1, "forward", 8, "freeze")
    config = faulty(monkeypatch, tmp_path, fault, timeout_seconds=60)
    process = subprocess.Popen(supervised(config), cwd=ROOT)
    deadline = time.monotonic() + 120
    while not (tmp_path / "done").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    while not config.stop_path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # long enough that a rank looks for the file again as soon as it goes on
    time.sleep(0.6)
    heartbeat = json.loads((config.logs_directory / "heartbeat-1.json").read_text())
    os.kill(heartbeat["pid"], signal.SIGCONT)
    assert process.wait(120) == 7
    newest = checkpoint.find(config.checkpoint_directory, "newest")
    assert newest.name in ("step-00000008", "step-00000009")
    train_locally(config)
    ROWS.append(("SIGTERM to distrec train", f"saved {newest.name}, exit code 7", ""))
    check(config, undisturbed)


@pytest.mark.skipif(not ALL, reason="one of make faults")
def test_there_is_an_end_to_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Fault(0, "forward", 1, "fail")
    config = faulty(monkeypatch, tmp_path, fault, max_restarts=1)
    # never done: it fails in the same place each time
    monkeypatch.setenv(FAULT, os.environ[FAULT].replace(str(tmp_path / "done"), "/proc/self/none"))
    with pytest.raises(RankFailedError, match="rank 0 failed: "):
        train_locally(config)
    assert [entry["restart_in_seconds"] for entry in restarts(config)] == [0.1, None]
    ROWS.append((f"{fault}, each time", "given up after 1 restart", ""))
