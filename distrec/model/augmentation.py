"""Histories changed at random in training, so that a model does not hold on to a single one.

What is withheld from a tower (model.input_dropout, model.sequence_mask) is that tower's own; here
the history itself becomes another, alike for all towers. Draws are torch's, which the trainer seeds
in each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from distrec.batch import Batch, Jagged
from distrec.model.features import keep_values


def augment(
    batch: Batch,
    kinds: Sequence[str],
    rate: float,
    share: float = 1.0,
    similar: Tensor | None = None,
) -> tuple[Batch, Batch]:
    """Change some histories, each in one way.

    Of windows, whose events are targets too, a target is predicted from what then comes before it;
    an item that another one stands in for is a target itself.

    Args:
        batch: B examples.
        kinds: Of model.augment; each is as likely as the others. None changes nothing.
        rate: Share of a history's events that is cut off, put in another order or substituted.
        share: Of examples whose history is changed.
        similar: int64, (num_items, n): for substitute, what may stand in for each item.

    Returns:
        The same examples twice, as they are predicted and as they are seen; the two differ by what
        is substituted. `num_events` is as it was.

    Source: Xie et al. 2022, arXiv:2010.14395 (CL4SRec), section 3.2; substitute: Liu et al. 2021,
    arXiv:2108.06479 (CoSeRec), section 3.2.
    """
    if not kinds or share == 0.0:
        return batch, batch
    types = batch.history_types
    device = batch.history.offsets.device
    # -1 for what stays as it is
    kind = torch.randint(len(kinds), (batch.batch_size,), device=device)
    kind = kind.masked_fill(torch.rand(batch.batch_size, device=device) >= share, -1)
    if "reorder" in kinds:
        order = reorder(batch.history, rate, kind == kinds.index("reorder"))
        batch = replace(
            batch,
            history=_ordered(batch.history, order),
            history_types=None if types is None else _ordered(types, order),
        )
        types = batch.history_types
    if "crop" in kinds:
        kept = crop(batch.history, rate, kind == kinds.index("crop"))
        batch = replace(
            batch,
            history=keep_values(batch.history, kept),
            history_times=keep_values(batch.history_times, kept),
            history_types=None if types is None else keep_values(types, kept),
        )
    if "substitute" not in kinds:
        return batch, batch
    assert similar is not None
    history = substitute(batch.history, rate, kind == kinds.index("substitute"), similar)
    return batch, replace(batch, history=history)


def _stretches(lengths: Tensor, sizes: Tensor) -> Tensor:
    """Where a stretch of so many events begins, anywhere in its history: int64, (B,)."""
    draws = torch.rand(len(lengths), dtype=torch.float64, device=lengths.device)
    return (draws * (lengths - sizes + 1)).to(torch.int64)


def _inside(history: Jagged, starts: Tensor, sizes: Tensor) -> Tensor:
    """Which events lie in a stretch of their history: bool, (nnz,)."""
    bag = history.bag_of_value
    place = torch.arange(len(bag), device=bag.device) - history.offsets[bag] - starts[bag]
    return (place >= 0) & (place < sizes[bag])


def crop(history: Jagged, rate: float, chosen: Tensor) -> Tensor:
    """Which events stay when all but one stretch is cut off: bool, (nnz,).

    Args:
        history: B histories.
        rate: Share that is cut off; at least one event stays.
        chosen: bool, (B,): of the others all stay.
    """
    lengths = history.lengths
    sizes = torch.where(chosen, lengths - (lengths * rate).to(torch.int64), lengths)
    return _inside(history, _stretches(lengths, sizes), sizes)


def _ordered(values: Jagged, order: Tensor) -> Jagged:
    """What goes along with events, in their new order."""
    return Jagged(values.values[order], values.offsets)


def reorder(history: Jagged, rate: float, chosen: Tensor) -> Tensor:
    """Put the items of one stretch in another order; places and times stay.

    Each item takes along of which kind its event was.

    Args:
        history: B histories.
        rate: Share of the events in the stretch.
        chosen: bool, (B,): the others stay as they are.

    Returns:
        int64, (nnz,): the place from which each event's item comes.
    """
    lengths = history.lengths
    sizes = torch.where(chosen, (lengths * rate).to(torch.int64), 0)
    starts = _stretches(lengths, sizes)
    inside = _inside(history, starts, sizes)
    bag = history.bag_of_value
    order = torch.arange(len(bag), dtype=torch.float64, device=bag.device)
    draws = torch.rand(len(bag), dtype=torch.float64, device=bag.device)
    # anywhere in the stretch, which takes up [first, first + size)
    first = history.offsets[bag] + starts[bag]
    order = torch.where(inside, first + draws * sizes[bag], order)
    return torch.argsort(order, stable=True)


def substitute(history: Jagged, rate: float, chosen: Tensor, similar: Tensor) -> Jagged:
    """Put one of the items that are like it in the place of each of some items.

    Args:
        history: B histories.
        rate: Chance of each event.
        chosen: bool, (B,): the others stay as they are.
        similar: int64, (num_items, n).
    """
    items = history.values
    drawn = torch.rand(len(items), device=items.device) < rate
    which = torch.randint(similar.shape[1], (len(items),), device=items.device)
    drawn &= chosen[history.bag_of_value]
    return Jagged(torch.where(drawn, similar[items, which], items), history.offsets)
