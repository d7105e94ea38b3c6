"""Checkpoints that travel over numbers of ranks: bit-equal, full or delta, each byte read once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distrec import checkpoint
from distrec.batch import Jagged
from distrec.checkpoint.manifest import table_directory
from distrec.config import ShardingConfig
from distrec.model import ModelSpec
from distrec.sharding.collectives import Collectives
from distrec.sharding.lookup import Request
from distrec.sharding.plan import TableSpec, plan_tables
from distrec.sharding.tables import EmbeddingTables
from tests.parallel.harness import run_ranks

SPECS = (TableSpec("wide", 101, 8), TableSpec("bias", 37, 4), TableSpec("small", 9, 8))
SPEC = ModelSpec(
    features=(), num_users=3, num_trained_items=3, num_items=3, history_length=3, has_labels=False
)
IDENTITY = checkpoint.Identity(1, {}, "c", "d", {}, SPEC)
# the tables lie in another way on each number of ranks
SHARDING: dict[int, dict[str, Any]] = {
    1: {},
    2: {"tables": {"small": "replicated"}},
    3: {"tables": {"bias": "replicated"}, "hot_rows": {"wide": 20}},
    8: {"tables": {"small": "row_wise"}, "hot_rows": {"bias": 5, "wide": 7}},
}
TRAINED = {2: ([1, 2, 3, 40, 99], [2, 50, 97]), 3: ([3, 19, 20, 100],)}


def make_parts(collectives: Collectives, seed: int) -> checkpoint.Parts:
    keys = SHARDING[collectives.world.world_size]
    sharding = ShardingConfig.model_validate(
        {"optimizer": "adagrad", "placement": "row_wise", "learning_rate": 0.1} | keys
    )
    plans = plan_tables(SPECS, sharding, collectives.world.world_size)
    tables = EmbeddingTables(plans, collectives, sharding, seed, collectives.device)
    tables.track_touched_rows()
    model = torch.nn.Linear(2, 2)
    return checkpoint.Parts(model, torch.optim.SGD(model.parameters()), tables, plans, sharding)


def train(parts: checkpoint.Parts, ids: list[int], rank: int) -> None:
    """Each rank uses some of the ids."""
    requests = {
        plan.name: Request(
            plan.name,
            Jagged.from_lists([[id_ % plan.num_embeddings for id_ in ids[rank:]]]),
            "sum",
        )
        for plan in parts.plans
    }
    rows = parts.tables(requests)
    torch.stack([(tensor - 1).square().sum() for tensor in rows.values()]).sum().backward()


def body(collectives: Collectives, directory: str, source: str) -> dict[str, Any]:
    """Load, save again; then train and save as a delta and as a whole."""
    world = collectives.world
    folder = Path(directory)
    parts = make_parts(collectives, seed=world.world_size)
    series = checkpoint.Series(folder / "series", 9, parts, collectives)
    answer: dict[str, Any] = {}
    if source:
        path = folder / source
        answer["bytes"] = checkpoint.load_tables(
            path, parts.tables, parts.plans, parts.sharding, world
        )
        series.resume(path, checkpoint.read_checkpoint_manifest(path))
        position = checkpoint.Position(0, 0, 0, 1)
        checkpoint.save(
            folder / f"loaded-{world.world_size}", IDENTITY, position, parts, collectives
        )
    for number, ids in enumerate(TRAINED.get(world.world_size, ())):
        train(parts, ids, world.rank)
        position = checkpoint.Position(10 * world.world_size + number, 0, 0, 1)
        answer["saved"] = series.save(IDENTITY, position).name
        checkpoint.save(folder / "whole", IDENTITY, position, parts, collectives)
    return answer


def shards_of(path: Path, table: str) -> Iterator[tuple[int, int, dict[str, torch.Tensor]]]:
    """Number, how many there are, tensors."""
    files = sorted((path / table_directory(table)).iterdir())
    for index, file in enumerate(files):
        yield index, len(files), load_file(file)


def logical(path: Path, base: Path | None = None) -> dict[str, torch.Tensor]:
    """Rows and state of every table in the order of ids, put together here."""
    result = {}
    for spec in SPECS:
        for name, width in (("weights", spec.embedding_dim), ("state", spec.embedding_dim)):
            whole = torch.full((spec.num_embeddings, width), torch.nan)
            for index, count, shard in shards_of(base or path, spec.name):
                whole[index::count] = shard[name]
            if base is not None:
                for _, _, shard in shards_of(path, spec.name):
                    whole[shard["row_ids"]] = shard[name]
            assert not whole.isnan().any()
            result[f"{spec.name} {name}"] = whole
    return result


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def tensor_bytes(path: Path) -> int:
    """Of all shards of a checkpoint, without the files' headers."""
    return sum(
        tensor.numel() * tensor.element_size()
        for spec in SPECS
        for _, _, shard in shards_of(path, spec.name)
        for tensor in shard.values()
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[dict[str, Any]]]]:
    """Two ranks train; three go on from their delta; eight read that, and one what eight wrote."""
    folder = tmp_path_factory.mktemp("sizes")
    answers = {}
    for ranks, source in (
        (2, ""),
        (3, "series/step-00000021"),
        (8, "series/step-00000030"),
        (1, "loaded-8/step-00000000"),
    ):
        answers[ranks] = run_ranks(
            ranks,
            "tests.parallel.test_checkpoint_sizes:body",
            {"directory": str(folder), "source": source},
            folder,
        )
    return folder, answers


