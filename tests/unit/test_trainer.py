"""Training in one process: resume, best weights, refusals, and what a failure leaves behind."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from distrec import checkpoint
from distrec.config import Config
from distrec.dataset import MANIFEST, read_manifest
from distrec.errors import CheckpointError, ConfigError, DataError, TrainingError
from distrec.files import sha256
from distrec.sharding.collectives import OneProcess
from distrec.trainer import TrainResult, train
from tests.training import STEPS_PER_EPOCH, log_entries, losses, make_config

DRAWS = {
    "dropout": 0.3, "input_dropout": 0.3, "id_dropout": 0.2,
    "augment": ["crop", "reorder", "substitute"], "autoencoder_kl": 0.01,
}  # fmt: skip


def run(config: Config) -> TrainResult:
    return train(config, OneProcess(torch.device("cpu")))


def files_of(path: Path) -> dict[str, str]:
    """SHA-256 of every tensor file of a checkpoint: weights, optimizer states, rows."""
    manifest = checkpoint.read_checkpoint_manifest(path)
    return {name: entry.sha256 for name, entry in checkpoint.manifest.files_of(manifest)}


def names(config: Config) -> list[str]:
    return [path.name for path in checkpoint.committed(config.checkpoint_directory)]


@pytest.mark.parametrize("kind", ["softmax", "sampled_softmax"])
def test_resume_equals_never_having_stopped_bit_for_bit(tmp_path: Path, kind: str) -> None:
    """Interrupted in mid-epoch, with everything that is drawn."""
    keys = {
        "model": DRAWS,
        "loss": {"kind": kind, "num_negatives": 16, "contrastive": 0.1, "adversarial": 0.1,
                 "towers": 0.5},
        "train": {"max_steps": 8, "checkpoint_every_steps": 4, "keep_checkpoints": 9,
                  "evaluate_every_steps": 2, "average_decay": 0.5},
    }  # fmt: skip
    config = make_config(tmp_path, keys)
    run(config)
    last = config.checkpoint_directory / "step-00000008"
    whole, curve = files_of(last), losses(config)
    for path in checkpoint.committed(config.checkpoint_directory):
        if path.name > "step-00000004":
            shutil.rmtree(path)
    result = run(config)
    assert result.steps == 8
    assert files_of(last) == whole
    assert len(whole) > 5
    # the log goes on where the checkpoint is
    assert losses(config) == curve + curve[4:]
    assert [entry["step"] for entry in log_entries(config, "step")][8:] == [5, 6, 7, 8]


def test_the_signal_is_learned_and_the_best_weights_are_kept(tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        {"train": {"max_epochs": 40, "early_stopping_patience": 2, "keep_checkpoints": 1,
                   "metric": "ndcg@7"}},
    )  # fmt: skip
    result = run(config)
    validations = log_entries(config, "valid")
    values = [entry["metrics"]["ndcg@7"] for entry in validations]
    best = max(range(len(values)), key=values.__getitem__)
    # of four groups of ten items, nine events in ten lie in the user's own group
    assert max(values) > 0.3
    assert result.stopped_early
    assert len(values) == best + 1 + 2
    assert result.checkpoint.name == f"step-{validations[best]['step']:08d}"
    assert result.value == pytest.approx(values[best])
    assert checkpoint.find(config.checkpoint_directory, "best") == result.checkpoint
    assert names(config) == sorted({result.checkpoint.name, f"step-{result.steps:08d}"})
    # a stopped run stays stopped
    assert run(config).steps == result.steps


def test_a_damaged_newest_checkpoint_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tmp_path, {"train": {"max_steps": 12, "keep_checkpoints": 9}})
    run(config)
    whole = files_of(config.checkpoint_directory / "step-00000012")
    dense = config.checkpoint_directory / "step-00000012" / "dense.safetensors"
    content = bytearray(dense.read_bytes())
    content[-3] ^= 1
    dense.write_bytes(content)
    with caplog.at_level(logging.WARNING, "distrec"):
        run(config)
    assert "passing over checkpoint step-00000012" in caplog.text
    assert str(dense) in caplog.text
    assert files_of(config.checkpoint_directory / "step-00000012") == whole
    assert [entry["step"] for entry in log_entries(config, "step")][12:] == [7, 8, 9, 10, 11, 12]


def test_another_configuration_starts_anew_and_keeps_the_old_checkpoints(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(make_config(tmp_path, {"train": {"max_steps": 2}}))
    changed = make_config(tmp_path, {"train": {"max_steps": 2, "learning_rate": 0.5}})
    with caplog.at_level(logging.WARNING, "distrec"):
        run(changed)
    assert "trained with another configuration: starting anew" in caplog.text
    assert (tmp_path / "checkpoints-before-1" / "step-00000002").is_dir()
    assert [entry["step"] for entry in log_entries(changed, "step")] == [1, 2]
    # what does not change the result does not stop a run from going on
    for more in ({"log_every_steps": 5}, {"early_stopping_patience": 7}):
        run(make_config(tmp_path, {"train": {"max_steps": 2, "learning_rate": 0.5, **more}}))
        assert not (tmp_path / "checkpoints-before-2").exists()


def test_the_runs_set_aside_longest_ago_are_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def next_run(**train: Any) -> list[str]:
        run(make_config(tmp_path, {"train": {"max_steps": 1, "resume": False, **train}}))
        return sorted(path.name for path in tmp_path.glob("checkpoints*"))

    # not ours: another name, a file
    (tmp_path / "checkpoints-before-x").mkdir()
    (tmp_path / "checkpoints-before-99").touch()
    others = ["checkpoints", "checkpoints-before-99", "checkpoints-before-x"]

    def kept(*numbers: int) -> list[str]:
        return sorted([*others, *(f"checkpoints-before-{number}" for number in numbers)])

    assert next_run() == others
    with caplog.at_level(logging.WARNING, "distrec"):
        for numbers in ((1,), (1, 2), (1, 2, 3)):
            assert next_run() == kept(*numbers)
        assert "deleting" not in caplog.text
        assert next_run() == kept(2, 3, 4)
        assert f"deleting {tmp_path / 'checkpoints-before-1'}: train.keep_earlier" in caplog.text
        # what the new run starts from is not taken from under it
        source = tmp_path / "checkpoints-before-2"
        assert next_run(keep_earlier_runs=1, warm_start=str(source)) == kept(2, 5)
        assert next_run(keep_earlier_runs=0) == others


def test_a_run_without_decay_can_be_made_longer(tmp_path: Path) -> None:
    run(make_config(tmp_path, {"train": {"max_steps": 2, "decay": "none"}}))
    longer = make_config(tmp_path, {"train": {"max_steps": 4, "decay": "none"}})
    run(longer)
    assert [entry["step"] for entry in log_entries(longer, "step")] == [1, 2, 3, 4]
    once = make_config(tmp_path / "once", {"train": {"max_steps": 4, "decay": "none"}})
    run(once)
    assert losses(longer) == losses(once)


def rewrite_ages(directory: Path, age: float) -> None:
    """Put one age into the last row of the last train file, and into the manifest's checks."""
    manifest = read_manifest(directory)
    entry = manifest.splits["train"].files[-1]
    table = pq.read_table(directory / entry.path)
    ages = table["user_age"].to_pylist()
    ages[-1] = age
    place = table.schema.get_field_index("user_age")
    table = table.set_column(place, table.schema.field(place), pa.array(ages, pa.float32()))
    pq.write_table(table, directory / entry.path)
    text = (directory / MANIFEST).read_text()
    size = (directory / entry.path).stat().st_size
    text = text.replace(f'"num_bytes": {entry.num_bytes}', f'"num_bytes": {size}')
    (directory / MANIFEST).write_text(text.replace(entry.sha256, sha256(directory / entry.path)))


