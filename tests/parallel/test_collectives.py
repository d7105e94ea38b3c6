"""Collectives on real ranks: what arrives, what is refused before it is sent, what failures say."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distrec.errors import LaunchError
from distrec.sharding.collectives import Collectives, _bind_cores
from distrec.sharding.dense import DenseGradients
from tests.parallel.harness import RanksFailedError, run_ranks

DTYPES = ("bool", "uint8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
NUM_INPUTS, CLIP_NORM = 3, 0.5


def move_everything(collectives: Collectives) -> dict[str, Any]:
    """One of each; returns what JSON can hold."""
    world = collectives.world
    rank, size = world.rank, world.world_size
    moved: dict[str, Any] = {}
    for name in DTYPES:
        dtype = getattr(torch, name)
        # rank r sends s + r rows to rank s, each holding r
        counts = [target + rank for target in range(size)]
        # a column of a wider matrix, so that it is not contiguous
        sent = torch.full((sum(counts), 2, 5), rank).to(dtype)[:, :, 1]
        received, receive_counts = collectives.alltoall(sent, counts, f"alltoall {name}")
        assert received.dtype == dtype
        gathered = collectives.allgather(sent[: rank + 1, 0], f"allgather {name}")
        copied = collectives.broadcast(sent.new_tensor(rank), f"broadcast {name}", size - 1)
        numbers = torch.tensor([rank + 0.5, 1]).to(dtype)
        largest = collectives.allreduce(numbers, f"max {name}", "max")
        assert gathered.dtype == copied.dtype == largest.dtype == dtype
        moved[name] = [
            received.int().tolist(), receive_counts, gathered.int().tolist(), copied.int().item(),
            largest.double().tolist(),
        ]  # fmt: skip
    nothing, counts = collectives.alltoall(torch.zeros(0, 4), [0] * size, "nothing")
    assert nothing.shape == (0, 4)
    assert counts == [0] * size
    # under way together, started in another order on every rank
    order = range(4) if rank % 2 else range(3, -1, -1)
    waits = {n: collectives.start_allreduce(torch.tensor([n * 1.0]), f"part {n}") for n in order}
    moved["together"] = [waits[n]().item() for n in range(4)]
    moved["sum"] = collectives.allreduce(torch.tensor(2**40 + rank), "large sum").item()
    moved["gathered"] = collectives.gather_objects({"rank": rank, "text": "é" * rank}, "objects")
    moved["object"] = collectives.broadcast_object([rank, None, 0.1], "object", root=size - 1)
    return moved


def expected_moves(rank: int, size: int) -> dict[str, Any]:
    """The same by arithmetic."""
    moves: dict[str, Any] = {}
    for name in DTYPES:
        as_type = bool if name == "bool" else int
        half = 0.5 if getattr(torch, name).is_floating_point else 0
        moves[name] = [
            [[int(as_type(s))] * 2 for s in range(size) for _ in range(rank + s)],
            [rank + s for s in range(size)],
            # rank 0 alone has nothing to send
            [int(as_type(s)) for s in range(size) for _ in range(min(s + 1, sum_sent(s, size)))],
            int(as_type(size - 1)),
            # any number but 0 is true
            [1 if name == "bool" else size - 1 + half, 1],
        ]
    return moves | {
        "together": [n * size for n in range(4)],
        "sum": size * 2**40 + size * (size - 1) // 2,
        "gathered": [{"rank": s, "text": "é" * s} for s in range(size)],
        "object": [size - 1, None, 0.1],
    }


def sum_sent(rank: int, size: int) -> int:
    return sum(target + rank for target in range(size))


def refuse(collectives: Collectives) -> list[str]:
    """What must not be sent, on one rank or all; afterwards everything still works."""
    messages = []
    size = collectives.world.world_size
    # the last ones add up to the nine rows
    wrong_counts = [[1] * (size + 1), [1] * size, [10] + [0] * (size - 2) + [-1]][: size + 1]
    for counts in wrong_counts:
        try:
            collectives.alltoall(torch.zeros(9, 2), counts, "wrong")
        except LaunchError as error:
            messages.append(str(error))
    try:
        collectives.allreduce(torch.tensor([True]), "flags")
    except LaunchError as error:
        messages.append(str(error))
    collectives.barrier("still here")
    return messages


def data_of(rank: int, size: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's rows of six; the last rank of three has none at step 1."""
    features = torch.linspace(-2, 2, 18).reshape(6, 3) * (step + 1)
    targets = features.sum(dim=1, keepdim=True).sin() * 3
    workers = size - 1 if step == 1 and size > 1 else size
    chosen = slice(rank, None, workers) if rank < workers else slice(0, 0)
    return features[chosen], targets[chosen]


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(NUM_INPUTS, 4), nn.Tanh(), nn.Linear(4, 1))


