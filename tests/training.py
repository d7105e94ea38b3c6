"""A small run on the synthetic dataset, for the tests of trainer, checkpoint and launching."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distrec.config import Config, dump_config, parse_config
from tests.synthetic import write_dataset

# 60 users x 12 events in steps of 120: 6 steps an epoch
STEPS_PER_EPOCH = 6


def make_config(
    directory: Path, sections: Mapping[str, Mapping[str, Any]] | None = None, **dataset: Any
) -> Config:
    """Write the synthetic dataset into `directory`/dataset, once, and describe a run on it.

    Dropouts are off, for they differ with the number of ranks; two tables are row-wise.

    Args:
        directory: The run's output.
        sections: Keys to set, by section.
        dataset: For write_dataset.
    """
    if not (directory / "dataset").exists():
        write_dataset(directory / "dataset", **dataset)
    document: dict[str, Any] = {
        "name": "synthetic",
        "output": str(directory),
        "seed": 3,
        "prepare": {
            "events": {"paths": ["none.csv"], "time": "time", "label": "label", "tasks": ["like"]}
        },
        # nothing that the numbers depend on is left to a default that may be tuned
        "sharding": {
            "tables": {"user": "row_wise", "item": "row_wise"},
            "optimizer": "rowwise_adagrad",
            "learning_rate": 0.05,
            "init_scale": 0.05,
        },
        "loss": {"l2": 1e-5, "sampling_power": 0.75},
        "model": {
            "embedding_dim": 8,
            "feature_dim": 4,
            "autoencoder_hidden": [16],
            "deep_hidden": [16],
            "gate_hidden": 4,
            "normalize": False,
            "temperature": 1.0,
            "dropout": 0.0,
            "input_dropout": 0.0,
            "id_dropout": 0.0,
        },
        "train": {
            "global_batch_size": 120,
            "max_epochs": 2,
            "learning_rate": 0.01,
            "optimizer": "adamw",
            "weight_decay": 1e-4,
            "warmup_steps": 3,
            "decay": "cosine",
            "min_learning_rate_share": 0.05,
            "gradient_clip": 5.0,
            "log_every_steps": 1,
            "early_stopping_patience": 0,
            "metric": "ndcg@10",
            "fit_tower_weights": False,
        },
        "launch": {"device": "cpu", "timeout_seconds": 60},
    }
    for name, keys in (sections or {}).items():
        document.setdefault(name, {}).update(keys)
    return parse_config(document, "the test")


def write_config(config: Config, name: str = "config.toml") -> Path:
    """Write the configuration beside the run's other files."""
    path = config.directory / name
    path.write_text(dump_config(config), encoding="utf-8")
    return path


def log_entries(config: Config, kind: str) -> list[dict[str, Any]]:
    """Lines of train.jsonl of one kind."""
    text = (config.logs_directory / "train.jsonl").read_text(encoding="utf-8")
    entries = [json.loads(line) for line in text.splitlines()]
    return [entry for entry in entries if entry["kind"] == kind]


def losses(config: Config) -> list[float]:
    """The loss of each step."""
    return [float(entry["loss"]) for entry in log_entries(config, "step")]
