"""The sequence tower against plain loops, and windows against the events that they stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from distrec.batch import Batch, Jagged
from distrec.config import LossConfig
from distrec.model import ModelSpec, Objective, UnifiedModel, sequence
from distrec.model.l2 import SquaredNorms
from distrec.model.positions import Positions, window_targets
from distrec.model.sequence import SequenceTower
from tests.unit.test_model import SPEC, InMemoryTables, make_batch, make_catalogue, make_model

ATTENTIONS = ("softmax", "hstu")
HISTORIES = [[3, 4], [], [2, 3, 5, 6], [9]]
TIMES = [[10, 12], [], [5, 5, 400, 90_000], [7]]
NOW = 10**6
KINDS = [[2, 4], [], [3, 3, 1, 2], [4]]
WITH_KINDS = SPEC.model_copy(update={"event_types": ("view", "cart", "buy")})
ALL_TOWERS = ("cf", "autoencoder", "sequence", "deep")


def timed_batch() -> Batch:
    batch = make_batch([2, 3, 5, 1], [2, 4, 7, 3], HISTORIES)
    return replace(
        batch,
        history_times=Jagged.from_lists(TIMES),
        history_types=Jagged.from_lists(KINDS),
        time=torch.full((4,), NOW),
    )


def disturbed(model: UnifiedModel) -> UnifiedModel:
    """Every parameter away from where it starts, so that each of them shows."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def encode(model: UnifiedModel, tables: InMemoryTables, batch: Batch) -> Tensor:
    return model.encode_users(batch, tables(model.user_requests(batch)))


# --- the tower -----------------------------------------------------------------------------------


def bias_by_hand(tower: SequenceTower, times: list[int], i: int, j: int) -> Tensor:
    """Of the i-th event that looks at the j-th, where the 0th is the start; NOW is next."""
    bias = tower.bias
    if j == 0:
        return bias.of_start
    seconds = [*times, NOW][i] - times[j - 1]
    return bias.by_distance[:, i - j] + bias.by_interval[:, (seconds + 1).bit_length() - 1]


def attend(
    tower: SequenceTower, kind: str, block: torch.nn.Module, times: list[int], parts: list[Tensor]
) -> Tensor:
    """Attention event by event and head by head; parts are queries, keys and values (n, D)."""
    queries, keys, values = (part.unflatten(1, (2, -1)) for part in parts)
    rows = []
    for i in range(len(queries)):
        heads = []
        for head in range(2):
            scores = torch.stack(
                [
                    queries[i, head] @ keys[j, head] / (2.0 if kind == "softmax" else 1.0)
                    + bias_by_hand(tower, times, i, j)[head]
                    for j in range(i + 1)
                ]
            )
            if kind == "softmax":
                weights = torch.softmax(scores, 0)
            else:
                weights = functional.silu(scores) / block.length
            heads.append(weights @ values[: i + 1, head])
        rows.append(torch.cat(heads))
    return torch.stack(rows)


def state_by_hand(
    tower: SequenceTower, kind: str, rows: Tensor, times: list[int], kinds: list[int]
) -> Tensor:
    """The state after the last event of one user. D = 8, two heads of four."""
    events = torch.cat([tower.start, rows]) * 8**0.5
    if tower.kinds is not None:
        added = [torch.zeros(8), *(tower.kinds[one] for one in kinds)]
        events = events + torch.stack(added)
    for block in tower.blocks:
        if kind == "softmax":
            parts = list(block.projections(block.attention_norm(events)).chunk(3, 1))
            events = events + block.output(attend(tower, kind, block, times, parts))
            hidden = functional.gelu(block.hidden(block.hidden_norm(events)))
            events = events + block.hidden_output(hidden)
        else:
            projected = functional.silu(block.projections(block.norm(events)))
            gate, *parts = projected.chunk(4, 1)
            seen = block.output_norm(attend(tower, kind, block, times, parts))
            events = events + block.output(seen * gate)
    return tower.norm(events)[-1]


