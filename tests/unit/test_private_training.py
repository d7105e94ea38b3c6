"""Private training in one process: what it spends, says, refuses, and goes on with."""

from __future__ import annotations

import math
import shutil
import statistics
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from opacus.accountants import RDPAccountant

from distrec import checkpoint
from distrec.config import Config, PrivacyConfig
from distrec.errors import CheckpointError, ConfigError
from distrec.private import Spending, affordable_steps, find_noise_multiplier
from distrec.sharding.collectives import OneProcess
from distrec.trainer import TrainResult, train
from distrec.trainer.private import _spending
from tests.training import log_entries, make_config

# four steps an epoch
PRIVACY = {"target_epsilon": 5.0, "delta": 1e-3, "sample_rate": 0.25}
# spares the search for the noise
GIVEN = {**PRIVACY, "noise_multiplier": 1.5}
WINDOWS = {"train_rows": "windows", "events": {"paths": ["none.csv"], "time": "time"}}


def run(config: Config) -> TrainResult:
    return train(config, OneProcess(torch.device("cpu")))


def private_config(directory: Path, **sections: dict[str, Any]) -> Config:
    keys: dict[str, dict[str, Any]] = {
        "model": {"towers": ["cf"]},
        "loss": {"kind": "softmax"},
        "train": {"max_epochs": 2, "keep_checkpoints": 9},
        "privacy": dict(GIVEN),
    }
    for name, own in sections.items():
        keys.setdefault(name, {}).update(own)
    return make_config(directory, keys)


def manifest_of(config: Config, step: int) -> checkpoint.CheckpointManifest:
    path = config.checkpoint_directory / checkpoint.checkpoint_name(step)
    return checkpoint.read_checkpoint_manifest(path)


def rows_of(config: Config, step: int, table: str) -> torch.Tensor:
    path = config.checkpoint_directory / checkpoint.checkpoint_name(step)
    manifest = checkpoint.read_checkpoint_manifest(path)
    return checkpoint.MappedTables(path).rows(table, torch.arange(manifest.tables[table].num_ids))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, TrainResult]:
    config = private_config(tmp_path_factory.mktemp("private"), privacy={"noise_multiplier": None})
    return config, run(config)


def test_epsilon_is_what_opacus_says_of_each_step_by_itself() -> None:
    accountant = RDPAccountant()
    for _ in range(37):
        accountant.step(noise_multiplier=1.3, sample_rate=0.07)
    assert Spending(1.3, 0.07, 1e-4).epsilon(37) == accountant.get_epsilon(delta=1e-4)
    assert Spending(1.3, 0.07, 1e-4).epsilon(0) == 0.0


def test_epsilon_is_not_below_the_exact_one() -> None:
    """With everybody in every step, T steps are one Gaussian with a root of T less noise.

    Source: Balle and Wang 2018, arXiv:1805.06530, theorem 8.
    """
    scale, normal = 10.0 / 50**0.5, statistics.NormalDist()
    epsilon = Spending(10.0, 1.0, 1e-5).epsilon(50)

    def delta_of(value: float) -> float:
        shift, width = 1 / (2 * scale), value * scale
        return normal.cdf(shift - width) - math.exp(value) * normal.cdf(-shift - width)

    assert delta_of(epsilon) < 1e-5 < delta_of(0.9 * epsilon)


def test_noise_is_as_small_as_the_target_allows() -> None:
    privacy = PrivacyConfig(**PRIVACY)
    multiplier = find_noise_multiplier(privacy, 8)
    spent = Spending(multiplier, 0.25, 1e-3).epsilon(8)
    assert 0.99 * 5.0 < spent <= 5.0
    with pytest.raises(ConfigError, match=r"target_epsilon = 1e-08 for 8 steps at .* Raise either"):
        find_noise_multiplier(privacy.model_copy(update={"target_epsilon": 1e-8}), 8)


def test_given_noise_ends_training_where_the_budget_does() -> None:
    spending = Spending(1.0, 0.25, 1e-3)
    steps = affordable_steps(spending, 5.0, 1000)
    assert spending.epsilon(steps) <= 5.0 < spending.epsilon(steps + 1)
    assert affordable_steps(spending, 5.0, 3) == 3
    with pytest.raises(ConfigError, match=r"of which one step spends 3\.\d+\. Raise either"):
        affordable_steps(Spending(0.7, 0.25, 1e-3), 1.0, 10)


