"""Section of differentially private training, and what cannot be trained with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from distrec.config.section import Section

if TYPE_CHECKING:
    from distrec.config.whole import Config


class PrivacyConfig(Section):
    """Differentially private training of the tower cf, whole users protected; what that covers is
    in docs/privacy.md. Steps draw users: train.global_batch_size has no effect, and an epoch is
    1 / sample_rate steps. Needs the extra privacy. Off without this section."""

    target_epsilon: float = Field(gt=0, le=10_000)
    """Epsilon of the whole run at delta. Training is never longer than it allows."""
    delta: float = Field(default=1e-5, gt=0, lt=1)
    """Below one over the number of users."""
    noise_multiplier: float | None = Field(default=None, gt=0, le=1e6)
    """Standard deviation of the noise over clip_norm. Not given: the smallest with which all steps
    of train.max_epochs and train.max_steps spend at most target_epsilon. Given: steps end where
    target_epsilon would be passed."""
    clip_norm: float = Field(default=0.1, gt=0, le=1e6)
    """Largest L2 norm of what one user adds to the gradient of the item vectors in a step. A user
    counts with the mean of the losses of their events."""
    sample_rate: float = Field(default=0.1, gt=0, le=1)
    """Chance of a user to be in a step, drawn for each user and step by itself (Poisson
    sampling)."""


def check_private(config: Config) -> None:
    """Refuse whatever would learn from users' data without noise.

    Raises:
        ValueError: With every such setting, what was received and the fix.
    """
    faults = list(_faults(config))
    if faults:
        raise ValueError(
            "[privacy] trains only what it can protect, which docs/privacy.md explains: "
            + "; ".join(faults)
        )


def _faults(config: Config) -> Iterator[str]:
    model, train, sharding = config.model, config.train, config.sharding
    if model.towers != ("cf",):
        yield (
            f'model.towers = {list(model.towers)}: set ["cf"], as the user side of the others has '
            "weights that all users share"
        )
    if model.cf_history != "none":
        yield f'model.cf_history = "{model.cf_history}": set "none", as users then read item rows'
    if model.id_dropout > 0:
        yield (
            f"model.id_dropout = {model.id_dropout}: set 0, as withheld ids train one row for all "
            "users"
        )
    if config.loss.kind not in ("auto", "softmax"):
        yield f'loss.kind = "{config.loss.kind}": set "softmax", of which users\' norms are known'
    if model.multi_task != "none":
        yield f'model.multi_task = "{model.multi_task}": set "none", as all users share its weights'
    if config.loss.exclude_seen:
        yield "loss.exclude_seen = true: set false, as every item counts alike"
    if config.loss.adversarial > 0:
        yield f"loss.adversarial = {config.loss.adversarial}: set 0, as its norms are not known"
    if model.augment:
        yield f"model.augment = {list(model.augment)}: remove it, as no history is read"
    if model.recent_weight != 0:
        yield (
            f"model.recent_weight = {model.recent_weight}: set 0, as lists would tell what others "
            "had lately"
        )
    if config.prepare.train_rows != "events":
        yield f'prepare.train_rows = "{config.prepare.train_rows}": set "events"'
    if train.early_stopping_patience:
        yield (
            f"train.early_stopping_patience = {train.early_stopping_patience}: set 0, as "
            "validation has no noise; the newest checkpoint counts as the best"
        )
    if train.on_bad_loss == "skip":
        yield 'train.on_bad_loss = "skip": set "stop", as a step that is left out tells of its data'
    if train.warm_start is not None:
        yield f"train.warm_start = {train.warm_start!r}: remove it, epsilon would not cover it"
    if sharding.compress:
        yield f"sharding.compress of {sorted(sharding.compress)}: remove it, as rows are shared"
    if sharding.exchange_precision != "fp32":
        yield (
            f'sharding.exchange_precision = "{sharding.exchange_precision}": set "fp32", as '
            "rounding comes after clipping"
        )
