"""What the reader hands to the model: ragged ids, dense numbers, histories, labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Jagged:
    """One bag of ids an example.

    Args:
        values: int64 (or another dtype for what goes along, such as times), (nnz,).
        offsets: int64, (B + 1,); bag b is values[offsets[b]:offsets[b + 1]].

    Example:
        >>> bags = Jagged.from_lists([[7, 8], [], [9]])
        >>> bags.lengths.tolist(), bags.values.tolist()
        ([2, 0, 1], [7, 8, 9])
    """

    values: Tensor
    offsets: Tensor

    @classmethod
    def from_lists(cls, bags: list[list[int]]) -> Jagged:
        """Build from Python lists; for tests and small inputs."""
        lengths = torch.tensor([len(bag) for bag in bags], dtype=torch.int64)
        values = torch.tensor([value for bag in bags for value in bag], dtype=torch.int64)
        return cls.from_lengths(values, lengths)

    @classmethod
    def from_lengths(cls, values: Tensor, lengths: Tensor) -> Jagged:
        """Build from values (nnz,) and lengths (B,)."""
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64, device=values.device)
        torch.cumsum(lengths, 0, out=offsets[1:])
        return cls(values, offsets)

    @classmethod
    def singles(cls, values: Tensor) -> Jagged:
        """One value an example, (B,)."""
        return cls(values, torch.arange(len(values) + 1, device=values.device))

    @property
    def batch_size(self) -> int:
        """B, the number of bags."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """int64, (B,)."""
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def bag_of_value(self) -> Tensor:
        """The bag that each value lies in: int64, (nnz,)."""
        bags = torch.arange(self.batch_size, device=self.offsets.device)
        return torch.repeat_interleave(bags, self.lengths)

    def select(self, positions: Tensor) -> Jagged:
        """The bags at the given positions, int64 (M,), in that order."""
        lengths = self.lengths[positions]
        places = torch.arange(int(lengths.sum()), device=lengths.device)
        selected = Jagged.from_lengths(places, lengths)
        # place in its own bag + start of the bag it comes from
        shift = self.offsets[positions] - selected.offsets[:-1]
        return Jagged(
            self.values[places + torch.repeat_interleave(shift, lengths)], selected.offsets
        )

    def to(self, device: torch.device) -> Jagged:
        """The same bags on `device`."""
        return Jagged(
            self.values.to(device, non_blocking=True), self.offsets.to(device, non_blocking=True)
        )


@dataclass(frozen=True)
class Batch:
    """B examples, or B queries where there is no target (then item_index is all padding).

    Args:
        user_index: int64, (B,).
        item_index: int64, (B,); may be a catalogue item that train never saw.
        time: int64, (B,), Unix seconds; 0 where the data has no time.
        labels: float32, (B, num_tasks): of the first task and further ones; 1 for a positive, NaN
            where a further task's is not known.
        weights: float32, (B,).
        num_events: int64, (B,): positive events of the user before the example.
        history: item indexes, oldest first.
        history_times: int64 Unix seconds, aligned with history.
        ids: user and context features that are ids, by dataset column.
        dense: user and context numbers and vectors side by side, in the manifest's order: float32,
            (B, num_dense).
        history_types: int64 kinds of event, aligned with history: columns.FIRST_INDEX + the place
            among the manifest's event_types, or UNKNOWN_INDEX; None where the data has none.
    """

    user_index: Tensor
    item_index: Tensor
    time: Tensor
    labels: Tensor
    weights: Tensor
    num_events: Tensor
    history: Jagged
    history_times: Jagged
    ids: Mapping[str, Jagged]
    dense: Tensor
    history_types: Jagged | None = None

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.user_index)

    def select(self, positions: Tensor) -> Batch:
        """The examples at the given positions, int64 (M,), in that order."""
        types = self.history_types
        return Batch(
            user_index=self.user_index[positions],
            item_index=self.item_index[positions],
            time=self.time[positions],
            labels=self.labels[positions],
            weights=self.weights[positions],
            num_events=self.num_events[positions],
            history=self.history.select(positions),
            history_times=self.history_times.select(positions),
            ids={name: bags.select(positions) for name, bags in self.ids.items()},
            dense=self.dense[positions],
            history_types=None if types is None else types.select(positions),
        )

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        if self.user_index.device == device:
            return self
        types = self.history_types
        return Batch(
            user_index=self.user_index.to(device, non_blocking=True),
            item_index=self.item_index.to(device, non_blocking=True),
            time=self.time.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            weights=self.weights.to(device, non_blocking=True),
            num_events=self.num_events.to(device, non_blocking=True),
            history=self.history.to(device),
            history_times=self.history_times.to(device),
            ids={name: bags.to(device) for name, bags in self.ids.items()},
            dense=self.dense.to(device, non_blocking=True),
            history_types=None if types is None else types.to(device),
        )


@dataclass(frozen=True)
class QueryBatch:
    """B users to recommend to, with what may not be recommended and what was withheld.

    Args:
        batch: The user side; its item_index is padding.
        seen: Item indexes to mask, per user.
        targets: Withheld positive item indexes, per user; UNKNOWN_INDEX stands for an item that is
            in no catalogue and so cannot be found. Empty when scoring.
    """

    batch: Batch
    seen: Jagged
    targets: Jagged


@dataclass(frozen=True)
class ItemBatch:
    """M items of the catalogue with their features.

    Args:
        item_index: int64, (M,), in [FIRST_INDEX, num_items).
        count: int64, (M,): events in train; columns.FREE_COUNT where the index is free, and so
            stands for no item.
        recent: int64, (M,): positive events of the days before the split that is scored; 0 where
            events have no times.
        ids: item features that are ids, by dataset column.
        dense: item numbers and vectors side by side: float32, (M, num_dense).
    """

    item_index: Tensor
    count: Tensor
    recent: Tensor
    ids: Mapping[str, Jagged]
    dense: Tensor

    @property
    def is_free(self) -> Tensor:
        """Which indexes stand for no item: bool, (M,). Nobody is recommended one of them."""
        return self.count < 0
