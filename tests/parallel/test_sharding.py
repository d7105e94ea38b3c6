"""Tables over 1, 2 and 3 real ranks equal nn.EmbeddingBag and a plain optimizer, step for step."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distrec.batch import Jagged
from distrec.config import ShardingConfig
from distrec.errors import CheckpointError, DataError
from distrec.sharding.collectives import Collectives
from distrec.sharding.lookup import Request
from distrec.sharding.plan import TableSpec, plan_tables
from distrec.sharding.tables import EmbeddingTables
from tests.parallel.harness import run_ranks

# no size is a multiple of 2 and of 3; two tables share a width
SPECS = (TableSpec("user", 13, 8), TableSpec("item", 10, 8), TableSpec("tag", 7, 4),
         TableSpec("word", 101, 12))  # fmt: skip
# request -> table, pooling; item is asked for twice in a look-up
REQUESTS = {"who": ("user", "none"), "history": ("item", "mean"), "what": ("item", "sum"),
            "tags": ("tag", "sum"), "words": ("word", "mean")}  # fmt: skip
OPTIMIZERS = ("rowwise_adagrad", "adagrad", "sgd")
PLACEMENTS = ("row_wise", "replicated", "mixed")
NUM_STEPS = 5
NUM_EXAMPLES = 9
LEARNING_RATES = (0.1, 0.1, 0.3, 0.3, 0.05)
EPS = 1e-8
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Example:
    bags: dict[str, list[int]]
    target: float


def global_batch(step: int) -> list[Example]:
    """Few distinct ids, so that ranks meet in the same rows; empty bags; padding inside bags."""
    source = random.Random(step)
    sizes = {spec.name: spec.num_embeddings for spec in SPECS}
    examples = []
    for _ in range(NUM_EXAMPLES):
        bags = {}
        for name, (table, pooling) in REQUESTS.items():
            length = 1 if pooling == "none" else source.choice([0, 1, 2, 5])
            bags[name] = [source.randrange(sizes[table]) for _ in range(length)]
        examples.append(Example(bags, source.uniform(-1, 1)))
    return examples


def share(step: int, rank: int, world_size: int) -> list[Example]:
    """A rank's examples; on odd steps the last of several ranks has none."""
    workers = world_size - 1 if step % 2 and world_size > 1 else world_size
    return global_batch(step)[rank::workers] if rank < workers else []


def requests_of(examples: list[Example]) -> dict[str, Request]:
    return {
        name: Request(table, Jagged.from_lists([e.bags[name] for e in examples]), pooling)  # type: ignore[arg-type]
        for name, (table, pooling) in REQUESTS.items()
    }


def loss_sum(rows: dict[str, Tensor], examples: list[Example]) -> Tensor:
    """Not linear in the rows and not the same for every column; divided by the global count."""
    targets = torch.tensor([example.target for example in examples]).reshape(-1)
    scores = torch.zeros(len(examples))
    for name in sorted(rows):
        width = rows[name].shape[1]
        columns = torch.arange(1.0, width + 1) / width
        scores = scores + (rows[name] * columns).sum(dim=1)
    return (scores - targets).square().sum() / NUM_EXAMPLES


def config_of(optimizer: str, placement: str) -> ShardingConfig:
    return ShardingConfig.model_validate(
        {
            "optimizer": optimizer,
            "placement": "replicated" if placement == "replicated" else "row_wise",
            "tables": {"tag": "replicated", "item": "replicated"} if placement == "mixed" else {},
            "eps": EPS,
            "init_scale": 0.5,
        }
    )


def held_rows(tables: EmbeddingTables) -> dict[str, dict[str, Any]]:
    """Copies of everything that this rank holds, as JSON."""
    held = {}
    for spec in SPECS:
        row_ids, weights, state = tables.local_rows(spec.name)
        held[spec.name] = {
            "ids": row_ids.tolist(), "weights": weights.tolist(), "state": state.tolist(),
        }  # fmt: skip
    return held


