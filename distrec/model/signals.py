"""What the gates see: how much is known of a user and of an item."""

from __future__ import annotations

import torch
from torch import Tensor

from distrec.batch import Batch, ItemBatch
from distrec.columns import FIRST_INDEX
from distrec.model.features import has_features
from distrec.model.positions import Positions, at, elapsed

NUM_USER_SIGNALS = 4
NUM_ITEM_SIGNALS = 3
# brings log1p of counts to the size of the flags beside them
_LOG_COUNT_SCALE = 0.2
# and log1p of seconds: a year is 17
_LOG_SECONDS_SCALE = 0.05


def user_signals(
    batch: Batch, withheld: Tensor | None, positions: Positions | None = None
) -> Tensor:
    """Of users: float32, (B, NUM_USER_SIGNALS), or (P, NUM_USER_SIGNALS) with positions."""
    known = batch.user_index >= FIRST_INDEX
    if withheld is not None:
        known = known & ~withheld
    lengths = batch.history.lengths if positions is None else positions.length
    unseen = at(positions, batch.history.lengths) - lengths
    counts = torch.stack([at(positions, batch.num_events) - unseen, lengths], dim=1)
    return torch.cat(
        [
            torch.log1p(counts.to(torch.float32)) * _LOG_COUNT_SCALE,
            at(positions, known.to(torch.float32).unsqueeze(1)),
            at(positions, has_features(batch.ids, batch.dense)),
        ],
        dim=1,
    )


def item_signals(items: ItemBatch, withheld: Tensor | None, num_trained_items: int) -> Tensor:
    """Of items: float32, (M, NUM_ITEM_SIGNALS). A withheld item looks like a cold one."""
    known = (items.item_index >= FIRST_INDEX) & (items.item_index < num_trained_items)
    if withheld is not None:
        known = known & ~withheld
    flag = known.to(torch.float32)
    # a free index has a count below zero
    counts = items.count.clamp(min=0).to(torch.float32)
    log_count = torch.log1p(counts) * _LOG_COUNT_SCALE * flag
    return torch.cat(
        [torch.stack([log_count, flag], dim=1), has_features(items.ids, items.dense)], dim=1
    )


def recency(batch: Batch, positions: Positions | None) -> Tensor:
    """How long before what comes next the last event was: float32, (B,) or (P,); 0 without one."""
    seconds = elapsed(batch, positions or Positions.ends(batch)).clamp(min=0)
    return torch.log1p(seconds.to(torch.float32)) * _LOG_SECONDS_SCALE
