"""Several tasks at once: the head against plain formulas, and losses of labels partly known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from distrec.config import ModelConfig
from distrec.dataset import DatasetManifest
from distrec.errors import ConfigError
from distrec.metrics.classification import ClassificationMetrics
from distrec.metrics.evaluation import ModelScorer, evaluate_examples
from distrec.metrics.examples import example_metrics
from distrec.model import UnifiedModel
from distrec.model.losses import task_loss_sums
from distrec.model.multi_task import MultiTaskHead
from tests.unit.test_model import SPEC, InMemoryTables, make_batch, make_catalogue, make_model
from tests.unit.test_model_objective import loss_of, make_objective

KINDS = ("shared_bottom", "mmoe", "ple")
TASKS = ("label", "bought", "keys")
NAN = math.nan
TASK_SPEC = SPEC.model_copy(update={"has_labels": True, "tasks": ("bought", "keys")})
LABELS = torch.tensor([[1.0, NAN, 0.0], [0.0, 1.0, NAN], [1.0, NAN, NAN], [1.0, 0.0, 1.0]])
BATCH = replace(
    make_batch([2, 3, 4, 5], [2, 9, 5, 3], [[3], [], [2], [4]]),
    labels=LABELS,
    weights=torch.tensor([1.0, 2.0, 3.0, 4.0]),
)


def make_head(kind: str, **settings: object) -> MultiTaskHead:
    torch.manual_seed(0)
    given = {"multi_task": kind, "experts": 2, "expert_hidden": (5, 4), "dropout": 0.0, **settings}
    return MultiTaskHead(6, TASKS, ModelConfig.model_validate(given))


def pairs(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    users, items = torch.randn(2, count, 6, generator=torch.Generator().manual_seed(1))
    return users, items, (users * items).sum(dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_task_has_a_logit_and_every_parameter_a_gradient(kind: str) -> None:
    for count in (7, 0):
        head = make_head(kind)
        outputs = head(*pairs(count))
        assert outputs.shape == (count, 3)
        outputs.sum().backward()
        assert all(part.grad is not None for part in head.parameters())
    num_experts = {"shared_bottom": 1, "mmoe": 2, "ple": 2 * (2 + 3 * 2)}[kind]
    experts = [name for name in head.state_dict() if name.endswith("0.weight") and ".0.w" in name]
    of_experts = [name for name in experts if ".shared." in name or ".own." in name]
    assert len(of_experts) == num_experts
    # a task keeps its parameters in another place among the others
    assert {"scales.task_keys", "towers.task_bought.layers.0.bias"} <= set(head.state_dict())
    assert "scales.task_label" not in head.state_dict()


def test_mmoe_by_its_formula() -> None:
    head = make_head("mmoe")
    with torch.no_grad():
        head.scales["task_bought"].fill_(0.5)
    users, items, scores = pairs(5)
    found = head(users, items, scores)
    inputs = torch.cat([users, items, users * items], dim=1)
    weights = head.state_dict()

    def linear(name: str, values: torch.Tensor) -> torch.Tensor:
        return values @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    gelu = torch.nn.functional.gelu
    experts = [
        gelu(linear(f"layers.0.shared.{k}.3", gelu(linear(f"layers.0.shared.{k}.0", inputs))))
        for k in range(2)
    ]
    for place, (task, scale) in enumerate(zip(TASKS, (1.0, 0.5, 1.0), strict=True)):
        chances = linear(f"layers.0.gates.task_{task}.weights", inputs).exp()
        chances = chances / chances.sum(dim=1, keepdim=True)
        mixed = chances[:, :1] * experts[0] + chances[:, 1:] * experts[1]
        hidden = gelu(linear(f"towers.task_{task}.layers.0", mixed))
        expected = scale * scores + linear(f"towers.task_{task}.layers.3", hidden)[:, 0]
        torch.testing.assert_close(found[:, place], expected)


def test_own_experts_of_the_last_layer_learn_from_their_task_alone() -> None:
    head = make_head("ple", expert_layers=2)
    head(*pairs(7))[:, 1].sum().backward()
    last = head.layers[1]
    touched = {
        task: any(bool(part.grad.any()) for part in last.own[f"task_{task}"].parameters())
        for task in TASKS
    }
    assert touched == {"label": False, "bought": True, "keys": False}
    assert all(bool(part.grad.any()) for part in last.shared.parameters())
    # the first layer's meet in what the second layer shares
    assert all(bool(part.grad.any()) for part in head.layers[0].own["task_label"].parameters())


def test_losses_count_where_labels_are_known() -> None:
    scores = torch.tensor([[0.3, -1.0, 2.0], [0.1, 0.2, 0.4], [1.0, 5.0, 5.0], [-0.5, 0.7, 0.6]])
    scores.requires_grad_()
    sums = task_loss_sums(scores, LABELS, BATCH.weights)
    expected = [0.0, 0.0, 0.0]
    for row, weight in enumerate(BATCH.weights.tolist()):
        for task in range(3):
            label, score = float(LABELS[row, task]), float(scores[row, task].detach())
            if not math.isnan(label):
                chance = 1 / (1 + math.exp(-score))
                expected[task] -= weight * math.log(chance if label else 1 - chance)
    assert sums.tolist() == pytest.approx(expected, rel=1e-5)
    sums.sum().backward()
    assert torch.equal(scores.grad == 0, LABELS.isnan())


@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_has_a_sum_and_weights_of_each_task(kind: str) -> None:
    model = make_model(TASK_SPEC, multi_task=kind, pair_crosses=1)
    tables = InMemoryTables(model)
    objective = make_objective(model, "auto", task_weights={"label": 2.0, "keys": 0.5}, l2=0.1)
    rows = tables(objective.requests(BATCH, 0))
    total, parts = objective.loss_sum(BATCH, rows, 0)
    catalogue = make_catalogue(TASK_SPEC)
    every = tables({**model.user_requests(BATCH), **model.item_requests(catalogue)})
    users = model.encode_users(BATCH, every)
    items = model.encode_items(catalogue, every)[BATCH.item_index - 2]
    scores = model.task_head(users, items, model.pair_scores(users, items))
    sums = task_loss_sums(scores, LABELS, BATCH.weights).tolist()
    names = ("loss", "loss:bought", "loss:keys")
    assert [parts[name] for name in names] == pytest.approx(sums, rel=1e-5)
    assert parts["l2"] > 0
    weighted = [2.0 * sums[0] + parts["l2"], sums[1], 0.5 * sums[2]]
    assert total.tolist() == pytest.approx(weighted, rel=1e-5)
    assert objective.weight_sum(BATCH).tolist() == [10.0, 2.0 + 4.0, 1.0 + 4.0]
    # parts of a batch, one without rows, sum up to it
    cuts = ([0], [1, 2, 3], [])
    split = [BATCH.select(torch.tensor(places).long()) for places in cuts]
    torch.testing.assert_close(sum(loss_of(objective, tables, part) for part in split), total)
    measured, is_known = ModelScorer(
        model, tables, model.encode_items(catalogue, every).detach()
    ).score_examples(BATCH)
    torch.testing.assert_close(measured, scores)
    assert is_known.all()


def test_adversarial_losses_are_of_every_task() -> None:
    model = make_model(TASK_SPEC, multi_task="mmoe")
    tables = InMemoryTables(model)
    plain = loss_of(make_objective(model, "binary"), tables, BATCH)
    moved = loss_of(make_objective(model, "binary", adversarial=0.1), tables, BATCH)
    assert bool((moved[1:] > 1.5 * plain[1:]).all())
    # rows go where the label's loss grows
    assert moved[0].item() > 2 * plain[0].item()


def test_without_the_head_further_labels_are_nothing() -> None:
    model = make_model(TASK_SPEC)
    assert model.tasks == ()
    objective = make_objective(model, "binary")
    assert loss_of(objective, InMemoryTables(model), BATCH).shape == (1,)
    assert objective.weight_sum(BATCH).tolist() == [10.0]


def test_what_the_data_does_not_have_is_refused() -> None:
    for changes in ({"tasks": ()}, {"has_labels": False}):
        with pytest.raises(ConfigError, match=r"Received: 'ple' with .*prepare.events.tasks\.$"):
            make_model(TASK_SPEC.model_copy(update=changes), multi_task="ple")
    with pytest.raises(ConfigError, match=r"Received: mmoe with softmax\. Set loss\.kind"):
        make_objective(make_model(TASK_SPEC, multi_task="mmoe"), "softmax")


def test_metrics_of_a_task_are_of_the_examples_whose_label_is_known() -> None:
    model: UnifiedModel = make_model(TASK_SPEC, multi_task="ple")
    tables, catalogue = InMemoryTables(model), make_catalogue(TASK_SPEC)
    manifest = DatasetManifest.model_construct(rating_scale=None, has_labels=True)
    with torch.no_grad():
        items = model.encode_items(catalogue, tables(model.item_requests(catalogue)))
        scorer = ModelScorer(model, tables, items)
        whole = example_metrics(manifest, model.tasks, exact_auc=True)
        first, second = (example_metrics(manifest, model.tasks) for _ in range(2))
        evaluate_examples(scorer, [BATCH], whole)
        for metrics, places in ((first, [0, 3]), (second, [1, 2])):
            evaluate_examples(scorer, [BATCH.select(torch.tensor(places))], metrics)
        scores, _ = scorer.score_examples(BATCH)
    found = whole.compute()
    plain = ClassificationMetrics(exact_auc=True)
    known = torch.tensor([1, 3])
    plain.update(scores[known, 1], LABELS[known, 1], BATCH.weights[known])
    assert {name: found[f"{name}:bought"] for name in plain.compute()} == plain.compute()
    assert (found["num_examples"], found["num_examples:keys"]) == (4, 2)
    assert found["auc:keys"] in (0.0, 1.0)
    # as ranks do
    first.load_state_vector(first.state_vector() + second.state_vector())
    assert first.compute() == pytest.approx(found, abs=1e-6)
