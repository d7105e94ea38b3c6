"""Training under real horovodrun: the same numbers on 1, 2 and 3 ranks, resumed or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from distrec import checkpoint
from distrec.config import Config
from distrec.metrics.evaluation import ModelScorer, encode_catalogue, inference
from distrec.reader import read_queries
from distrec.scoring.model import open_model
from distrec.sharding.collectives import Collectives
from distrec.trainer import setup, train
from distrec.trainer.setup import Run
from distrec.trainer.start import load
from distrec.trainer.tower_weights import choose_held_out, fit_tower_weights
from distrec.trainer.validation import Validator
from distrec.world import World
from tests.parallel.harness import run_ranks
from tests.training import losses, make_config

# what all tests share is made with the first: it takes minutes on a slow machine
pytestmark = pytest.mark.timeout(600)

NUM_STEPS = 50
# the last computes with rows of one update ago
KINDS = ("softmax", "sampled_softmax", "stale")
# negatives of the whole batch, and even draws
MIXED = "mixed"
# every tower on rows that are windows, users with the mean of what they had, rows that are moved
WINDOWS = "windows"
# labels of another task, known to the ranks of unequally many rows
TASKS = "tasks"
ALL = (*KINDS, MIXED, WINDOWS, TASKS)


def curve_config(directory: Path, kind: str) -> Config:
    """Adam and Adagrad do not see the scale of the gradients, which plain SGD does."""
    keys: dict[str, dict[str, Any]] = {
        "loss": {"kind": "softmax" if kind == "stale" else kind, "num_negatives": 16},
        "train": {"max_epochs": 9, "max_steps": NUM_STEPS, "evaluate_every_steps": NUM_STEPS},
    }
    if kind == MIXED:
        keys["loss"] |= {"kind": "sampled_binary", "negatives": "mixed", "exclude_seen": True}
    if kind in ("sampled_softmax", MIXED):
        keys["train"] |= {"optimizer": "sgd", "learning_rate": 0.1, "gradient_clip": 1.0}
        # a sum over many negatives has large gradients
        rate = 1.0 if kind == MIXED else 6.0
        keys["sharding"] = {"optimizer": "sgd", "learning_rate": rate}
    if kind == WINDOWS:
        keys["loss"] |= {"kind": "softmax", "adversarial": 0.1, "towers": 0.5, "exclude_seen": True}
        towers = ["cf", "autoencoder", "sequence", "deep"]
        keys["model"] = {"towers": towers, "cf_history": "mean"}
        # five steps an epoch
        keys["train"] |= {"global_batch_size": 24, "max_epochs": 10, "fit_tower_weights": True}
        kinds = ("view", "buy")
        return make_config(directory / kind, keys, train_rows="windows", event_types=kinds)
    if kind == TASKS:
        keys["loss"] = {"kind": "binary", "task_weights": {"like": 2.0}}
        keys["model"] = {"multi_task": "ple", "experts": 2, "expert_hidden": [8]}
        keys["train"] |= {"optimizer": "sgd", "learning_rate": 0.5}
        keys["sharding"] = {"optimizer": "sgd", "learning_rate": 10.0}
        return make_config(directory / kind, keys, labels=True, tasks=True)
    if kind == "stale":
        keys["sharding"] = {"prefetch_rows": True}
    return make_config(directory / kind, keys)


def measure(config: Config, collectives: Collectives, path: Path) -> dict[str, float]:
    """Validation metrics of a checkpoint that any number of ranks has written."""
    inputs = setup.read_inputs(config, collectives.world.world_size)
    run = setup.build(inputs, collectives, None)
    load(run, path)
    metrics = run.validator.measure(run.model, run.tables, lambda: None)
    return metrics | fitted_weights(run, collectives)


def fitted_weights(run: Run, collectives: Collectives) -> dict[str, float]:
    """Those of the towers, whether they are better or not."""
    model, manifest, device = run.model, run.inputs.manifest, collectives.device
    queries = read_queries(
        run.config.dataset_directory, manifest, "valid_queries", collectives.world, 7
    )
    with inference(model):
        items = encode_catalogue(model, run.tables, run.validator.items, 1000, device)
        held_out = choose_held_out(model, ModelScorer(model, run.tables, items), queries, 60, True)
        is_free = torch.zeros(len(items), dtype=torch.bool)
        weights = fit_tower_weights(model, held_out, items, is_free, collectives)
    names = (*model.tower_names, "bias", "new items", "recent")
    return {f"weight of {name}": float(w) for name, w in zip(names, weights, strict=True)}


def body(collectives: Collectives, directory: str, two_ranks: str) -> dict[str, Any]:
    """Train all kinds from one dataset; then measure what two ranks have saved."""
    answers: dict[str, Any] = {}
    for kind in ALL:
        config = curve_config(Path(directory), kind)
        result = train(config, collectives)
        answers[kind] = {"losses": losses(config), **result.summary()}
    other = curve_config(Path(two_ranks), "softmax")
    path = checkpoint.find(other.checkpoint_directory, "newest")
    answers["measured"] = measure(other, collectives, path)
    answers["vectors"] = vector_difference(curve_config(Path(directory), WINDOWS), collectives)
    return answers


def vector_difference(config: Config, collectives: Collectives) -> float:
    """Largest between the users' vectors in training and those of the model opened for scoring."""
    inputs = setup.read_inputs(config, collectives.world.world_size)
    run = setup.build(inputs, collectives, None)
    path = checkpoint.find(config.checkpoint_directory, "newest")
    load(run, path)
    queries = next(
        read_queries(config.dataset_directory, inputs.manifest, "valid_queries", World(0, 1), 60)
    ).batch
    with inference(run.model):
        trained = run.model.encode_users(queries, run.tables(run.model.user_requests(queries)))
    return float((trained - open_model(path).encode_users(queries)).abs().max())


