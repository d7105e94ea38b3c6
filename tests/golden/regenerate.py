"""Writes the golden files: python -m tests.golden.regenerate [--checkpoint]"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from distrec import checkpoint
from distrec.launch import train_locally
from distrec.sharding.collectives import OneProcess
from distrec.trainer import train
from tests.training import losses, make_config

FOLDER = Path(__file__).parent
CURVE = FOLDER / "loss_curve.json"
CHECKPOINT = FOLDER / "checkpoint-format-1"
DELTA_CHECKPOINT = FOLDER / "checkpoint-format-2"
NAMES = ("step-00000001", "step-00000002")


def curve(directory: Path) -> list[float]:
    """Loss of each of 24 steps with sampled negatives and fused row-wise Adagrad."""
    keys = {
        "loss": {"kind": "sampled_softmax", "num_negatives": 16},
        "train": {"max_epochs": 4, "evaluate_every_steps": 24},
    }
    config = make_config(directory, keys)
    train(config, OneProcess(torch.device("cpu")))
    return losses(config)


def write_checkpoint(directory: Path) -> None:
    """A full checkpoint of two ranks and a delta on it, with what must be read from them."""
    keys = {
        "model": {"embedding_dim": 4, "autoencoder_hidden": [4], "deep_hidden": [4]},
        "loss": {"kind": "sampled_softmax", "num_negatives": 1},
        "train": {
            "global_batch_size": 2,
            "max_steps": 2,
            "checkpoint_every_steps": 1,
            "full_checkpoint_every": 2,
        },
        "launch": {"num_ranks": 2, "device": "cpu"},
    }
    config = make_config(directory, keys, num_users=4, num_items=8, num_cold_items=1)
    train_locally(config)
    for name in NAMES:
        shutil.copytree(config.checkpoint_directory / name, DELTA_CHECKPOINT / name)
    delta = DELTA_CHECKPOINT / NAMES[1]
    shards = sorted((delta / "tables" / "item").iterdir())
    model = checkpoint.load_model(delta)
    expected = {
        "bias": model.towers["deep"].user_network.layers[0].bias.tolist(),
        # of the table of items: rows that the delta has, and all rows
        "changed": sorted(row for file in shards for row in load_file(file)["row_ids"].tolist()),
        "rows": checkpoint.read_rows(delta, "item", 0, 10).tolist(),
    }
    (DELTA_CHECKPOINT / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        CURVE.write_text(json.dumps(curve(Path(folder) / "curve"), indent=1) + "\n")
        if "--checkpoint" in sys.argv:
            write_checkpoint(Path(folder) / "checkpoint")