def test_the_end_of_the_budget_ends_training(tmp_path: Path) -> None:
    result = run(private_config(tmp_path, privacy={"noise_multiplier": 0.9}))
    expected = affordable_steps(Spending(0.9, 0.25, 1e-3), 5.0, 8)
    assert 0 < expected < 8
    assert result.steps == expected
    assert result.epsilon is not None
    assert result.epsilon <= 5.0


def test_what_is_spent_is_told_and_kept(trained: tuple[Config, TrainResult]) -> None:
    config, result = trained
    assert result.steps == 8
    entry = manifest_of(config, 8).privacy
    assert entry is not None
    assert (entry.num_steps, entry.sample_rate, entry.delta) == (8, 0.25, 1e-3)
    accountant = RDPAccountant()
    accountant.history = [(entry.noise_multiplier, 0.25, 8)]
    assert entry.epsilon == accountant.get_epsilon(delta=1e-3)
    assert 4.9 < entry.epsilon <= 5.0
    assert result.summary()["epsilon"] == round(entry.epsilon, 6)
    logged = log_entries(config, "privacy")
    assert [one["step"] for one in logged] == [4, 8]
    assert logged[0]["epsilon"] < logged[1]["epsilon"] == entry.epsilon


def test_the_newest_checkpoint_is_the_best_whatever_validation_says(
    trained: tuple[Config, TrainResult],
) -> None:
    config, result = trained
    worse = private_config(config.directory / "worse")
    falling = [{"ndcg@10": 0.9}, {"ndcg@10": 0.1}]
    with mock.patch("distrec.trainer.validation.Validator.measure", side_effect=falling):
        assert run(worse).checkpoint.name == "step-00000008"
    assert result.checkpoint.name == "step-00000008"


def test_a_resumed_run_has_spent_what_one_that_never_stopped_has(
    trained: tuple[Config, TrainResult], tmp_path: Path
) -> None:
    config, _ = trained
    own = private_config(tmp_path, privacy={"noise_multiplier": None})
    shutil.copytree(config.checkpoint_directory, own.checkpoint_directory)
    shutil.rmtree(own.checkpoint_directory / "step-00000008")
    half = rows_of(own, 4, "item")
    result = run(own)
    assert log_entries(own, "privacy") == log_entries(config, "privacy")[1:]
    assert manifest_of(own, 8).privacy == manifest_of(config, 8).privacy
    assert result.steps == 8
    # it goes on from the rows that were there, with noise of its own
    assert torch.equal(rows_of(own, 4, "item"), half)
    other = rows_of(config, 8, "item") - rows_of(own, 8, "item")
    assert float(other[2:].abs().min()) > 0.0


def test_a_run_that_goes_on_has_the_noise_of_its_steps_so_far(
    trained: tuple[Config, TrainResult],
) -> None:
    """Also where another release of the accountant would find another one."""
    saved = manifest_of(trained[0], 8)
    assert saved.privacy is not None
    privacy = PrivacyConfig(**PRIVACY)
    other = saved.privacy.model_copy(update={"noise_multiplier": 7.5})
    found = _spending(privacy, saved.model_copy(update={"privacy": other}), 8)
    assert found == Spending(7.5, 0.25, 1e-3)
    with pytest.raises(CheckpointError, match="says what it has spent"):
        _spending(privacy, saved.model_copy(update={"privacy": None}), 8)


def test_another_length_is_another_run(trained: tuple[Config, TrainResult]) -> None:
    """Else steps would be added to those that the noise was found for."""
    config, _ = trained
    longer = private_config(config.directory, train={"decay": "none"})
    longest = private_config(config.directory, train={"decay": "none", "max_epochs": 3})
    from distrec.trainer.identity import resume_hash

    assert resume_hash(longer) != resume_hash(longest)
    assert resume_hash(config) != resume_hash(private_config(config.directory, privacy={
        "clip_norm": 2.0}))  # fmt: skip


def test_rows_begin_with_values_that_no_row_number_tells(
    trained: tuple[Config, TrainResult], tmp_path: Path
) -> None:
    """Row numbers are ranks of popularity, which would be found again in what is published."""
    config = private_config(
        tmp_path, train={"max_steps": 1}, sharding={"learning_rate": 1e-9}
    )  # fmt: skip
    first = {}
    for number in range(2):
        run(config)
        first[number] = {name: rows_of(config, 1, name) for name in ("user", "item", "item_bias")}
        shutil.rmtree(config.checkpoint_directory)
    for name, rows in first[0].items():
        again = first[1][name]
        assert not rows[0].any()
        assert float(rows.abs().max()) <= 0.05 + 1e-6
        assert float(rows[1:].std()) == pytest.approx(0.05 / 3**0.5, rel=0.15)
        assert float((rows - again)[1:].abs().min()) > 0.0
        correlation = torch.corrcoef(torch.stack([rows[1:].flatten(), again[1:].flatten()]))[0, 1]
        assert abs(float(correlation)) < 0.3