def test_two_to_three_to_eight_to_one_is_bit_equal(
    run: tuple[Path, dict[int, list[dict[str, Any]]]],
) -> None:
    folder, _ = run
    trained = {step: logical(folder / "whole" / f"step-000000{step}") for step in (20, 21, 30)}
    for before, after in ((20, 21), (21, 30)):
        assert not torch.equal(trained[before]["wide state"], trained[after]["wide state"])
    assert_equal(logical(folder / "loaded-3" / "step-00000000"), trained[21])
    assert_equal(logical(folder / "loaded-8" / "step-00000000"), trained[30])
    assert_equal(logical(folder / "loaded-1" / "step-00000000"), trained[30])


def test_deltas_hold_the_rows_that_any_rank_used(
    run: tuple[Path, dict[int, list[dict[str, Any]]]],
) -> None:
    folder, answers = run
    assert [answer["saved"] for answer in answers[3]] == ["step-00000030"] * 3
    base = folder / "series" / "step-00000020"
    for step, used in ((21, TRAINED[2][1]), (30, TRAINED[2][1] + TRAINED[3][0])):
        path = folder / "series" / f"step-000000{step}"
        manifest = checkpoint.read_checkpoint_manifest(path)
        assert manifest.base is not None
        assert manifest.base.checkpoint == base.name
        assert_equal(logical(path, base), logical(folder / "whole" / path.name))
        for spec in SPECS:
            found = [row for _, _, shard in shards_of(path, spec.name)
                     for row in shard["row_ids"].tolist()]  # fmt: skip
            # row 0 is padding
            assert sorted(found) == sorted({row % spec.num_embeddings for row in used} - {0})
    mapped = checkpoint.MappedTables(path)
    for spec in SPECS:
        rows = mapped.read_rows(spec.name, 1, spec.num_embeddings)
        assert torch.equal(rows, logical(path, base)[f"{spec.name} weights"][1:])


def test_each_byte_is_read_once_over_all_ranks(
    run: tuple[Path, dict[int, list[dict[str, Any]]]],
) -> None:
    folder, answers = run
    series = folder / "series"
    full = tensor_bytes(series / "step-00000020")
    for ranks, step in ((3, 21), (8, 30)):
        delta = tensor_bytes(series / f"step-000000{step}")
        assert 0 < delta < full
        assert sum(answer["bytes"] for answer in answers[ranks]) == full + delta
    assert answers[1][0]["bytes"] == tensor_bytes(folder / "loaded-8" / "step-00000000")
    # and nobody reads most of it
    assert max(answer["bytes"] for answer in answers[8]) < full / 4
