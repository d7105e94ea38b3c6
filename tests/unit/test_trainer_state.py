"""Weights that are not finite are never saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distrec.errors import TrainingError
from distrec.sharding.collectives import OneProcess
from distrec.trainer import setup
from distrec.trainer.step import check_state
from tests.training import make_config

CPU = torch.device("cpu")


@pytest.mark.parametrize("part", ["weights", "state"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_found_in_any_table(
    tmp_path: Path, part: str, number: float
) -> None:
    config = make_config(tmp_path)
    run = setup.build(setup.read_inputs(config, 1), OneProcess(CPU), None)
    check_state(run, "step 1")
    rows, weights, state = run.tables.local_rows("user")
    weights, state = weights.clone(), state.clone()
    (weights if part == "weights" else state)[-1, -1] = number
    run.tables.load_rows("user", rows, weights, state)
    with pytest.raises(TrainingError, match="rank 0: table user at step 1"):
        check_state(run, "step 1")