def train_dense(collectives: Collectives) -> dict[str, Any]:
    """Three clipped steps of a dense model that starts differently on every rank."""
    world = collectives.world
    model = make_model(world.rank)
    collectives.broadcast_parameters(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    norms = []
    for step in range(3):
        features, targets = data_of(world.rank, world.world_size, step)
        optimizer.zero_grad()
        ((model(features) - targets).square().sum() / 6).backward()
        norms.append(DenseGradients(model.parameters(), collectives).step(optimizer, CLIP_NORM))
    weights = [parameter.tolist() for parameter in model.parameters()]
    return {"norms": norms, "weights": weights}


def update_of_one_rank(collectives: Collectives) -> list[list[float]]:
    """Two parameters after a step of 1 against their gradients; the second is rank 0's alone."""
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    parameters[0].sum().backward()
    if collectives.world.is_first:
        parameters[1].sum().backward()
    DenseGradients(parameters, collectives).step(torch.optim.SGD(parameters, lr=1.0), 100.0)
    return [parameter.tolist() for parameter in parameters]


def sum_in_company(collectives: Collectives) -> list[bool]:
    """Whether a sum has the same bits alone and beside others, several times.

    From three ranks on, the order of additions is more than a swap.
    """
    generator = torch.Generator().manual_seed(collectives.world.rank)
    tensors = [torch.randn(101 + 17 * number, generator=generator) for number in range(6)]
    alone = [collectives.allreduce(tensor, f"{n} alone") for n, tensor in enumerate(tensors)]
    same = []
    for _ in range(30):
        waits = [collectives.start_allreduce(t, f"{n} together") for n, t in enumerate(tensors)]
        same += [torch.equal(wait(), sum_) for wait, sum_ in zip(waits, alone, strict=True)]
    return same


def disagree(collectives: Collectives) -> str:
    """The last call: Horovod ends with it."""
    try:
        collectives.allreduce(torch.zeros(2 + collectives.world.rank), "uneven")
    except LaunchError as error:
        return str(error)
    return ""


def cores_of_threads() -> dict[str, list[int]]:
    tasks = os.listdir("/proc/self/task")
    return {task: sorted(os.sched_getaffinity(int(task))) for task in tasks}


def bind(collectives: Collectives) -> dict[str, Any]:
    before = cores_of_threads()
    _bind_cores(collectives.world)
    after = cores_of_threads()
    own = str(os.getpid())
    others = {task for task in after if task != own and task in before}
    return {
        "allowed": before[own],
        "own": after[own],
        "others": [after[task] for task in others],
        "before": [before[task] for task in others],
    }


def work(collectives: Collectives) -> dict[str, Any]:
    return {
        "bound": bind(collectives),
        "moved": move_everything(collectives),
        "refused": refuse(collectives),
        "trained": train_dense(collectives),
        "one rank's": update_of_one_rank(collectives),
        "summed": sum_in_company(collectives),
        "disagreed": disagree(collectives),
    }


def plain_training() -> dict[str, Any]:
    model = make_model(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    norms = []
    for step in range(3):
        features, targets = data_of(0, 1, step)
        optimizer.zero_grad()
        ((model(features) - targets).square().sum() / 6).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)))
        optimizer.step()
    return {"norms": norms, "weights": list(model.parameters())}


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_everything_arrives(num_ranks: int, tmp_path: Path) -> None:
    results = run_ranks(num_ranks, "tests.parallel.test_collectives:work", {}, tmp_path)
    plain = plain_training()
    assert min(plain["norms"]) > CLIP_NORM
    for rank, result in enumerate(results):
        assert result["moved"] == expected_moves(rank, num_ranks)
        *counts, flags = result["refused"]
        assert len(counts) >= 2
        for message in counts:
            assert f"alltoall 'wrong' sends every row once, to one of {num_ranks} ranks" in message
            assert "Received: 9 rows, send_counts = [" in message
        assert "allreduce 'flags' cannot sum bool" in flags
        assert result["trained"]["norms"] == pytest.approx(plain["norms"], abs=1e-5)
        for found, expected in zip(result["trained"]["weights"], plain["weights"], strict=True):
            torch.testing.assert_close(torch.tensor(found), expected.data, rtol=0, atol=1e-5)
        assert result["trained"]["weights"] == results[0]["trained"]["weights"]
        assert result["one rank's"] == [[-num_ranks] * 2, [-1] * 3]
        assert result["summed"] == [True] * 180
        bound = result["bound"]
        allowed = bound["allowed"]
        share = len(allowed) // num_ranks
        assert bound["own"] == (allowed[rank * share : (rank + 1) * share] if share else allowed)
        assert bound["others"] == bound["before"]
        if num_ranks > 1:
            name = f"collective 'uneven' failed on rank {rank} of {num_ranks}"
            assert name in result["disagreed"]
            assert "Likely cause: the ranks ask for different things" in result["disagreed"]


def leave_or_hang(collectives: Collectives, hangs: bool) -> None:
    if collectives.world.rank == 1:
        if hangs:
            time.sleep(60)
        print("rank 1 leaves", flush=True)
        os._exit(3)
    collectives.barrier("for ever")


@pytest.mark.parametrize(("hangs", "ending"), [(False, "exit code 1"), (True, "no end within 6")])
def test_the_harness_ends_when_a_rank_dies_or_hangs(
    hangs: bool, ending: str, tmp_path: Path
) -> None:
    target = "tests.parallel.test_collectives:leave_or_hang"
    timeout = 6 if hangs else 60
    with pytest.raises(RanksFailedError, match=ending) as caught:
        run_ranks(2, target, {"hangs": hangs}, tmp_path, timeout)
    assert ("rank 1 leaves" in str(caught.value)) != hangs
