"""Saving from two ranks when one of them cannot write: all are told, the last one stays."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

from distrec import checkpoint
from distrec.errors import CheckpointError
from distrec.sharding.collectives import Collectives
from distrec.trainer import setup
from tests.parallel.harness import run_ranks
from tests.training import make_config

NAME = "step-00000002"


def body(collectives: Collectives, directory: str) -> dict[str, Any]:
    """Save; then with a rank that may write files of a few bytes only; then in another state."""
    config = make_config(Path(directory))
    inputs = setup.read_inputs(config, collectives.world.world_size)
    run = setup.build(inputs, collectives, None)

    def save(step: int) -> str:
        position = checkpoint.Position(step, 0, step, run.reader.lanes)
        try:
            path = checkpoint.save(
                config.checkpoint_directory, inputs.identity, position, run.parts, collectives
            )
        except CheckpointError as error:
            return str(error)
        return path.name

    answers: dict[str, Any] = {"saved": save(2)}
    for guilty in (0, 1):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if collectives.world.rank == guilty:
            # as on a full disk: the system refuses the bytes
            resource.setrlimit(resource.RLIMIT_FSIZE, (250, limits[1]))
        answers[f"rank {guilty} cannot write"] = save(3)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        collectives.barrier("test.failed")
        answers[f"left by {guilty}"] = sorted(
            path.name for path in config.checkpoint_directory.iterdir()
        )
    answers["newest"] = checkpoint.find(config.checkpoint_directory, "newest").name
    answers["saved again"] = save(3)
    whole = inputs.plans[[plan.name for plan in inputs.plans].index("user")].num_embeddings
    answers["own"] = run.tables.local_rows("user")[1].tolist()
    rows = checkpoint.read_rows(config.checkpoint_directory / NAME, "user", 0, whole)
    answers["rows"] = rows.tolist()
    return answers


def test_one_rank_that_cannot_write_stops_all_and_leaves_nothing(tmp_path: Path) -> None:
    make_config(tmp_path / "run")
    answers = run_ranks(
        2, "tests.parallel.test_checkpoint:body", {"directory": str(tmp_path / "run")}, tmp_path
    )
    for rank, answer in enumerate(answers):
        assert answer["saved"] == answer["newest"] == NAME
        assert answer["saved again"] == "step-00000003"
        for guilty in (0, 1):
            message = answer[f"rank {guilty} cannot write"]
            assert "cannot be written" in message
            assert "File too large" in message
            assert message.startswith(f"rank {guilty}: ") == (rank != guilty)
            assert answer[f"left by {guilty}"] == [NAME]
        # row i lies on rank i mod 2; row 0 is padding
        assert answer["own"][1:] == answer["rows"][rank::2][1:]
        assert len(answer["rows"]) == 62
