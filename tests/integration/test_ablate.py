"""Ablation and search on a small dataset: each trained in this process, nothing done twice."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from distrec import ablate, pipeline, tune
from distrec.checkpoint import find, read_checkpoint_manifest
from distrec.cli import app
from distrec.config import Config, dump_config, load_config, parse_config
from distrec.errors import ConfigError, TrainingError
from distrec.sharding.collectives import start
from distrec.trainer import train
from tests.synthetic import write_dataset


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that are trained, which is done in this process."""
    names: list[str] = []

    def work(config: Config) -> dict[str, Any]:
        names.append(config.name)
        train(config, start(config.launch, distributed=False))
        return {}

    stages = [
        dataclasses.replace(stage, function=work) if stage.name == "train" else stage
        for stage in pipeline.STAGES
    ]
    monkeypatch.setattr(pipeline, "STAGES", tuple(stages))
    # the dataset is there, and was not made by this configuration
    run_stages = pipeline.run_stages

    def without_prepare(
        config: Config, force: bool = False, only: Sequence[str] = ()
    ) -> tuple[int, list[str]]:
        return (0, []) if list(only) == ["prepare"] else run_stages(config, force, only)

    monkeypatch.setattr(pipeline, "run_stages", without_prepare)
    return names


def write_run(directory: Path, **sections: Any) -> Path:
    """A dataset with planted groups and the file of a run that has it."""
    document = {
        "name": "planted",
        "output": str(directory / "run"),
        "prepare": {"events": {"paths": ["none.csv"], "time": "time"}},
        "model": {"towers": ["cf", "autoencoder", "deep"], "embedding_dim": 8},
        "train": {"global_batch_size": 256, "max_epochs": 2, "warmup_steps": 2},
        # of users none has as few events as the ten of a cold one, of items about half as many
        "evaluate": {"ks": [5], "baselines": ["popularity"], "cold_item_count": 30},
        "launch": {"device": "cpu"},
    }
    for name, keys in sections.items():
        document[name] = {**document.get(name, {}), **keys}
    config = parse_config(document, "the test")
    write_dataset(config.dataset_directory, num_users=150, num_items=60)
    path = directory / "run.toml"
    path.write_text(dump_config(config))
    return path


