"""Delta checkpoints: bit-equal to full ones, and refused without the base they were made on."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distrec import checkpoint
from distrec.batch import Jagged
from distrec.checkpoint import files, shards
from distrec.checkpoint.manifest import TableEntry, table_directory
from distrec.config import ShardingConfig
from distrec.errors import CheckpointError
from distrec.files import sha256
from distrec.sharding.lookup import Request
from distrec.trainer import train
from tests.training import make_config
from tests.unit.test_checkpoint import COLLECTIVES, SPEC, flip, make_parts
from tests.unit.test_checkpoint import save as save_full

SHARD = "shard-00001-of-00001.safetensors"


def look_up(parts: checkpoint.Parts, ids: list[int], trains: bool = True) -> None:
    with torch.set_grad_enabled(trains):
        rows = parts.tables({"x": Request("user", Jagged.from_lists([ids]), "sum")})
        if trains:
            (rows["x"] - 1).square().sum().backward()


def make_series(directory: Path, parts: checkpoint.Parts, full_every: int) -> checkpoint.Series:
    parts.tables.track_touched_rows()
    parts.tables.set_learning_rate(0.1)
    return checkpoint.Series(directory, full_every, parts, COLLECTIVES)


def save(series: checkpoint.Series, step: int) -> Path:
    identity = checkpoint.Identity(1, {"model": {}}, "c", "d", {"user_id": "v"}, SPEC)
    return series.save(identity, checkpoint.Position(step, 0, step, 12))


def load(path: Path, parts: checkpoint.Parts) -> None:
    world = COLLECTIVES.world
    checkpoint.load_tables(path, parts.tables, parts.plans, parts.sharding, world)


def rows_of(path: Path, table: str) -> list[int]:
    shard = load_file(path / table_directory(table) / SHARD)
    return shard["row_ids"].tolist()  # type: ignore[no-any-return]


@pytest.fixture
def saved(tmp_path: Path) -> list[Path]:
    """Full, delta, delta, full, delta; some rows of the table of users are trained before each."""
    parts = make_parts(ShardingConfig())
    series = make_series(tmp_path, parts, 3)
    paths = []
    for step, ids in enumerate(([1, 2], [5, 2], [9], [4, 3], [7, 7, 0]), start=1):
        look_up(parts, ids)
        look_up(parts, [10], trains=False)
        paths.append(save(series, step))
    return paths


def test_a_delta_holds_what_was_trained_since_the_full_one(saved: list[Path]) -> None:
    manifests = [checkpoint.read_checkpoint_manifest(path) for path in saved]
    assert [manifest.format_version for manifest in manifests] == [1, 2, 2, 1, 2]
    bases = [manifest.base and (manifest.base.checkpoint, manifest.base.number)
             for manifest in manifests]  # fmt: skip
    first, fourth = saved[0].name, saved[3].name
    assert bases == [None, (first, 1), (first, 2), None, (fourth, 1)]
    assert [rows_of(saved[k], "user") for k in (1, 2, 4)] == [[2, 5], [2, 5, 9], [7]]
    assert rows_of(saved[1], "tags/ä .. x") == []
    # a format that old versions read says nothing of a base
    assert "base" not in json.loads((saved[0] / "manifest.json").read_text())


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_base_and_delta_are_bit_equal_to_a_full_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, precision: str
) -> None:
    # two rows or less at once
    monkeypatch.setattr(files, "CHUNK_BYTES", 72)
    sharding = ShardingConfig(optimizer=optimizer, precision=precision)  # type: ignore[arg-type]
    parts = make_parts(sharding)
    series = make_series(tmp_path / "deltas", parts, 3)
    look_up(parts, [1, 2, 3])
    save(series, 1)
    look_up(parts, [3, 8])
    delta = save(series, 2)
    full = save_full(tmp_path / "full", parts, 2)
    loaded = {}
    for path in (delta, full):
        other = make_parts(sharding, seed=9)
        load(path, other)
        loaded[path] = [other.tables.local_rows(plan.name)[1:] for plan in other.plans]
        mapped = checkpoint.MappedTables(path)
        for plan, (weights, _) in zip(other.plans, loaded[path], strict=True):
            rows = mapped.read_rows(plan.name, 0, plan.num_embeddings)
            assert torch.equal(rows[1:], weights[1:].float())
    for ours, theirs in zip(loaded[delta], loaded[full], strict=True):
        for left, right in zip(ours, theirs, strict=True):
            assert torch.equal(left, right)


def test_a_resumed_run_goes_on_with_the_same_base(saved: list[Path], tmp_path: Path) -> None:
    parts = make_parts(ShardingConfig(), seed=4)
    series = make_series(tmp_path, parts, 3)
    load(saved[1], parts)
    series.resume(saved[1], checkpoint.read_checkpoint_manifest(saved[1]))
    look_up(parts, [9])
    third = save(series, 3)
    assert rows_of(third, "user") == [2, 5, 9]
    assert sha256(third / "tables" / "user" / SHARD) == (
        checkpoint.read_checkpoint_manifest(saved[2]).tables["user"].shards[0].sha256
    )
    look_up(parts, [4])
    assert checkpoint.read_checkpoint_manifest(save(series, 4)).base is None


def test_without_its_base_the_next_one_is_full(saved: list[Path], tmp_path: Path) -> None:
    parts = make_parts(ShardingConfig(), seed=4)
    series = make_series(tmp_path, parts, 3)
    load(saved[1], parts)
    series.resume(saved[1], checkpoint.read_checkpoint_manifest(saved[1]))
    shutil.rmtree(saved[0])
    assert checkpoint.read_checkpoint_manifest(save(series, 3)).base is None


def test_a_base_stays_as_long_as_a_delta_that_stays(saved: list[Path]) -> None:
    directory = saved[0].parent
    checkpoint.mark_best(saved[2], "ndcg@10", 0.5)
    assert checkpoint.prune(directory, 1) == [saved[1].name]
    assert checkpoint.committed(directory) == [saved[0], saved[2], saved[3], saved[4]]
    assert checkpoint.find(directory, "best") == saved[2]
    checkpoint.mark_best(saved[4], "ndcg@10", 0.6)
    assert checkpoint.prune(directory, 1) == [saved[0].name, saved[2].name]
    assert checkpoint.find(directory, "newest") == saved[4]


def test_a_damaged_base_makes_its_deltas_unusable(saved: list[Path]) -> None:
    flip(saved[3] / "tables" / "user" / SHARD)
    with pytest.raises(CheckpointError, match=f"SHA-256.*Received: {saved[3]}"):
        checkpoint.verify(saved[4])
    assert checkpoint.find(saved[0].parent, "newest") == saved[2]


def remove(paths: list[Path]) -> None:
    shutil.rmtree(paths[0])


def replace(paths: list[Path]) -> None:
    """Another full checkpoint under the base's name."""
    shutil.rmtree(paths[0])
    shutil.copytree(paths[3], paths[0])


