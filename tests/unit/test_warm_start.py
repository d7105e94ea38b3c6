"""Warm starts in one process: what a new run does with older weights, and what it refuses."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distrec import checkpoint, columns
from distrec.batch import Jagged
from distrec.config import Config, ModelConfig
from distrec.dataset import MANIFEST, Ancestor, VocabularyState, read_manifest
from distrec.errors import CheckpointError
from distrec.model import ModelSpec, UnifiedModel, vocabulary_of
from distrec.sharding.collectives import OneProcess
from distrec.trainer import TrainResult, train
from distrec.trainer.identity import resume_hash
from distrec.trainer.setup import build, read_inputs
from distrec.trainer.warm_start import (
    changed_sides,
    find_warm_start,
    generation_of,
    load_warm_start,
    reused_ids,
)
from tests.growing import REUSED_ITEMS, extend_dataset, new_config, old_config
from tests.training import log_entries, losses, make_config
from tests.unit.test_checkpoint import flip


def run(config: Config) -> TrainResult:
    return train(config, OneProcess(torch.device("cpu")))


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Trained on the first dataset, for ten epochs."""
    directory = tmp_path_factory.mktemp("old")
    config = old_config(directory, {"train": {"max_epochs": 10, "max_steps": 60}})
    run(config)
    return config


def grown(old: Config, directory: Path) -> Path:
    directory.mkdir()
    extend_dataset(old.dataset_directory, directory / "dataset")
    return directory


def test_a_new_run_counts_from_zero_and_goes_on_by_itself(
    old: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = grown(old, tmp_path / "new")
    config = new_config(directory, old.checkpoint_directory)
    with caplog.at_level(logging.INFO, "distrec"):
        result = run(config)
    assert "table item: 42 old rows, 4 new, 3 of the old ones start anew" in caplog.text
    assert "table user: 62 old rows, 6 new, 0 of the old ones start anew" in caplog.text
    assert result.steps == 4
    assert [entry["step"] for entry in log_entries(config, "step")] == [1, 2, 3, 4]
    cold = make_config(grown(old, tmp_path / "cold"), {"train": {"max_steps": 1}})
    run(cold)
    # ten epochs ahead
    assert losses(config)[0] < losses(cold)[0] - 0.3
    # its own checkpoint goes before the older weights
    longer = config.train.model_copy(update={"max_steps": 6, "decay": "none"})
    with caplog.at_level(logging.INFO, "distrec"):
        run(config)
    assert "going on from step 4 of 4" in caplog.text
    assert resume_hash(config) != resume_hash(
        config.model_copy(update={"train": longer.model_copy(update={"warm_start": None})})
    )


def test_a_key_that_is_not_set_does_not_change_the_identity_of_a_run(tmp_path: Path) -> None:
    """Checkpoints from before there was the key are gone on from."""
    config = make_config(tmp_path)
    assert config.train.warm_start is None
    dumped = config.train.model_dump()
    assert "warm_start" in dumped
    other = config.train.model_copy(update={"warm_start": "somewhere"})
    assert resume_hash(config) != resume_hash(config.model_copy(update={"train": other}))


def test_whether_weights_are_fitted_counts(tmp_path: Path) -> None:
    def hashes(towers: list[str]) -> list[str]:
        return [
            resume_hash(make_config(tmp_path, {"model": {"towers": towers}, "train": keys}))
            for keys in ({"fit_tower_weights": False}, {"fit_tower_weights": True})
        ]

    assert len(set(hashes(["cf"]))) == 2
    assert len(set(hashes(["cf", "deep"]))) == 2
    given = make_config(tmp_path, {"model": {"towers": ["cf"], "tower_weights": {"bias": 0.5}}})
    assert resume_hash(given) not in hashes(["cf"])


def test_when_rows_are_saved_counts_where_they_are_looked_up_ahead(tmp_path: Path) -> None:
    often = {"train": {"checkpoint_every_steps": 2}}
    assert resume_hash(make_config(tmp_path)) == resume_hash(make_config(tmp_path, often))
    ahead = {"sharding": {"prefetch_rows": True}}
    hashes = {resume_hash(make_config(tmp_path, keys)) for keys in ({}, ahead, ahead | often)}
    assert len(hashes) == 3


def test_what_is_refused(old: Config, tmp_path: Path) -> None:
    directory = grown(old, tmp_path / "new")
    checkpoints = old.checkpoint_directory
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path, {}, r"names a checkpoint, or a directory of checkpoints\. Received: .*neither"),
        (checkpoints, {"model": {"embedding_dim": 12}}, r"rows, width, .*table 'item'"),
        (checkpoints, {"sharding": {"optimizer": "sgd"}}, r"rows, width, precision, optimizer"),
    ]
    for path, sections, message in cases:
        with pytest.raises(CheckpointError, match=message):
            run(new_config(directory, path, sections))
    # a dataset that extends nothing
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    make_config(stranger, num_users=66, num_items=44)
    with pytest.raises(
        CheckpointError, match=r"'item_id', 'user_id' differ from the dataset itself: it extends no"
    ):
        run(new_config(stranger, checkpoints))
    # fewer rows than the checkpoint has
    small = tmp_path / "small"
    small.mkdir()
    extend_dataset(old.dataset_directory, small / "dataset", num_items=30)
    with pytest.raises(CheckpointError, match=r"tables grow.*'item\w*' with 42 ids .*32 in the mo"):
        run(new_config(small, checkpoints))


