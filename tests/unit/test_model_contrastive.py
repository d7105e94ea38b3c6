"""The contrastive term against plain loops, and what the objective makes of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distrec.batch import Batch, Jagged
from distrec.config import LossConfig, parse_config
from distrec.errors import ConfigError
from distrec.model import Objective, UnifiedModel
from distrec.model.contrastive import contrastive_loss, draw_views, view_requests
from tests.unit.test_model import InMemoryTables, make_batch, make_catalogue, make_model

# user 2 is there twice, user 5 has no history
BATCH = make_batch([2, 3, 2, 5, 4], [2, 4, 7, 3, 6], [[3, 4, 5], [2, 6], [3, 4], [], [7]])
LONGEST = {2: [3, 4, 5], 3: [2, 6], 4: [7]}
ALL_TOWERS = ("cf", "autoencoder", "sequence", "deep", "content")


def term(model: UnifiedModel, batch: Batch, temperature: float) -> Tensor:
    views = draw_views(batch, model)
    rows = InMemoryTables(model)(view_requests(model, views))
    return contrastive_loss(model, views, rows, temperature)


def by_hand(vectors: list[Tensor], temperature: float) -> float:
    """Of views that are equal."""
    total = 0.0
    for own in vectors:
        scores = [float(own @ other) / temperature for other in vectors]
        total += math.log(sum(map(math.exp, scores))) - float(own @ own) / temperature
    return total / len(vectors)


def test_term_by_hand() -> None:
    model = make_model(towers=("autoencoder",), autoencoder_hidden=())
    with torch.no_grad():
        for parameter in model.towers.parameters():
            parameter.zero_()  # leaves the bag itself, whose scale does not matter
    table = InMemoryTables(model).weights["item_history"].detach()
    sums = [table[history].sum(dim=0) for history in LONGEST.values()]
    expected = by_hand([one / one.norm() for one in sums], 0.4)
    assert term(model, BATCH, 0.4).item() == pytest.approx(expected, rel=1e-5)


def test_similarity_is_the_mean_over_the_towers_that_read_histories() -> None:
    model = make_model(towers=ALL_TOWERS)
    batch = make_batch([2, 3, 4], [2, 2, 2], list(LONGEST.values()))
    tables = InMemoryTables(model)
    users = model.encode_users(batch, tables(model.user_requests(batch))).detach()
    parts = users[:, :-3].unflatten(1, (5, 8))[:, [1, 2, 4]]
    vectors = (parts / parts.norm(dim=2, keepdim=True)).flatten(1) / 3**0.5
    assert term(model, BATCH, 0.3).item() == pytest.approx(by_hand(list(vectors), 0.3), rel=1e-4)


def test_views_are_of_each_users_longest_history() -> None:
    model = make_model(towers=("autoencoder",), augment=("reorder",), augment_rate=0.99)
    for view in draw_views(BATCH, model):
        bags = [sorted(part.tolist()) for part in
                view.history.values.split(view.history.lengths.tolist())]  # fmt: skip
        assert dict(zip(view.user_index.tolist(), bags, strict=True)) == LONGEST
    long = make_batch([2], [2], [list(range(2, 8)) * 4])
    first, second = draw_views(long, model)
    assert not torch.equal(first.history.values, second.history.values)
    assert not torch.equal(first.history.values, long.history.values)


@pytest.mark.parametrize("train_rows", ["events", "windows"])
def test_objective_adds_the_mean_of_users_for_all_that_it_weighs(train_rows: str) -> None:
    model = make_model(towers=ALL_TOWERS)
    tables = InMemoryTables(model)
    batch = replace(
        BATCH,
        history_times=Jagged(torch.arange(8), BATCH.history.offsets),
        time=torch.full((5,), 99),
    )
    totals = []
    for weight in (0.0, 0.7):
        config = LossConfig(kind="softmax", contrastive=weight, contrastive_temperature=0.3)
        objective = Objective(model, make_catalogue(), config, 1, train_rows)
        totals.append(objective.loss_sum(batch, tables(objective.requests(batch, 0)), 0))
    (plain, parts), (total, with_term) = totals
    weights = float(objective.weight_sum(batch))
    assert parts == with_term
    expected = 0.7 * weights * term(model, batch, 0.3).item()
    assert (total - plain).item() == pytest.approx(expected, rel=1e-3)
    total.backward()
    assert all(bool(one.grad.isfinite().all()) for one in tables.weights.values())


def test_nobody_is_like_nobody() -> None:
    model = make_model(towers=("autoencoder", "sequence"))
    tables = InMemoryTables(model)
    objective = Objective(model, make_catalogue(), LossConfig(kind="softmax", contrastive=1.0), 1)
    for batch in (make_batch([], [], []), make_batch([2, 3], [4, 5], [[], []])):
        plain = Objective(model, make_catalogue(), LossConfig(kind="softmax"), 1)
        expected = plain.loss_sum(batch, tables(plain.requests(batch, 0)), 0)[0]
        found = objective.loss_sum(batch, tables(objective.requests(batch, 0)), 0)[0]
        torch.testing.assert_close(found, expected)
        found.backward()
    model.eval()
    assert set(objective.requests(BATCH, 1)) == set(plain.requests(BATCH, 1))
    # nor without a tower that reads histories, as an ablation has it
    model = make_model(towers=("cf", "deep"))
    objective = Objective(model, make_catalogue(), LossConfig(kind="softmax", contrastive=1.0), 1)
    assert set(objective.requests(BATCH, 1)) == {
        *model.user_requests(BATCH), *model.item_requests(make_catalogue())
    }  # fmt: skip


def test_what_cannot_be_compared_is_refused() -> None:
    def read(**model: object) -> None:
        events = {"events": {"paths": ["none.csv"], "time": "time"}}
        document = {"name": "x", "prepare": events, "loss": {"contrastive": 0.1}, "model": model}
        parse_config(document, "the test")

    with pytest.raises(ConfigError, match=r"two views of a history. Received: neither model.augm"):
        read(dropout=0.0, input_dropout=0.0)
    read()
    read(dropout=0.0, input_dropout=0.0, augment=["crop"])
