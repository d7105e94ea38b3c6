"""Weights of the towers, fitted on valid: against the plain likelihood, by queries and by ranks."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distrec import checkpoint
from distrec.batch import Jagged, QueryBatch
from distrec.config import ModelConfig
from distrec.metrics.evaluation import ModelScorer
from distrec.model import UnifiedModel
from distrec.sharding.collectives import OneProcess
from distrec.trainer import tower_weights, train
from distrec.trainer.tower_weights import HeldOut, choose_held_out, fit_tower_weights
from distrec.trainer.validation import slack
from tests.training import log_entries, make_config
from tests.unit.test_model import (
    BATCH,
    RECENT,
    SPEC,
    InMemoryTables,
    encode,
    make_batch,
    make_catalogue,
    make_model,
)

NOBODY = torch.zeros(12, dtype=torch.bool)
ONE = OneProcess(torch.device("cpu"))
# of three towers, the bias, new items, and what is recent
TRUE = [0.5, 1.0, 2.0, 1.0, -0.8, 0.6]
USUAL = [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
FITS = {"max_steps": 6, "fit_tower_weights": True}


def draw(num_users: int, seed: int) -> tuple[UnifiedModel, HeldOut, Tensor]:
    """Users who follow the first tower half as much as they seem to, and the last one twice."""
    generator = torch.Generator().manual_seed(seed)
    model = make_model()
    users = torch.randn(num_users, model.vector_width, generator=generator) * 0.6
    items = torch.randn(12, model.vector_width, generator=generator) * 0.6
    parts = model.part_scores(users, items)
    true = torch.einsum("p,pbm->bm", torch.tensor(TRUE), parts)
    targets = torch.multinomial(true.softmax(1), 2, generator=generator) + 2
    seen = torch.randint(2, 14, (num_users, 2), generator=generator)
    # some have two targets, some one that is in no catalogue beside, some none
    bags = [
        [pair[:2], [pair[0], 1], [pair[0]], []][place % 4]
        for place, pair in enumerate(targets.tolist())
    ]
    return model, HeldOut(users, Jagged.from_lists(seen.tolist()), Jagged.from_lists(bags)), items


def plain(weights: Tensor, model: UnifiedModel, held_out: HeldOut, items: Tensor) -> Tensor:
    """The log-likelihood user by user, and the prior."""
    total = -0.5 * (weights - torch.tensor(USUAL)).square().sum()
    scores = torch.einsum("p,pbm->bm", weights, model.part_scores(held_out.users, items).double())
    for row, score in enumerate(scores):
        targets = held_out.targets.values[slice(*held_out.targets.offsets[row : row + 2].tolist())]
        targets = targets[targets > 1] - 2
        seen = held_out.seen
        masked = set() if seen is None else set((seen.values.view(-1, 2)[row] - 2).tolist())
        kept = [item for item in range(12) if item in targets.tolist() or item not in masked]
        if len(targets):
            chosen = torch.logsumexp(score[targets.unique()], 0) - torch.logsumexp(score[kept], 0)
            total = total + chosen
    return total


@pytest.mark.parametrize("masks", [True, False])
def test_no_other_weights_make_the_targets_likelier(
    monkeypatch: pytest.MonkeyPatch, masks: bool
) -> None:
    beats = []
    monkeypatch.setattr(tower_weights.pulse, "beat", lambda: beats.append(1))
    # a block of 5 users
    monkeypatch.setattr(tower_weights, "_SCORES_PER_BLOCK", 5 * 12 * len(USUAL))
    model, held_out, items = draw(num_users=203, seed=1)
    if not masks:
        held_out = dataclasses.replace(held_out, seen=None)
    fitted = fit_tower_weights(model, [held_out], items, NOBODY, ONE)
    # a watchdog hears of each block
    assert len(beats) >= 2 * 41
    weights = fitted.double().requires_grad_()
    plain(weights, model, held_out, items).backward()
    assert weights.grad is not None
    assert weights.grad.abs().max() < 0.1
    usual = torch.tensor(USUAL, dtype=torch.float64, requires_grad=True)
    plain(usual, model, held_out, items).backward()
    assert usual.grad is not None
    assert usual.grad.abs().max() > 10


def test_the_weights_that_made_the_data_are_found() -> None:
    model, held_out, items = draw(num_users=6000, seed=2)
    held_out = dataclasses.replace(
        held_out, seen=None, targets=Jagged.singles(held_out.targets.select(torch.arange(0, 6000, 4)
        ).values[::2]), users=held_out.users[::4],
    )  # fmt: skip
    fitted = fit_tower_weights(model, [held_out], items, NOBODY, ONE)
    assert fitted.tolist() == pytest.approx(TRUE, abs=0.25)


def test_no_weight_is_below_zero_and_none_is_found_from_nothing() -> None:
    model, held_out, items = draw(num_users=200, seed=3)
    nobody = HeldOut(held_out.users, None, Jagged.from_lists([[] for _ in range(200)]))
    assert fit_tower_weights(model, [nobody], items, NOBODY, ONE).tolist() == USUAL
    assert fit_tower_weights(model, [], items, NOBODY, ONE).tolist() == USUAL
    width = model.config.embedding_dim
    against = held_out.users.clone()
    against[:, :width] *= -1
    fitted = fit_tower_weights(
        model, [dataclasses.replace(held_out, users=against)], items, NOBODY, ONE
    )
    assert fitted[0] == 0
    assert fitted[1:-2].min() > 0.5
    assert fitted[-2] < -0.3


def test_a_place_that_stands_for_no_item_takes_no_share() -> None:
    model, held_out, items = draw(num_users=200, seed=4)
    wider = torch.cat([items, 9 * torch.ones(1, items.shape[1])])
    held_out = dataclasses.replace(held_out, seen=None)
    found = fit_tower_weights(model, [held_out], wider, torch.arange(13) == 12, ONE)
    expected = fit_tower_weights(model, [held_out], items, NOBODY, ONE)
    torch.testing.assert_close(found, expected)


def test_of_many_queries_the_same_are_taken_however_they_are_dealt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tower_weights, "_MOST_SCORES", 0)
    monkeypatch.setattr(tower_weights, "_LEAST_QUERIES", 20)
    model = make_model()
    tables = InMemoryTables(model)
    items = torch.zeros(8, model.vector_width)
    users = [2 + place % 4 for place in range(60)]
    targets = Jagged.from_lists([[2 + place % 7] for place in range(60)])
    seen = Jagged.from_lists([[2 + place % 5, 3] for place in range(60)])
    batch = make_batch(users, [0] * 60, [[3]] * 60)
    everyone = QueryBatch(batch, seen, targets)

    def taken(queries: list[QueryBatch]) -> list[tuple[int, ...]]:
        scorer = ModelScorer(model, tables, items)
        chosen = choose_held_out(model, scorer, queries, 60, exclude_seen=True)
        pairs = []
        for part in chosen:
            assert part.seen is not None
            assert len(part.users) == part.targets.batch_size == part.seen.batch_size
            pairs += [tuple(row) for row in part.seen.values.view(-1, 2).tolist()]
        return sorted(pairs)

    def part(rows: Tensor) -> QueryBatch:
        return QueryBatch(batch.select(rows), seen.select(rows), targets.select(rows))

    whole = taken([everyone])
    assert 5 < len(whole) < 40
    assert taken([part(torch.arange(0, 60, 2)), part(torch.arange(1, 60, 2))]) == whole


def test_weights_count_outside_training_where_lists_are_all_that_is_wanted() -> None:
    given = {
        "tower_weights": {"cf": 0.5, "deep": 0.0, "bias": 2.0}, "new_item_bias": -0.7,
        "recent_weight": 0.3,
    }  # fmt: skip
    model, plain_model = make_model(**given).eval(), make_model().eval()
    tables = InMemoryTables(model)
    catalogue = make_catalogue()
    users, items = encode(model, tables, BATCH, catalogue)
    without, same_items = encode(plain_model, tables, BATCH, catalogue)
    torch.testing.assert_close(items, same_items)
    weights = torch.tensor([0.5, 1.0, 0.0, 2.0]).view(-1, 1, 1)
    parts = plain_model.part_scores(without, items)
    torch.testing.assert_close(parts.sum(0), without @ items.T)
    assert not parts[-2:].any()
    found = model.part_scores(users, items)
    torch.testing.assert_close(found[:-2], weights * parts[:-2])
    # items 8 and 9 have no row
    assert found[-2].tolist() == [pytest.approx([0.0] * 6 + [-0.7] * 2)] * 4
    expected = [0.3 * math.log(3 + number) for number in RECENT]
    assert found[-1].tolist() == [pytest.approx(expected)] * 4
    shares = model.tower_scores(users.unsqueeze(1), items.unsqueeze(0)).permute(2, 0, 1)
    torch.testing.assert_close(shares, torch.cat([found[:3], found[3:].sum(0, keepdim=True)]))
    model.train()
    in_training = model.encode_users(BATCH, tables(model.user_requests(BATCH)))
    torch.testing.assert_close(in_training, without)
    labelled = SPEC.model_copy(update={"has_labels": True})
    probable = make_model(labelled, **given).eval()
    assert probable.vector_width == model.vector_width - 1
    of_labels = make_model(labelled).eval()
    tables = InMemoryTables(probable)
    torch.testing.assert_close(
        encode(probable, tables, BATCH, catalogue), encode(of_labels, tables, BATCH, catalogue)
    )


def test_a_tower_that_is_off_has_no_weight() -> None:
    with pytest.raises(ValueError, match="tower_weights names towers that are on"):
        ModelConfig(tower_weights={"sequence": 1.0})


def test_slack_is_half_of_a_standard_error() -> None:
    assert slack(0.1, 400) == pytest.approx(0.5 * math.sqrt(0.1 * 0.9 / 400))
    assert slack(0.0, 400) == slack(1.0, 400) == slack(1.1, 0) == 0.0


def test_weights_that_are_hardly_worse_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = torch.tensor([0.7, 1.0, 0.7, 1.4, -0.5, 0.3])
    monkeypatch.setattr("distrec.trainer.validation.fit_tower_weights", lambda *_: weights)
    monkeypatch.setattr("distrec.trainer.validation.slack", lambda *_: 1.0)
    config = make_config(tmp_path, {"train": FITS})
    train(config, ONE)
    model = checkpoint.load_model(checkpoint.find(config.checkpoint_directory, "newest"))
    assert torch.equal(model.tower_weights, weights[:-2])
    assert model.new_item_bias == -0.5
    assert model.recent_weight == weights[-1]


@pytest.mark.parametrize("given", [0.0, 1.0])
def test_training_keeps_the_weights_that_are_better_on_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: float
) -> None:
    """With all of them 0 the order says nothing; chance, which may say as much, is left out."""
    monkeypatch.setattr("distrec.trainer.validation.slack", lambda *_: 0.0)
    names = ("cf", "autoencoder", "deep", "bias")
    monkeypatch.setattr(
        "distrec.trainer.validation.fit_tower_weights", lambda *_: torch.full((6,), 1.0 - given)
    )
    weights = {
        "tower_weights": dict.fromkeys(names, given), "new_item_bias": given,
        "recent_weight": given,
    }  # fmt: skip
    keys = {"model": weights, "train": FITS}
    config = make_config(tmp_path, keys)
    train(config, ONE)
    model = checkpoint.load_model(checkpoint.find(config.checkpoint_directory, "newest"))
    assert model.tower_weights.tolist() == [1.0] * 4
    assert model.new_item_bias == model.recent_weight == 1.0


def test_the_weights_of_a_run_are_fitted_and_saved_unless_told_not_to(tmp_path: Path) -> None:
    found = {}
    for fits in (True, False):
        config = make_config(
            tmp_path / str(fits),
            {"train": {"max_steps": 12, "fit_tower_weights": fits},
             "model": {"tower_weights": {"bias": 0.0, "cf": 0.0}}},
        )  # fmt: skip
        train(config, ONE)
        path = checkpoint.find(config.checkpoint_directory, "newest")
        model = checkpoint.load_model(path)
        found[fits] = model.tower_weights.tolist()
        logged = [entry.get("weights") for entry in log_entries(config, "valid")]
        assert logged[-1] == (model.named_weights() if fits else None)
    assert found[False] == [0.0, 1.0, 1.0, 0.0]
    assert found[True] not in (found[False], [1.0] * 4)