def change(paths: list[Path], **tensors: Any) -> None:
    """Other rows in the delta, with a manifest that fits."""
    file = paths[1] / "tables" / "user" / SHARD
    save_file({**load_file(file), **tensors}, file)
    document = json.loads((paths[1] / "manifest.json").read_text())
    document["tables"]["user"]["shards"][0] |= {
        "num_bytes": file.stat().st_size, "sha256": sha256(file),
    }  # fmt: skip
    (paths[1] / "manifest.json").write_text(json.dumps(document))


def chain(paths: list[Path]) -> None:
    """A delta whose base is a delta."""
    document = json.loads((paths[1] / "manifest.json").read_text())
    document["base"] = {
        "checkpoint": paths[2].name, "number": 1,
        "manifest_sha256": sha256(paths[2] / "manifest.json"),
    }  # fmt: skip
    (paths[1] / "manifest.json").write_text(json.dumps(document))


def reshape(paths: list[Path]) -> None:
    """A delta that says that its table has a row more than its base's."""
    document = json.loads((paths[1] / "manifest.json").read_text())
    document["tables"]["user"]["num_embeddings"] += 1
    (paths[1] / "manifest.json").write_text(json.dumps(document))


def lead_out(paths: list[Path]) -> None:
    document = json.loads((paths[1] / "manifest.json").read_text())
    document["base"]["checkpoint"] = "../" + paths[0].name
    (paths[1] / "manifest.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, "needs the full checkpoint step-00000001 beside it"),
        (replace, "is another one of this name"),
        (chain, "is another one of this name"),
        (lead_out, "String should match pattern"),
        (reshape, "has the tables of its base|state width and compression that"),
        (lambda paths: change(paths, row_ids=torch.tensor([5, 2])), "row numbers of shard 0 of 1"),
        (lambda paths: change(paths, row_ids=torch.tensor([2, 2])), "row numbers of shard 0 of 1"),
        (lambda paths: change(paths, row_ids=torch.tensor([2, 11])), "row numbers of shard 0 of 1"),
        (lambda paths: change(paths, row_ids=torch.tensor([-1, 2])), "row numbers of shard 0 of 1"),
        (lambda paths: change(paths, row_ids=torch.tensor([2])), "Received: \\(1,\\), I64"),
    ],
)
def test_what_does_not_fit_is_refused(
    saved: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[list[Path]], None],
    message: str,
) -> None:
    # of row numbers two neighbours are never looked at in one piece
    monkeypatch.setattr(shards, "_CHECKED_ROWS", 1)
    damage(saved)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.MappedTables(saved[1]).read_rows("user", 0, 2)
    parts = make_parts(ShardingConfig())
    with pytest.raises(CheckpointError, match=message):
        load(saved[1], parts)


