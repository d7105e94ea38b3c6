"""A run with compressed tables: trained, saved, looked up on disk, exported, scored, taken over."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from distrec import checkpoint
from distrec.batch import Jagged
from distrec.checkpoint import export
from distrec.cli import app
from distrec.config import Config
from distrec.errors import CheckpointError
from distrec.metrics.evaluation import inference
from distrec.planner import plan_run
from distrec.scoring.model import open_model
from distrec.sharding.collectives import OneProcess
from distrec.sharding.lookup import Request
from distrec.trainer import setup, train
from distrec.trainer.identity import FREE_KEYS, resume_hash
from distrec.trainer.start import load
from distrec.trainer.warm_start import find_warm_start, load_warm_start
from tests.growing import REUSED_ITEMS, extend_dataset, new_config, old_config
from tests.training import make_config, write_config

COLLECTIVES = OneProcess(torch.device("cpu"))
# 62 users and 42 items; every way of composing, and one table that has a row an id
COMPRESS: dict[str, dict[str, Any]] = {
    "item": {"method": "hash", "num_buckets": 12, "num_hashes": 2, "own_rows": 5},
    "user": {"method": "quotient_remainder", "num_buckets": 8, "operation": "product"},
    "item_history": {"method": "quotient_remainder", "num_buckets": 6, "own_rows": 2},
}
KEYS: dict[str, dict[str, Any]] = {
    "train": {
        "max_epochs": 2, "max_steps": 12, "evaluate_every_steps": 0, "checkpoint_every_steps": 4,
        "full_checkpoint_every": 4,
    },
    "sharding": {"compress": COMPRESS},
    "score": {"checkpoint": "newest"},
}  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A run whose newest checkpoint is a delta, and its tables in memory."""

    config: Config
    run: setup.Run
    path: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    config = old_config(tmp_path_factory.mktemp("compressed"), KEYS)
    train(config, COLLECTIVES)
    path = checkpoint.find(config.checkpoint_directory, "newest")
    assert checkpoint.read_checkpoint_manifest(path).base is not None
    run = setup.build(setup.read_inputs(config, 1), COLLECTIVES, None)
    load(run, path)
    return Trained(config, run, path)


def vectors_by_hand(run: setup.Run, table: str) -> Tensor:
    """Of every id, composed of the rows in memory."""
    plan = run.tables.table_plans[table]
    rows = run.tables.local_rows(table)[1]
    if plan.composition is None:
        return rows
    parts = rows[plan.composition.row_ids(table, torch.arange(plan.num_ids))]
    if plan.composition.operation == "product":
        return parts[:, 0] * (1 + parts[:, 1])
    return parts.sum(dim=1)


def test_tables_are_as_small_as_planned_and_learn(trained: Trained) -> None:
    sizes = {"item": 2 + 5 + 12, "user": 2 + 8 + 8, "item_history": 2 + 2 + 6 + 7, "item_bias": 42}
    saved = checkpoint.read_checkpoint_manifest(trained.path)
    report = plan_run(trained.config, 1)
    planned = {entry.plan.name: entry.plan for entry in report.tables}
    for name, rows in sizes.items():
        assert saved.tables[name].num_embeddings == planned[name].num_embeddings == rows
        num_ids = 62 if name == "user" else 42
        assert saved.tables[name].num_ids == planned[name].num_ids == num_ids
        assert len(trained.run.tables.local_rows(name)[0]) == rows
        state = trained.run.tables.local_rows(name)[2]
        assert (state[2:] > 0).float().mean() > 0.9, name
    logged = json.loads((trained.config.logs_directory / setup.PLAN_LOG).read_text())["tables"]
    found = {table["name"]: (table["num_ids"], table["compression"]) for table in logged}
    assert found["user"] == (62, "quotient_remainder")
    assert found["item_bias"] == (42, None)


@pytest.mark.parametrize("pooling", ["none", "sum", "mean"])
def test_mapped_tables_look_up_as_training_does(trained: Trained, pooling: Any) -> None:
    bags = Jagged.from_lists([[], [0, 4, 41, 41, 1], [0], [9]])
    requests = {name: Request(name, bags, pooling) for name in [*COMPRESS, "item_bias"]}
    with torch.no_grad():
        expected = trained.run.tables(requests)
    found = checkpoint.MappedTables(trained.path)(requests)
    for name, rows in expected.items():
        assert torch.equal(found[name], rows)


