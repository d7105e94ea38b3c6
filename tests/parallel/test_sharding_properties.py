"""Any tables, any batches, under 1 to 4 real ranks: equal to plain torch on the whole batch.

Hypothesis draws the same examples on every rank, many in one launch. The ranks agree on whether an
example failed before one of them raises, so that they stay together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from distrec import checkpoint
from distrec.batch import Jagged
from distrec.config import ShardingConfig
from distrec.errors import CheckpointError, DataError
from distrec.model import ModelSpec
from distrec.sharding.collectives import Collectives
from distrec.sharding.initial import initial_rows
from distrec.sharding.lookup import Request
from distrec.sharding.plan import TablePlan, TableSpec, plan_tables
from distrec.sharding.tables import EmbeddingTables
from tests.parallel.harness import run_ranks
from tests.parallel.test_sharding import plain_bag

NUM_EXAMPLES = 60
SEED, INIT_SCALE, LEARNING_RATE = 5, 0.5, 0.1
# with a tiny eps, Adagrad's first step has one size whatever the gradient: rounding would decide
EPS = 0.05
TOLERANCE = 1e-6
# stands for 1 / batch; a larger one makes SGD swing further and further on rows that many ids share
SHARE = 0.05
OPTIMIZERS = ("rowwise_adagrad", "adagrad", "sgd")
AHEAD = ("nothing", "ids", "rows")


@dataclass(frozen=True)
class Table:
    """A table, how it lies, how its ids share rows, if they do, and a request for it."""

    num_embeddings: int
    width: int
    placement: str
    hot_rows: int
    pooling: str
    compress: dict[str, Any] | None


@dataclass(frozen=True)
class Case:
    """bags[step][rank][request][example] is a list of ids; the last request is for table 0 again.

    `ahead` is what is sent ahead of a step, `wide_ids` sends row numbers as int64, as the largest
    tables do.
    """

    tables: list[Table]
    optimizer: str
    ahead: str
    wide_ids: bool
    bags: list[list[list[list[list[int]]]]]

    def table_of(self, request: int) -> int:
        return request if request < len(self.tables) else 0


@st.composite
def compressions(draw: st.DrawFn, size: int, kind: str) -> dict[str, Any]:
    """A section of sharding.compress for so many ids."""
    if kind == "hash":
        num_hashes = draw(st.integers(1, 3))
        more = {"method": "hash", "num_buckets": size // 4, "num_hashes": num_hashes}
    else:
        more = {"method": "quotient_remainder", "num_buckets": 4, "operation": kind}
    return {"own_rows": draw(st.integers(0, 3)), **more}


@st.composite
def cases(draw: st.DrawFn, world_size: int, ahead: str) -> Case:
    wide_ids = draw(st.booleans())
    tables = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["a row an id", "a row an id", "hash", "sum", "product"]))
        is_compressed = kind != "a row an id"
        # with fewer ids than these, compression would need more rows than it saves
        size = draw(st.integers(12 if is_compressed else 1, 40))
        placement = draw(st.sampled_from(["row_wise", "replicated"]))
        hot_rows = draw(st.one_of(st.just(0), st.integers(0, size + 1)))
        width = draw(st.sampled_from([4, 8]))
        pooling = draw(st.sampled_from(["none", "sum", "mean"]))
        # a table smaller than the number of ranks cannot be spread
        placement = placement if size >= world_size else "auto"
        compress = draw(compressions(size, kind)) if is_compressed else None
        tables.append(Table(size, width, placement, hot_rows, pooling, compress))
    requests = [*tables, tables[0]]
    # ids of one residue all lie on one rank
    owner = draw(st.one_of(st.none(), st.integers(0, world_size - 1)))

    def ids_of(table: Table) -> st.SearchStrategy[int]:
        chosen = list(range(table.num_embeddings))
        if owner is not None:
            chosen = chosen[owner::world_size] or chosen
        return st.sampled_from(chosen)

    steps = []
    for _ in range(draw(st.sampled_from([1, 2, 2, 3]))):
        ranks = []
        for _ in range(world_size):
            count = draw(st.integers(0, 3))
            longest = [1 if table.pooling == "none" else 5 for table in requests]
            ranks.append(
                [
                    [
                        draw(st.lists(ids_of(table), min_size=most == 1, max_size=most))
                        for _ in range(count)
                    ]
                    for table, most in zip(requests, longest, strict=True)
                ]
            )
        steps.append(ranks)
    optimizer = draw(st.sampled_from(OPTIMIZERS))
    return Case(tables, optimizer, ahead, wide_ids, steps)


def specs_of(case: Case) -> list[TableSpec]:
    return [TableSpec(f"t{k}", t.num_embeddings, t.width) for k, t in enumerate(case.tables)]


def config_of(case: Case, hot: bool = True) -> ShardingConfig:
    placements = {f"t{k}": t.placement for k, t in enumerate(case.tables) if t.placement != "auto"}
    return ShardingConfig.model_validate(
        {
            "optimizer": case.optimizer,
            "learning_rate": LEARNING_RATE,
            "eps": EPS,
            "init_scale": INIT_SCALE,
            "tables": placements,
            "hot_rows": {f"t{k}": t.hot_rows for k, t in enumerate(case.tables)} if hot else {},
            "compress": {f"t{k}": t.compress for k, t in enumerate(case.tables) if t.compress},
        }
    )


def requests_of(case: Case, bags: list[list[list[int]]]) -> dict[str, Request]:
    found = {}
    for number, examples in enumerate(bags):
        table = case.table_of(number)
        pooling: Any = case.tables[table].pooling
        found[f"r{number}"] = Request(f"t{table}", Jagged.from_lists(examples), pooling)
    return found


def global_bags(step: list[list[list[list[int]]]]) -> list[list[list[int]]]:
    """The examples of all ranks, one after the other, by request."""
    return [[bag for rank in step for bag in rank[k]] for k in range(len(step[0]))]


def loss_of(rows: dict[str, Tensor]) -> Tensor:
    """Not linear, other factors for every request and column."""
    total = torch.zeros(())
    for number, key in enumerate(sorted(rows)):
        columns = torch.arange(1.0, rows[key].shape[1] + 1) / rows[key].shape[1]
        total = total + ((rows[key] * columns - 0.1 * (number + 1)).square()).sum()
    return total * SHARE


def plain_vectors(plan: TablePlan, weight: Tensor) -> Tensor:
    """The vector of every id, of which a bag of a table without compression could be made."""
    if plan.composition is None:
        return weight
    padding = torch.zeros(1, plan.embedding_dim)
    row_ids = plan.composition.row_ids(plan.name, torch.arange(plan.num_ids))
    rows = torch.cat([padding, weight[1:]])[row_ids]
    if plan.composition.operation == "sum":
        return rows.sum(dim=1)
    return rows[:, 0] + rows[:, 0] * rows[:, 1]


def learning_rate(step: int) -> float:
    """Another one for every step."""
    return LEARNING_RATE * (1 + step)


def reference(case: Case) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """By plain torch on the whole batch: what each step looks up, and the last weights.

    Source of row-wise Adagrad: Mudigere et al. 2022, arXiv:2104.05158, section 4.1.4.
    """
    weights = []
    plans = {plan.name: plan for plan in plan_tables(specs_of(case), config_of(case), 1)}
    for plan in plans.values():
        ids = np.arange(plan.num_embeddings)
        first = initial_rows(plan.name, ids, plan.embedding_dim, SEED, INIT_SCALE)
        weights.append(nn.Parameter(torch.from_numpy(first)))
    moments = [torch.zeros_like(weight) for weight in weights]
    seen = []
    # what the next step looks up
    looked_up = weights
    for number, step in enumerate(case.bags):
        requests = requests_of(case, global_bags(step))
        rows = {
            key: plain_bag(plain_vectors(plans[r.table], looked_up[int(r.table[1:])]), r)
            for key, r in requests.items()
        }
        seen.append({key: value.detach().clone() for key, value in rows.items()})
        for weight in looked_up:
            weight.grad = torch.zeros_like(weight)
        loss_of(rows).backward()
        gradients = [weight.grad for weight in looked_up]
        if case.ahead == "rows":
            looked_up = [nn.Parameter(weight.detach().clone()) for weight in weights]
        with torch.no_grad():
            for weight, gradient, moment in zip(weights, gradients, moments, strict=True):
                assert gradient is not None
                squared = gradient.square()
                moment += (
                    squared if case.optimizer == "adagrad" else squared.mean(dim=1, keepdim=True)
                )
                divisor = 1.0 if case.optimizer == "sgd" else moment.sqrt() + EPS
                weight -= learning_rate(number) * gradient / divisor
    return seen, [weight.detach() for weight in weights]


def make_tables(case: Case, collectives: Collectives, hot: bool = True) -> EmbeddingTables:
    config = config_of(case, hot)
    plans = plan_tables(specs_of(case), config, collectives.world.world_size)
    tables = EmbeddingTables(plans, collectives, config, SEED, collectives.device)
    if case.wide_ids:
        tables._exchange.layout.id_dtype = torch.int64
    return tables


def steps_of(case: Case, tables: EmbeddingTables, rank: int) -> Iterator[dict[str, Tensor]]:
    """Look-up and update, step by step, with what the example sends ahead."""
    own = [requests_of(case, step[rank]) for step in case.bags]
    asked = None
    for number, requests in enumerate(own):
        tables.set_learning_rate(learning_rate(number))
        rows = tables(requests, asked)
        asked = None
        if case.ahead != "nothing" and number + 1 < len(own):
            asked = tables.ask(own[number + 1], with_rows=case.ahead == "rows")
        yield {key: value.detach().clone() for key, value in rows.items()}
        loss_of(rows).backward()
        with torch.no_grad():
            # as validation does between two steps
            tables(requests)


def held_rows(tables: EmbeddingTables, table: str) -> list[tuple[range, Tensor]]:
    """All rows that this rank keeps, hot ones whole."""
    layout = tables._exchange.layout
    return [
        (ids, tables._exchange.kernels[part.group].weights()[places])
        for ids, part, places in layout.held_parts(table)
    ]


def differences(case: Case, collectives: Collectives) -> list[str]:
    """What this rank finds wrong with an example."""
    rank = collectives.world.rank
    seen, weights = reference(case)
    tables = make_tables(case, collectives)
    found = []
    for number, rows in enumerate(steps_of(case, tables, rank)):
        for key, value in rows.items():
            before = sum(len(case.bags[number][r][int(key[1:])]) for r in range(rank))
            expected = seen[number][key][before : before + len(value)]
            if not torch.allclose(value, expected, rtol=0, atol=TOLERANCE):
                found.append(f"step {number}, request {key}: {value} instead of {expected}")
    for number, weight in enumerate(weights):
        for ids, part in held_rows(tables, f"t{number}"):
            expected = weight[list(ids)]
            if not torch.allclose(part, expected, rtol=0, atol=TOLERANCE):
                found.append(f"table t{number}, rows {ids}: {part} instead of {expected}")
    return found


def digest(case: Case) -> str:
    return hashlib.sha256(json.dumps(asdict(case)).encode()).hexdigest()


def check_cases(collectives: Collectives) -> dict[str, int]:
    """How many examples there were, and of what kinds."""
    kinds = ("examples", "ids", "rows", "hot", "idle rank", "small", "hash", "sum", "product")
    counts = dict.fromkeys(kinds, 0)
    world_size = collectives.world.world_size

    def check(case: Case) -> None:
        answers = collectives.gather_objects([digest(case), differences(case, collectives)], "test")
        assert all(answer[0] == digest(case) for answer in answers), "ranks drew other examples"
        wrong = {rank: answer[1] for rank, answer in enumerate(answers) if answer[1]}
        assert not wrong, f"{case}: {wrong}"
        counts["examples"] += 1
        if len(case.bags) > 1 and case.ahead != "nothing":
            counts[case.ahead] += 1
        counts["hot"] += any(
            t.placement == "row_wise" and 0 < t.hot_rows < t.num_embeddings for t in case.tables
        )
        counts["idle rank"] += any(not rank[0] for step in case.bags for rank in step)
        counts["small"] += any(t.num_embeddings < world_size for t in case.tables)
        for key, kind in (("method", "hash"), ("operation", "sum"), ("operation", "product")):
            counts[kind] += any(t.compress and t.compress.get(key) == kind for t in case.tables)

    for number, ahead in enumerate(AHEAD):
        examples = settings(
            max_examples=NUM_EXAMPLES // len(AHEAD), database=None, deadline=None,
            phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        examples(seed(number)(given(cases(world_size, ahead))(check)))()
    return counts


# 50 rows, the first 6 on every rank, and a width with replicated tables only
SPECS = (TableSpec("big", 50, 8), TableSpec("other", 30, 8), TableSpec("tiny", 3, 4))


def small_tables(collectives: Collectives, seed: int = SEED, **section: Any) -> checkpoint.Parts:
    config = ShardingConfig.model_validate(
        {
            "placement": "row_wise", "tables": {"tiny": "replicated"}, "learning_rate": 1.0,
            "init_scale": INIT_SCALE, **section,
        }
    )  # fmt: skip
    plans = plan_tables(SPECS, config, collectives.world.world_size)
    tables = EmbeddingTables(plans, collectives, config, seed, collectives.device)
    model = nn.Linear(2, 2)
    return checkpoint.Parts(model, torch.optim.SGD(model.parameters()), tables, plans, config)


def request_of(table: str, ids: list[int]) -> dict[str, Request]:
    return {"x": Request(table, Jagged.from_lists([[row] for row in ids]), "none")}


def used_of_hot(collectives: Collectives) -> list[int]:
    """Bytes that this rank sends for the gradients of 4 of 40 hot rows, then of all of them."""
    sent = []
    for ids in ([1, 2, 3, 4], list(range(1, 40))):
        tables = small_tables(collectives, hot_rows={"big": 40}).tables
        rows = tables(request_of("big", ids))["x"]
        before = tables.exchanged_bytes
        rows.sum().backward()
        sent.append(tables.exchanged_bytes - before)
    return sent


def wrong_ids(collectives: Collectives) -> list[str]:
    """What each rank says of an id of the last rank: sent ahead or not, in words of both sizes."""
    world, messages = collectives.world, []
    for wrong in (50, -1, 2**40 + 5, -(2**62)):
        for dtype in (torch.int32, torch.int64):
            tables = small_tables(collectives, hot_rows={"big": 6}).tables
            tables._exchange.layout.id_dtype = dtype
            last = world.rank == world.world_size - 1
            requests = request_of("big", [7, 3, wrong] if last else [1])
            for ahead in ("nothing", "ids", "rows"):
                try:
                    asked = tables.ask(requests, ahead == "rows") if ahead != "nothing" else None
                    tables(requests, asked)
                except DataError as error:
                    messages.append(str(error))
            good = tables(request_of("big", [0, 49]))["x"]
            assert good[0].abs().max() == 0
            assert good[1].abs().max() > 0
    return messages


def rounding(collectives: Collectives) -> dict[str, list[float]]:
    """By precision the largest errors, as shares of what is allowed, of rows and of updates.

    Gradients are of sizes that fp16 itself does not have.
    """
    factors = torch.tensor([1e-12, 3e-7, 1.0, 1e9]).unsqueeze(1) * torch.linspace(0.1, 1, 8)
    ids = [7, 20, 33, 49]
    found = {}
    for precision in ("fp16", "bf16"):
        # rounding of weights after the step is not what is measured
        exact, rounded = (
            small_tables(
                collectives, optimizer="adagrad", eps=1e-30, hot_rows={"big": 6 * hot},
                exchange_precision=sent,
            ).tables
            for hot, sent in ((0, "fp32"), (1, precision))
        )  # fmt: skip
        expected = exact(request_of("big", [*ids, 2, 4]))["x"]
        rows = rounded(request_of("big", [*ids, 2, 4]))["x"]
        # relative: 11 and 8 bits
        unit = 2.0**-11 if precision == "fp16" else 2.0**-8
        row_errors = (rows - expected).abs() / (expected.abs() * unit + 2.0**-25)
        assert torch.equal(rows[4:], expected[4:]), "hot rows do not travel"
        both = [(expected, exact), (rows, rounded)]
        squares = []
        for result, tables in both:
            (result[:4] * factors).sum().backward()
            states = {}
            for row_ids, _, state in tables.local_parts("big"):
                states.update(zip(row_ids, state, strict=True))
            squares.append({row: states[row] for row in ids if row in states})
        update_errors = [
            # every rank sent the same gradient; Adagrad keeps the square of the sum
            float(
                (
                    (squares[1][row].double().sqrt() - squares[0][row].double().sqrt()).abs()
                    / (squares[0][row].double().sqrt().max() * unit)
                ).max()
            )
            for row in squares[0]
        ]
        found[precision] = [float(row_errors.max()), max(update_errors, default=0.0)]
    return found


def cross_load(collectives: Collectives, directory: str) -> list[str]:
    """What is not equal when a run with a hot tier goes on without, and the reverse."""
    world, wrong = collectives.world, []
    identity = checkpoint.Identity(
        1, {}, "c", "d", {"v": "h"},
        ModelSpec(
            features=(), num_users=50, num_trained_items=5, num_items=5, history_length=3,
            has_labels=False,
        ),
    )  # fmt: skip
    hot = {"big": 7, "other": 29}
    for number, (first, second) in enumerate([(hot, {}), ({}, hot), (hot, {"big": 3})]):
        written = small_tables(collectives, optimizer="rowwise_adagrad", hot_rows=first)
        rank_ids = [1 + world.rank, 5, 8, 20 + world.rank, 29]
        for table in ("big", "other"):
            written.tables(request_of(table, rank_ids))["x"].square().sum().backward()
        path = checkpoint.save(
            directory, identity, checkpoint.Position(number, 0, 0, 1), written, collectives
        )
        read = small_tables(collectives, seed=9, optimizer="rowwise_adagrad", hot_rows=second)
        checkpoint.load_tables(path, read.tables, read.plans, read.sharding, world)
        for table in ("big", "other", "tiny"):
            pairs = zip(
                written.tables.local_rows(table), read.tables.local_rows(table), strict=True
            )
            if not all(torch.equal(left, right) for left, right in pairs):
                wrong.append(f"{table}: {first} to {second}")
            whole = checkpoint.read_rows(path, table, 0, _size(table))
            for ids, part in held_rows(read.tables, table):
                if not torch.equal(whole[list(ids)][1:], part[1:]):
                    wrong.append(f"{table}, held rows: {first} to {second}")
        collectives.barrier("test.read")
    if world.world_size > 1:
        try:
            read.tables.load_rows(
                "big",
                torch.tensor([2 * world.world_size + world.rank + 1]),
                torch.zeros(1, 8),
                torch.zeros(1, 1),
            )
        except CheckpointError as error:
            wrong.append(str(error))
    return wrong


def _size(table: str) -> int:
    return next(spec.num_embeddings for spec in SPECS if spec.name == table)


def body(collectives: Collectives, directory: str) -> dict[str, Any]:
    return {
        "cases": check_cases(collectives),
        "used": used_of_hot(collectives),
        "messages": wrong_ids(collectives),
        "rounding": rounding(collectives),
        "cross": cross_load(collectives, directory),
    }


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def answers(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank answered."""
    folder = tmp_path_factory.mktemp("properties")
    target = "tests.parallel.test_sharding_properties:body"
    arguments = {"directory": str(folder / "checkpoints")}
    return run_ranks(request.param, target, arguments, folder, timeout=300)


