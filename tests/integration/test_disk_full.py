"""A disk that fills up stops the job with a message, and leaves what was there as it was."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distrec import checkpoint, evaluate
from distrec.checkpoint.export import export_table
from distrec.config import Config, load_config
from distrec.dataset import read_manifest
from distrec.job import execute
from distrec.report.page import write_report
from distrec.sharding.collectives import OneProcess
from distrec.trainer import train
from tests.bad_inputs.case import snapshot
from tests.disks import Disk, fill
from tests.integration.raw import write_raw
from tests.training import make_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration of a run that has its dataset, on a disk with room."""
    folder = tmp_path_factory.mktemp("room")
    path = write_raw(folder / "raw", folder / "run")
    result = distrec("prepare", path)
    assert result.returncode == 0, result.stderr[-4000:]
    return path


def distrec(stage: str, config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run one stage in a process of its own."""
    arguments = [part for override in overrides for part in ("--set", override)]
    code = "import sys; from distrec.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, stage, str(config), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
    )


def size_kib(folder: Path) -> int:
    """Room that a folder takes on a tmpfs, in KiB: pages of 4 KiB."""
    return sum(4 * -(-path.stat().st_size // 4096) for path in folder.rglob("*") if path.is_file())


def test_prepare(prepared: Path, disk: Disk) -> None:
    full = disk(120)
    result = distrec("prepare", prepared, f"output={full}/run")
    assert result.returncode == 3, result.stderr[-4000:]
    assert "No space left on device" in result.stderr
    assert not (full / "run" / "dataset").exists()
    assert not [path for path in (full / "run").iterdir() if path.name.startswith(".dataset")]


def test_train_keeps_the_last_good_checkpoint(prepared: Path, disk: Disk) -> None:
    config = load_config(prepared)
    needed = size_kib(config.dataset_directory)
    # one checkpoint of this model takes about 250 KiB
    full = disk(needed + 700)
    shutil.copytree(config.dataset_directory, full / "run" / "dataset")
    settings = (
        f"output={full}/run",
        "train.keep_checkpoints=99",
        "train.checkpoint_every_steps=2",
        "train.early_stopping_patience=0",
    )
    result = distrec("train", prepared, *settings)
    assert result.returncode == 4, result.stderr[-4000:]
    assert "No space left on device" in result.stderr
    left = [path.name for path in (full / "run" / "checkpoints").iterdir()]
    assert left
    assert not [name for name in left if name.startswith(".")]
    checkpoint.verify(checkpoint.find(full / "run" / "checkpoints", "newest"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_was_written_before_stays(disk: Disk, capsys: pytest.CaptureFixture[str]) -> None:
    """Writers that need no Spark; scores are in tests/spark/test_score.py."""
    full = disk(32 * 1024)
    config, longer = (
        make_config(full / "run", {"train": {"max_steps": steps, "decay": "none"}})
        for steps in (2, 4)
    )
    jobs: dict[str, Callable[[Config], Any]] = {
        "train": lambda config: train(config, OneProcess(torch.device("cpu"))).summary(),
        "evaluate": evaluate.run,
        "report": lambda config: {"report": str(write_report(config))},
        "export": lambda config: {"rows": export_item_table(config)},
    }
    for name, job in jobs.items():
        assert execute(name, config, job) == 0
    before = snapshot(full / "run")
    # logs take less than 24 KiB, a checkpoint takes more
    cases = (("evaluate", 0, 3), ("report", 0, 3), ("export", 0, 3), ("train", 0, 3),
             ("train", 24, 4))  # fmt: skip
    for name, free_kib, exit_code in cases:
        ballast = fill(full, free_kib)
        code = execute(name, longer if name == "train" else config, jobs[name])
        assert code == exit_code, capsys.readouterr().err
        assert "No space left on device" in capsys.readouterr().err
        assert snapshot(full / "run") == before
        ballast.unlink()
    assert execute("train", longer, jobs["train"]) == 0


def export_item_table(config: Config) -> int:
    path = checkpoint.find(config.checkpoint_directory, "newest")
    return export_table(
        path, "item", config.directory / "item.parquet", config.dataset_directory,
        read_manifest(config.dataset_directory),
    )  # fmt: skip
