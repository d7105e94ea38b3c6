"""Fine-tuning: frozen towers stay as the warm start gives them, but for their adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distrec import checkpoint
from distrec.config import Config
from distrec.errors import CheckpointError, ConfigError
from distrec.model.adapters import AdaptedLinear
from distrec.scoring.model import open_model
from distrec.sharding.collectives import OneProcess
from distrec.trainer import TrainResult, train
from tests.training import make_config

TOWERS = ["cf", "autoencoder", "sequence"]
SHARD = "shard-00001-of-00001.safetensors"


def run(config: Config) -> TrainResult:
    return train(config, OneProcess(torch.device("cpu")))


def configured(directory: Path, model: dict[str, Any], **keys: Any) -> Config:
    model = {"towers": TOWERS, "share_item_embedding": False, "sequence_layers": 1, **model}
    keys = {"max_steps": 4, "global_batch_size": 24, "keep_checkpoints": 9, **keys}
    return make_config(directory, {"model": model, "train": keys}, train_rows="windows")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run."""
    config = configured(tmp_path_factory.mktemp("old"), {})
    run(config)
    return config.checkpoint_directory / "step-00000004"


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Parameters, and the rows of every table."""
    dense = load_file(path / "dense.safetensors")
    found = {name: one for name, one in dense.items() if name.startswith("parameter/")}
    for table in (path / "tables").iterdir():
        found[table.name] = load_file(table / SHARD)["weights"]
    return found


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of what was there and is another now."""
    return {name for name, one in before.items() if not torch.equal(one, after[name])}


def test_an_adapted_map_begins_as_it_was() -> None:
    linear = torch.nn.Linear(2, 2)
    inputs = torch.tensor([[1.0, 2.0]])
    expected = linear(inputs)
    adapted = AdaptedLinear(linear, 1)
    torch.testing.assert_close(adapted(inputs), expected)
    with torch.no_grad():
        adapted.adapter_down.copy_(torch.tensor([[3.0, 1.0]]))
        adapted.adapter_up.copy_(torch.tensor([[1.0], [-2.0]]))
    torch.testing.assert_close(adapted(inputs), expected + torch.tensor([[5.0, -10.0]]))


def test_only_what_is_not_frozen_changes(old: Path, tmp_path: Path) -> None:
    model = {"frozen": ["sequence", "autoencoder"], "adapter_rank": 2}
    config = configured(tmp_path, model, warm_start=str(old), checkpoint_every_steps=2)
    run(config)
    last = config.checkpoint_directory / "step-00000004"
    before, after = tensors_of(old), tensors_of(last)
    new = set(after) - set(before)
    assert new
    assert {name.rpartition("/")[2].rpartition(".")[2] for name in new} == {
        "adapter_down", "adapter_up",
    }  # fmt: skip
    assert all(".sequence." in name or ".autoencoder." in name for name in new)
    ups = [after[name] for name in new if name.endswith("adapter_up")]
    assert all(bool(up.any()) for up in ups)
    found = changed(before, after)
    assert {name for name in before if "/" not in name} - found == {
        "item_sequence", "item_history", "item_output",
    }  # fmt: skip
    frozen = ("parameter/towers.sequence", "parameter/towers.autoencoder")
    assert not [name for name in found if name.startswith(frozen)]
    # the gates are trained
    gates = {name for name in found if "gate" in name}
    assert {name.split("/")[1].split(".")[0] for name in gates} == {"user_gate", "item_gate"}
    counted = json.loads((config.logs_directory / "plan.json").read_text())["parameters"]
    trained = [name for name in after if "/" in name and not name.startswith(frozen)]
    trained = [*trained, *new]
    trained.remove("parameter/global_bias")
    assert counted["dense_trained"] == sum(after[name].numel() for name in trained)
    tables = [name for name in after if "/" not in name]
    assert counted["tables"] == sum(after[name].numel() for name in tables)
    rest = {"item", "user", "item_bias"}
    assert counted["tables_trained"] == sum(after[name].numel() for name in rest)
    assert open_model(last).model.towers["sequence"].blocks[0].output.adapter_up.any()
    # and goes on bit for bit
    shutil.rmtree(last)
    run(config)
    assert not changed(after, tensors_of(last))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"frozen": ["sequence"]},
            r"model.frozen needs train.warm_start. Received: \['seq",
        ),
        (
            {"frozen": ["deep"]},
            r"frozen names some of the towers, each once, and 'bias'. Received: \['deep'\]",
        ),
        ({"adapter_rank": 2}, r"adapters stand beside what is frozen. Received: adapter_rank = 2"),
    ],
)
def test_what_is_refused(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(tmp_path, model)


def test_the_bias_of_items_stays_where_it_is_named(old: Path, tmp_path: Path) -> None:
    model = {"frozen": ["sequence", "bias"]}
    run(configured(tmp_path, model, warm_start=str(old), max_steps=2))
    new = tensors_of(tmp_path / "checkpoints" / "step-00000002")
    found = changed(tensors_of(old), new)
    assert "item_bias" not in found
    assert {"item", "user"} <= found


def test_what_the_checkpoint_has_not_is_not_frozen(old: Path, tmp_path: Path) -> None:
    model = {"towers": ["cf", "deep"], "frozen": ["deep"]}
    config = configured(tmp_path, model, warm_start=str(old))
    with pytest.raises(CheckpointError, match=r"frozen comes from the warm start.*does not have"):
        run(config)
    assert not checkpoint.committed(config.checkpoint_directory)