def test_ranks_equal_plain_torch_on_anything(answers: list[dict[str, Any]]) -> None:
    counts = answers[0]["cases"]
    assert all(answer["cases"] == counts for answer in answers)
    assert counts["examples"] == NUM_EXAMPLES
    # the examples are of all kinds
    kinds = ("ids", "rows", "hot", "idle rank", "hash", "sum", "product")
    assert min(counts[kind] for kind in kinds) >= NUM_EXAMPLES / 10
    assert (counts["small"] > 0) == (len(answers) > 1)


def test_hot_gradients_take_the_way_of_fewer_bytes(answers: list[dict[str, Any]]) -> None:
    num_ranks = len(answers)
    # the replicated table, 3 rows of 4, is summed in any case
    replicated = 3 * 4 * 4 if num_ranks > 1 else 0
    for answer in answers:
        few, all_rows = (sent - replicated for sent in answer["used"])
        # 4 rows of 8 float32 and an int32 to each other rank; else 40 rows of 8 float32
        assert few == (0 if num_ranks == 1 else 4 * (8 * 4 + 4) * (num_ranks - 1))
        # 39 rows of every rank: from 2 ranks on more than twice all 40, as numbers say
        cheaper = num_ranks > 1 and num_ranks * 39 * (8 * 4 + 4) >= 2 * 40 * 8 * 4
        assert all_rows == (40 * 8 * 4 if cheaper else 0)