@pytest.mark.parametrize(
    ("row_ids", "fits"), [([1, 3, 9], True), ([1, 4, 9], False), ([0, 2], False), ([], True)]
)
def test_row_numbers_are_those_of_their_shard(row_ids: list[int], fits: bool) -> None:
    """The second shard of two has the odd rows."""
    shard = {"path": "x", "num_bytes": 1, "sha256": "0" * 64, "num_rows": len(row_ids)}
    table = TableEntry.model_validate(
        {
            "num_embeddings": 10, "embedding_dim": 4, "precision": "fp32", "optimizer": "sgd",
            "state_dim": 0, "placement": "row_wise",
            "shards": ({**shard, "index": 0}, {**shard, "index": 1}),
        }
    )  # fmt: skip
    expected = contextlib.nullcontext() if fits else pytest.raises(CheckpointError, match="leave 1")
    with expected:
        numbers = torch.tensor(row_ids, dtype=torch.int64)
        shards.check_row_ids(Path("c"), "t", table, 1, numbers)


def test_training_with_deltas_ends_where_training_without_does(tmp_path: Path) -> None:
    """Bit for bit, resumed from a delta, and what is kept can be read."""
    keys: dict[str, Any] = {"max_steps": 8, "checkpoint_every_steps": 1, "keep_checkpoints": 2}
    # a decay would end elsewhere in the run that stops first
    keys |= {"decay": "none"}
    for steps in (6, 8):
        deltas = make_config(
            tmp_path / "deltas",
            {"train": keys | {"max_steps": steps, "full_checkpoint_every": 4}},
        )
        train(deltas, COLLECTIVES)
    plain = make_config(tmp_path / "full", {"train": keys})
    train(plain, COLLECTIVES)
    newest = checkpoint.find(deltas.checkpoint_directory, "newest")
    manifest = checkpoint.read_checkpoint_manifest(newest)
    assert manifest.base is not None
    assert (manifest.base.checkpoint, manifest.base.number) == ("step-00000005", 3)
    expected = checkpoint.find(plain.checkpoint_directory, "newest")
    assert expected.name == newest.name == "step-00000008"
    ours, theirs = checkpoint.MappedTables(newest), checkpoint.MappedTables(expected)
    for name, table in manifest.tables.items():
        assert torch.equal(
            ours.read_rows(name, 0, table.num_embeddings),
            theirs.read_rows(name, 0, table.num_embeddings),
        )
    assert sha256(newest / "dense.safetensors") == sha256(expected / "dense.safetensors")
