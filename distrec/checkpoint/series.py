"""The checkpoints of a run, most of which may be deltas: only rows touched since the last full one.

Each delta stands on a full checkpoint alone, not on the delta before it: any two files of a run are
enough, and what may go is simple. Its price is that deltas grow until the next full one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from distrec.checkpoint.manifest import MANIFEST, BaseEntry, CheckpointManifest
from distrec.checkpoint.save import Identity, Parts, Position, save
from distrec.checkpoint.together import together
from distrec.files import sha256

if TYPE_CHECKING:
    from distrec.sharding.collectives import Collectives


class Series:
    """Saves the checkpoints of a run, each full or a delta.

    Args:
        directory: Of all checkpoints of the run.
        full_every: Of so many, one after the other, the first is full; 1: all are.
        parts: What is saved; its tables track touched rows unless all checkpoints are full.
        collectives: Of the job.
    """

    def __init__(
        self, directory: Path, full_every: int, parts: Parts, collectives: Collectives
    ) -> None:
        self._directory = directory
        self._full_every = full_every
        self._parts = parts
        self._collectives = collectives
        self._next: BaseEntry | None = None

    def resume(self, path: Path, manifest: CheckpointManifest) -> None:
        """Go on after the checkpoint that the tables were loaded from. Collective."""
        base = manifest.base
        if base is None:
            self._stand_on(path)
        else:
            self._next = base.model_copy(update={"number": base.number + 1})

    def save(self, identity: Identity, position: Position) -> Path:
        """Write the next checkpoint and commit it. Collective.

        Raises:
            CheckpointError: On every rank, when any rank could not write. Nothing is left behind.
        """
        base = self._next if self._may_be_delta() else None
        path = save(self._directory, identity, position, self._parts, self._collectives, base)
        if base is None:
            self._stand_on(path)
        else:
            self._next = base.model_copy(update={"number": base.number + 1})
        return path

    def _may_be_delta(self) -> bool:
        """Whether the next one is a delta: decided by the first rank, which looks for the base."""
        if self._full_every == 1:
            return False
        due = self._next is not None and self._next.number < self._full_every
        return bool(
            self._collectives.broadcast_object(due and self._base_is_there(), "checkpoint.delta")
        )

    def _base_is_there(self) -> bool:
        if not self._collectives.world.is_first or self._next is None:
            return False
        try:
            file = self._directory / self._next.checkpoint / MANIFEST
            return sha256(file) == self._next.manifest_sha256
        except OSError:
            return False

    def _stand_on(self, path: Path) -> None:
        """What follows has what is touched from now on."""
        if self._full_every == 1:
            return
        digest = together("checkpoint.base", lambda: sha256(path / MANIFEST), self._collectives)
        self._next = BaseEntry(checkpoint=path.name, manifest_sha256=digest, number=1)
        self._parts.tables.forget_touched_rows()
