"""The loss of private training: each user's part clipped, and noise on every item vector.

What is protected is the gradient of the matrix of item vectors. All that follows from it, rows,
optimizer state and later steps, is computed from numbers that already hold the noise. A user's own
row is trained without: it is part of that user's data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distrec.batch import Batch, ItemBatch
from distrec.columns import FIRST_INDEX
from distrec.config import LossConfig, PrivacyConfig
from distrec.errors import ConfigError
from distrec.model import Objective, UnifiedModel
from distrec.model.losses import SCORES_PER_BLOCK
from distrec.model.towers import USER_TABLE
from distrec.model.unified import USER_BIAS_TABLE
from distrec.private.noise import SecretNoise
from distrec.private.users import UserBatch
from distrec.sharding.collectives import Collectives
from distrec.sharding.lookup import Request

# rounding must not bring a clipped norm above its bound
_MARGIN = 1e-6


class PrivateObjective(Objective):
    """Softmax over the whole catalogue for batches of users, differentiable once.

    The sum of the clipped gradients has noise from the first rank alone; sums over ranks then hold
    it once. L2 of items counts all of them alike, for which were used would tell of the data.

    Args:
        model: With the one tower cf.
        catalogue: As for `Objective`.
        config: Section [loss].
        privacy: Section [privacy].
        noise_multiplier: Of this run.
        expected_users: In a step, over all ranks.
        noise: Draws the noise.
        seed: As for `Objective`.
        collectives: Of the job.

    Raises:
        ConfigError: The loss is another one with this dataset, or the model has weights that would
            see users' data without noise.
    """

    def __init__(
        self,
        model: UnifiedModel,
        catalogue: ItemBatch,
        config: LossConfig,
        privacy: PrivacyConfig,
        noise_multiplier: float,
        expected_users: float,
        noise: SecretNoise,
        seed: int,
        collectives: Collectives,
    ) -> None:
        super().__init__(model, catalogue, config, seed, "events", collectives)
        if self.kind != "softmax":
            raise ConfigError(
                f"private training takes the loss softmax. Received: {self.kind} with this "
                'dataset. Set loss.kind = "softmax".'
            )
        dense = [name for name, one in model.named_parameters() if one.requires_grad]
        if dense:
            raise ConfigError(_refusal(f"dense weights {', '.join(dense)}"))
        self._clip_norm = privacy.clip_norm
        self._noise_scale = noise_multiplier * privacy.clip_norm
        self._expected_users = expected_users
        self._noise = noise
        self._is_first = collectives.world.is_first

    def requests(self, batch: Batch, global_step: int) -> dict[str, Request]:
        """The rows of the batch's users and of every item."""
        of_users = self.model.user_requests(batch)
        shared = {request.table for request in of_users.values()} - {USER_TABLE, USER_BIAS_TABLE}
        if shared:
            raise ConfigError(_refusal(f"users' vectors made of {', '.join(sorted(shared))}"))
        requests = {**of_users, **self.model.item_requests(self._items)}
        self._norms.note(requests)
        return requests

    def weight_sum(self, batch: Batch) -> Tensor:
        """This rank's part of the expected number of users, by which the trainer divides: (1,)."""
        return torch.tensor([self._expected_users if self._is_first else 0.0], device=self.device)

    def loss_sum(
        self, batch: Batch, rows: Mapping[str, Tensor], global_step: int
    ) -> tuple[Tensor, dict[str, float]]:
        """As `Objective.loss_sum`; the loss is a user's mean over their events."""
        assert isinstance(batch, UserBatch)
        users = self.model.encode_users(batch, rows)
        items = self.model.encode_items(self._items, rows)
        noise = None
        if self._is_first:
            noise = self._noise.gaussian(*items.shape, "noise", global_step).to(items.device)
            noise *= self._noise_scale
        places = batch.items.values - FIRST_INDEX
        if self._places is not None:
            places = self._places[places].clamp(min=0)
        loss: Tensor = _ClippedSoftmaxSum.apply(
            users, items, batch.items.bag_of_value, places, batch.shares,
            self.config.label_smoothing, self._clip_norm, noise,
        )  # fmt: skip
        l2 = self._norms.of_users(batch, rows).sum()
        if self._is_first:
            l2 = l2 + self._expected_users * self._norms.of_items(self._items, rows).mean()
        return (loss + l2).reshape(1), {"loss": float(loss.detach()), "l2": float(l2.detach())}


def _refusal(received: str) -> str:
    return (
        "private training has rows of users and of items, and users meet in item vectors alone. "
        f'Received: {received}. Set model.towers = ["cf"] without additions.'
    )


class _ClippedSoftmaxSum(torch.autograd.Function):
    """Sum of the users' losses. Gradients of users are exact; that of items is the sum of the
    users' parts, each clipped, and the noise."""

    @staticmethod
    def forward(
        ctx: Any,
        users: Tensor,
        items: Tensor,
        user_of_event: Tensor,
        item_of_event: Tensor,
        shares: Tensor,
        smoothing: float,
        clip_norm: float,
        noise: Tensor | None,
    ) -> Tensor:
        """float32 scalar.

        Args:
            ctx: Of autograd.
            users: float32, (U, W).
            items: float32, (M, W).
            user_of_event: int64, (nnz,), ascending, in [0, U).
            item_of_event: int64, (nnz,), in [0, M).
            shares: float32, (nnz,); those of a user sum to one.
            smoothing: Share of the target spread evenly over the items.
            clip_norm: Of each user's part.
            noise: float32, (M, W), or None.
        """
        total = users.new_zeros(())
        user_gradients = torch.empty_like(users)
        item_gradients = torch.zeros_like(items)
        norms = torch.linalg.vector_norm(users, dim=1, keepdim=True)
        rows = max(1, SCORES_PER_BLOCK // len(items))
        for start in range(0, len(users), rows):
            block = users[start : start + rows]
            events = slice(*torch.searchsorted(user_of_event, torch.tensor(
                [start, start + len(block)], device=users.device)).tolist())  # fmt: skip
            targets = users.new_full((len(block), len(items)), smoothing / len(items))
            targets.index_put_(
                (user_of_event[events] - start, item_of_event[events]),
                (1.0 - smoothing) * shares[events],
                accumulate=True,
            )
            log_shares = torch.log_softmax(block @ items.T, dim=1)
            total -= (targets * log_shares).sum()
            # of the scores: (u, M)
            slopes = log_shares.exp_().sub_(targets)
            torch.mm(slopes, items, out=user_gradients[start : start + rows])
            # a user's part is an outer product, whose norm is the product of norms
            own = torch.linalg.vector_norm(slopes, dim=1, keepdim=True)
            own *= norms[start : start + rows]
            slopes *= (clip_norm * (1.0 - _MARGIN) / own.clamp(min=1e-30)).clamp(max=1.0)
            item_gradients.addmm_(slopes.T, block)
        if noise is not None:
            item_gradients += noise
        ctx.gradients = user_gradients, item_gradients
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of users and items."""
        of_users, of_items = ctx.gradients
        return of_users * gradient, of_items * gradient, *[None] * 6
