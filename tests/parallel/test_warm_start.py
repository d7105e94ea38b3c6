"""A run on a grown dataset from the weights of an older run, on another number of ranks."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distrec.batch import Jagged
from distrec.config import Config
from distrec.errors import DistrecError
from distrec.sharding.collectives import Collectives, OneProcess
from distrec.sharding.initial import initial_rows
from distrec.sharding.lookup import Request
from distrec.trainer import setup, train
from distrec.trainer.warm_start import find_warm_start, load_warm_start
from tests.growing import REUSED_ITEMS, extend_dataset, new_config, old_config
from tests.parallel.harness import run_ranks

ITEM_TABLES = ("item", "item_bias", "item_history")
# their new rows are predicted from features
PREDICTED = (*ITEM_TABLES, "user")
PREDICT = {"train": {"predict_new_rows": True}}
NAME = "step-00000004"


def warm_rows(config: Config, collectives: Collectives) -> dict[str, Any]:
    """Every table of this rank after a warm start, and the dense part."""
    inputs = setup.read_inputs(config, collectives.world.world_size)
    path = find_warm_start(inputs, collectives)
    assert path is not None
    run = setup.build(inputs, collectives, None)
    load_warm_start(run, path)
    answer: dict[str, Any] = {"path": path.name, "dense_state": len(run.optimizer.state)}
    for plan in inputs.plans:
        rows = [part.tolist() for part in run.tables.local_rows(plan.name)]
        answer[plan.name] = [plan.placement, plan.num_embeddings, *rows]
    # as a step would see them: through the copies of hot rows on this rank
    every = torch.arange(1, 46)
    seen = run.tables({"all": Request("item", Jagged.singles(every), "none")})["all"]
    answer["looked_up"] = seen.detach().tolist()
    answer["dense"] = {name: t.tolist() for name, t in run.model.state_dict().items()}
    return answer


def whole_table(answers: list[Any], name: str) -> tuple[Tensor, Tensor]:
    """Weights and state of a table of all ranks, as `warm_rows` gave them; each row once."""
    parts = [answer[name][2:] for answer in answers]
    if answers[0][name][0] == "replicated":
        # the copies are equal, bit by bit
        assert all(part == parts[0] for part in parts)
        parts = parts[:1]
    row_ids = torch.tensor([row for part in parts for row in part[0]])
    assert sorted(row_ids.tolist()) == list(range(answers[0][name][1]))
    order = row_ids.argsort()
    return tuple(
        torch.tensor([row for part in parts for row in part[place]])[order] for place in (1, 2)
    )  # type: ignore[return-value]


def refusal(config: Config, collectives: Collectives, num_files: int | None) -> str:
    """What a rank is told whose warm start fails; with `num_files`, one that can open no more."""
    inputs = setup.read_inputs(config, collectives.world.world_size)
    path = find_warm_start(inputs, collectives)
    assert path is not None
    run = setup.build(inputs, collectives, None)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if num_files is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (num_files, limits[1]))
    try:
        load_warm_start(run, path)
    except DistrecError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    return "nothing was raised"


def body(
    collectives: Collectives, old_two: str, new: str, damaged: str, old_one: str
) -> dict[str, Any]:
    """On two ranks: train on the first dataset; then start from what one rank has trained."""
    train(old_config(Path(old_two)), collectives)
    keys = {**PREDICT, "sharding": {"hot_rows": {"item": 6}}}
    older, is_guilty = Path(old_one) / "checkpoints", collectives.world.rank == 1
    answer = warm_rows(new_config(Path(new), older, keys), collectives)
    config = new_config(Path(damaged) if is_guilty else Path(new), older)
    answer["reused ids"] = refusal(config, collectives, None)
    config = new_config(Path(new), older)
    answer["checkpoint"] = refusal(config, collectives, 3 if is_guilty else None)
    return answer


def stored_rows(path: Path, table: str) -> tuple[Tensor, Tensor]:
    """Weights and state of a table, put together from its shards: row i is in shard i mod N."""
    files = sorted((path / "tables" / table).iterdir())
    shards = [load_file(file) for file in files]
    num_rows = sum(len(shard["weights"]) for shard in shards)
    parts = []
    for name in ("weights", "state"):
        whole = torch.empty(num_rows, shards[0][name].shape[1])
        for index, shard in enumerate(shards):
            whole[index :: len(shards)] = shard[name]
        parts.append(whole)
    return parts[0], parts[1]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Any]]]:
    """Old checkpoint and what each rank of the new run has, by 1 -> 2 and 2 -> 1."""
    folder = tmp_path_factory.mktemp("warm")
    old = {ranks: folder / f"old{ranks}" for ranks in (1, 2)}
    new = {ranks: folder / f"new{ranks}" for ranks in (1, 2)}
    one = OneProcess(torch.device("cpu"))
    for ranks in (1, 2):
        old_config(old[ranks])
        new[ranks].mkdir()
        extend_dataset(old[ranks] / "dataset", new[ranks] / "dataset")
    # as one rank may see it
    damaged = folder / "damaged"
    shutil.copytree(new[2], damaged)
    next(damaged.glob("dataset/vocab_reused/*/*.parquet")).write_bytes(b"PAR1")
    train(old_config(old[1]), one)
    two_ranks = run_ranks(
        2,
        "tests.parallel.test_warm_start:body",
        {
            "old_two": str(old[2]),
            "new": str(new[2]),
            "damaged": str(damaged),
            "old_one": str(old[1]),
        },
        folder,
    )
    from_two = old[2] / "checkpoints"
    # the directory of one checkpoint, too
    one_rank = warm_rows(new_config(new[1], from_two / NAME, PREDICT), one)
    alone = warm_rows(new_config(new[1], old[1] / "checkpoints", PREDICT), one)
    return {
        "1 -> 1": (old[1] / "checkpoints" / NAME, [alone]),
        "1 -> 2": (old[1] / "checkpoints" / NAME, two_ranks),
        "2 -> 1": (from_two / NAME, [one_rank]),
    }


@pytest.mark.parametrize("case", ["1 -> 2", "2 -> 1"])
def test_old_rows_stay_and_new_and_reused_ones_start_anew(
    answers: dict[str, tuple[Path, list[Any]]], case: str
) -> None:
    path, ranks = answers[case]
    others = ("path", "dense", "dense_state", "looked_up", "reused ids", "checkpoint")
    tables = [name for name in ranks[0] if name not in others]
    assert set(PREDICTED) < set(tables)
    sizes = {"user": (62, 68), "item": (42, 46), "item_tags": (6, 6)}
    for name in tables:
        weights, state = stored_rows(path, name)
        assert float(state.abs().sum()) > 0
        found, found_state = whole_table(ranks, name)
        if name in sizes:
            assert (len(weights), len(found)) == sizes[name]
        is_new = torch.arange(len(found)) >= len(weights)
        if name in ITEM_TABLES:
            is_new[list(REUSED_ITEMS)] = True
        kept = torch.arange(len(found))[~is_new]
        assert torch.equal(found[kept], weights[kept])
        assert torch.equal(found_state[kept], state[kept])
        assert not found_state[is_new].any()
        ids = is_new.nonzero().flatten().numpy()
        noise = torch.from_numpy(initial_rows(name, ids, weights.shape[1], 4, 0.05))
        is_noise = (found[is_new] == noise).all(dim=1)
        assert not is_noise.any() if name in PREDICTED else is_noise.all(), name


def test_new_rows_are_like_the_old_ones_of_their_group(
    answers: dict[str, tuple[Path, list[Any]]],
) -> None:
    """Whose features say the group and nothing else; the mean of it, for so few a bit less."""
    path, ranks = answers["1 -> 2"]
    for name in ITEM_TABLES:
        weights, _ = stored_rows(path, name)
        found, _ = whole_table(ranks, name)
        ids = torch.tensor([*REUSED_ITEMS, 42, 43, 44, 45])
        old = torch.tensor([row for row in range(2, 42) if row not in REUSED_ITEMS])
        means = torch.stack([weights[old[(old - 2) % 4 == group]].mean(0) for group in range(4)])
        assert torch.cdist(found[ids], means).argmin(dim=1).tolist() == ((ids - 2) % 4).tolist()


def test_any_number_of_ranks_predicts_the_same(
    answers: dict[str, tuple[Path, list[Any]]],
) -> None:
    """Rows on one rank, on all of them, and in a hot tier."""
    assert answers["1 -> 2"][1][0]["item_bias"][0] == "replicated"
    one, two = answers["1 -> 1"][1], answers["1 -> 2"][1]
    for name in PREDICTED:
        expected, found = (whole_table(ranks, name)[0] for ranks in (one, two))
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_hot_copies_are_the_same_on_every_rank(
    answers: dict[str, tuple[Path, list[Any]]],
) -> None:
    _, ranks = answers["1 -> 2"]
    expected, _ = whole_table(ranks, "item")
    for answer in ranks:
        assert torch.equal(torch.tensor(answer["looked_up"]), expected[1:])


def test_a_rank_that_fails_alone_ends_the_warm_start_on_every_rank(
    answers: dict[str, tuple[Path, list[Any]]],
) -> None:
    """Without leaving the others in the exchange of rows."""
    _, ranks = answers["1 -> 2"]
    for what, kind, message in (
        ("reused ids", "DataError", "a dataset is whole. Received: "),
        ("checkpoint", "CheckpointError", "Too many open files"),
    ):
        for rank, answer in enumerate(ranks):
            told = answer[what]
            assert told.startswith(f"{kind}: " + ("rank 1: " if rank == 0 else "")), told
            assert message in told


@pytest.mark.parametrize("case", ["1 -> 2", "2 -> 1"])
def test_the_dense_part_is_the_old_one_without_its_optimizer(
    answers: dict[str, tuple[Path, list[Any]]], case: str
) -> None:
    path, ranks = answers[case]
    stored = load_file(path / "dense.safetensors")
    for answer in ranks:
        assert answer["path"] == NAME
        assert answer["dense_state"] == 0
        for name, values in answer["dense"].items():
            kind = "parameter" if f"parameter/{name}" in stored else "buffer"
            assert torch.equal(torch.tensor(values), stored[f"{kind}/{name}"])