def test_bad_ids_are_named_on_every_rank(answers: list[dict[str, Any]]) -> None:
    last = len(answers) - 1
    expected = [
        f"ids of table 'big' lie in [0, 50). Received: id {wrong} at position 2 (example 2 of the "
        f"batch) on rank {last}. The tables and the data have different vocabularies"
        for wrong in (50, -1, 2**40 + 5, -(2**62))
        for _ in range(2 * 3)
    ]
    for answer in answers:
        assert len(answer["messages"]) == len(expected)
        for message, text in zip(answer["messages"], expected, strict=True):
            assert message.startswith(text)


def test_rounding_stays_within_what_is_stated(answers: list[dict[str, Any]]) -> None:
    for precision in ("fp16", "bf16"):
        rows = max(answer["rounding"][precision][0] for answer in answers)
        updates = max(answer["rounding"][precision][1] for answer in answers)
        if len(answers) == 1:
            assert rows == updates == 0
        else:
            # within the bound, and near it: it is this precision that was used
            assert 0.1 < rows <= 1
            assert 0.1 < updates <= 1 + 1e-3


def test_checkpoints_do_not_know_the_hot_tier(answers: list[dict[str, Any]]) -> None:
    for rank, answer in enumerate(answers):
        refused = answer["cross"] if len(answers) > 1 else [""]
        assert len(refused) == 1, refused
        if len(answers) > 1 and rank == 0:
            assert "holds rows range(0, 3) and range(" in refused[0]
            assert f"of table 'big'. Received: row {2 * len(answers) + 1}." in refused[0]
