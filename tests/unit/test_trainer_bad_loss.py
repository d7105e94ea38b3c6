"""A bad loss: its batch is kept, its step is left out or ends the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from distrec import checkpoint
from distrec.config import Config
from distrec.errors import TrainingError
from distrec.reader.decode import no_rows, to_batch
from distrec.reader.layout import example_layout
from distrec.sharding.collectives import start
from distrec.trainer import train
from distrec.trainer.bad_loss import write_batch
from tests.synthetic import FEATURES
from tests.training import log_entries, make_config
from tests.unit.test_trainer import rewrite_ages

NAN = float("nan")


def with_bad_row(directory: Path, **keys: Any) -> Config:
    """A run whose last row of each epoch, in steps 6 and 12, has no age."""
    sections = {
        "reader": {"shuffle": False, "lanes": 1},
        "train": {"checkpoint_every_steps": 1, "keep_checkpoints": 99, **keys},
    }
    is_new = not (directory / "dataset").exists()
    config = make_config(directory, sections)
    if is_new:
        rewrite_ages(config.dataset_directory, NAN)
    return config


def run(config: Config) -> None:
    train(config, start(config.launch, distributed=False))


def tensors(config: Config, step: int) -> dict[str, torch.Tensor]:
    path = config.checkpoint_directory / checkpoint.checkpoint_name(step)
    return {
        f"{file.relative_to(path).parent}/{name}": tensor
        for file in sorted(path.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def test_a_step_is_left_out_whole(tmp_path: Path) -> None:
    config = with_bad_row(tmp_path, on_bad_loss="skip")
    run(config)
    before, after = tensors(config, 5), tensors(config, 6)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(after["tables/item/weights"], tensors(config, 7)["tables/item/weights"])
    entries = log_entries(config, "skipped")
    assert [entry["step"] for entry in entries] == [6, 12]
    assert (
        "rank 0 (loss nan, weight 120.0) at step 6 (epoch 1, batch 6 of 6)"
        in (entries[0]["reason"])
    )
    manifests = [
        checkpoint.read_checkpoint_manifest(
            config.checkpoint_directory / checkpoint.checkpoint_name(step)
        )
        for step in (5, 6, 12)
    ]
    assert [manifest.skipped_steps for manifest in manifests] == [0, 1, 2]
    assert all(np.isfinite(entry["loss"]) for entry in log_entries(config, "step"))


def test_there_is_an_end_to_leaving_out_even_across_a_restart(tmp_path: Path) -> None:
    config = with_bad_row(tmp_path, on_bad_loss="skip", max_skipped_steps=1)
    for _ in range(2):
        # the second run goes on from step 11, which has been skipped once already
        with pytest.raises(TrainingError, match=r"at step 12 .* leave some such steps out"):
            run(config)
    assert checkpoint.find(config.checkpoint_directory, "newest").name == "step-00000011"
    # the policy may change in mid-run
    more = with_bad_row(tmp_path, on_bad_loss="skip", max_skipped_steps=2)
    run(more)
    assert checkpoint.find(config.checkpoint_directory, "newest").name == "step-00000012"


def test_the_batch_is_kept_for_people(tmp_path: Path) -> None:
    config = with_bad_row(tmp_path)
    path = tmp_path / "bad_batches" / "step-00000006-rank-0.parquet"
    with pytest.raises(TrainingError, match=f"The batch is in {path}"):
        run(config)
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    kept = pq.read_table(path)
    last = pq.read_table(tmp_path / "dataset" / "train" / "part-00002.parquet").slice(120)
    for name in ("user_index", "item_index", "time", "label", "weight", "history", "context_hour"):
        expected = last[name].to_pylist()
        # a feature is a list of ids, whatever their number
        expected = [[one] for one in expected] if name == "context_hour" else expected
        assert kept[name].to_pylist() == expected, name
    ages = np.array([row[0] for row in kept["dense"].to_pylist()])
    assert np.isnan(ages).tolist() == [False] * 119 + [True]


def test_a_loss_that_explodes(tmp_path: Path) -> None:
    config = make_config(tmp_path, {"train": {"bad_loss_above": 3.0}})
    with pytest.raises(TrainingError, match=r"a mean of 3\.\d+ over all ranks at step 1 .*rank-0"):
        run(config)
    assert not config.checkpoint_directory.exists()
    calm = make_config(tmp_path, {"train": {"bad_loss_above": 100.0, "max_steps": 2}})
    run(calm)


def test_a_batch_that_cannot_be_kept_does_not_hide_the_loss(tmp_path: Path) -> None:
    config = with_bad_row(tmp_path)
    (tmp_path / "bad_batches").write_text("in the way")
    with pytest.raises(TrainingError, match=r"loss nan.* no file, for .* cannot be written"):
        run(config)


def test_a_batch_without_rows_is_written(tmp_path: Path) -> None:
    layout = example_layout(FEATURES, event_types=("view", "buy"))
    write_batch(to_batch([no_rows(layout)], FEATURES), tmp_path / "empty.parquet")
    kept = pq.read_table(tmp_path / "empty.parquet")
    assert kept.num_rows == 0
    assert {"history_times", "history_types"} <= set(kept.column_names)