@pytest.mark.parametrize(
    ("age", "message"),
    [
        (float("nan"), r"rank 0 \(loss nan, weight \S+\) at step 6 \(epoch 1, batch 6 of 6\)"),
        # finite in the data and in the loss, beyond float32 in the gradient
        (3e38, r"gradients are finite.* at step 6 \(epoch 1, batch 6 of 6\)"),
    ],
)
def test_a_number_that_is_not_finite_stops_and_names_the_place(
    tmp_path: Path, age: float, message: str
) -> None:
    config = make_config(
        tmp_path,
        {"reader": {"shuffle": False, "lanes": 1}, "train": {"checkpoint_every_steps": 5}},
    )
    rewrite_ages(config.dataset_directory, age)
    with pytest.raises(TrainingError, match=message):
        run(config)
    assert names(config) == ["step-00000005"]
    checkpoint.verify(config.checkpoint_directory / "step-00000005")


def test_a_huge_rate_never_leaves_a_checkpoint_that_is_not_finite(tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        {"train": {"learning_rate": 1e30, "warmup_steps": 0, "gradient_clip": 0.0,
                   "optimizer": "sgd", "checkpoint_every_steps": 1, "max_epochs": 5}},
    )  # fmt: skip
    with pytest.raises(TrainingError, match="finite"):
        run(config)
    for path in checkpoint.committed(config.checkpoint_directory):
        model = checkpoint.load_model(path)
        assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())


