"""A user's history seen twice: the two are to be alike, and unlike those of other users."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from distrec.batch import Batch
from distrec.model.augmentation import augment
from distrec.model.losses import softmax_loss_sum
from distrec.model.unified import UnifiedModel
from distrec.sharding.lookup import Request

_PREFIXES = ("first_view.", "second_view.")


def draw_views(
    batch: Batch, model: UnifiedModel, similar: Tensor | None = None
) -> tuple[Batch, Batch]:
    """Two changed copies of `longest_histories`; without model.augment they differ by dropout.

    `similar` is as `augment` has it.
    """
    chosen, config = longest_histories(batch), model.config
    first, second = (
        augment(chosen, config.augment, config.augment_rate, similar=similar)[1] for _ in _PREFIXES
    )
    return first, second


def longest_histories(batch: Batch) -> Batch:
    """Of each user of the batch that has a history the longest.

    One a user, so that nobody is held to be unlike himself.
    """
    history = batch.history.lengths
    # by user and within each by length, the longest last
    order = torch.argsort(history, stable=True)
    order = order[torch.argsort(batch.user_index[order], stable=True)]
    users = batch.user_index[order]
    is_last = torch.ones_like(users, dtype=torch.bool)
    is_last[:-1] = users[1:] != users[:-1]
    return batch.select(order[is_last & (history[order] > 0)])


def view_requests(model: UnifiedModel, views: tuple[Batch, Batch]) -> dict[str, Request]:
    """The rows that `contrastive_loss` needs."""
    return {
        prefix + name: request
        for prefix, view in zip(_PREFIXES, views, strict=True)
        for tower in model.history_towers()
        for name, request in tower.user_requests(view, False, None).items()
    }


def contrastive_loss(
    model: UnifiedModel,
    views: tuple[Batch, Batch],
    rows: Mapping[str, Tensor],
    temperature: float,
) -> Tensor:
    """Mean cross-entropy of each view's other one among those of all users of this rank.

    The similarity is the mean over the towers that read histories of the cosine of their vectors.

    Args:
        model: That encodes.
        views: From `draw_views`, of U users.
        rows: What the look-up gave for `view_requests`, perhaps among others.
        temperature: By which similarities are divided.

    Returns:
        float32 scalar; 0 without users.

    Source: Xie et al. 2022, arXiv:2010.14395 (CL4SRec), with negatives from the other view alone.
    """
    first, second = (
        _encode(model, view, rows, prefix) for prefix, view in zip(_PREFIXES, views, strict=True)
    )
    own = torch.arange(len(first), device=first.device)
    weights = torch.full((len(first),), 0.5 / max(len(first), 1), device=first.device)
    return softmax_loss_sum(first / temperature, second, own, weights) + softmax_loss_sum(
        second / temperature, first, own, weights
    )


def _encode(model: UnifiedModel, view: Batch, rows: Mapping[str, Tensor], prefix: str) -> Tensor:
    """Vectors of length one: float32, (U, towers * D)."""
    towers = model.history_towers()
    own = {
        name.removeprefix(prefix): found for name, found in rows.items() if name.startswith(prefix)
    }
    vectors = [
        functional.normalize(tower.encode_users(view, own, None, None), dim=1) for tower in towers
    ]
    return torch.cat(vectors, dim=1) / len(towers) ** 0.5
