"""`distrec clean` takes what no job has committed, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from distrec.clean import find_leftovers, remove
from distrec.cli import app
from distrec.errors import ConfigError
from distrec.trainer.watchdog import Watchdog
from tests.unit.test_status import look_after

TOKEN = "0123456789ab"
KEPT = (
    "dataset/manifest.json", "scores/part.parquet", "config.toml", ".hidden", "logs/jobs.jsonl",
    "checkpoints/best.json", "checkpoints/step-00000003/manifest.json",
    "checkpoints-before-1/step-00000009/manifest.json", "notes-0123456789ab/a.txt",
)  # fmt: skip
GOES = (
    f".dataset-{TOKEN}/part.parquet", f".scores-old-{TOKEN}/part.parquet", ".stages.json.4711",
    "logs/.heartbeat-1.json", f"checkpoints/.partial-step-00000006-{TOKEN}/dense.safetensors",
    "checkpoints/.best.json.12", f"checkpoints/.partial-replaced-step-00000003-{TOKEN}/x",
)  # fmt: skip


def tree(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def write(directory: Path, *names: str) -> None:
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def test_what_was_never_committed_goes(tmp_path: Path) -> None:
    write(tmp_path, *KEPT, *GOES)
    assert find_leftovers(tmp_path, 3600) == []
    shown = CliRunner().invoke(app, ["clean", str(tmp_path), "--older-than", "0", "--dry-run"])
    assert len(shown.output.splitlines()) == len(GOES)
    assert tree(tmp_path) == {*KEPT, *GOES}
    assert CliRunner().invoke(app, ["clean", str(tmp_path), "--older-than", "0"]).exit_code == 0
    assert tree(tmp_path) == set(KEPT)


def test_what_was_moved_aside_for_nothing_gets_its_name_back(tmp_path: Path) -> None:
    write(tmp_path, "logs/train.log", f".dataset-old-{TOKEN}/manifest.json",
          f"checkpoints/.partial-replaced-step-00000003-{TOKEN}/manifest.json")  # fmt: skip
    for leftover in find_leftovers(tmp_path, 0):
        remove(leftover)
    names = {"dataset/manifest.json", "checkpoints/step-00000003/manifest.json"}
    assert tree(tmp_path) == {"logs/train.log", *names}


def test_links_and_running_jobs_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "logs/train.log", "elsewhere/file")
    os.symlink(tmp_path / "elsewhere", tmp_path / f".dataset-{TOKEN}")
    assert find_leftovers(tmp_path, 0) == []
    watchdog = Watchdog(0, 60, tmp_path / "logs", lambda message, waits: None)
    watchdog._write_heartbeat()
    look_after(monkeypatch, watchdog._write_heartbeat)
    with pytest.raises(ConfigError, match="whose ranks are running"):
        find_leftovers(tmp_path, 0)
