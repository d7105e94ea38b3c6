"""The unified model on tables held in memory: what it asks for and what it makes of the rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from distrec.batch import Batch, ItemBatch, Jagged
from distrec.config import LossConfig, ModelConfig
from distrec.dataset import FeatureSpec
from distrec.errors import ConfigError
from distrec.model import ModelSpec, UnifiedModel
from distrec.model.l2 import SquaredNorms
from distrec.model.layers import CrossNetwork
from distrec.model.positions import Positions, elapsed
from distrec.model.signals import item_signals, recency, user_signals
from distrec.sharding.lookup import Request, pool
from tests.synthetic import write_dataset

FEATURES = (
    FeatureSpec(
        name="tags", side="item", kind="multi_categorical", column="item_tags", num_embeddings=7
    ),
    FeatureSpec(name="year", side="item", kind="number", column="item_year", dim=1),
    FeatureSpec(name="age", side="user", kind="number", column="user_age", dim=1),
    FeatureSpec(name="job", side="user", kind="categorical", column="user_job", num_embeddings=5),
    FeatureSpec(
        name="hour", side="context", kind="categorical", column="context_hour", num_embeddings=9
    ),
)
# items 2 to 7 are trained, 8 and 9 are cold
SPEC = ModelSpec(
    features=FEATURES,
    num_users=6,
    num_trained_items=8,
    num_items=10,
    history_length=4,
    has_labels=False,
)
NO_DROPOUT = {"dropout": 0.0, "input_dropout": 0.0, "id_dropout": 0.0}
SMALL = {"embedding_dim": 8, "feature_dim": 4, "autoencoder_hidden": (6,), "deep_hidden": (6,)}


class InMemoryTables:
    """Whole tables as leaves of autograd, read by plain indexing; row 0 is padding, so zero."""

    def __init__(self, model: UnifiedModel, scale: float = 0.5, seed: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weights: dict[str, Tensor] = {}
        for spec in model.table_specs():
            shape = (spec.num_embeddings, spec.embedding_dim)
            weight = torch.randn(shape, generator=generator) * scale
            weight[0] = 0.0
            self.weights[spec.name] = weight.requires_grad_()

    def __call__(self, requests: Mapping[str, Request]) -> dict[str, Tensor]:
        return {
            name: pool(
                self.weights[request.table][request.ids.values], request.ids, request.pooling
            )
            for name, request in requests.items()
        }


def make_model(spec: ModelSpec = SPEC, **settings: object) -> UnifiedModel:
    torch.manual_seed(0)
    return UnifiedModel(spec, ModelConfig.model_validate({**SMALL, **NO_DROPOUT, **settings}))


def make_batch(
    users: list[int],
    items: list[int],
    histories: list[list[int]],
    labels: list[float] | None = None,
) -> Batch:
    size = len(users)
    history = Jagged.from_lists(histories)
    generator = np.random.default_rng(size)
    return Batch(
        user_index=torch.tensor(users, dtype=torch.int64),
        item_index=torch.tensor(items, dtype=torch.int64),
        time=torch.zeros(size, dtype=torch.int64),
        labels=torch.tensor([1.0] * size if labels is None else labels).reshape(size, 1),
        weights=torch.arange(1, size + 1, dtype=torch.float32),
        num_events=history.lengths,
        history=history,
        history_times=Jagged(torch.zeros_like(history.values), history.offsets),
        ids={
            "user_job": Jagged.singles(torch.tensor([2 + user % 3 for user in users]).long()),
            "context_hour": Jagged.singles(torch.tensor([2 + item % 7 for item in items]).long()),
        },
        dense=torch.from_numpy(generator.normal(size=(size, 1))).float(),
    )


# of each item of the catalogue
RECENT = [0, 5, 1, 0, 2, 9, 0, 4]


def make_catalogue(spec: ModelSpec = SPEC) -> ItemBatch:
    index = torch.arange(2, spec.num_items)
    return ItemBatch(
        item_index=index,
        count=(spec.num_items - index) * (index < spec.num_trained_items),
        recent=torch.tensor(RECENT[: len(index)]),
        ids={"item_tags": Jagged.from_lists([[2 + i % 5, 2 + i % 3] for i in index.tolist()])},
        dense=torch.linspace(-1, 1, len(index)).unsqueeze(1),
    )


BATCH = make_batch([2, 3, 5, 1], [2, 4, 7, 3], [[3, 4], [], [2, 3, 5, 6], [9]])


def encode(model: UnifiedModel, tables: InMemoryTables, batch: Batch, items: ItemBatch):
    rows = tables({**model.user_requests(batch), **model.item_requests(items)})
    return model.encode_users(batch, rows), model.encode_items(items, rows)


def test_spec_is_the_manifest_and_survives_json(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, num_users=7, num_items=5, num_cold_items=2)
    spec = ModelSpec.from_manifest(manifest)
    assert (spec.num_users, spec.num_trained_items, spec.num_items) == (9, 7, 9)
    assert (spec.num_dense("user", "context"), spec.num_dense("item")) == (1, 3)
    assert [feature.column for feature in spec.features_of("item")] == ["item_tags", "item_image"]
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"towers": ("cf",)}, {"user": (6, 8), "item": (8, 8)}),
        ({"towers": ("autoencoder",)}, {"item": (8, 8), "item_history": (8, 8)}),
        (
            {"towers": ("cf", "autoencoder"), "share_item_embedding": False},
            {"user": (6, 8), "item": (8, 8), "item_history": (8, 8), "item_output": (8, 8)},
        ),
        (
            {"towers": ("deep",)},
            {"user_job": (5, 4), "context_hour": (9, 4), "item_tags": (7, 4)},
        ),
        ({"towers": ("content",)}, {"item_history": (8, 8), "item_tags": (7, 4)}),
        (
            {},
            {
                "user": (6, 8),
                "item": (8, 8),
                "item_history": (8, 8),
                "user_job": (5, 4),
                "context_hour": (9, 4),
                "item_tags": (7, 4),
            },
        ),
    ],
)
def test_only_the_tables_of_towers_that_are_on(settings: dict, expected: dict) -> None:
    model = make_model(**settings)
    specs = {spec.name: (spec.num_embeddings, spec.embedding_dim) for spec in model.table_specs()}
    assert specs == {"item_bias": (8, 4), **expected}
    requests = {**model.user_requests(BATCH), **model.item_requests(make_catalogue())}
    assert {request.table for request in requests.values()} == set(specs)
    assert all(name.startswith("user.") for name in model.user_requests(BATCH))
    assert all(name.startswith("item.") for name in model.item_requests(make_catalogue()))


def test_score_of_one_tower_is_the_inner_product_of_rows_plus_bias() -> None:
    model = make_model(towers=("cf",), temperature=0.5)
    tables = InMemoryTables(model)
    users, items = encode(model, tables, BATCH, make_catalogue())
    weights = {name: weight.detach().numpy() for name, weight in tables.weights.items()}
    # cold items 8 and 9 stand on the unknown row
    index = [2, 3, 4, 5, 6, 7, 1, 1]
    expected = weights["user"][[2, 3, 5, 1]] @ weights["item"][index].T / 0.5
    expected += weights["item_bias"][index].sum(axis=1)
    assert users.shape == (4, 11)
    np.testing.assert_allclose((users @ items.T).detach().numpy(), expected, rtol=1e-5)


def test_a_user_is_the_row_and_the_mean_of_the_items_had_before() -> None:
    model = make_model(towers=("cf",), cf_history="mean")
    assert {spec.name for spec in model.table_specs()} == {"user", "item", "item_bias"}
    tables = InMemoryTables(model)
    users, _ = encode(model, tables, BATCH, make_catalogue())
    user, item = (tables.weights[name].detach().numpy() for name in ("user", "item"))
    bags = [[3, 4], [], [2, 3, 5, 6], [1]]  # item 9 is cold, so unknown
    means = [item[bag].mean(axis=0) if bag else np.zeros(8) for bag in bags]
    expected = user[[2, 3, 5, 1]] + np.stack(means)
    np.testing.assert_allclose(users[:, :-3].detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_history_is_summed_over_the_root_of_its_length() -> None:
    model = make_model(towers=("autoencoder",), autoencoder_hidden=())
    with torch.no_grad():
        for parameter in model.towers.parameters():
            parameter.zero_()  # leaves the bag itself
    tables = InMemoryTables(model)
    users, _ = encode(model, tables, BATCH, make_catalogue())
    table = tables.weights["item_history"].detach().numpy()
    bags = [[3, 4], [], [2, 3, 5, 6], [1]]  # item 9 is cold, so unknown
    expected = [table[bag].sum(axis=0) / max(1, len(bag)) ** 0.5 for bag in bags]
    np.testing.assert_allclose(users[:, :-3].detach().numpy(), expected, rtol=1e-5)


def test_content_tells_items_apart_by_their_features_alone() -> None:
    model = make_model(towers=("content",))
    tables = InMemoryTables(model)
    catalogue = make_catalogue()
    # items 2 and 9, one warm and one that train never saw, are the same in all but their ids
    catalogue.ids["item_tags"] = Jagged.from_lists([[3]] + [[2]] * 6 + [[3]])
    catalogue.dense[0] = catalogue.dense[7]
    _, items = encode(model, tables, BATCH, catalogue)
    vectors = items[:, :-3]
    torch.testing.assert_close(vectors[0], vectors[7])
    assert (vectors[0] - vectors[1:7]).abs().amax(dim=1).min() > 1e-4


def test_content_reads_the_history_as_the_autoencoder_does() -> None:
    content = make_model(towers=("content",))
    other = make_model(towers=("autoencoder",))
    other.towers["autoencoder"].network = content.towers["content"].network
    tables, others = InMemoryTables(content), InMemoryTables(other)
    others.weights["item_history"] = tables.weights["item_history"]
    users, _ = encode(content, tables, BATCH, make_catalogue())
    expected, _ = encode(other, others, BATCH, make_catalogue())
    torch.testing.assert_close(users, expected)


def test_content_without_features_is_refused() -> None:
    spec = SPEC.model_copy(update={"features": SPEC.features_of("user")})
    with pytest.raises(
        ConfigError, match=r"content reads features of items. Received: a dataset w"
    ):
        UnifiedModel(spec, ModelConfig(towers=("content",)))


@pytest.mark.parametrize("normalize", [False, True])
def test_shares_of_the_towers_and_the_bias_make_up_the_score(normalize: bool) -> None:
    model = make_model(normalize=normalize, temperature=0.5)
    with torch.no_grad():
        model.user_gate.output.weight.normal_()
        model.item_gate.output.weight.normal_()
        model.global_bias.fill_(0.3)
    tables = InMemoryTables(model)
    users, items = encode(model, tables, BATCH, make_catalogue())
    shares = model.tower_scores(users.unsqueeze(1), items.unsqueeze(0))
    assert shares.shape == (4, 8, 4)
    torch.testing.assert_close(shares.sum(dim=-1), users @ items.T)
    bias = tables.weights["item_bias"][[2, 3, 4, 5, 6, 7, 1, 1]].sum(dim=1) + 0.3
    torch.testing.assert_close(shares[2, :, 3], bias)
    vectors = users[:, :-3].unflatten(1, (3, 8))
    own = vectors[0, 2] @ items[1, :-3].unflatten(0, (3, 8))[2]
    torch.testing.assert_close(shares[0, 1, model.tower_names.index("deep")], own)
    if normalize:
        # the lengths are the gate's weights, which sum to T, over the temperature
        torch.testing.assert_close(vectors.norm(dim=-1).sum(dim=1), torch.full((4,), 3 / 0.5))


def test_gate_starts_even_and_tells_known_from_unknown() -> None:
    model = make_model()
    tables = InMemoryTables(model)
    users, _ = encode(model, tables, BATCH, make_catalogue())
    torch.testing.assert_close(users[:, :8], tables.weights["user"][[2, 3, 5, 1]])
    with torch.no_grad():
        model.user_gate.output.weight.normal_()
    stranger = replace(BATCH, user_index=torch.ones_like(BATCH.user_index))
    known = model.user_gate(user_signals(BATCH, None))
    unknown = model.user_gate(user_signals(stranger, None))
    assert (known[:3] - unknown[:3]).abs().min() > 1e-4
    torch.testing.assert_close(known[3], unknown[3])


def test_gate_sees_how_long_ago_the_last_event_was() -> None:
    """Within the history too, where what comes next is the event after; not where there is none."""
    model = make_model()
    with torch.no_grad():
        model.user_gate.output.weight.normal_(generator=torch.Generator().manual_seed(1))
        model.user_gate.recency.fill_(2.0)
    times = Jagged.from_lists([[10, 40], [], [0, 100, 100, 500], [7]])
    batch = replace(BATCH, history_times=times, time=torch.tensor([50, 60, 500, 7 + 3600]))
    assert recency(batch, None).tolist() == pytest.approx(
        [math.log(11) / 20, 0.0, 0.0, math.log(3601) / 20], rel=1e-6
    )
    places = Positions(torch.tensor([2, 2, 2, 0, 1]), torch.tensor([0, 1, 3, 1, 0]))
    assert elapsed(batch, places).tolist() == [-1, 100, 400, 30, -1]
    tables = InMemoryTables(model)
    rows = tables(model.user_requests(batch))
    soon, late = (
        model.encode_users(replace(batch, time=batch.time + wait), rows) for wait in (0, 10**6)
    )
    assert (soon[[0, 2, 3]] != late[[0, 2, 3]]).any(dim=1).all()
    torch.testing.assert_close(soon[1], late[1])


def test_a_cold_item_differs_by_its_features_only() -> None:
    model = make_model()
    _, items = encode(model, InMemoryTables(model), BATCH, make_catalogue())
    first, second = items[6], items[7]
    torch.testing.assert_close(first[:16], second[:16])  # cf and autoencoder: the unknown row
    assert (first[16:24] - second[16:24]).abs().max() > 1e-4  # deep
    assert first[24] == second[24]


def test_a_missing_feature_is_zero_and_known_to_the_gate() -> None:
    model = make_model(towers=("deep",))
    zeros, none = torch.zeros(4, dtype=torch.int64), Jagged.from_lists([[], [], [], []])
    padded = replace(BATCH, ids={**BATCH.ids, "context_hour": Jagged.singles(zeros)})
    empty = replace(BATCH, ids={**BATCH.ids, "context_hour": none})
    tables = InMemoryTables(model)
    users, _ = encode(model, tables, padded, make_catalogue())
    torch.testing.assert_close(users, encode(model, tables, empty, make_catalogue())[0])
    assert (users - encode(model, tables, BATCH, make_catalogue())[0]).abs().max() > 1e-4
    bare = replace(
        padded, ids={name: Jagged.singles(zeros) for name in BATCH.ids}, dense=torch.zeros(4, 1)
    )
    assert user_signals(padded, None)[:, 3].tolist() == [1, 1, 1, 1]
    assert user_signals(bare, None)[:, 3].tolist() == [0, 0, 0, 0]


def test_input_dropout_asks_for_fewer_rows_and_keeps_the_mean() -> None:
    model = make_model(towers=("autoencoder",), autoencoder_hidden=(), input_dropout=0.25)
    with torch.no_grad():
        for parameter in model.towers.parameters():
            parameter.zero_()
    tables = InMemoryTables(model)
    batch = make_batch([2] * 500, [2] * 500, [[3, 4, 5, 6]] * 500)
    asked = len(model.user_requests(batch)["user.history"].ids.values)
    trained, _ = encode(model, tables, batch, make_catalogue())
    assert 0.70 * 2000 < asked < 0.80 * 2000
    model.eval()
    assert len(model.user_requests(batch)["user.history"].ids.values) == 2000
    evaluated, _ = encode(model, tables, batch, make_catalogue())
    torch.testing.assert_close(trained.mean(dim=0), evaluated[0], atol=0.05, rtol=0)


def test_a_withheld_id_reads_the_unknown_row_and_looks_unknown() -> None:
    model = make_model(id_dropout=1 - 1e-7)
    tables = InMemoryTables(model)
    users, items = encode(model, tables, BATCH, make_catalogue())
    torch.testing.assert_close(users[:, :8], tables.weights["user"][1].expand(4, 8))
    bias = tables.weights["item_bias"][1].sum()
    torch.testing.assert_close(items[:, -3], bias.expand(8))
    (users.sum() + items.sum()).backward()
    for name in ("user", "item", "item_bias"):
        gradient = tables.weights[name].grad
        assert gradient[1].abs().sum() > 0
        assert gradient[2:].abs().sum() == 0
    signals = item_signals(make_catalogue(), torch.ones(8, dtype=torch.bool), 8)
    assert signals[:, :2].abs().sum() == 0
    assert user_signals(BATCH, torch.ones(4, dtype=torch.bool))[:, 2].abs().sum() == 0
    assert user_signals(BATCH, None)[:, 2].tolist() == [1, 1, 1, 0]
    model.eval()
    users, _ = encode(model, tables, BATCH, make_catalogue())
    torch.testing.assert_close(users[:, :8], tables.weights["user"][[2, 3, 5, 1]])


@pytest.mark.parametrize(
    ("settings", "user", "item", "item_bias"),
    [
        ({"l2": 1.0}, 1.0, 1.0, 1.0),
        ({"l2": 0.5, "table_l2": {"user": 0.25, "item_bias": 0.0}}, 0.25, 0.5, 0.0),
        ({"l2": 0.0, "table_l2": {"item": 2.0}}, 0.0, 2.0, 0.0),
    ],
)
def test_squared_norms_are_of_the_examples_own_rows(
    settings: dict[str, object], user: float, item: float, item_bias: float
) -> None:
    model = make_model(towers=("cf",), id_dropout=0.5)
    tables = InMemoryTables(model)
    items = make_catalogue()
    requests = {**model.user_requests(BATCH), **model.item_requests(items)}
    norms, rows = SquaredNorms(model, LossConfig.model_validate(settings)), tables(requests)
    norms.note(requests)
    squares = {name: weight.detach().square().sum(dim=1) for name, weight in tables.weights.items()}
    of_items = item * squares["item"] + item_bias * squares["item_bias"]
    found = norms.of_items(items, rows)
    torch.testing.assert_close(found, of_items[[2, 3, 4, 5, 6, 7, 1, 1]])
    found = norms.of_users(BATCH, rows)
    torch.testing.assert_close(found, (user * squares["user"])[[2, 3, 5, 1]])


def test_l2_names_tables_of_any_towers_and_no_others() -> None:
    model = make_model(towers=("cf",))
    SquaredNorms(model, LossConfig(table_l2={"item_sequence": 1.0, "user_job": 0.0}))
    with pytest.raises(ConfigError, match=r"'usr' in loss\.table_l2\. Did you mean 'user'\?"):
        SquaredNorms(model, LossConfig(table_l2={"usr": 1.0}))


def test_sides_without_features_have_a_constant() -> None:
    model = make_model(SPEC.model_copy(update={"features": ()}), towers=("deep",))
    batch = replace(BATCH, ids={}, dense=torch.zeros(4, 0))
    items = replace(make_catalogue(), ids={}, dense=torch.zeros(8, 0))
    users, encoded = encode(model, InMemoryTables(model), batch, items)
    assert users.shape == (4, 11)
    assert encoded[:, :-3].std(dim=0).max() < 1e-6
    users.square().sum().backward()
    gradient = model.towers["deep"].user_features.constant.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_fresh_scores_are_near_zero() -> None:
    model = make_model(embedding_dim=64)
    tables = InMemoryTables(model, scale=0.03)
    users, items = encode(model, tables, BATCH, make_catalogue())
    scores = (users @ items.T).detach()
    assert 0 < scores.abs().max() < 0.5


def test_cross_layers_by_hand() -> None:
    crosses = CrossNetwork(2, 2)
    weights = [torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[0.0, 1.0], [3.0, 0.5]])]
    biases = [torch.tensor([0.5, 0.0]), torch.tensor([0.0, -1.0])]
    for layer, weight, bias in zip(crosses.layers, weights, biases, strict=True):
        layer.load_state_dict({"weight": weight, "bias": bias})
    # x0 (2, 3): W x0 + b = (8.5, -3), x1 = (19, -6); W x1 + b = (-6, 53), x2 = (7, 153)
    assert crosses(torch.tensor([[2.0, 3.0]])).tolist() == [[7.0, 153.0]]
    assert CrossNetwork(2, 0)(torch.tensor([[2.0, 3.0]])).tolist() == [[2.0, 3.0]]


def test_a_cross_layer_of_rank_one_by_hand() -> None:
    crosses = CrossNetwork(2, 1, rank=1)
    down, up = crosses.layers[0]
    down.load_state_dict({"weight": torch.tensor([[1.0, 2.0]])})
    up.load_state_dict({"weight": torch.tensor([[1.0], [-1.0]]), "bias": torch.tensor([0.5, 0.0])})
    # x0 (2, 3): 8 of the first map, W x0 + b = (8.5, -8), x1 = (19, -21)
    assert crosses(torch.tensor([[2.0, 3.0]])).tolist() == [[19.0, -21.0]]


def test_crosses_of_the_deep_tower_come_before_its_perceptron() -> None:
    model = make_model(towers=("deep",), deep_crosses=2)
    tables = InMemoryTables(model)
    tower = model.towers["deep"]
    batch, items = BATCH, make_catalogue()
    rows = tables({**model.user_requests(batch), **model.item_requests(items)})
    for side, encode, of in (
        ("user", tower.encode_users, batch),
        ("item", tower.encode_items, items),
    ):
        inputs = getattr(tower, f"{side}_features")(rows, of.dense)
        crossed = inputs
        for layer in getattr(tower, f"{side}_crosses").layers:
            crossed = inputs * (crossed @ layer.weight.T + layer.bias) + crossed
        expected = getattr(tower, f"{side}_network")(crossed)
        arguments = (None, None) if side == "user" else (None,)
        torch.testing.assert_close(encode(of, rows, *arguments), expected)
        plain = getattr(tower, f"{side}_network")(inputs)
        assert float((plain - expected).detach().abs().max()) > 1e-4
