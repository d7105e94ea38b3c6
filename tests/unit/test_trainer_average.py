"""The moving average of the dense weights: its numbers, and that they are what is scored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distrec import checkpoint
from distrec.checkpoint.files import open_tensors
from distrec.scoring.model import open_model
from distrec.sharding.collectives import OneProcess
from distrec.trainer import loop, setup
from distrec.trainer.average import WeightAverage
from tests.training import log_entries, make_config

CPU = torch.device("cpu")


def test_the_average_forgets_as_its_decay_says_once_it_is_warm() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(0.0)
    average.restart()
    with torch.no_grad():
        model.weight.fill_(1.0)
    average.update(1)
    # of the first update 2 / 11 is kept, later a half
    assert average.tensors["weight"].item() == pytest.approx(9 / 11)
    average.update(1000)
    assert average.tensors["weight"].item() == pytest.approx(9 / 11 + 2 / 11 / 2)
    with average.applied():
        assert model.weight.item() == pytest.approx(10 / 11)
    assert model.weight.item() == 1.0


def test_what_is_validated_and_scored_is_the_average(tmp_path: Path) -> None:
    train = {"max_steps": 5, "average_decay": 0.9}
    config = make_config(tmp_path, {"train": train})
    loop.train(config, OneProcess(CPU))
    (path,) = checkpoint.committed(config.checkpoint_directory)
    stored = open_tensors(path / "dense.safetensors", None)
    scored = dict(open_model(path).model.named_parameters())
    # under a softmax the global bias is not trained
    del scored["global_bias"]
    assert len(scored) > 5
    for name, tensor in scored.items():
        torch.testing.assert_close(tensor.detach(), stored[f"average/{name}"], rtol=0, atol=0)
        assert not torch.equal(tensor, stored[f"parameter/{name}"]), name
    # what the log says of the step is of these weights, measured again from the file
    run = setup.build(setup.read_inputs(config, 1), OneProcess(CPU), None)
    checkpoint.load_dense(path, run.model)
    checkpoint.load_tables(
        path, run.tables, run.inputs.plans, config.sharding, run.collectives.world
    )
    metrics = run.validator.measure(run.model, run.tables, lambda: None)
    logged = log_entries(config, "valid")[-1]["metrics"]
    assert logged == pytest.approx(metrics, abs=1e-6)