def test_each_tower_off_and_alone(tmp_path: Path, trained: list[str]) -> None:
    path = write_run(tmp_path)
    arguments = ["ablate", str(path), "--seed", "1", "--seed", "2"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    names = [
        "all", "without-cf", "without-autoencoder", "without-deep", "only-cf",
        "only-autoencoder", "only-deep",
    ]  # fmt: skip
    assert trained == [f"planted-{name}-seed-{seed}" for name in names for seed in (1, 2)]
    directory = tmp_path / "run" / "ablation"
    table = json.loads((directory / "ablation.json").read_text())
    assert [row["name"] for row in table["rows"]] == [*names, "popularity"]
    assert [(one["split"], one["slice"]) for one in table["columns"]] == [
        ("valid", "all"), ("test", "all"), ("test", "cold_items"),
    ]  # fmt: skip
    cold = table["columns"][2]["num_users"]
    assert 0 < cold < 150
    assert f"ndcg@10 test, cold items ({cold} users)" in done.stdout
    assert table["rows"][1]["towers"] == ["autoencoder", "deep"]
    assert table["rows"][4]["towers"] == ["cf"]
    for row in table["rows"][:-1]:
        runs = [directory / f"{row['name']}-seed-{seed}" for seed in (1, 2)]
        manifests = [read_checkpoint_manifest(find(one / "checkpoints")) for one in runs]
        # ndcg@10, by which training goes, whatever evaluate.ks says
        values = [manifest.metrics["ndcg@10"] for manifest in manifests]
        assert row["cells"][0]["mean"] == pytest.approx(np.mean(values))
        assert row["cells"][0]["spread"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        towers = [manifest.config["model"]["towers"] for manifest in manifests]
        assert towers == [row["towers"]] * 2
        assert [load_config(one / "config.toml").seed for one in runs] == [1, 2]
        assert values[0] != values[1]
    whole, without = (table["rows"][place]["cells"][1] for place in (0, 1))
    assert "difference" not in whole
    difference = without["difference"]
    assert difference["mean"] == pytest.approx(without["mean"] - whole["mean"])
    assert difference["low"] <= difference["mean"] <= difference["high"]
    assert "| only-deep | 0." in done.stdout
    assert "| *popularity* | 0." in done.stdout
    # nothing is trained twice, and what is gone is trained again
    shutil.rmtree(directory / "only-cf-seed-2" / "checkpoints")
    trained.clear()
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert trained == ["planted-only-cf-seed-2"]


def test_of_two_towers_each_alone_is_the_model_without_the_other() -> None:
    assert [one.towers for one in ablate.variants(["cf", "deep"])] == [
        ("cf", "deep"), ("cf",), ("deep",),
    ]  # fmt: skip


def test_one_tower_is_refused(tmp_path: Path, trained: list[str]) -> None:
    config = load_config(write_run(tmp_path, model={"towers": ["cf"]}))
    with pytest.raises(ConfigError, match=r"Received: model.towers = \['cf'\]. Name at least two"):
        ablate.run(config, [1])
    assert trained == []


RANGES = {
    "train.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
    "model.embedding_dim": {"low": 4, "high": 12, "step": 4},
    "model.deep_hidden": {"choices": [[128], [8, 8]]},
}


def test_a_search_goes_on_and_writes_the_best(tmp_path: Path, trained: list[str]) -> None:
    pytest.importorskip("optuna")
    path = write_run(tmp_path, tune={"trials": 2, "parameters": RANGES})
    assert CliRunner().invoke(app, ["tune", str(path)]).exit_code == 0
    assert len(trained) == 2
    done = CliRunner().invoke(app, ["tune", str(path), "--set", "tune.trials=4"])
    assert done.exit_code == 0, done.output
    assert len(set(trained)) == len(trained) == 4
    directory = tmp_path / "run" / "tune"
    document = json.loads((directory / "trials.json").read_text())
    values = [row["value"] for row in document["trials"]]
    assert len(values) == 4
    assert values == sorted(values, reverse=True)
    # the file's own values are tried first
    base = load_config(path)
    own = {
        "train.learning_rate": base.train.learning_rate,
        "model.embedding_dim": 8,
        "model.deep_hidden": [128],
    }
    (first,) = [row for row in document["trials"] if trained[0].endswith(row["directory"])]
    assert first["values"] == own
    # the best one keeps its checkpoints, and best.toml says how to train it
    best = document["trials"][0]
    kept = [path.parent.name for path in directory.glob("*/checkpoints")]
    assert kept == [best["directory"]]
    manifest = read_checkpoint_manifest(find(directory / best["directory"] / "checkpoints"))
    assert manifest.metrics["ndcg@10"] == best["value"]
    written = load_config(directory / "best.toml")
    assert written.train.learning_rate == best["values"]["train.learning_rate"]
    assert written.model.embedding_dim == best["values"]["model.embedding_dim"]
    assert (written.name, written.output) == (base.name, base.output)
    assert written.train.keep_checkpoints == base.train.keep_checkpoints


def test_a_trial_that_was_cut_off_is_taken_up_again_and_one_that_diverges_is_not(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    parameters = {"train.learning_rate": RANGES["train.learning_rate"]}
    config = load_config(write_run(tmp_path, tune={"trials": 3, "parameters": parameters}))
    codes = iter([0, 130, 0, TrainingError.exit_code])
    seen: list[str] = []
    run_stages = pipeline.run_stages

    def sometimes(one: Config, only: list[str]) -> tuple[int, list[str]]:
        if only == ["prepare"]:
            return 0, []
        seen.append(one.directory.name)
        code = next(codes)
        return (code, []) if code else run_stages(one, only=only)

    monkeypatch.setattr(pipeline, "run_stages", sometimes)
    assert tune.run(config)[0] == 130
    code, directory = tune.run(config)
    assert code == 0
    assert seen[2] == seen[1] != seen[0]
    rows = json.loads((directory / "trials.json").read_text())["trials"]
    assert {row["directory"] for row in rows} == set(seen)
    assert [row["value"] is None for row in rows] == [False, False, True]
    assert rows[2]["directory"] == seen[3]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "needs .tune.parameters.. Received: none"),
        ({"train.learning_rat": {"low": 1, "high": 2}}, "Received: 'train.learning_rat', which is"),
        ({"evaluate.batch_size": {"low": 1, "high": 2}}, "Received: 'evaluate.batch_size'. Take"),
        ({"train.metric": {"choices": ["ndcg@10", "hr@10"]}}, "Received: 'train.metric'. Take"),
        ({"model.normalize": {"low": 0, "high": 1}}, "model.normalize = False. Give choices"),
        ({"model.embedding_dim": {"low": 4.0, "high": 8.0}}, r"model.embedding_dim, .*\(4.0, 8.0"),
        ({"model.embedding_dim": {"low": 3, "high": 8}}, "multiple of 4. Received: 3"),
        ({"model.towers": {"choices": [["cf"], ["fc"]]}}, "Received: 'fc'"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_the_first_trial(
    tmp_path: Path, trained: list[str], parameters: dict[str, Any], message: str
) -> None:
    config = load_config(write_run(tmp_path, tune={"parameters": parameters}))
    with pytest.raises(ConfigError, match=message):
        tune.run(config)
    assert trained == []


def test_without_optuna_the_extra_is_named(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    config = load_config(write_run(tmp_path, tune={"parameters": RANGES}))
    with pytest.raises(ConfigError, match=r"pip install -c constraints.txt 'distrec\[tune\]'"):
        tune.run(config)
    assert trained == []


@pytest.mark.parametrize(
    ("one", "message"),
    [
        ({"low": 2, "high": 1}, "low < high, or choices"),
        ({"high": 1}, "low < high, or choices"),
        ({"low": 0, "high": 1, "log": True}, "log needs low > 0"),
        ({"low": 0, "high": 1, "step": 2}, "fits between low and high"),
        ({"choices": [1]}, "at least two"),
        ({"choices": [1, 2], "low": 1}, "or choices"),
        ({"lo": 1, "high": 2}, "Did you mean 'low'"),
    ],
)
def test_ranges_that_cannot_be_are_refused_with_the_file(
    tmp_path: Path, one: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        write_run(tmp_path, tune={"parameters": {"loss.l2": one}})
