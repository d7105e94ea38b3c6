"""What must not change unnoticed: a short loss curve, and that old checkpoints stay readable.

After a change that is meant to change the numbers, write the curve again and say why in the commit:
python -m tests.golden.regenerate

The checkpoint of a format version is written once, by the same command with --checkpoint, when the
version is new; it is never written again.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distrec import checkpoint
from distrec.batch import Jagged
from distrec.config import ShardingConfig, parse_config
from distrec.sharding.collectives import OneProcess
from distrec.sharding.lookup import Request
from distrec.sharding.plan import plan_tables
from distrec.sharding.tables import EmbeddingTables
from distrec.trainer.setup import dense_optimizer
from tests.golden.regenerate import CHECKPOINT, CURVE, DELTA_CHECKPOINT, NAMES, curve


def test_loss_curve(tmp_path: Path) -> None:
    expected = json.loads(CURVE.read_text())
    assert curve(tmp_path) == pytest.approx(expected, abs=1e-4)
    assert len(expected) == 24
    assert expected[-1] < expected[0] - 0.5


def test_a_checkpoint_of_format_1_is_readable() -> None:
    path = CHECKPOINT / "step-00000002"
    checkpoint.verify(path)
    manifest = checkpoint.read_checkpoint_manifest(path)
    assert (manifest.format_version, manifest.global_step, manifest.world_size) == (1, 2, 2)
    expected = json.loads((CHECKPOINT / "expected.json").read_text())
    model = checkpoint.load_model(path)
    bias = model.towers["deep"].user_network.layers[0].bias
    torch.testing.assert_close(bias, torch.tensor(expected["bias"]), atol=0, rtol=0)
    tables = checkpoint.MappedTables(path)
    rows = tables({"x": Request("item", Jagged.from_lists([[0, 3], [5]]), "sum")})["x"]
    torch.testing.assert_close(rows, torch.tensor(expected["rows"]), atol=0, rtol=0)
    assert len(manifest.tables["item"].shards) == 2


def test_a_delta_of_format_2_is_readable() -> None:
    base, delta = (DELTA_CHECKPOINT / name for name in NAMES)
    checkpoint.verify(delta)
    manifest = checkpoint.read_checkpoint_manifest(delta)
    assert (manifest.format_version, manifest.global_step, manifest.world_size) == (2, 2, 2)
    assert manifest.base is not None
    assert manifest.base.checkpoint == base.name
    expected = json.loads((DELTA_CHECKPOINT / "expected.json").read_text())
    model = checkpoint.load_model(delta)
    bias = model.towers["deep"].user_network.layers[0].bias
    assert bias.tolist() == expected["bias"]
    rows = torch.tensor(expected["rows"])
    assert torch.equal(checkpoint.read_rows(delta, "item", 0, len(rows)), rows)
    differs = (checkpoint.read_rows(base, "item", 0, len(rows)) != rows).any(dim=1)
    assert differs.nonzero().flatten().tolist() == expected["changed"]
    # as a run on one rank goes on from it
    one = OneProcess(torch.device("cpu"))
    sharding = ShardingConfig.model_validate_json(json.dumps(manifest.config["sharding"]))
    plans = plan_tables(model.table_specs(), sharding, 1)
    tables = EmbeddingTables(plans, one, sharding, 9, one.device)
    checkpoint.load_tables(delta, tables, plans, sharding, one.world)
    assert torch.equal(tables.local_rows("item")[1][1:], rows[1:])


def test_an_optimizer_of_other_parameters_goes_on_from_format_1() -> None:
    """Older versions trained the global bias under a softmax, and no recency of the gate."""
    path = CHECKPOINT / "step-00000002"
    config = parse_config({"name": "x", "prepare": {"events": {"paths": ["x"], "time": "t"}}}, "t")
    model = checkpoint.load_model(path)
    model.global_bias.requires_grad_(False)
    optimizer = dense_optimizer(model, config)
    checkpoint.load_dense(path, model, optimizer)
    recency = model.user_gate.recency
    assert set(optimizer.state) == set(model.parameters()) - {model.global_bias, recency}
    assert not recency.any()
    assert float(model.global_bias.detach()) != 0