def resume_body(collectives: Collectives, directory: str, two_ranks: str) -> dict[str, Any]:
    """On two ranks: never stopped, and stopped in mid-epoch; then as `body`."""
    answers = body(collectives, directory, two_ranks)
    for name, sharding in (("resume", {}), ("resume_stale", {"prefetch_rows": True})):
        config = resume_config(Path(directory), name, sharding)
        train(config, collectives)
        whole = hashes(config, 8)
        keep_first(config, collectives)
        steps = train(config, collectives).steps
        answers[name] = {"whole": whole, "steps": steps, "resumed": hashes(config, 8)}
    config = resume_config(Path(directory), "resume")
    # validations that draw, between sending row numbers and looking them up
    often = {"evaluate_every_steps": 1}
    ahead = resume_config(Path(directory), "ahead", {"prefetch_ids": True}, often)
    measures = Validator.measure

    def measure_and_draw(*arguments: Any) -> dict[str, float]:
        torch.rand(3)
        return measures(*arguments)

    with mock.patch.object(Validator, "measure", measure_and_draw):
        train(ahead, collectives)
    answers["ahead"] = hashes(ahead, 8)
    answers["hot"] = train_hot(collectives, Path(directory))
    chosen = resume_config(Path(directory), "chosen", {"hot_rows": "auto"})
    train(chosen, collectives)
    answers["hot"]["chosen"] = largest_difference(chosen, config)
    tables = json.loads((chosen.logs_directory / setup.PLAN_LOG).read_text())["tables"]
    answers["placements"] = {table["name"]: table["placement"] for table in tables}
    # nothing is learned, so that patience ends the run while row numbers are on their way
    still = {"prefetch_ids": True, "learning_rate": 1e-12}
    every = {"evaluate_every_steps": 1, "early_stopping_patience": 1, "learning_rate": 1e-12}
    result = train(resume_config(Path(directory), "still", still, every), collectives)
    answers["still"] = [result.steps, result.stopped_early]
    return answers


def keep_first(config: Config, collectives: Collectives) -> None:
    """Remove what was saved after step 4."""
    collectives.barrier("test.read")
    if collectives.world.is_first:
        for path in checkpoint.committed(config.checkpoint_directory):
            if path.name > "step-00000004":
                shutil.rmtree(path)
    collectives.barrier("test.removed")


def resume_config(
    directory: Path,
    name: str,
    sharding: dict[str, Any] | None = None,
    train_keys: dict[str, Any] | None = None,
) -> Config:
    """Eight steps, saved in the middle of each epoch, with everything random switched on."""
    return make_config(
        directory / name,
        {
            "model": {"dropout": 0.3, "input_dropout": 0.3, "id_dropout": 0.2,
                      "augment": ["crop", "reorder", "substitute"], "autoencoder_kl": 0.01},
            "loss": {"contrastive": 0.1, "adversarial": 0.1},
            "train": {"max_steps": 8, "checkpoint_every_steps": 4, "keep_checkpoints": 9,
                      "early_stopping_patience": 9, "average_decay": 0.5, **(train_keys or {})},
            "sharding": sharding or {},
        },
    )  # fmt: skip


def train_hot(collectives: Collectives, directory: Path) -> dict[str, float]:
    """A run with a hot tier, and one that goes on without it: largest differences from neither."""
    hot = resume_config(directory, "hot", {"hot_rows": {"user": 9, "item": 21}})
    plain = resume_config(directory, "resume")
    train(hot, collectives)
    found = {"whole": largest_difference(hot, plain)}
    keep_first(hot, collectives)
    mixed = resume_config(directory, "hot")
    train(mixed, collectives)
    # a run that did not go on would have put these away
    assert "step-00000004" in {p.name for p in checkpoint.committed(mixed.checkpoint_directory)}
    assert len(losses(mixed)) == 8 + 4
    found["mixed"] = largest_difference(mixed, plain)
    return found


