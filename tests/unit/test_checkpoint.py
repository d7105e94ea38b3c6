"""Checkpoints: what is read back, what is refused, what stays when others go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from distrec import checkpoint
from distrec.batch import Jagged
from distrec.checkpoint.load import stretches
from distrec.checkpoint.manifest import table_directory
from distrec.config import ShardingConfig
from distrec.errors import CheckpointError, DataError
from distrec.files import sha256
from distrec.model import ModelSpec
from distrec.sharding.collectives import OneProcess
from distrec.sharding.lookup import Request
from distrec.sharding.plan import TableSpec, plan_tables
from distrec.sharding.tables import EmbeddingTables

SPECS = (TableSpec("user", 11, 8), TableSpec("tags/ä .. x", 5, 4))
SPEC = ModelSpec(
    features=(), num_users=11, num_trained_items=5, num_items=5, history_length=3, has_labels=False
)
COLLECTIVES = OneProcess(torch.device("cpu"))


def make_parts(
    sharding: ShardingConfig, seed: int = 1, specs: tuple[TableSpec, ...] = SPECS
) -> checkpoint.Parts:
    torch.manual_seed(seed)
    plans = plan_tables(specs, sharding, 1)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters())
    tables = EmbeddingTables(plans, COLLECTIVES, sharding, seed, torch.device("cpu"))
    return checkpoint.Parts(model, optimizer, tables, plans, sharding)


def save(directory: Path, parts: checkpoint.Parts, step: int, **position: Any) -> Path:
    identity = checkpoint.Identity(1, {"model": {}}, "c", "d", {"user_id": "v"}, SPEC)
    place = checkpoint.Position(step, 0, step, 12, **position)
    return checkpoint.save(directory, identity, place, parts, COLLECTIVES)


def train_a_little(parts: checkpoint.Parts) -> None:
    parts.tables.set_learning_rate(0.1)
    for _ in range(3):
        rows = parts.tables(
            {plan.name: Request(plan.name, Jagged.from_lists([[1, 2], [4]]), "sum")
             for plan in parts.plans}
        )  # fmt: skip
        loss = parts.model(torch.randn(4, 3)).square().sum()
        for tensor in rows.values():
            loss = loss + (tensor - 1).square().sum()
        loss.backward()
        parts.optimizer.step()
        parts.optimizer.zero_grad()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    parts = make_parts(ShardingConfig())
    train_a_little(parts)
    return save(tmp_path, parts, 3)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
def test_everything_comes_back(tmp_path: Path, precision: str, optimizer: str) -> None:
    sharding = ShardingConfig(precision=precision, optimizer=optimizer)  # type: ignore[arg-type]
    parts = make_parts(sharding)
    train_a_little(parts)
    path = save(tmp_path, parts, 3, metrics={"ndcg@10": 0.5}, early_stopping={"best_step": 3})
    other = make_parts(sharding, seed=2)
    manifest = checkpoint.load_dense(path, other.model, other.optimizer)
    checkpoint.load_tables(path, other.tables, other.plans, sharding, COLLECTIVES.world)
    assert (manifest.global_step, manifest.metrics) == (3, {"ndcg@10": 0.5})
    for name, tensor in parts.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], tensor), name
    state, loaded = parts.optimizer.state_dict(), other.optimizer.state_dict()
    assert state["state"].keys() == loaded["state"].keys() == {0, 1, 2, 3}
    for index, entries in state["state"].items():
        for key, tensor in entries.items():
            assert torch.equal(loaded["state"][index][key], tensor), (index, key)
    for plan in parts.plans:
        for ours, theirs in zip(
            parts.tables.local_rows(plan.name), other.tables.local_rows(plan.name), strict=True
        ):
            assert torch.equal(ours, theirs)
            assert ours.dtype == theirs.dtype


def test_tables_are_told_once_all_rows_are_written(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For those on a GPU, which keep copies of rows in a cache."""
    parts = make_parts(ShardingConfig(), seed=2)
    tables, name = parts.tables, parts.plans[-1].name
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(
        tables, "rows_were_written", lambda: seen.append(tables.local_rows(name)[1].clone())
    )
    checkpoint.load_tables(saved, tables, parts.plans, parts.sharding, COLLECTIVES.world)
    assert torch.equal(seen[-1], tables.local_rows(name)[1])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("pooling", ["none", "sum", "mean"])
def test_mapped_tables_look_up_as_training_does(
    tmp_path: Path, precision: str, pooling: str
) -> None:
    parts = make_parts(ShardingConfig(precision=precision))  # type: ignore[arg-type]
    train_a_little(parts)
    mapped = checkpoint.MappedTables(save(tmp_path, parts, 3))
    bags = Jagged.from_lists([[], [0, 4, 4, 1], [0], [3]])
    requests = {plan.name: Request(plan.name, bags, pooling) for plan in parts.plans}  # type: ignore[arg-type]
    with torch.no_grad():
        expected = parts.tables(requests)
    found = mapped(requests)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
        assert found[key].dtype == torch.float32


