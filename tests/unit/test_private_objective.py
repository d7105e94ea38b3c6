"""Private gradients against autograd of one user at a time, and the noise against its own words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distrec.batch import Jagged
from distrec.columns import FIRST_INDEX, TRAIN
from distrec.config import LossConfig, PrivacyConfig
from distrec.dataset import read_manifest
from distrec.errors import ConfigError
from distrec.model import ModelSpec, Objective, UnifiedModel
from distrec.private import PrivateObjective, SecretNoise, UserReader
from distrec.private.users import UserBatch
from distrec.reader import ExampleReader, read_items
from distrec.sharding.collectives import OneProcess
from distrec.world import World
from tests.training import make_config

KEY = bytes(range(32))
WORLD = World()
EVERYBODY = PrivacyConfig(target_epsilon=1.0, sample_rate=1.0)


class Setting:
    """A model on the synthetic dataset, its rows by request as leaves of autograd."""

    def __init__(self, directory: Path, **model: object) -> None:
        self.config = make_config(directory, {"model": {"towers": ["cf"], **model}})
        self.manifest = read_manifest(self.config.dataset_directory)
        self.items = read_items(self.config.dataset_directory, self.manifest)
        self.model = UnifiedModel(ModelSpec.from_manifest(self.manifest), self.config.model)
        self.model.global_bias.requires_grad_(False)

    def objective(
        self,
        clip_norm: float,
        noise_multiplier: float,
        smoothing: float = 0.0,
        l2: float = 0.0,
        world: World = WORLD,
        table_l2: Mapping[str, float] | None = None,
    ) -> PrivateObjective:
        collectives = OneProcess(torch.device("cpu"))
        collectives.world = world
        return PrivateObjective(
            self.model, self.items,
            LossConfig(
                kind="softmax", label_smoothing=smoothing, l2=l2, table_l2=table_l2 or {}
            ),
            EVERYBODY.model_copy(update={"clip_norm": clip_norm}),
            noise_multiplier, 10.0, SecretNoise(KEY), 0, collectives,
        )  # fmt: skip

    def batch(self) -> UserBatch:
        reader = UserReader(
            self.config.dataset_directory, self.manifest, World(), 1.0, SecretNoise(KEY)
        )
        return next(iter(reader.batches(0)))

    def rows(self, objective: PrivateObjective, batch: UserBatch) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(5)
        return {
            name: torch.randn(len(request.ids.values), 8 if "bias" not in name else 4,
                              generator=generator).requires_grad_()
            for name, request in objective.requests(batch, 0).items()
        }  # fmt: skip


def users_alone(batch: UserBatch) -> list[UserBatch]:
    """Each user as a batch."""
    found = []
    for place in range(batch.batch_size):
        events = slice(int(batch.items.offsets[place]), int(batch.items.offsets[place + 1]))
        one = torch.tensor([place])
        fields = {
            name: getattr(batch, name)[one]
            for name in ("user_index", "item_index", "time", "labels", "weights", "num_events",
                         "dense")
        }  # fmt: skip
        none = Jagged.from_lists([[]])
        found.append(
            UserBatch(**fields, history=none, history_times=none, ids={},
                      items=batch.items.select(one), shares=batch.shares[events])
        )  # fmt: skip
    return found


def brute_force(
    setting: Setting, rows: dict[str, Tensor], batch: UserBatch, smoothing: float
) -> list[Tensor]:
    """Each user's gradient of the item vectors by autograd through torch's own cross-entropy."""
    objective = setting.objective(1.0, 0.0)
    users = setting.model.encode_users(batch, rows).detach()
    items = setting.model.encode_items(objective._items, rows).detach().requires_grad_()
    found = []
    for place, alone in enumerate(users_alone(batch)):
        targets = alone.items.values - FIRST_INDEX
        losses = torch.nn.functional.cross_entropy(
            (items @ users[place]).expand(len(targets), -1), targets, reduction="none",
            label_smoothing=smoothing,
        )  # fmt: skip
        gradient = torch.autograd.grad(losses.mean(), items)[0]
        # the last numbers, whether an item has no row and what is recent, are 0 for every user
        assert not gradient[:, -2:].any()
        found.append(gradient[:, :-2])
    return found


def item_gradient(rows: dict[str, Tensor]) -> Tensor:
    """Of the item vectors: the rows of items, and one of the four numbers of their bias."""
    item, bias = rows["item.item"].grad, rows["item.bias"].grad
    assert item is not None
    assert bias is not None
    assert torch.equal(bias[:, :1].expand(-1, 4), bias)
    return torch.cat([item, bias[:, :1]], dim=1)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_users_part_is_clipped_and_is_else_the_plain_gradient(
    tmp_path: Path, smoothing: float
) -> None:
    setting = Setting(tmp_path)
    batch = setting.batch()
    plain = brute_force(setting, setting.rows(setting.objective(1.0, 0.0), batch), batch, smoothing)
    norms = torch.stack([one.norm() for one in plain])
    clip_norm = float(norms.median())
    assert norms.min() < 0.9 * clip_norm < 1.1 * clip_norm < norms.max()
    for user, expected, norm in zip(users_alone(batch), plain, norms.tolist(), strict=True):
        objective = setting.objective(clip_norm, 0.0, smoothing)
        rows = setting.rows(objective, batch)
        own = {**rows, "user.id": rows["user.id"][user.user_index - FIRST_INDEX].detach()}
        objective.loss_sum(user, own, 0)[0].backward()
        received = item_gradient(rows)
        assert float(received.norm()) <= clip_norm
        torch.testing.assert_close(
            received, expected * min(1.0, clip_norm / norm), rtol=1e-4, atol=1e-6
        )


def test_parts_of_all_users_add_up_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distrec.private.objective.SCORES_PER_BLOCK", 40 * 7)
    setting = Setting(tmp_path)
    batch = setting.batch()
    objective = setting.objective(0.5, 0.0)
    rows = setting.rows(objective, batch)
    plain = brute_force(setting, rows, batch, 0.0)
    assert len(plain) == 60
    objective.loss_sum(batch, rows, 0)[0].backward()
    expected = sum(one * min(1.0, 0.5 / float(one.norm())) for one in plain)
    torch.testing.assert_close(item_gradient(rows), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_without_clipping_and_noise_it_is_the_ordinary_objective(
    tmp_path: Path, normalize: bool
) -> None:
    """A user of the synthetic dataset has 12 events of weight 1, so the mean is a twelfth."""
    setting = Setting(tmp_path, normalize=normalize, temperature=0.5)
    batch = setting.batch()
    private = setting.objective(1e6, 0.0)
    rows = setting.rows(private, batch)
    loss, parts = private.loss_sum(batch, rows, 0)
    loss.backward()
    received = {name: row.grad for name, row in rows.items()}

    config = setting.config
    examples = next(
        iter(ExampleReader(config.dataset_directory, setting.manifest, TRAIN, World(),
                           config.reader, 720, 0).batches(0))
    )  # fmt: skip
    assert examples.batch_size == 720
    again = setting.rows(private, batch)
    plain = Objective(setting.model, setting.items, LossConfig(kind="softmax", l2=0.0), 0)
    own = {**again, "user.id": again["user.id"][examples.user_index - FIRST_INDEX]}
    expected, _ = plain.loss_sum(examples, own, 0)
    (expected / 12).backward()
    torch.testing.assert_close(loss, expected / 12)
    assert parts["loss"] == pytest.approx(float(expected.detach()) / 12)
    for name, row in again.items():
        torch.testing.assert_close(received[name], row.grad, rtol=1e-3, atol=1e-5)


def test_every_item_has_noise_of_the_stated_size_whoever_is_in_the_step(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    batch = setting.batch()
    nobody = UserReader(
        setting.config.dataset_directory, setting.manifest, World(), 1e-12, SecretNoise(KEY)
    )
    empty = next(iter(nobody.batches(0)))
    assert empty.batch_size == 0
    with_noise, without = setting.objective(0.5, 3.0), setting.objective(0.5, 0.0)
    noises, plain = [], {}
    for users in (batch, empty):
        rows = setting.rows(without, users)
        without.loss_sum(users, rows, 0)[0].backward()
        plain[users.batch_size] = item_gradient(rows)
    assert float(plain[0].abs().max()) == 0.0
    for step in range(40):
        users = batch if step % 2 else empty
        rows = setting.rows(with_noise, users)
        with_noise.loss_sum(users, rows, step)[0].backward()
        noises.append(item_gradient(rows) - plain[users.batch_size])
    stacked = torch.stack(noises)  # (40, 40 items, 9)
    assert stacked.shape == (40, 40, 9)
    # 14,400 numbers: a standard error of 0.6 %
    assert float(stacked.std()) == pytest.approx(1.5, rel=0.03)
    assert abs(float(stacked.mean())) < 0.06
    # each row, also those that nobody's events are of, and each step by itself
    by_row, by_step = stacked.std(dim=(0, 2)), stacked.std(dim=(1, 2))
    assert 1.2 < float(by_row.min()) < float(by_row.max()) < 1.8
    assert 1.2 < float(by_step.min()) < float(by_step.max()) < 1.8
    assert abs(float((stacked[1:] * stacked[:-1]).mean())) < 0.1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"towers": ["cf", "deep"]}, r"Received: dense weights towers\.deep.*Set model\.towers"),
        ({"cf_history": "mean"}, r"Received: users' vectors made of item\. Set model\.towers"),
    ],
)
def test_a_model_in_which_users_meet_elsewhere_is_refused(
    tmp_path: Path, model: dict[str, object], message: str
) -> None:
    """Whatever a configuration, or a tower of the future, lets through."""
    setting = Setting(tmp_path, **model)
    with pytest.raises(ConfigError, match=message):
        setting.objective(1.0, 1.0).requests(setting.batch(), 0)


@pytest.mark.parametrize(("l2", "table_l2"), [(0.5, {}), (0.1, {"item": 0.5})])
def test_what_a_user_has_does_not_show_in_l2_of_items_or_in_the_divisor(
    tmp_path: Path, l2: float, table_l2: dict[str, float]
) -> None:
    setting = Setting(tmp_path)
    batch = setting.batch()
    objective = setting.objective(1e-9, 0.0, l2=l2, table_l2=table_l2)
    rows = setting.rows(objective, batch)
    objective.loss_sum(batch, rows, 0)[0].backward()
    assert rows["item.item"].grad is not None
    # 10 expected users, 40 items
    torch.testing.assert_close(
        rows["item.item"].grad, 2 * 0.5 * 10.0 / 40 * rows["item.item"].detach()
    )
    assert float(objective.weight_sum(batch)) == 10.0


def test_sums_over_ranks_hold_noise_l2_and_divisor_once(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    batch = setting.batch()
    gradients = []
    for noise, l2, rank, world_size in ((0.0, 0.0, 0, 1), (3.0, 0.1, 0, 2), (3.0, 0.1, 1, 2)):
        objective = setting.objective(0.5, noise, l2=l2, world=World(rank, world_size))
        rows = setting.rows(objective, batch)
        rows["user.id"].requires_grad_(False)
        objective.loss_sum(batch, rows, 0)[0].backward()
        gradients.append(rows["item.item"].grad)
        assert float(objective.weight_sum(batch)) == (10.0 if rank == 0 else 0.0)
    alone, first, second = gradients
    assert alone is not None
    assert first is not None
    assert second is not None
    assert torch.equal(second, alone)
    assert float((first - alone).abs().min()) > 0.0


def test_the_generator_draws_by_key_and_purpose() -> None:
    noise = SecretNoise(KEY)
    numbers = noise.uniform(20_000, "users", 1)
    assert 0.0 < numbers.min() < numbers.max() < 1.0
    assert numbers.mean() == pytest.approx(0.5, abs=0.01)
    assert (numbers == SecretNoise(KEY).uniform(20_000, "users", 1)).all()
    for other in (noise.uniform(20_000, "users", 2), noise.uniform(20_000, "noise", 1),
                  SecretNoise(KEY[::-1]).uniform(20_000, "users", 1)):  # fmt: skip
        assert abs(float(((numbers - 0.5) * (other - 0.5)).mean())) < 0.003
    normal = noise.gaussian(2001, 9, "noise", 1)
    assert normal.shape == (2001, 9)
    # kurtosis, and share beyond two standard deviations
    assert float((normal**4).mean()) == pytest.approx(3.0, abs=0.2)
    assert float((normal.abs() > 2).float().mean()) == pytest.approx(
        math.erfc(2 / math.sqrt(2)), abs=0.005
    )
