"""On a GPU: FBGEMM's kernels update as the CPU's do, and a run learns what it learns on the CPU."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from distrec import checkpoint
from distrec.config import Config, LaunchConfig, ShardingConfig
from distrec.sharding import collectives
from distrec.sharding.kernels import CpuTable, make_table
from distrec.trainer import train
from tests.training import losses, make_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

CPU = torch.device("cpu")
TOWERS = ["cf", "autoencoder", "sequence", "deep", "content"]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_table_updates_as_on_the_cpu(optimizer: str, precision: str, offload: bool) -> None:
    """Rows repeated, some and all; with the cache over host memory, more rows than it holds."""
    config = ShardingConfig.model_validate(
        {"optimizer": optimizer, "precision": precision, "cpu_offload": offload}
    )
    rows, width, gpu = 5000, 8, torch.device("cuda", 0)
    # identical on all ranks: rounds to the nearest, as the CPU does
    tables = (make_table(rows, width, config, gpu, True), CpuTable(rows, width, config, CPU))
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(rows, width, generator=generator)
    for table in tables:
        table.weights()[:] = start
        table.rows_were_written()
    near = {"atol": 1e-5, "rtol": 1e-5} if precision == "fp32" else {"atol": 4e-3, "rtol": 4e-3}
    for step in range(3):
        used = torch.randint(0, rows, (2000,), generator=generator)
        some = torch.randperm(rows, generator=generator)[:1000]
        gradient = torch.randn(2000, width, generator=generator)
        whole = torch.randn(rows, width, generator=generator)
        found = []
        for table, device in zip(tables, (gpu, CPU), strict=True):
            answer = table.lookup(used.to(device))
            answer.backward(gradient.to(device))
            table.update(some.to(device), gradient[:1000].to(device))
            table.update_all(whole.to(device))
            table.set_learning_rate(0.02 / (1 + step))
            found.append(answer.detach().cpu())
        torch.testing.assert_close(*found, **near)
    torch.testing.assert_close(tables[0].weights().cpu(), tables[1].weights(), **near)
    torch.testing.assert_close(tables[0].state().cpu(), tables[1].state(), **near)
    assert (tables[1].weights().float() - start).abs().max() > 0.05


def run(
    directory: Path, device: str, distributed: bool = False, **sections: dict[str, Any]
) -> tuple[Config, Any]:
    """Train on windows with every tower on a device, alone or as Horovod's only rank."""
    model = {"towers": TOWERS, "sequence_heads": 2, **sections.pop("model", {})}
    keys = {"model": model, "launch": {"device": device, "timeout_seconds": 300}, **sections}
    config = make_config(directory, keys, train_rows="windows")
    return config, train(config, collectives.start(LaunchConfig(device=device), distributed))


@pytest.mark.parametrize("attention", ["softmax", "hstu"])
@pytest.mark.parametrize("kind", ["softmax", "sampled_softmax", "sampled_binary", "bpr"])
def test_a_run_learns_as_on_the_cpu(tmp_path: Path, kind: str, attention: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        sections: dict[str, dict[str, Any]] = {
            # the devices draw other negatives: so many that their mean is the same
            "loss": {"kind": kind, "negatives": "uniform", "num_negatives": 4096},
            "model": {"sequence_attention": attention},
            "train": {"max_epochs": 3, "evaluate_every_steps": 100, "fit_tower_weights": True},
        }
        config, _ = run(tmp_path / device, device, **sections)
        found.append(losses(config))
    near = 1e-4 if kind == "softmax" else 0.05
    assert found[1] == pytest.approx(found[0], rel=near)
    assert found[0][-1] < found[0][0]


@pytest.mark.parametrize("offload", [False, True])
def test_resumed_on_the_gpu_and_read_on_the_cpu(tmp_path: Path, offload: bool) -> None:
    """What is drawn goes on where it was; sums of a GPU differ in their last places."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"dropout": 0.2, "id_dropout": 0.2, "input_dropout": 0.3},
        "sharding": {"cpu_offload": offload, "replicate_below_mib": 0.0},
        "train": {"max_steps": 8, "checkpoint_every_steps": 4, "keep_checkpoints": 9,
                  "evaluate_every_steps": 2, "global_batch_size": 32},
    }  # fmt: skip
    config, _ = run(tmp_path, "cuda", **sections)
    last = config.checkpoint_directory / "step-00000008"
    curve, rows = losses(config), torch.as_tensor(checkpoint.read_rows(last, "item", 0, 40))
    for path in checkpoint.committed(config.checkpoint_directory):
        if path.name > "step-00000004":
            shutil.rmtree(path)
    _, result = run(tmp_path, "cuda", **sections)
    assert result.steps == 8
    assert losses(config)[8:] == pytest.approx(curve[4:], rel=1e-4)
    again = torch.as_tensor(checkpoint.read_rows(last, "item", 0, 40))
    torch.testing.assert_close(again, rows, rtol=1e-3, atol=1e-4)
    assert checkpoint.load_model(last).towers["sequence"].start.device == CPU


def test_horovod_sums_and_exchanges_on_the_gpu(tmp_path: Path) -> None:
    """One rank: a GPU serves no second one. NCCL adds up, and rows travel from it to itself."""
    horovod = pytest.importorskip("horovod.torch")
    if not horovod.nccl_built():
        pytest.skip("Horovod is built without NCCL")
    sections: dict[str, dict[str, Any]] = {"sharding": {"replicate_below_mib": 0.0}}
    alone, _ = run(tmp_path / "alone", "cuda", **sections)
    joined, _ = run(tmp_path / "joined", "cuda", distributed=True, **sections)
    assert losses(joined) == pytest.approx(losses(alone), rel=1e-4)
