"""Every bad input is refused with its message and exit code, and nothing half-written is left.

Raw data is in tests/spark/test_bad_raw_data.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import pytest

from distrec import evaluate, scoring
from distrec.config import Config, load_config
from distrec.job import execute, run_job
from distrec.sharding.collectives import start
from distrec.trainer import train
from tests.bad_inputs import checkpoints, configs, datasets, raw, table
from tests.bad_inputs.case import Case, snapshot
from tests.training import make_config, write_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a dataset and a checkpoint."""
    config = make_config(tmp_path_factory.mktemp("trained"), {"train": {"max_steps": 2}})
    train_alone(config)
    write_config(config)
    return config.directory


def train_alone(config: Config) -> dict[str, Any]:
    return train(config, start(config.launch, distributed=False)).summary()


def score_without_spark(config: Config) -> dict[str, Any]:
    # what these cases break is looked at before Spark is asked for anything
    return scoring.run(cast(Any, None), config).model_dump()


def job_of(case: Case, run: Path) -> int:
    """Give the run to the job, and return its exit code."""
    path = run / configs.NAME
    if case.job == "load":
        return run_job("train", "", train_alone, ["--config", str(path)])
    config = load_config(path, [f"output={run}", *case.settings])
    jobs = {"train": train_alone, "evaluate": evaluate.run, "score": score_without_spark}
    return execute(case.job, config, jobs[case.job])


def check(case: Case, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(run)
    assert job_of(case, run) == case.exit_code, capsys.readouterr().err
    assert case.pattern.search(capsys.readouterr().err)
    assert snapshot(run) == before
    assert not (run / datasets.RAN).exists()


@pytest.mark.parametrize("case", configs.CASES, ids=str)
def test_configurations(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case.make(tmp_path)
    check(case, tmp_path, capsys)


@pytest.mark.parametrize("case", [*datasets.CASES, *checkpoints.CASES], ids=str)
def test_datasets_and_checkpoints(
    case: Case, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    # train finds no checkpoint: it would go on from one
    kept = ("logs",) if case.job != "train" else ("logs", "checkpoints")
    shutil.copytree(trained, run, ignore=lambda folder, _: kept if folder == str(trained) else ())
    case.make(run)
    check(case, run, capsys)


def test_the_page_is_made_of_these_cases() -> None:
    assert (ROOT / "docs" / "bad-inputs.md").read_text(encoding="utf-8") == table.page(), (
        "run: python -m tests.bad_inputs.table > docs/bad-inputs.md"
    )
    cases = [case for section in table.SECTIONS.values() for case in section]
    assert len(cases) + len(raw.ROWS) > 60
    assert len({(case.name, case.job) for case in cases}) == len(cases)
