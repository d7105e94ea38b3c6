"""Private training under real horovodrun: two ranks compute what one does, noise included."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch

from distrec import checkpoint
from distrec.config import Config
from distrec.private import Spending
from distrec.sharding.collectives import Collectives, OneProcess
from distrec.trainer import train
from tests.parallel.harness import run_ranks
from tests.training import make_config

NUM_STEPS = 8
TABLES = ("item", "item_bias", "user")


def private_config(directory: Path) -> Config:
    return make_config(
        directory,
        {
            "model": {"towers": ["cf"]},
            "loss": {"kind": "softmax"},
            "train": {"max_epochs": 2},
            "sharding": {"tables": {"user": "row_wise", "item": "row_wise"}},
            "privacy": {
                "target_epsilon": 50.0, "delta": 1e-3, "sample_rate": 0.25,
                "noise_multiplier": 1.0, "clip_norm": 0.5,
            },
        },
    )  # fmt: skip


def body(collectives: Collectives, directory: str) -> list[str]:
    """Train; each rank offers another key, of which the first rank's counts.

    What the accountant says changes nothing here.
    """
    config = private_config(Path(directory))
    key = bytes([7 + collectives.world.rank]) * 32
    with (
        mock.patch("secrets.token_bytes", return_value=key),
        mock.patch.object(Spending, "epsilon", return_value=1.0),
        mock.patch("distrec.trainer.setup.check_opacus"),
    ):
        result = train(config, collectives)
    return [str(result.checkpoint), str(result.steps)]


def rows_of(path: str) -> dict[str, torch.Tensor]:
    manifest = checkpoint.read_checkpoint_manifest(path)
    mapped = checkpoint.MappedTables(Path(path))
    return {name: mapped.rows(name, torch.arange(manifest.tables[name].num_ids)) for name in TABLES}


def test_two_ranks_are_one(tmp_path: Path) -> None:
    alone = body(OneProcess(torch.device("cpu")), str(tmp_path / "alone"))
    # written once, before two ranks would
    private_config(tmp_path / "two")
    both = run_ranks(2, f"{__name__}:body", {"directory": str(tmp_path / "two")}, tmp_path)
    assert alone[1] == both[0][1] == both[1][1] == str(NUM_STEPS)
    manifest = checkpoint.read_checkpoint_manifest(both[0][0])
    assert manifest.world_size == 2
    assert len(manifest.tables["item"].shards) == 2
    expected, received = rows_of(alone[0]), rows_of(both[0][0])
    for name in TABLES:
        assert float(expected[name].abs().max()) > 0.1
        torch.testing.assert_close(received[name], expected[name], rtol=1e-3, atol=1e-4)
