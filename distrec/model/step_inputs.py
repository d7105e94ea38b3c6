"""What the loss of one step is computed from, beside the rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distrec.batch import Batch, ItemBatch
from distrec.model.losses import LeftOut
from distrec.model.positions import Positions


@dataclass(frozen=True)
class Candidates:
    """The items that a step encodes.

    Args:
        items: M items.
        positives: int64, (P,): place of each target among them; 0 where it has none.
        negatives: int64, (S,): places of the sampled items; empty without sampling.
        times: float32, (S,): how often each was drawn.
        log_weights: float32, (S,): of the sampled items, see `sampled_softmax_loss`.
        left_out: Of each target what is no candidate: of the M items, or of the S sampled ones.
    """

    items: ItemBatch
    positives: Tensor
    negatives: Tensor
    times: Tensor
    log_weights: Tensor
    left_out: LeftOut | None = None


@dataclass(frozen=True)
class Targets:
    """What a batch teaches: P items, one an example, or one an event of windows.

    Args:
        positions: Where in the histories they are predicted from; None: one an example, at its end.
        places: int64, (P,): of their items in the catalogue; 0 where the loss does not know it.
        labels: float32, (P, T): of the label and of further tasks that are trained.
        weights: float32, (P,): 0 where there is nothing to learn.
    """

    positions: Positions | None
    places: Tensor
    labels: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Inputs:
    """A batch as the model sees it in a step.

    Args:
        batch: Its histories perhaps changed, see `augment`.
        targets: What it teaches.
        views: Its users' histories twice more, for loss.contrastive.
    """

    batch: Batch
    targets: Targets
    views: tuple[Batch, Batch] | None


def select_items(items: ItemBatch, positions: Tensor) -> ItemBatch:
    """The items at the given positions (int64, (M,)), in that order."""
    return ItemBatch(
        item_index=items.item_index[positions],
        count=items.count[positions],
        recent=items.recent[positions],
        ids={name: bags.select(positions) for name, bags in items.ids.items()},
        dense=items.dense[positions],
    )