def largest_difference(one: Config, other: Config) -> float:
    """Of any number in two tables after step 8."""
    paths = [config.checkpoint_directory / "step-00000008" for config in (one, other)]
    found = []
    for table, rows in (("user", 62), ("item", 42)):
        first, second = (checkpoint.read_rows(path, table, 0, rows) for path in paths)
        found.append(float((first - second).abs().max()))
    return max(found)


def hashes(config: Config, step: int) -> dict[str, str]:
    path = config.checkpoint_directory / f"step-{step:08d}"
    manifest = checkpoint.read_checkpoint_manifest(path)
    return {name: entry.sha256 for name, entry in checkpoint.manifest.files_of(manifest)}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank answered, by the number of ranks."""
    folder = tmp_path_factory.mktemp("training")
    found = {}
    for num_ranks in (2, 1, 3):
        directory = folder / f"ranks{num_ranks}"
        directory.mkdir()
        for kind in ALL:
            # once and before the ranks, which would write it at the same time
            curve_config(directory, kind)
        for name in ("resume", "resume_stale", "ahead", "hot", "chosen", "still"):
            make_config(directory / name)
        name = "resume_body" if num_ranks == 2 else "body"
        found[num_ranks] = run_ranks(
            num_ranks,
            f"tests.parallel.test_training:{name}",
            {"directory": str(directory), "two_ranks": str(folder / "ranks2")},
            folder,
        )
    return found


@pytest.mark.parametrize("kind", ALL)
def test_loss_curves_agree(answers: dict[int, list[dict[str, Any]]], kind: str) -> None:
    one = torch.tensor(answers[1][0][kind]["losses"])
    assert len(one) == NUM_STEPS
    assert one[-1] < one[0] - 0.5
    for num_ranks in (2, 3):
        answer = answers[num_ranks][0][kind]
        assert answer["num_ranks"] == num_ranks
        torch.testing.assert_close(torch.tensor(answer["losses"]), one, atol=1e-4, rtol=0)
        assert answer["value"] == pytest.approx(answers[1][0][kind]["value"], abs=2e-2)


def test_a_checkpoint_of_two_ranks_measures_the_same_on_one_and_three(
    answers: dict[int, list[dict[str, Any]]],
) -> None:
    saved = answers[2][0]["measured"]
    assert saved["ndcg@10"] == pytest.approx(answers[2][0]["softmax"]["value"], abs=1e-6)
    for num_ranks in (1, 3):
        for answer in answers[num_ranks]:
            assert answer["measured"] == pytest.approx(saved, abs=1e-6)


def test_scoring_gives_the_vectors_of_training(answers: dict[int, list[dict[str, Any]]]) -> None:
    for num_ranks in (1, 2, 3):
        for answer in answers[num_ranks]:
            assert answer["vectors"] < 1e-5


def test_two_ranks_resume_bit_for_bit(answers: dict[int, list[dict[str, Any]]]) -> None:
    for name in ("resume", "resume_stale"):
        found = answers[2][0][name]
        assert found["steps"] == 8
        assert found["resumed"] == found["whole"]
        shards = [name for name in found["whole"] if name.startswith("tables/user/")]
        assert shards == [f"tables/user/shard-{k:05d}-of-00002.safetensors" for k in (1, 2)]


def test_rows_of_one_update_ago_are_other_rows(answers: dict[int, list[dict[str, Any]]]) -> None:
    first = answers[2][0]
    assert first["resume_stale"]["whole"] != first["resume"]["whole"]
    stale, exact = first["stale"]["losses"], first["softmax"]["losses"]
    # the second step is the first whose rows went ahead, and nothing was learned before the first
    assert stale[0] == exact[0]
    assert stale[1] != exact[1]
    assert stale[-1] == pytest.approx(exact[-1], abs=0.05)


def test_row_numbers_sent_ahead_change_no_bit(answers: dict[int, list[dict[str, Any]]]) -> None:
    first = answers[2][0]
    assert first["ahead"] == first["resume"]["whole"]
    # one step to compare with, and one without an improvement
    assert all(answer["still"] == [2, True] for answer in answers[2])


def test_a_hot_tier_changes_nothing_and_a_run_goes_on_without_it(
    answers: dict[int, list[dict[str, Any]]],
) -> None:
    assert all(max(answer["hot"].values()) < 1e-6 for answer in answers[2])
    # every item is a candidate of every step: the planner's tier is the whole table
    assert all(answer["placements"]["item"] == "replicated" for answer in answers[2])


def test_every_rank_comes_to_the_same_result(answers: dict[int, list[dict[str, Any]]]) -> None:
    for every in answers.values():
        results = [
            [(answer[kind]["value"], answer[kind]["checkpoint"]) for kind in KINDS]
            for answer in every
        ]
        assert results == [results[0]] * len(every)
