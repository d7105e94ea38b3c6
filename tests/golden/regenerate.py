"""Writes the golden files: python -m tests.golden.regenerate [--checkpoint]"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from distrec import checkpoint
from distrec.launch import train_locally
from distrec.sharding.collectives import OneProcess
from distrec.trainer import train
from tests.training import losses, make_config

FOLDER = Path(__file__).parent
CURVE = FOLDER / "loss_curve.json"
CHECKPOINT = FOLDER / "checkpoint-format-1"


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
    """A tiny checkpoint of two ranks, with what must be read from it."""
    keys = {
        "model": {"embedding_dim": 4, "autoencoder_hidden": [4], "deep_hidden": [4]},
        "train": {"max_steps": 2},
        "launch": {"num_ranks": 2, "device": "cpu"},
    }
    config = make_config(directory, keys, num_users=4, num_items=8, num_cold_items=1)
    train_locally(config)
    source = config.checkpoint_directory / "step-00000002"
    shutil.copytree(source, CHECKPOINT / source.name)
    model = checkpoint.load_model(source)
    rows = checkpoint.read_rows(source, "item", 0, 6)
    expected = {
        "bias": model.towers["deep"].user_network.layers[0].bias.tolist(),
        # sums of the bags [0, 3] and [5], row 0 being padding
        "rows": [rows[3].tolist(), rows[5].tolist()],
    }
    (CHECKPOINT / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        CURVE.write_text(json.dumps(curve(Path(folder) / "curve"), indent=1) + "\n")
        if "--checkpoint" in sys.argv:
            write_checkpoint(Path(folder) / "checkpoint")
