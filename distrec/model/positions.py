"""Places in histories from which a next event is predicted: many of one example."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from distrec.batch import Batch, Jagged


@dataclass(frozen=True)
class Positions:
    """P places; at each of them the first `length` events of an example's history are seen.

    Args:
        example: int64, (P,), in [0, B).
        length: int64, (P,), from 0 to the length of the example's history.
    """

    example: Tensor
    length: Tensor

    @classmethod
    def ends(cls, batch: Batch) -> Positions:
        """Of every example the end of its history."""
        example = torch.arange(batch.batch_size, device=batch.user_index.device)
        return cls(example, batch.history.lengths)

    def of_examples(self, vectors: Tensor) -> Tensor:
        """What belongs to examples, (B, ...), at each position: (P, ...)."""
        return vectors[self.example]


def at(positions: Positions | None, vectors: Tensor) -> Tensor:
    """Vectors of examples at each position; without positions they are asked for as they are."""
    return vectors if positions is None else positions.of_examples(vectors)


def padded_places(bags: Jagged, stride: int, shift: int = 0) -> Tensor:
    """Where the values of bags lie in a matrix of one row a bag: int64, (nnz,).

    Args:
        bags: B bags of at most stride - shift values.
        stride: Columns of the matrix.
        shift: Columns left free at the start of each row.

    Returns:
        row * stride + shift + place in the bag.
    """
    bag = bags.bag_of_value
    places = torch.arange(len(bags.values), device=bag.device) - bags.offsets[bag]
    return bag * stride + shift + places


def sums_before(bags: Jagged, rows: Tensor, positions: Positions) -> Tensor:
    """The sum of the rows that each position sees.

    Args:
        bags: B histories.
        rows: float32, (nnz, D), one an event.
        positions: P places in them.

    Returns:
        float32, (P, D).
    """
    size = bags.batch_size
    stride = 1 + (int(bags.lengths.max()) if size else 0)
    padded = rows.new_zeros(size * stride, rows.shape[1])
    padded = padded.index_copy(0, padded_places(bags, stride, shift=1), rows)
    sums = padded.view(size, stride, rows.shape[1]).cumsum(1).flatten(0, 1)
    return sums[positions.example * stride + positions.length]


def elapsed(batch: Batch, positions: Positions) -> Tensor:
    """Seconds from the last event that each position sees to what comes next: int64, (P,).

    What comes next is the event after it in the history, or at the end the example itself. -1 where
    no event is seen.
    """
    offsets = batch.history.offsets
    times = functional.pad(batch.history_times.values, (0, 1))
    following = offsets[positions.example] + positions.length
    at_end = positions.length == batch.history.lengths[positions.example]
    now = torch.where(at_end, batch.time[positions.example], times[following])
    waited = (now - times[(following - 1).clamp(min=0)]).clamp(min=0)
    return torch.where(positions.length > 0, waited, -1)


def window_targets(batch: Batch) -> tuple[Positions, Tensor]:
    """Every event of windows as something to predict from what came before it in its window.

    Events of one time do not see each other. An event with nothing before it in its window is left
    out, unless nothing of the user comes before the window: else it is the target of the window
    before, or one of the same time as that.

    Args:
        batch: B windows, as prepare.train_rows = "windows" makes them.

    Returns:
        P positions, and the item to predict at each: int64, (P,). The last B are those of the
        examples' own items.
    """
    history, times = batch.history, batch.history_times.values
    bag = history.bag_of_value
    index = torch.arange(len(times), device=times.device)
    starts = history.offsets[:-1][bag]
    is_new = index == starts
    is_new[1:] |= times[1:] != times[:-1]
    # the first event of each one's time
    seen = torch.where(is_new, index, 0).cummax(0).values - starts
    is_whole = batch.num_events == history.lengths
    kept = (seen > 0) | is_whole[bag]
    earlier = torch.bincount(bag[times < batch.time[bag]], minlength=batch.batch_size)
    own = torch.arange(batch.batch_size, device=times.device)
    positions = Positions(torch.cat([bag[kept], own]), torch.cat([seen[kept], earlier]))
    return positions, torch.cat([history.values[kept], batch.item_index])