@pytest.mark.parametrize("spec", [SPEC, WITH_KINDS], ids=["no kinds", "kinds"])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_states_equal_a_plain_loop(
    kind: str, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the longest history alone, then one of two events with those that are shorter
    monkeypatch.setitem(sequence._ATTENTION_WEIGHTS, "cpu", 2 * 25)
    model = disturbed(make_model(spec, towers=("sequence",), sequence_attention=kind))
    tables = InMemoryTables(model)
    tower = model.towers["sequence"]
    users = encode(model, tables, timed_batch())
    assert users.shape == (4, 11)
    for row, (history, times, kinds) in enumerate(zip(HISTORIES, TIMES, KINDS, strict=True)):
        # item 9 is cold: it stands on the unknown row
        index = torch.tensor([1 if item == 9 else item for item in history], dtype=torch.int64)
        expected = state_by_hand(tower, kind, tables.weights["item"][index], times, kinds)
        torch.testing.assert_close(users[row, :8], expected, rtol=1e-4, atol=1e-5)


def test_kinds_begin_without_effect() -> None:
    plain = make_model(towers=("sequence",))
    assert plain.towers["sequence"].kinds is None
    told = make_model(WITH_KINDS, towers=("sequence",))
    assert told.towers["sequence"].kinds.shape == (5, 8)
    users = [encode(model, InMemoryTables(model), timed_batch()) for model in (plain, told)]
    assert torch.equal(users[0], users[1])


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_others_in_the_batch_change_nothing(kind: str) -> None:
    model = disturbed(make_model(towers=ALL_TOWERS, sequence_attention=kind))
    tables = InMemoryTables(model)
    together = timed_batch()
    vectors = encode(model, tables, together)
    for row in range(4):
        alone = replace(
            together,
            **{
                name: getattr(together, name)[row : row + 1]
                for name in ("user_index", "item_index", "time", "labels", "weights", "num_events",
                             "dense")
            },
            history=Jagged.from_lists(HISTORIES[row : row + 1]),
            history_times=Jagged.from_lists(TIMES[row : row + 1]),
            ids={
                name: Jagged.singles(bags.values[row : row + 1])
                for name, bags in together.ids.items()
            },
        )  # fmt: skip
        found = encode(model, tables, alone)
        torch.testing.assert_close(found, vectors[row : row + 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_a_position_is_the_history_up_to_there(kind: str) -> None:
    """Of every tower and the gate: nothing later is seen."""
    model = make_model(towers=ALL_TOWERS, sequence_attention=kind, cf_history="mean")
    tables = InMemoryTables(disturbed(model))
    batch = timed_batch()
    places = [(2, 0), (2, 1), (2, 3), (0, 1), (1, 0), (2, 4)]
    positions = Positions(*(torch.tensor(column) for column in zip(*places, strict=True)))
    rows = tables(model.user_requests(batch, positions))
    found = model.encode_users(batch, rows, positions)
    assert found.shape == (6, 4 * 8 + 3)
    for row, (example, length) in enumerate(places):
        time = batch.time.clone()
        time[example] = [*TIMES[example], NOW][length]
        cut = replace(
            batch,
            time=time,
            history=Jagged.from_lists([*HISTORIES[:example], HISTORIES[example][:length],
                                       *HISTORIES[example + 1 :]]),
            history_times=Jagged.from_lists([*TIMES[:example], TIMES[example][:length],
                                             *TIMES[example + 1 :]]),
            num_events=batch.num_events.clone().index_fill(0, torch.tensor([example]), length),
        )  # fmt: skip
        expected = encode(model, tables, cut)[example]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


def test_an_own_table_unless_items_are_shared() -> None:
    own = make_model(towers=("cf", "sequence"), share_item_embedding=False)
    assert "item_sequence" in {spec.name for spec in own.table_specs()}
    shared = make_model(towers=("cf", "sequence"))
    assert {spec.name for spec in shared.table_specs()} == {"item", "item_bias", "user"}


def test_masked_items_are_the_unknown_one_in_training_only() -> None:
    model = make_model(towers=("sequence",), sequence_mask=0.5)
    batch = make_batch([2] * 50, [3] * 50, [[4, 5, 6, 7]] * 50)

    def asked() -> Tensor:
        return model.user_requests(batch)["user.sequence"].ids.values.view(50, 4)

    model.eval()
    assert torch.equal(asked(), batch.history.values.view(50, 4))
    model.train()
    found = asked()
    masked = found == 1
    assert 60 < int(masked.sum()) < 140
    assert torch.equal(found[~masked], batch.history.values.view(50, 4)[~masked])


def test_a_history_counts_as_the_mean_of_its_rows() -> None:
    model = make_model(towers=("sequence",))
    tables = InMemoryTables(model)
    batch = timed_batch()
    requests = model.user_requests(batch)
    norms = SquaredNorms(model, LossConfig(l2=1.0))
    norms.note(requests)
    found = norms.of_users(batch, tables(requests))
    squares = tables.weights["item"].detach().square().sum(dim=1)
    expected = [(squares[3] + squares[4]) / 2, 0.0, squares[[2, 3, 5, 6]].mean(), squares[1]]
    torch.testing.assert_close(found.detach(), torch.tensor(expected))


# --- windows -------------------------------------------------------------------------------------


def events_batch(rows: list[tuple[int, int, int, list[int], list[int], int]]) -> Batch:
    """(user, item, time, history, times, num_events) a row, each of weight 1."""
    batch = make_batch([row[0] for row in rows], [row[1] for row in rows], [row[3] for row in rows])
    job = torch.tensor([2 + row[0] % 3 for row in rows])
    return replace(
        batch,
        time=torch.tensor([row[2] for row in rows]),
        weights=torch.ones(len(rows)),
        num_events=torch.tensor([row[5] for row in rows]),
        history_times=Jagged.from_lists([row[4] for row in rows]),
        # the kind follows from the event
        history_types=Jagged.from_lists(
            [
                [2 + (item + time // 10) % 3 for item, time in zip(row[3], row[4], strict=True)]
                for row in rows
            ]
        ),
        ids={"user_job": Jagged.singles(job), "context_hour": Jagged.singles(job)},
        dense=job.to(torch.float32).unsqueeze(1),
    )


# user 2: a whole window with a tie; user 3: a window whose first event belongs to the one before,
# with its item at the time of the last event
WINDOWS = events_batch(
    [
        (2, 7, 40, [3, 4, 5, 2], [10, 20, 20, 30], 4),
        (3, 2, 90, [6, 5, 4, 3], [60, 70, 80, 90], 9),
    ]
)
EVENTS = [
    (2, 3, 10, [], [], 0),
    (2, 4, 20, [3], [10], 1),
    (2, 5, 20, [3], [10], 1),
    (2, 2, 30, [3, 4, 5], [10, 20, 20], 3),
    (2, 7, 40, [3, 4, 5, 2], [10, 20, 20, 30], 4),
    (3, 5, 70, [6], [60], 6),
    (3, 4, 80, [6, 5], [60, 70], 7),
    (3, 3, 90, [6, 5, 4], [60, 70, 80], 8),
    (3, 2, 90, [6, 5, 4], [60, 70, 80], 8),
]


def test_window_targets_by_hand() -> None:
    positions, items = window_targets(WINDOWS)
    found = list(
        zip(positions.example.tolist(), positions.length.tolist(), items.tolist(), strict=True)
    )
    expected = [(row[0] - 2, len(row[3]), row[1]) for row in EVENTS]
    assert sorted(found) == sorted(expected)
    assert found[-2:] == [(0, 4, 7), (1, 3, 2)]


@pytest.mark.parametrize("kind", ["softmax", "sampled_softmax"])
def test_windows_teach_what_their_events_teach(kind: str) -> None:
    """The loss, its weight and every gradient; of the towers all at once."""
    results = []
    for train_rows, batch in (("windows", WINDOWS), ("events", events_batch(EVENTS))):
        model = disturbed(make_model(WITH_KINDS, towers=ALL_TOWERS, cf_history="mean"))
        tables = InMemoryTables(model)
        settings = {"kind": kind, "num_negatives": 5, "l2": 0.0, "label_smoothing": 0.0}
        objective = Objective(
            model, make_catalogue(), LossConfig.model_validate(settings), 1, train_rows
        )
        loss = objective.loss_sum(batch, tables(objective.requests(batch, 0)), 0)[0]
        loss.backward()
        gradients = [*model.parameters(), *tables.weights.values()]
        results.append((loss, objective.weight_sum(batch), [one.grad for one in gradients]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-5)
    assert results[0][1] == len(EVENTS)


def test_no_windows_give_zero_and_reach_every_parameter() -> None:
    model = make_model(WITH_KINDS, towers=ALL_TOWERS)
    tables = InMemoryTables(model)
    objective = Objective(model, make_catalogue(), LossConfig(kind="softmax"), 1, "windows")
    batch = make_batch([], [], [])
    batch = replace(batch, history_types=batch.history)
    loss = objective.loss_sum(batch, tables(objective.requests(batch, 0)), 0)[0]
    loss.backward()
    assert loss.item() == 0.0
    assert objective.weight_sum(batch).item() == 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_a_history_longer_than_the_models_is_read() -> None:
    """Distances beyond the longest known one count as that."""
    model = make_model(towers=("sequence",))
    tables = InMemoryTables(model)
    long = make_batch([2], [3], [[2, 3, 4, 5, 6, 7, 2]])
    assert encode(model, tables, long).isfinite().all()