def train_on_ranks(collectives: Collectives) -> dict[str, Any]:
    """Every optimizer with every placement: the rows before and after, and what was looked up."""
    world = collectives.world
    results: dict[str, Any] = {"refused": refuse_on_ranks(collectives)}
    for optimizer in OPTIMIZERS:
        for placement in PLACEMENTS:
            config = config_of(optimizer, placement)
            plans = plan_tables(SPECS, config, world.world_size)
            tables = EmbeddingTables(plans, collectives, config, 7, collectives.device)
            assert not list(tables.parameters())
            before, seen = held_rows(tables), []
            for step in range(NUM_STEPS):
                examples = share(step, world.rank, world.world_size)
                tables.set_learning_rate(LEARNING_RATES[step])
                asked = None
                if optimizer == "sgd":
                    # another look-up comes between
                    asked = tables.ask(requests_of(examples), with_rows=True)
                with torch.no_grad():
                    looked_up = tables(requests_of(examples))
                rows = tables(requests_of(examples), asked)
                assert all(torch.equal(rows[name], looked_up[name]) for name in rows)
                seen.append({name: value.tolist() for name, value in rows.items()})
                loss_sum(rows, examples).backward()
            results[f"{optimizer} {placement}"] = {
                "before": before, "seen": seen, "after": held_rows(tables),
                "sent": tables.exchanged_bytes,
            }  # fmt: skip
    return results


def plain_bag(weight: Tensor, request: Request) -> Tensor:
    """torch's own pooling."""
    mode = "sum" if request.pooling == "none" else request.pooling
    return nn.functional.embedding_bag(
        request.ids.values, weight, request.ids.offsets, mode=mode, include_last_offset=True,
        padding_idx=0,
    )  # fmt: skip


def plain_optimizer(optimizer: str, weights: list[nn.Parameter]) -> Callable[[float], None]:
    """One optimizer step at a learning rate, by torch.optim or, for row-wise, by its formula.

    Source of the formula: Mudigere et al. 2022, arXiv:2104.05158, section 4.1.4: one moment a row,
    the mean of the squared gradient over the row.
    """
    moments = [torch.zeros(len(weight), 1) for weight in weights]
    torch_optimizers: dict[str, torch.optim.Optimizer] = {
        "adagrad": torch.optim.Adagrad(weights, eps=EPS),
        "sgd": torch.optim.SGD(weights),
    }

    def step(learning_rate: float) -> None:
        if optimizer in torch_optimizers:
            for group in torch_optimizers[optimizer].param_groups:
                group["lr"] = learning_rate
            torch_optimizers[optimizer].step()
            return
        with torch.no_grad():
            for weight, moment in zip(weights, moments, strict=True):
                assert weight.grad is not None
                moment += weight.grad.square().mean(dim=1, keepdim=True)
                weight -= learning_rate * weight.grad / (moment.sqrt() + EPS)

    return step


def reference(optimizer: str, initial: dict[str, Tensor]) -> tuple[list[Any], dict[str, Tensor]]:
    """What was looked up at each step over the global batch, and the weights at the end."""
    weights = {name: nn.Parameter(value.clone()) for name, value in initial.items()}
    step_weights = plain_optimizer(optimizer, list(weights.values()))
    seen = []
    for step in range(NUM_STEPS):
        examples = global_batch(step)
        rows = {
            name: plain_bag(weights[request.table], request)
            for name, request in requests_of(examples).items()
        }
        seen.append({name: value.detach().clone() for name, value in rows.items()})
        for weight in weights.values():
            weight.grad = None
        loss_sum(rows, examples).backward()
        step_weights(LEARNING_RATES[step])
    return seen, {name: weight.detach() for name, weight in weights.items()}


def whole_table(parts: list[dict[str, Any]], spec: TableSpec, key: str) -> Tensor:
    """Put a table together; every row is somewhere, and equal wherever it is."""
    rows: dict[int, list[float]] = {}
    for part in parts:
        for row, values in zip(part[spec.name]["ids"], part[spec.name][key], strict=True):
            assert rows.setdefault(row, values) == values
    assert sorted(rows) == list(range(spec.num_embeddings))
    return torch.tensor([rows[row] for row in range(spec.num_embeddings)])


