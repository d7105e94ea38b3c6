"""Steps of drawn users, each with all of their events, in place of batches of examples.

A rank keeps its users' events of train in memory, 12 bytes each; users are dealt over ranks. Who is
in a step is drawn for everybody by every rank, 8 bytes a user.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from distrec import columns as c
from distrec import pulse
from distrec.batch import Batch, Jagged
from distrec.dataset import DatasetManifest
from distrec.errors import DataError
from distrec.private.noise import SecretNoise
from distrec.reader.files import open_split
from distrec.reader.layout import Layout
from distrec.world import World

_LAYOUT = Layout((c.USER_INDEX, c.ITEM_INDEX), (c.LABEL, c.WEIGHT), (), ())


@dataclass(frozen=True, kw_only=True)
class UserBatch(Batch):
    """U users, each once; of the fields of `Batch` only user_index means something.

    Args:
        items: What they had, item indexes that train has seen.
        shares: float32, (nnz,): the weight of each, over the sum of the user's weights.
    """

    items: Jagged
    shares: Tensor

    def to(self, device: torch.device) -> UserBatch:
        """The same users on `device`."""
        if self.user_index.device == device:
            return self
        plain = super().to(device)
        shared = {field.name: getattr(plain, field.name) for field in fields(Batch)}
        return UserBatch(**shared, items=self.items.to(device), shares=self.shares.to(device))


class UserReader:
    """Draws the users of each step, and hands each rank its own.

    It stands where `ExampleReader` does. Users without an id have no part: nobody knows which of
    them are one. Nor have events without weight, negatives and items that train does not know.

    Args:
        directory: Of the dataset.
        manifest: Of the dataset.
        world: This rank.
        sample_rate: Chance of a user to be in a step.
        noise: Draws them.

    Attributes:
        lanes: Of a checkpoint; there are none here.
        num_users: Of the dataset, those of all ranks.

    Raises:
        DataError: The files are not those of the manifest, or nobody has an event to learn from.
    """

    def __init__(
        self,
        directory: Path,
        manifest: DatasetManifest,
        world: World,
        sample_rate: float,
        noise: SecretNoise,
    ) -> None:
        self.lanes = 1
        self.num_users = manifest.num_users - c.FIRST_INDEX
        self._world = world
        self._sample_rate = sample_rate
        self._noise = noise
        self._num_drawn = 0
        self._has_events = np.zeros(manifest.num_users, dtype=np.bool_)
        self._items, self._shares, self._starts = self._read(directory, manifest)

    def _read(
        self, directory: Path, manifest: DatasetManifest
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
        """Items and shares of this rank's users, one user after the other, and where each starts:
        int64, (num_users + 1,)."""
        rank, world_size = self._world.rank, self._world.world_size
        found = []
        for file in open_split(directory, manifest, c.TRAIN, _LAYOUT):
            with pq.ParquetFile(file.path) as source:
                for row_group in range(len(file.row_groups)):
                    pulse.beat()
                    table = source.read_row_group(row_group, columns=list(_LAYOUT.columns))
                    users, items, labels, weights = (
                        table[name].to_numpy() for name in _LAYOUT.columns
                    )
                    _check_ids(users, manifest.num_users, str(file.path))
                    counts = (users >= c.FIRST_INDEX) & (weights * labels > 0)
                    counts &= (items >= c.FIRST_INDEX) & (items < manifest.num_trained_items)
                    self._has_events[users[counts]] = True
                    counts &= users % world_size == rank
                    found.append((users[counts], items[counts], weights[counts]))
        if not self._has_events.any():
            raise DataError(
                "private training needs users with an id and positive events in train. Received: "
                f"none ({directory}). Loosen the filters of [prepare]."
            )
        users, items, weights = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.argsort(users, kind="stable")
        lengths = np.bincount(users, minlength=manifest.num_users)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        sums = np.bincount(users, weights, minlength=manifest.num_users)
        shares = (weights / sums[users]).astype(np.float32)
        return items[order].astype(np.int64), shares[order], starts

    @property
    def steps_per_epoch(self) -> int:
        """After which a user has been in one step, on average."""
        return math.ceil(1.0 / self._sample_rate)

    @property
    def expected_users(self) -> float:
        """In a step, over all ranks: a constant, unlike their number, which tells of the data."""
        return self._sample_rate * self.num_users

    def rows_planned(self, start_step: int = 0) -> int:
        """Users of all ranks in the steps that `batches` has given last."""
        return self._num_drawn

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[UserBatch]:
        """This rank's users of each step from `start_step` to the end of an epoch."""
        self._num_drawn = 0
        for step_in_epoch in range(start_step, self.steps_per_epoch):
            step = epoch * self.steps_per_epoch + step_in_epoch
            numbers = self._noise.uniform(len(self._has_events), "users", step)
            drawn = np.flatnonzero((numbers < self._sample_rate) & self._has_events)
            self._num_drawn += len(drawn)
            yield self._batch(drawn[drawn % self._world.world_size == self._world.rank])

    def _batch(self, users: NDArray[np.int64]) -> UserBatch:
        starts, stops = self._starts[users], self._starts[users + 1]
        parts = [np.arange(start, stop) for start, stop in zip(starts, stops, strict=True)]
        places = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
        lengths = torch.from_numpy(stops - starts)
        count = len(users)
        zeros, nothing = torch.zeros(count, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        none = Jagged.from_lengths(nothing, zeros)
        return UserBatch(
            user_index=torch.from_numpy(users),
            item_index=zeros,
            time=zeros,
            labels=torch.ones(count, 1),
            weights=torch.ones(count),
            num_events=zeros,
            history=none,
            history_times=none,
            ids={},
            dense=torch.zeros(count, 0),
            items=Jagged.from_lengths(torch.from_numpy(self._items[places]), lengths),
            shares=torch.from_numpy(self._shares[places]),
        )


def _check_ids(users: NDArray[np.int64], num_users: int, origin: str) -> None:
    if len(users) and not 0 <= users.min() <= users.max() < num_users:
        raise DataError(
            f"user indexes lie in [0, {num_users}). Received: {users.min()} to {users.max()} "
            f"({origin}). Run prepare again."
        )