def rewrite_features(directory: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Change the features of a dataset's manifest."""
    document = json.loads((directory / MANIFEST).read_text())
    change(document["features"])
    (directory / MANIFEST).write_text(json.dumps(document))


def test_features_in_another_order_start_their_layers_anew(
    old: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The shapes are the same."""
    directory = grown(old, tmp_path / "new")
    with caplog.at_level(logging.WARNING, "distrec"):
        run(new_config(directory, old.checkpoint_directory, {"train": {"resume": False}}))
        assert "start anew: " not in caplog.text
        rewrite_features(
            directory / "dataset", lambda features: features.insert(0, features.pop(1))
        )
        run(new_config(directory, old.checkpoint_directory, {"train": {"resume": False}}))
    assert "not in the checkpoint in this shape, and start anew: towers.deep." in caplog.text


def test_hashed_text_keeps_its_buckets(old: Config, tmp_path: Path) -> None:
    directory = grown(old, tmp_path / "new")
    rewrite_features(directory / "dataset", lambda features: features[2].update(num_embeddings=8))
    with pytest.raises(
        CheckpointError, match=r"buckets. Received: table 'item_tags' with 6 ids in .*, 8 in the"
    ):
        run(new_config(directory, old.checkpoint_directory))


def test_a_model_of_fewer_tables_takes_over_those_that_it_has(
    old: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = new_config(
        grown(old, tmp_path / "new"), old.checkpoint_directory, {"model": {"towers": ["cf"]}}
    )
    with caplog.at_level(logging.INFO, "distrec"):
        run(config)
    assert "table item: 42 old rows" in caplog.text
    assert "table item_tags" not in caplog.text


def noisy_items(old: Config, directory: Path, predict: bool = True, **model: Any) -> list[int]:
    """Rows of table item that after a warm start are as in a new run.

    Item 43 has lost its features, and index 44 stands for no item.
    """
    keys = {"model": model, "train": {"predict_new_rows": predict}}
    config = new_config(grown(old, directory), old.checkpoint_directory, keys)
    inputs = read_inputs(config, 1)
    bare = inputs.items.item_index == 43
    tags = [[] if has_none else [2] for has_none in bare.tolist()]
    items = replace(
        inputs.items,
        ids={"item_tags": Jagged.from_lists(tags)},
        dense=inputs.items.dense.masked_fill(bare[:, None], 0.0),
        count=inputs.items.count.masked_fill(inputs.items.item_index == 44, columns.FREE_COUNT),
    )
    collectives = OneProcess(torch.device("cpu"))
    run = build(replace(inputs, items=items), collectives, None)
    noise = run.tables.local_rows("item")[1].clone()
    path = find_warm_start(inputs, collectives)
    assert path is not None
    load_warm_start(run, path)
    is_noise = (run.tables.local_rows("item")[1] == noise).all(dim=1)
    return is_noise.nonzero().flatten().tolist()


def test_only_items_with_features_begin_with_them(old: Config, tmp_path: Path) -> None:
    # the padding row is always zeros
    assert noisy_items(old, tmp_path / "new") == [0, 43, 44]
    every = [0, *REUSED_ITEMS, 42, 43, 44, 45]
    assert noisy_items(old, tmp_path / "off", predict=False) == every


def test_a_model_without_tables_of_features_predicts_nothing(old: Config, tmp_path: Path) -> None:
    found = noisy_items(old, tmp_path / "new", towers=["cf"])
    assert found == [0, *REUSED_ITEMS, 42, 43, 44, 45]


def test_which_checkpoint_of_another_run(
    old: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The best one of a directory; one that is named itself is verified as well."""
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(old.checkpoint_directory, checkpoints)
    older, newest = checkpoint.committed(checkpoints)[-2:]
    checkpoint.mark_best(older, "ndcg@10", 0.5)
    directory = grown(old, tmp_path / "new")
    with caplog.at_level(logging.INFO, "distrec"):
        run(new_config(directory, checkpoints, {"train": {"resume": False}}))
        assert f"warm start from {older}" in caplog.text
        run(new_config(directory, newest, {"train": {"resume": False}}))
        assert f"warm start from {newest}" in caplog.text
    flip(next((newest / "tables" / "item").iterdir()))
    with pytest.raises(CheckpointError, match="it is damaged"):
        run(new_config(directory, newest, {"train": {"resume": False}}))


def test_the_generation_decides_which_ids_are_reused(old: Config, tmp_path: Path) -> None:
    directory = grown(old, tmp_path / "new") / "dataset"
    manifest, before = read_manifest(directory), read_manifest(old.dataset_directory)
    assert manifest.extends is not None
    hashes = {name: one.sha256 for name, one in before.vocabularies.items()}
    assert generation_of(hashes, manifest, Path("c")) == 0
    own = {name: one.sha256 for name, one in manifest.vocabularies.items()}
    assert generation_of(own, manifest, Path("c")) == 1
    assert reused_ids(directory, manifest, "item_id", 0).tolist() == list(REUSED_ITEMS)
    assert reused_ids(directory, manifest, "item_id", 1).tolist() == []
    assert reused_ids(directory, manifest, "user_id", 0).tolist() == []
    # two extensions on: the first of three datasets is still known
    first = Ancestor(
        content_hash="x", vocabularies={"user_id": VocabularyState(num_embeddings=3, sha256="y")}
    )
    extends = manifest.extends.model_copy(
        update={"generation": 2, "ancestors": (*manifest.extends.ancestors, first)}
    )
    later = manifest.model_copy(update={"extends": extends})
    assert generation_of({"user_id": "y"}, later, Path("c")) == 0
    assert generation_of(hashes, later, Path("c")) == 1
    with pytest.raises(CheckpointError, match=r"'user_id' differ from the dataset that this one"):
        generation_of({**hashes, "user_id": "z"}, later, Path("c"))


def test_other_features_leave_the_layers_that_read_them(old: Config) -> None:
    path = checkpoint.find(old.checkpoint_directory, "newest")
    saved = checkpoint.read_checkpoint_manifest(path)
    spec = saved.model_spec
    more_ids = spec.features[0].model_copy(update={"num_embeddings": 99})
    larger = spec.model_copy(update={"features": (more_ids, *spec.features[1:])})
    assert changed_sides(spec, larger) == []
    renamed = spec.features[1].model_copy(update={"column": "user_height"})
    other = spec.model_copy(update={"features": (spec.features[0], renamed, *spec.features[2:])})
    assert changed_sides(spec, other) == ["user"]

    torch.manual_seed(9)
    model = UnifiedModel(other, ModelConfig.model_validate(dict(old.model)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    left = checkpoint.load_dense_where_it_fits(path, saved, model, ["towers.deep."])
    stored = load_file(path / "dense.safetensors")
    assert left
    assert all(name.startswith("towers.deep.") for name in left)
    for name, tensor in model.state_dict().items():
        is_buffer = name in ("tower_weights", "new_item_bias", "recent_weight")
        kind = "buffer" if is_buffer else "parameter"
        expected = before[name] if name in left else stored[f"{kind}/{name}"]
        assert torch.equal(tensor, expected), name
    wider = ModelConfig.model_validate({**dict(old.model), "autoencoder_hidden": (24,)})
    left = checkpoint.load_dense_where_it_fits(path, saved, UnifiedModel(spec, wider))
    assert left
    assert all(name.startswith("towers.autoencoder.") for name in left)


@pytest.mark.parametrize(("towers", "weights"), [
    (["cf", "autoencoder", "deep"], [0.5, 1.0, 1.0, 1.0]),
    (["cf", "autoencoder", "sequence"], [1.0, 1.0, 1.0, 1.0]),
])  # fmt: skip
def test_weights_of_other_towers_are_not_taken_over(
    tmp_path: Path, towers: list[str], weights: list[float]
) -> None:
    keys = {"model": {"tower_weights": {"cf": 0.5}}, "train": {"max_steps": 1}}
    first = make_config(tmp_path, keys)
    run(first)
    keys = {"model": {"towers": towers}, "train": {"warm_start": str(first.checkpoint_directory)}}
    second = make_config(tmp_path, keys)
    one = OneProcess(torch.device("cpu"))
    built = build(read_inputs(second, 1), one, None)
    load_warm_start(built, find_warm_start(built.inputs, one))
    assert built.model.tower_weights.tolist() == weights


@pytest.mark.parametrize("now", [("view", "buy"), ("buy", "view"), ("view", "buy", "cart")])
def test_kinds_of_other_places_begin_anew(tmp_path: Path, now: tuple[str, ...]) -> None:
    """What a run learns of kinds, a warm start takes over where each is still at its place."""
    model = {"towers": ["cf", "sequence"], "sequence_layers": 1}
    first = make_config(
        tmp_path / "first", {"model": model, "train": {"max_steps": 2}}, event_types=("view", "buy")
    )
    run(first)
    path = checkpoint.find(first.checkpoint_directory, "newest")
    learned = load_file(path / "dense.safetensors")["parameter/towers.sequence.kinds"]
    # no event of a history is padding, or of an unknown kind
    assert learned.abs().sum(dim=1).gt(0).tolist() == [False, False, True, True]
    keys = {"model": model, "train": {"warm_start": str(first.checkpoint_directory)}}
    second = make_config(tmp_path / "second", keys, event_types=now)
    one = OneProcess(torch.device("cpu"))
    built = build(read_inputs(second, 1), one, None)
    load_warm_start(built, find_warm_start(built.inputs, one))
    found = built.model.towers["sequence"].kinds.detach()
    assert torch.equal(found, learned if now == ("view", "buy") else torch.zeros(2 + len(now), 8))


def test_tables_and_their_vocabularies(old: Config) -> None:
    spec = ModelSpec.from_manifest(read_manifest(old.dataset_directory))
    model = UnifiedModel(spec, old.model)
    found = {table.name: vocabulary_of(table.name, spec) for table in model.table_specs()}
    assert found == {
        "user": "user_id", "item": "item_id", "item_history": "item_id", "item_bias": "item_id",
        "user_group": "user_group", "item_tags": "item_tags", "context_hour": "context_hour",
    }  # fmt: skip
