"""Tables of a checkpoint as Parquet: the rows that training holds, the values of the vocabulary."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from distrec import checkpoint
from distrec.checkpoint import export
from distrec.cli import app
from distrec.config import Config
from distrec.sharding.collectives import OneProcess
from distrec.trainer import setup, train
from distrec.trainer.start import load
from tests.training import make_config, write_config

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint-format-1" / "step-00000002"
COLLECTIVES = OneProcess(torch.device("cpu"))


@dataclass(frozen=True)
class Trained:
    """A run whose newest checkpoint is a delta, and the tables in memory."""

    config: Config
    path: Path
    run: setup.Run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    keys = {
        "train": {"max_steps": 3, "checkpoint_every_steps": 1, "full_checkpoint_every": 3},
        "score": {"checkpoint": "newest"},
    }
    config = make_config(tmp_path_factory.mktemp("export"), keys)
    train(config, COLLECTIVES)
    newest = checkpoint.find(config.checkpoint_directory, "newest")
    assert checkpoint.read_checkpoint_manifest(newest).base is not None
    run = setup.build(setup.read_inputs(config, 1), COLLECTIVES, None)
    load(run, newest)
    return Trained(config, write_config(config), run)


def call(trained: Trained, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["export", str(trained.path), *arguments])
    return result.exit_code, result.output


def vectors(table: pa.Table) -> torch.Tensor:
    return torch.tensor(table["vector"].to_pylist())


@pytest.mark.parametrize(
    ("name", "vocabulary"),
    [("user", "user_id"), ("item", "item_id"), ("item_bias", "item_id"), ("item_tags", None)],
)
def test_a_table_is_the_rows_of_training_and_the_values_of_the_vocabulary(
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    vocabulary: str | None,
) -> None:
    # several row groups
    monkeypatch.setattr(export, "_MAX_GROUP_ROWS", 5)
    output = tmp_path / "rows.parquet"
    code, printed = call(trained, "--table", name, "--output", str(output))
    assert code == 0, printed
    file = pq.ParquetFile(output)
    assert file.metadata.row_group(0).num_rows == 5
    table = file.read()
    assert table.schema.types == [pa.int64(), pa.string(), pa.list_(pa.float32())]
    ids, weights, _ = trained.run.tables.local_rows(name)
    assert table["id"].to_pylist() == ids.tolist()
    assert torch.equal(vectors(table), weights)
    assert json.loads(printed.splitlines()[-1])["summary"]["num_rows"] == len(ids)
    expected: dict[int, str] = {}
    if vocabulary is not None:
        folder = trained.config.dataset_directory / "vocab" / vocabulary
        rows = pq.read_table(folder).to_pylist()
        expected = {row["id"]: row["value"] for row in rows}
        assert len(expected) == len(ids) - 2
    assert table["value"].to_pylist() == [expected.get(row) for row in ids.tolist()]


def test_a_range_of_ids_in_place_of_an_older_file(trained: Trained, tmp_path: Path) -> None:
    output = tmp_path / "rows.parquet"
    output.write_text("older")
    arguments = ("--table", "item", "--output", str(output), "--start", "5", "--stop", "17")
    assert call(trained, *arguments)[0] == 0
    table = pq.read_table(output)
    assert table["id"].to_pylist() == list(range(5, 17))
    assert torch.equal(vectors(table), trained.run.tables.local_rows("item")[1][5:17])
    assert os.listdir(tmp_path) == ["rows.parquet"]


@pytest.mark.parametrize("bounds", [(0, 6), (0, 1), (1, 6), (2, 3), (3, 5), (5, 6)])
def test_rows_of_several_shards(bounds: tuple[int, int]) -> None:
    rows = export.TableRows(GOLDEN, "item")
    whole = torch.empty(rows.num_ids, rows.embedding_dim)
    files = sorted((GOLDEN / "tables" / "item").iterdir())
    assert len(files) == 2
    for index, file in enumerate(files):
        whole[index::2] = load_file(file)["weights"]
    assert torch.equal(rows.read(*bounds), whole[slice(*bounds)])


def no_such_table(trained: Trained, output: Path) -> tuple[str, ...]:
    return "--table", "items", "--output", str(output)


def too_many_rows(trained: Trained, output: Path) -> tuple[str, ...]:
    return "--table", "item", "--output", str(output), "--stop", "1000"


def no_directory(trained: Trained, output: Path) -> tuple[str, ...]:
    return "--table", "item", "--output", str(output / "deeper")


def damaged(trained: Trained, output: Path) -> tuple[str, ...]:
    """Noticed once the file has been begun."""
    path = trained.config.dataset_directory / "vocab" / "item_id" / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[:50])
    return "--table", "item", "--output", str(output)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (no_such_table, 2, "has no table 'items'. Tables: "),
        (too_many_rows, 2, "stop 1000. Ask for a range"),
        (no_directory, 3, "cannot be written"),
        (damaged, 3, "the vocabulary 'item_id' can be read"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(
    trained: Trained,
    tmp_path: Path,
    arguments: Callable[[Trained, Path], tuple[str, ...]],
    code: int,
    message: str,
) -> None:
    received, printed = call(trained, *arguments(trained, tmp_path / "rows.parquet"))
    assert received == code
    assert message in printed
    assert os.listdir(tmp_path) == []
