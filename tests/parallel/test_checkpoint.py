"""Saving and loading on two ranks when one cannot write or read: all are told."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path
from typing import Any
from unittest import mock

from distrec import checkpoint
from distrec.checkpoint.load import _Reader
from distrec.errors import CheckpointError
from distrec.sharding.collectives import Collectives
from distrec.sharding.plan import TableSpec, plan_tables
from distrec.sharding.tables import EmbeddingTables
from distrec.trainer import setup
from distrec.trainer.setup import Run
from tests.parallel.harness import run_ranks
from tests.training import make_config

NAME = "step-00000002"


def body(collectives: Collectives, directory: str) -> dict[str, Any]:
    """Save; then with a rank that may write files of a few bytes only; then load."""
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
    answers["unreadable"] = load_where_one_cannot_read(run, config.checkpoint_directory / NAME)
    return answers


def load_where_one_cannot_read(run: Run, path: Path) -> str:
    """Load into tables that lie elsewhere, so that rows are sent; rank 1 reads nothing."""
    world = run.collectives.world
    sharding = run.config.sharding.model_copy(update={"placement": "replicated"})
    specs = [TableSpec(one.name, one.num_embeddings, one.embedding_dim) for one in run.inputs.plans]
    plans = plan_tables(specs, sharding, world.world_size)
    tables = EmbeddingTables(plans, run.collectives, sharding, 1, run.collectives.device)
    error = CheckpointError("the disk has gone")
    broken = mock.patch.object(_Reader, "read", side_effect=error)
    with broken if world.rank == 1 else contextlib.nullcontext():
        try:
            checkpoint.load_tables(path, tables, plans, sharding, world)
        except CheckpointError as found:
            return str(found)
    return "loaded"


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
        # the one that cannot read goes on taking part, and all are told
        assert "the disk has gone" in answer["unreadable"]
        # row i lies on rank i mod 2; row 0 is padding
        assert answer["own"][1:] == answer["rows"][rank::2][1:]
        assert len(answer["rows"]) == 62