def test_rows_that_no_batch_reads_are_checked_before_they_are_saved(tmp_path: Path) -> None:
    config = make_config(tmp_path, {"train": {"max_steps": 2, "decay": "none"}})
    run(config)
    path = config.checkpoint_directory / "step-00000002"
    shard = path / "tables" / "user" / "shard-00001-of-00001.safetensors"
    tensors = load_file(shard)
    # the unknown user, who is in no row of train
    tensors["weights"] = tensors["weights"].clone()
    tensors["weights"][1, 0] = float("inf")
    before = sha256(shard)
    save_file(tensors, shard)
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace(before, sha256(shard)))
    longer = make_config(tmp_path, {"train": {"max_steps": 4, "decay": "none"}})
    with pytest.raises(TrainingError, match="rank 0: table user at step 4"):
        run(longer)
    assert names(config) == ["step-00000002"]


def test_refusals_come_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Received: 'ndgc@10'. Did you mean 'ndcg@10'"):
        run(make_config(tmp_path, {"train": {"metric": "ndgc@10"}}))
    with pytest.raises(ConfigError, match=r"auc needs labels. Received: train.metric = 'auc'"):
        run(make_config(tmp_path, {"train": {"metric": "auc"}}))
    assert not (tmp_path / "checkpoints").exists()


def test_labels_and_a_metric_of_probabilities(tmp_path: Path) -> None:
    """log_loss is minimised; valid holds positives only, so auc is not defined there."""
    config = make_config(tmp_path, {"train": {"metric": "log_loss", "max_epochs": 3}}, labels=True)
    result = run(config)
    values = [entry["metrics"]["log_loss"] for entry in log_entries(config, "valid")]
    assert result.value == pytest.approx(min(values))
    assert values[-1] < values[0]
    assert "auc" not in log_entries(config, "valid")[0]["metrics"]
    # seen before the first step
    config = make_config(tmp_path, {"train": {"metric": "auc", "resume": False}})
    with pytest.raises(DataError, match=r"positives and negatives.*'auc' and a valid split with"):
        run(config)
    assert not (tmp_path / "checkpoints-before-1").exists()


def test_ratings_are_predicted_in_validation(tmp_path: Path) -> None:
    """One in ten events is of another group and rated 1: the mean is 1.05 off, a constant."""
    keys: dict[str, Any] = {"train": {"metric": "rmse", "max_epochs": 6, "learning_rate": 0.03}}
    config = make_config(tmp_path, keys, ratings=True, num_users=120)
    result = run(config)
    values = [entry["metrics"]["rmse"] for entry in log_entries(config, "valid")]
    assert result.value == pytest.approx(min(values))
    assert min(values) < 0.6
    entry = log_entries(config, "valid")[-1]["metrics"]
    assert entry["mae"] <= entry["rmse"]
    assert "log_loss" not in entry
    with pytest.raises(ConfigError, match=r"rmse needs ratings. Received: train.metric = 'rmse'"):
        run(make_config(tmp_path / "plain", keys))


@pytest.mark.parametrize("labels", [False, True])
def test_the_global_bias_is_trained_where_it_has_an_effect(tmp_path: Path, labels: bool) -> None:
    config = make_config(tmp_path, {"train": {"max_steps": 3, "metric": "ndcg@10"}}, labels=labels)
    path = run(config).checkpoint
    stored = load_file(path / "dense.safetensors")
    assert bool(stored["parameter/global_bias"]) == labels
    assert ("optimizer/global_bias/exp_avg" in stored) == labels
    # a model without another dense parameter
    keys = {"model": {"towers": ["cf"]}, "train": {"max_steps": 1}}
    assert run(make_config(tmp_path / "cf", keys, labels=labels)).steps == 1


def test_a_dataset_smaller_than_the_lanes(tmp_path: Path) -> None:
    config = make_config(tmp_path, {"train": {"max_epochs": 1}}, num_users=2, events_per_user=2)
    assert run(config).steps == 1


def test_what_a_run_leaves(tmp_path: Path) -> None:
    config = make_config(tmp_path, {"train": {"max_epochs": 1}})
    run(config)
    plan = {entry["name"]: entry for entry in
            json.loads((config.logs_directory / "plan.json").read_text())["tables"]}  # fmt: skip
    # 42 rows of 8 float32, and one number of row-wise Adagrad each
    assert plan["item"]["weight_bytes_by_rank"] == [42 * 8 * 4]
    assert plan["item"]["state_bytes_by_rank"] == [42 * 4]
    assert plan["item"]["placement"] == "row_wise"
    assert list((config.logs_directory / "tensorboard").glob("events.out.tfevents.*"))
    steps = log_entries(config, "step")
    assert [entry["step"] for entry in steps] == list(range(1, STEPS_PER_EPOCH + 1))
    assert steps[0]["learning_rate"] == pytest.approx(0.01 / 3)
    saved = checkpoint.read_checkpoint_manifest(config.checkpoint_directory / "step-00000006")
    assert (saved.epoch, saved.step_in_epoch, saved.lanes) == (1, 0, 12)


def test_no_checkpoint_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    for which in ("best", "newest"):
        with pytest.raises(CheckpointError, match="Train first"):
            checkpoint.find(tmp_path, which)  # type: ignore[arg-type]
