"""Without Horovod one process still trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distrec.checkpoint import find
from distrec.config import load_config
from tests.synthetic import write_dataset

ROOT = Path(__file__).parents[2]
CONFIG = """
name = "small"
output = "{output}"
[prepare.events]
paths = ["none"]
time = "time"
[model]
embedding_dim = 8
[train]
max_steps = 5
global_batch_size = 64
"""


@pytest.fixture
def train(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Runs `distrec train` on a small dataset where `import horovod` fails."""
    hidden = tmp_path / "hidden" / "horovod"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('horovod is not here')\n")
    path = tmp_path / "small.toml"
    path.write_text(CONFIG.format(output=tmp_path / "run"))
    write_dataset(tmp_path / "run" / "dataset")

    def run(*overrides: str) -> subprocess.CompletedProcess[str]:
        arguments = [part for override in overrides for part in ("--set", override)]
        return subprocess.run(
            [sys.executable, "jobs/train.py", "--config", str(path), *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{hidden.parent}{os.pathsep}{ROOT}"},
        )

    return path, run


def test_one_process_trains(train) -> None:  # type: ignore[no-untyped-def]
    path, run = train
    result = run()
    assert result.returncode == 0, result.stderr[-3000:]
    assert find(load_config(path).checkpoint_directory, "best").name == "step-00000005"
