"""A disk that fills up stops the job with a message, and leaves what was there as it was."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distrec import checkpoint
from distrec.config import load_config
from tests.integration.raw import write_raw

ROOT = Path(__file__).parents[2]
Disk = Callable[[int], Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Makes a file system of so many KiB."""
    mounted: list[Path] = []

    def make(kib: int) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        result = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)],
            capture_output=True,
            text=True,
        )
        if result.returncode != 0:
            pytest.skip(f"this machine does not let us mount a small disk: {result.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


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
