"""The learning curve on MLflow: what arrives, what a resumed run does, what a dead server costs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from distrec import checkpoint
from distrec.config import Config
from distrec.errors import ConfigError
from distrec.sharding.collectives import OneProcess
from distrec.trainer import tracking, train
from tests.training import log_entries, make_config

TRAIN = {"max_steps": 4, "checkpoint_every_steps": 2, "keep_checkpoints": 9, "log_every_steps": 1}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    # files in place of a server: the same client
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return f"file://{tmp_path}/mlruns"


def run(config: Config) -> None:
    train(config, OneProcess(torch.device("cpu")))


def runs_of(uri: str) -> list[Run]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("shop")
    return list(client.search_runs([experiment.experiment_id]))


def test_the_curve_arrives_and_goes_on_when_resumed(tmp_path: Path, store: str) -> None:
    report = {"mlflow_uri": store, "mlflow_experiment": "shop"}
    config = make_config(tmp_path, {"train": TRAIN, "report": report})
    run(config)
    (first,) = runs_of(store)
    assert first.info.status == "FINISHED"
    assert first.data.params["model.embedding_dim"] == str(config.model.embedding_dim)
    client = MlflowClient(store)
    curve = client.get_metric_history(first.info.run_id, "train/loss")
    losses = [entry["loss"] for entry in log_entries(config, "step")]
    assert [point.value for point in sorted(curve, key=lambda point: point.step)] == losses
    assert "valid/ndcg_at_10" in first.data.metrics
    for path in checkpoint.committed(config.checkpoint_directory):
        if path.name > "step-00000002":
            shutil.rmtree(path)
    run(config)
    (resumed,) = runs_of(store)
    assert resumed.info.run_id == first.info.run_id
    assert len(client.get_metric_history(first.info.run_id, "train/loss")) == 6


def test_a_dead_server_costs_the_curve_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = {"mlflow_uri": "http://127.0.0.1:9"}
    config = make_config(tmp_path, {"train": TRAIN, "report": report})
    run(config)
    assert sum("MLflow gets no more of this run" in text for text in caplog.messages) == 1
    assert checkpoint.find(config.checkpoint_directory).name == "step-00000004"


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="mlflow_uri holds no password"):
        make_config(tmp_path, {"report": {"mlflow_uri": "http://me:secret@host:5000"}})
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"distrec\[mlflow\]"):
        run(make_config(tmp_path, {"report": {"mlflow_uri": "http://host:5000"}}))