@pytest.fixture(scope="module")
def first_values() -> dict[str, Tensor]:
    """Of one rank's launch; the others must have the same."""
    return {}


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_ranks_equal_plain_torch(
    num_ranks: int, tmp_path: Path, first_values: dict[str, Tensor]
) -> None:
    results = run_ranks(num_ranks, "tests.parallel.test_sharding:train_on_ranks", {}, tmp_path)
    check_refusals([result["refused"] for result in results])
    for optimizer in OPTIMIZERS:
        for placement in PLACEMENTS:
            runs = [result[f"{optimizer} {placement}"] for result in results]
            befores = [run["before"] for run in runs]
            initial = {spec.name: whole_table(befores, spec, "weights") for spec in SPECS}
            for name, value in initial.items():
                torch.testing.assert_close(
                    value, first_values.setdefault(name, value), rtol=0, atol=0
                )
            seen, weights = reference(optimizer, initial)
            compare_seen(runs, seen, num_ranks)
            afters = [run["after"] for run in runs]
            for spec in SPECS:
                after = whole_table(afters, spec, "weights")
                torch.testing.assert_close(after, weights[spec.name], rtol=0, atol=TOLERANCE)
                assert after[0].abs().max() == 0
                # the reference has moved, so this was no comparison of first values
                assert (after - initial[spec.name]).abs().max() > 0.01
            if placement == "row_wise":
                held = [len(after["word"]["ids"]) for after in afters]
                assert max(held) - min(held) <= 1
            assert (num_ranks == 1) == (runs[0]["sent"] == 0)


def compare_seen(runs: list[dict[str, Any]], seen: list[Any], num_ranks: int) -> None:
    """The rows that ranks looked up, put back into the order of the global batch."""
    for step in range(NUM_STEPS):
        workers = num_ranks - 1 if step % 2 and num_ranks > 1 else num_ranks
        for name, expected in seen[step].items():
            for rank in range(workers):
                found = torch.tensor(runs[rank]["seen"][step][name])
                torch.testing.assert_close(found, expected[rank::workers], rtol=0, atol=TOLERANCE)
            for rank in range(workers, num_ranks):
                assert runs[rank]["seen"][step][name] == []


def refuse_on_ranks(collectives: Collectives) -> dict[str, Any]:
    """Bad ids on the last rank only, then a good look-up: messages and what still works."""
    world = collectives.world
    last = world.rank == world.world_size - 1
    messages = []
    for placement in ("row_wise", "replicated"):
        config = config_of("sgd", placement)
        plans = plan_tables(SPECS, config, world.world_size)
        tables = EmbeddingTables(plans, collectives, config, 7, collectives.device)
        for wrong in (10, -1):
            bags = [[2], [3, wrong]] if last else [[2, 9], []]
            requests = {
                "a": Request("user", Jagged.from_lists([[1]]), "sum"),
                "b": Request("item", Jagged.from_lists(bags), "sum"),
            }
            try:
                with torch.set_grad_enabled(wrong < 0):
                    tables(requests)
            except DataError as error:
                messages.append(str(error))
        good = tables({"b": Request("item", Jagged.from_lists([[2], []]), "sum")})
        assert good["b"].shape == (2, 8)
    foreign = ""
    if world.world_size > 1:
        config = config_of("adagrad", "row_wise")
        plans = plan_tables(SPECS, config, world.world_size)
        tables = EmbeddingTables(plans, collectives, config, 7, collectives.device)
        try:
            row = torch.tensor([world.rank + 1])
            tables.load_rows("item", row, torch.zeros(1, 8), torch.zeros(1, 8))
        except CheckpointError as error:
            foreign = str(error)
    return {"messages": messages, "foreign": foreign}


def check_refusals(refusals: list[dict[str, Any]]) -> None:
    """Every rank says the same of the last rank's bad ids."""
    last = len(refusals) - 1
    expected = [
        f"ids of table 'item' lie in [0, 10). Received: id {wrong} at position 2 (example "
        f"1 of the batch) on rank {last}. The tables and the data have different vocabularies"
        for wrong in [10, -1] * 2
    ]
    for refusal in refusals:
        for message, text in zip(refusal["messages"], expected, strict=True):
            assert message.startswith(text)
    if last:
        assert (
            f"rank 0 of {last + 1} holds rows range(0, 10, {last + 1}) of table 'item'. Received: "
            "row 1"
        ) in refusals[0]["foreign"]
