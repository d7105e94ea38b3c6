"""Which process this is among how many: passed in, never asked for deep inside."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """Place of one process in a training job.

    Args:
        rank: This process, in [0, world_size).
        world_size: Number of processes, N.
        local_rank: This process among those of its host, in [0, local_size); picks the GPU.
        local_size: Number of processes on this host.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size, self
        assert 0 <= self.local_rank < self.local_size, self

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that logs and commits."""
        return self.rank == 0
