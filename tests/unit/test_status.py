"""What `distrec status` makes of the files of a run."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from distrec.errors import ConfigError
from distrec.status import read_status, show, slowest
from distrec.trainer.watchdog import Watchdog


def beat(exchange: float, of_input: float) -> dict[str, Any]:
    compute = 1 - exchange - of_input
    return {"shares": {"exchange": exchange, "input": of_input, "compute": compute}}


def test_the_slow_rank_is_the_one_that_waits_least() -> None:
    beats = {0: beat(0.7, 0.1), 1: beat(0.2, 0.6), 2: beat(0.8, 0.1)}
    assert slowest(beats) == (1, "input")
    assert slowest({**beats, 1: beat(0.2, 0.1)}) == (1, "compute")
    assert slowest({0: beat(0.2, 0.1)}) is None
    assert slowest({0: {}, 1: beat(0.2, 0.1)}) is None


def look_after(monkeypatch: pytest.MonkeyPatch, function: Callable[[], object]) -> None:
    """Call it in place of waiting between two looks.

    `time` is replaced in that module alone: another thread that sleeps is none of its business.
    """
    sleeping = SimpleNamespace(sleep=lambda seconds: function())
    monkeypatch.setattr("distrec.status.time", sleeping)


def text(directory: Path) -> str:
    stream = io.StringIO()
    show(read_status(directory), Console(file=stream, width=200))
    return stream.getvalue()


def test_a_run_that_moves_and_one_that_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = tmp_path / "logs"
    with pytest.raises(ConfigError, match="a run's directory has its logs"):
        read_status(tmp_path)
    logs.mkdir()
    assert text(tmp_path) == "no rank is running\n"
    (tmp_path / "stages.json").write_text(json.dumps({"prepare": {"seconds": 12.3}}))
    jobs = [
        {"job": "train restart", "message": "long ago"},
        {"job": "prepare", "exit_code": 0},
        {"job": "train restart", "message": "rank 1 died"},
    ]
    (logs / "jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)) + "\n{cut o")
    step = {"kind": "step", "step": 30, "total_steps": 60, "epoch": 1, "loss": 0.5}
    valid = {"kind": "valid", "step": 20, "metrics": {"ndcg@10": 0.25}}
    (logs / "train.jsonl").write_text(f"{json.dumps(step)}\n{json.dumps(valid)}\n")
    watchdog = Watchdog(0, 60, logs, lambda message, waits: None)
    watchdog.beat("step 31")
    watchdog._write_heartbeat()
    look_after(monkeypatch, watchdog._write_heartbeat)
    shown = text(tmp_path)
    assert "prepare: done, 12 s" in shown
    assert "step 30 of 60, epoch 2, loss 0.5000" in shown
    assert "last validation: step 20, ndcg@10 0.2500" in shown
    assert "lost: rank 1 died" in shown
    assert "long ago" not in shown
    assert "step 31 (" in shown
    assert "runs" in shown
    look_after(monkeypatch, lambda: None)
    still = text(tmp_path)
    assert "no rank is running" in still
    assert "last job: prepare, exit code 0" in still