def test_items_that_nobody_has_get_noise_too(tmp_path: Path) -> None:
    """With a clip norm near zero there is nothing but noise: no row stays where it was."""
    keys = {"optimizer": "sgd", "learning_rate": 1.0, "init_scale": 1e-9}
    config = private_config(
        tmp_path, train={"max_steps": 1, "warmup_steps": 0}, sharding=keys,
        privacy={"noise_multiplier": 2.0, "clip_norm": 0.5}, loss={"l2": 0.0},
    )  # fmt: skip
    run(config)
    noise = rows_of(config, 1, "item")[2:]
    assert noise.shape == (40, 8)
    # one step of plain SGD: noise of 2 x .5, over 15 expected users
    assert float(noise.std()) == pytest.approx(1.0 / 15, rel=0.2)
    assert float(noise.abs().max(dim=1).values.min()) > 0.0


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"model": {"towers": ["cf", "deep"]}},
            r"model\.towers = \['cf', 'deep'\]: set \[\"cf\"\]",
        ),
        ({"model": {"towers": ["autoencoder"]}}, r"model\.towers = \['autoencoder'\]"),
        ({"model": {"id_dropout": 0.1}}, r"model\.id_dropout = 0\.1: set 0"),
        ({"model": {"cf_history": "mean"}}, r"model\.cf_history = \"mean\": set \"none\""),
        ({"model": {"augment": ["crop"]}}, r"model\.augment = \['crop'\]: remove it"),
        ({"model": {"recent_weight": 0.5}}, r"model\.recent_weight = 0\.5: set 0"),
        ({"loss": {"adversarial": 0.5}}, r"loss\.adversarial = 0\.5: set 0"),
        ({"loss": {"exclude_seen": True}}, r"loss\.exclude_seen = true: set false"),
        ({"loss": {"kind": "sampled_softmax"}}, r"loss\.kind = \"sampled_softmax\""),
        ({"prepare": WINDOWS}, r"prepare\.train_rows = \"windows\""),
        ({"train": {"early_stopping_patience": 3}}, r"early_stopping_patience = 3: set 0"),
        ({"train": {"on_bad_loss": "skip"}}, r"train\.on_bad_loss = \"skip\""),
        ({"train": {"warm_start": "old"}}, r"train\.warm_start = 'old': remove it"),
        (
            {"sharding": {"compress": {"user": {"method": "hash", "num_buckets": 4}}}},
            r"sharding\.compress of \['user'\]",
        ),
        ({"sharding": {"exchange_precision": "fp16"}}, r"exchange_precision = \"fp16\""),
    ],
)  # fmt: skip
def test_what_cannot_be_private_is_refused_with_the_configuration(
    tmp_path: Path, sections: dict[str, dict[str, Any]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        private_config(tmp_path, **sections)


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.on_bad_loss") as caught:
        private_config(tmp_path, model={"id_dropout": 0.5}, train={"on_bad_loss": "skip"})
    assert "model.id_dropout = 0.5" in str(caught.value)


@pytest.mark.parametrize(
    ("dataset", "sections", "message"),
    [
        ({}, {"privacy": {"delta": 0.02}}, r"delta = 0\.02 with 60 users"),
        ({"labels": True}, {"loss": {"kind": "auto"}}, r"Received: binary with this dataset"),
        ({"train_rows": "windows"}, {}, r"Received: a dataset of windows"),
    ],
)
def test_what_the_dataset_forbids_is_refused_before_the_first_step(
    tmp_path: Path, dataset: dict[str, Any], sections: dict[str, dict[str, Any]], message: str
) -> None:
    make_config(tmp_path, **dataset)
    config = private_config(tmp_path, **sections)
    with pytest.raises(ConfigError, match=message):
        run(config)
    assert not checkpoint.committed(config.checkpoint_directory)


def test_a_run_without_the_accountant_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    config = private_config(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package opacus.*'distrec\[privacy\]'"):
        run(config)
