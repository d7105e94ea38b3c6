"""The dense part of an update on one process: what comes too late, and what clipping leaves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distrec.errors import TrainingError
from distrec.sharding.collectives import OneProcess
from distrec.sharding.dense import DenseGradients


def gradients_of(*values: float) -> tuple[nn.Parameter, DenseGradients]:
    """A parameter of zeros with these gradients."""
    parameter = nn.Parameter(torch.zeros(len(values)))
    parameter.grad = torch.tensor(values)
    return parameter, DenseGradients([parameter], OneProcess(torch.device("cpu")))


@pytest.mark.parametrize("replaced", [False, True])
def test_a_gradient_that_comes_after_the_start_is_refused(replaced: bool) -> None:
    parameter, gradients = gradients_of(1.0, 2.0)
    gradients.start()
    assert parameter.grad is not None
    if replaced:
        parameter.grad = parameter.grad + 1
    else:
        parameter.grad += 1
    with pytest.raises(TrainingError, match="are complete when they are summed"):
        gradients.step(torch.optim.SGD([parameter], lr=1.0))
    assert not parameter.any()


@pytest.mark.parametrize(("clip_norm", "factor"), [(0.0, 1.0), (10.0, 1.0), (2.5, 0.5)])
def test_clipping_makes_gradients_smaller_alone(clip_norm: float, factor: float) -> None:
    parameter, gradients = gradients_of(3.0, -4.0)
    assert gradients.step(torch.optim.SGD([parameter], lr=1.0), clip_norm) == 5.0
    torch.testing.assert_close(parameter.detach(), torch.tensor([-3.0, 4.0]) * factor)
