"""A stage is done again when, and only when, something that it depends on has changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distrec import pipeline
from distrec.config import Config, load_config, section_hash
from distrec.errors import DataError
from distrec.job import execute, note_interrupt
from distrec.store import SCORES, Current, Store, Version

CONFIG = """
name = "x"
[prepare.events]
paths = ["raw.csv"]
time = "time"
"""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with raw data, where each stage writes the hash of what it reads."""
    monkeypatch.chdir(tmp_path)
    Path("raw.csv").write_text("user_id,item_id,time\n1,2,3\n")
    Path("x.toml").write_text(CONFIG)
    stages = []
    for stage in pipeline.STAGES:

        def work(config: Config, stage: pipeline.Stage = stage) -> dict[str, Any]:
            read = [
                other.output(config).read_text()
                for other in pipeline.STAGES
                if other.name in stage.inputs
            ]
            sections = section_hash(config, *stage.sections)
            raw = Path("raw.csv").read_text()
            stage.output(config).parent.mkdir(parents=True, exist_ok=True)
            stage.output(config).write_text(json.dumps([stage.name, sections, read, raw]))
            return {}

        stages.append(
            pipeline.Stage(
                stage.name,
                work,
                stage.sections,
                stage.inputs,
                stage.output,
                stage.files,
                stage.published,
            )
        )
    monkeypatch.setattr(pipeline, "STAGES", tuple(stages))
    return tmp_path


def run(*overrides: str) -> list[str]:
    code, done = pipeline.run_stages(load_config("x.toml", overrides))
    assert code == 0
    return done


ALL = ["prepare", "train", "evaluate", "score", "report"]


def test_nothing_changed_nothing_done(directory: Path) -> None:
    assert run() == ALL
    assert run() == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("prepare.history_length=9", ALL),
        ("seed=2", ALL),
        ("train.learning_rate=0.5", ALL[1:]),
        ("evaluate.ks=[3]", ["evaluate", "report"]),
        ("score.k=3", ["score", "report"]),
        ("score.checkpoint='newest'", ["evaluate", "score", "report"]),
        ("report.sample_users=3", ["report"]),
        ("launch.threads_per_rank=2", []),
        ("spark.driver_memory='1g'", []),
    ],
)
def test_redone_from_the_stage_whose_settings_changed(
    directory: Path, override: str, expected: list[str]
) -> None:
    run()
    assert run(override) == expected


def test_redone_when_raw_data_or_an_output_changed(directory: Path) -> None:
    run()
    Path("raw.csv").write_text("user_id,item_id,time\n1,2,3\n4,5,6\n")
    assert run() == ALL
    Path("runs/x/metrics.json").unlink()
    # made again as it was, byte for byte, so the report still stands
    assert run() == ["evaluate"]


def test_a_failed_stage_ends_the_run_and_is_tried_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = pipeline.STAGES

    def fail(config: Config) -> dict[str, Any]:
        raise DataError("the file is empty")

    broken = pipeline.Stage("train", fail, good[1].sections, good[1].inputs, good[1].output)
    monkeypatch.setattr(pipeline, "STAGES", (good[0], broken, *good[2:]))
    assert pipeline.run_stages(load_config("x.toml")) == (DataError.exit_code, ["prepare"])
    captured = capsys.readouterr()
    assert "train: the file is empty" in captured.err
    # for people: the lines of JSON are in the logs
    assert captured.out == ""
    logged = Path("runs/x/logs/jobs.jsonl").read_text().splitlines()
    assert [json.loads(entry)["exit_code"] for entry in logged] == [0, 3]
    line = json.loads(logged[-1])
    assert (line["job"], line["error"]) == ("train", "DataError")
    monkeypatch.setattr(pipeline, "STAGES", good)
    assert run() == ALL[1:]


@pytest.mark.parametrize(
    ("key", "stage"),
    [("prepare.exclude_users", "prepare"), ("evaluate.test_candidates", "evaluate")],
)
def test_another_list_in_a_file_is_read(directory: Path, key: str, stage: str) -> None:
    override = f"{key}=list.csv"
    Path("list.csv").write_text("1\n")
    assert (run(override), run(override)) == (ALL, [])
    Path("list.csv").write_text("1\n2\n")
    assert run(override) == [stage]


def test_the_resolved_configuration_lies_in_the_run(directory: Path) -> None:
    run("train.max_epochs=3")
    resolved = load_config("runs/x/config.toml")
    assert resolved.train.max_epochs == 3
    assert resolved == load_config("x.toml", ["train.max_epochs=3"])


def test_an_interrupt_is_told_as_one_whatever_comes_of_it(
    directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(config: Config) -> dict[str, Any]:
        try:
            raise KeyboardInterrupt
        finally:
            raise OSError("the connection is gone")

    assert execute("prepare", load_config("x.toml"), interrupted) == 130
    output, told = capfd.readouterr()
    assert told == "\nprepare: interrupted\n"
    assert json.loads(output)["exit_code"] == 130
    assert json.loads(output)["message"] == "interrupted"

    def lost(config: Config) -> dict[str, Any]:
        note_interrupt()
        raise DataError("the connection is gone")

    assert execute("prepare", load_config("x.toml"), lost) == 130
    assert capfd.readouterr().err == "\nprepare: interrupted\n"

    def failed(config: Config) -> dict[str, Any]:
        raise DataError("a later job is another matter")

    assert execute("score", load_config("x.toml"), failed) == 3


def test_what_is_published_by_others_is_made_again(directory: Path) -> None:
    """A stage with a store is up to date only while the store has what it left there."""
    store = f"store=file://{directory}/store"
    assert run(store) == ALL
    assert run(store) == []
    others = Store(f"file://{directory}/store", "x", SCORES)
    version = Version(folder="scores-1", manifest_sha256="0" * 64, manifest_bytes=1)
    others.swap(Current(versions={SCORES: version}))
    # its report is of the same files
    assert run(store) == ["score", "report"]
    assert run(store) == []


@pytest.mark.parametrize("stage", ["prepare", "score"])
def test_outputs_are_published_when_they_are_whole(
    directory: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """And what is read is fetched first."""
    calls: list[str] = []

    class Manifest:
        counts = num_users = num_rows = 0
        model_version = ""
        files = ()

        def all_files(self) -> tuple[()]:
            return ()

    def runs(*_: Any) -> Manifest:
        calls.append("run")
        return Manifest()

    monkeypatch.setattr(f"distrec.{'prepare' if stage == 'prepare' else 'scoring'}.run", runs)
    monkeypatch.setattr("distrec.spark.session", lambda *_: None)
    monkeypatch.setattr(pipeline, "fetch_dataset", lambda _: calls.append("dataset"))
    monkeypatch.setattr("distrec.checkpoint.fetch_one", lambda *_: calls.append("checkpoint"))
    monkeypatch.setattr(pipeline, "publish", lambda _, output, *__: calls.append(output))
    getattr(pipeline, stage)(load_config("x.toml", ()))
    expected = {
        "prepare": ["run", "dataset"],
        "score": ["dataset", "checkpoint", "run", "scores"],
    }
    assert calls == expected[stage]