def split_shards(path: Path, table: str, num_shards: int) -> None:
    """Rewrite a table of one shard as several, as that many ranks would have written it."""
    folder = path / table_directory(table)
    whole = load_file(folder / "shard-00001-of-00001.safetensors")
    (folder / "shard-00001-of-00001.safetensors").unlink()
    document = json.loads((path / "manifest.json").read_text())
    shards = []
    for index in range(num_shards):
        file = folder / f"shard-{index + 1:05d}-of-{num_shards:05d}.safetensors"
        save_file({k: v[index::num_shards].contiguous() for k, v in whole.items()}, file)
        shards.append(
            {
                "index": index,
                "path": file.name,
                "num_rows": len(whole["weights"][index::num_shards]),
                "num_bytes": file.stat().st_size,
                "sha256": sha256(file),
            }
        )
    document["tables"][table]["shards"] = shards
    (path / "manifest.json").write_text(json.dumps(document))


@pytest.mark.parametrize("num_shards", [2, 3, 7])
def test_any_number_of_shards_is_read(saved: Path, num_shards: int) -> None:
    whole = checkpoint.read_rows(saved, "user", 0, 11)
    split_shards(saved, "user", num_shards)
    checkpoint.verify(saved)
    assert torch.equal(checkpoint.read_rows(saved, "user", 0, 11), whole)
    assert torch.equal(checkpoint.read_rows(saved, "user", 3, 6), whole[3:6])
    parts = make_parts(ShardingConfig(), seed=5)
    checkpoint.load_tables(saved, parts.tables, parts.plans, parts.sharding, COLLECTIVES.world)
    _, weights, state = parts.tables.local_rows("user")
    assert torch.equal(weights[1:], whole[1:])
    # rows 1, 2 and 4 were trained
    assert (state.squeeze(1) > 0).nonzero().squeeze(1).tolist() == [1, 2, 4]


def save_check_load_in_little_memory(directory: Path) -> None:
    """With 64 MiB of rows in memory, room for the mapped file and 32 MiB more."""
    import resource
    from types import SimpleNamespace

    from distrec.trainer.step import check_state

    parts = make_parts(ShardingConfig(), specs=(TableSpec("user", 2**20, 16),))
    # code and buffers that everything needs, once
    checkpoint.load_tables(
        save(directory, parts, 1), parts.tables, parts.plans, parts.sharding, COLLECTIVES.world
    )
    used = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmData")
    )
    resource.setrlimit(resource.RLIMIT_DATA, (used + 100 * 2**20,) * 2)
    run: Any = SimpleNamespace(
        model=parts.model, tables=parts.tables, collectives=COLLECTIVES,
        inputs=SimpleNamespace(plans=parts.plans),
    )  # fmt: skip
    check_state(run, "step 2")
    path = save(directory, parts, 2)
    checkpoint.load_tables(path, parts.tables, parts.plans, parts.sharding, COLLECTIVES.world)
    print("it was enough")


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_no_second_copy_of_a_table_is_made(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.unit import test_checkpoint as module; "
        "module.save_check_load_in_little_memory(Path(sys.argv[1]))"
    )
    # glibc gives large blocks back at once, so that what is used now is what the tables need
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1048576",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip
    assert result.stdout.strip() == "it was enough", result.stderr


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(1, 7), st.integers(1, 9))
def test_ranks_read_each_place_of_each_shard_once(places: list[int], ranks: int, step: int) -> None:
    read = []
    for rank in range(ranks):
        for stretch in stretches(places, rank, ranks, step):
            assert 0 < stretch.stop - stretch.start <= step
            read += [(stretch.shard, place) for place in range(stretch.start, stretch.stop)]
    assert sorted(read) == [(s, place) for s, count in enumerate(places) for place in range(count)]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_ids_and_tables_that_are_not_there(saved: Path) -> None:
    mapped = checkpoint.MappedTables(saved)
    for row in (-1, 11):
        with pytest.raises(DataError, match=r"table 'user' lies in \[0, 11\)"):
            mapped.rows("user", torch.tensor([1, row]))
    with pytest.raises(CheckpointError, match="has no table 'users'"):
        mapped.rows("users", torch.tensor([1]))


def test_another_model_or_optimizer_is_refused(saved: Path) -> None:
    parts = make_parts(ShardingConfig())
    with pytest.raises(CheckpointError, match="fits the model"):
        checkpoint.load_dense(saved, torch.nn.Linear(3, 2))
    other = ShardingConfig(optimizer="sgd")
    with pytest.raises(CheckpointError, match="rowwise_adagrad"):
        checkpoint.load_tables(saved, parts.tables, parts.plans, other, COLLECTIVES.world)


def test_what_goes_and_what_stays(tmp_path: Path) -> None:
    parts = make_parts(ShardingConfig())
    for step in (1, 2, 3, 4):
        path = save(tmp_path, parts, step)
        if step == 2:
            checkpoint.mark_best(path, "ndcg@10", 0.5)
    (tmp_path / ".partial-step-00000009-abc" / "tables").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    # committed by its manifest: this is not a checkpoint, whatever its name
    (tmp_path / "step-00000008").mkdir()
    assert checkpoint.find(tmp_path, "newest").name == "step-00000004"
    assert checkpoint.prune(tmp_path, 1) == [
        ".partial-step-00000009-abc", "step-00000001", "step-00000003", "step-00000008",
    ]  # fmt: skip
    assert sorted(os.listdir(tmp_path)) == ["best.json", "mine", "step-00000002", "step-00000004"]
    assert checkpoint.find(tmp_path, "best").name == "step-00000002"
    flip(tmp_path / "step-00000002" / "dense.safetensors")
    with pytest.raises(CheckpointError, match="best checkpoint cannot be used"):
        checkpoint.find(tmp_path, "best")