def test_scoring_encodes_as_training_does(trained: Trained) -> None:
    run, scoring = trained.run, open_model(trained.path)
    with inference(run.model):
        rows = run.tables(run.model.item_requests(run.inputs.items))
        expected = run.model.encode_items(run.inputs.items, rows)
    found = scoring.encode_items(run.inputs.items)
    torch.testing.assert_close(found, expected)
    assert float(found.std()) > 0


@pytest.mark.parametrize("table", [*COMPRESS, "item_bias"])
def test_an_export_has_the_vector_of_every_id(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    # several row groups
    monkeypatch.setattr(export, "_MAX_GROUP_ROWS", 5)
    config = write_config(trained.config)
    output = tmp_path / "rows.parquet"
    call = ["export", str(config), "--table", table, "--output", str(output)]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    found = pq.read_table(output)
    expected = vectors_by_hand(trained.run, table)
    assert found["id"].to_pylist() == list(range(len(expected)))
    torch.testing.assert_close(torch.tensor(found["vector"].to_pylist()), expected)
    assert found["value"].to_pylist()[:2] == [None, None]
    assert None not in found["value"].to_pylist()[2:]
    # ids as the vocabulary has them, not rows
    result = CliRunner().invoke(app, [*call, "--start", "40", "--stop", "99"])
    assert result.exit_code == 2
    assert f"lie in [0, {len(expected)}). Received: start 40, stop 99" in result.output


def test_a_warm_start_takes_shared_rows_over(
    trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "new"
    directory.mkdir()
    extend_dataset(trained.config.dataset_directory, directory / "dataset")
    config = new_config(directory, trained.path, KEYS)
    inputs = setup.read_inputs(config, 1)
    run = setup.build(inputs, COLLECTIVES, None)
    path = find_warm_start(inputs, COLLECTIVES)
    assert path is not None
    with caplog.at_level(logging.INFO, "distrec"):
        load_warm_start(run, path)
    # 3 has a row of its own, 8 and 9 share theirs with others
    assert REUSED_ITEMS == (3, 8, 9)
    assert "table item: 19 old rows, 0 new, 1 of the old ones start anew" in caplog.text
    assert "table user: 18 old rows, 1 new, 0 of the old ones start anew" in caplog.text
    for name, old_ids in (("item", 42), ("user", 62), ("item_history", 42)):
        old, new = vectors_by_hand(trained.run, name), vectors_by_hand(run, name)
        assert len(new) > len(old) == old_ids
        kept = torch.ones(old_ids, dtype=torch.bool)
        kept[3] = name == "user"
        assert torch.equal(new[:old_ids][kept], old[kept])
        assert torch.equal(new[3], old[3]) == (name == "user")
        assert float(new[old_ids:].abs().sum()) > 0


@pytest.mark.parametrize(
    "change",
    [
        {},
        {**COMPRESS, "item": {**COMPRESS["item"], "num_buckets": 13}},
        {**COMPRESS, "item_bias": {"method": "hash", "num_buckets": 5}},
    ],
)
def test_ids_that_would_be_composed_of_other_rows_are_refused(
    trained: Trained, tmp_path: Path, change: dict[str, Any]
) -> None:
    directory = tmp_path / "new"
    directory.mkdir()
    extend_dataset(trained.config.dataset_directory, directory / "dataset")
    keys = {**KEYS, "sharding": {"compress": change}}
    inputs = setup.read_inputs(new_config(directory, trained.path, keys), 1)
    with pytest.raises(CheckpointError, match=r"ids of a table go on sharing .*Put back sharding"):
        find_warm_start(inputs, COLLECTIVES)


def test_a_manifest_whose_rows_do_not_fit_is_refused(trained: Trained, tmp_path: Path) -> None:
    file = trained.path / "manifest.json"
    text = file.read_text()
    document = json.loads(text)
    # what first readers of format 1 do not know is there only where it is needed
    assert "composition" not in document["tables"]["item_bias"]
    document["tables"]["item"]["composition"]["num_buckets"] += 1
    file.write_text(json.dumps(document))
    try:
        with pytest.raises(
            CheckpointError, match=r"has the rows of its composition\. Received: 19"
        ):
            checkpoint.read_checkpoint_manifest(trained.path)
    finally:
        file.write_text(text)


def test_a_run_without_compression_is_the_run_that_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints from before there was the key are gone on from."""
    before = resume_hash(make_config(tmp_path))
    compressed = make_config(tmp_path, {"sharding": {"compress": COMPRESS}})
    assert resume_hash(compressed) != before
    monkeypatch.setitem(FREE_KEYS, "sharding", (*FREE_KEYS["sharding"], "compress"))
    assert resume_hash(compressed) == resume_hash(make_config(tmp_path)) == before
