"""Which users the sample shows: a pure function of their ids, the seed and who was scored.

Ids are read in batches and the users with the smallest hashes are kept, so that neither users nor
scores need to fit into memory.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.dataset as pads

from distrec import columns as c
from distrec.report.data import scan

COLD_SHARE = 0.2
# more candidates than users, for not everyone may have been scored
CANDIDATES_PER_USER = 4


class _Smallest:
    """The `size` different users with the smallest hashes seen so far."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._heap: list[tuple[int, str]] = []

    def offer(self, hashes: npt.NDArray[np.uint64], ids: npt.NDArray[np.object_]) -> None:
        """Look at more users; hashes and ids are of one length."""
        if len(self._heap) == self._size:
            # nearly all of a large table ends here, without a step of Python each
            near = hashes <= np.uint64(-self._heap[0][0] if self._heap else 0)
            hashes, ids = hashes[near], ids[near]
        for value, user in zip(hashes.tolist(), ids.tolist(), strict=True):
            entry = (-value, user)
            if entry in self._heap:
                continue
            if len(self._heap) < self._size:
                heapq.heappush(self._heap, entry)
            elif self._size and entry > self._heap[0]:
                heapq.heapreplace(self._heap, entry)

    def ordered(self) -> list[str]:
        """The users by ascending hash."""
        return [user for _, user in sorted(self._heap, key=lambda entry: (-entry[0], entry[1]))]


def hash_ids(ids: Iterable[str], seed: int) -> npt.NDArray[np.uint64]:
    """A hash of each id and the seed, uint64, the same on every machine."""
    values = pd.Series(list(ids), dtype=object).to_numpy()
    key = f"{seed % 10**16:016d}"
    return np.asarray(pd.util.hash_array(values, hash_key=key, categorize=False), dtype=np.uint64)


def open_scores(directory: Path, manifest: Mapping[str, Any] | None) -> pads.Dataset | None:
    """The scored Parquet, or None when no job has finished one."""
    if manifest is None:
        return None
    named = manifest.get("files")
    paths = []
    for entry in named if isinstance(named, list) else []:
        name = entry.get("path") if isinstance(entry, Mapping) else entry
        if isinstance(name, str) and ".." not in name.split("/") and not name.startswith("/"):
            paths.append(directory / name)
    if not paths:
        paths = [
            path
            for path in sorted(directory.rglob("*.parquet"))
            if not any(part[0] in "._" for part in path.relative_to(directory).parts)
        ]
    return pads.dataset([str(path) for path in paths], format="parquet") if paths else None


def choose_users(
    users: pads.Dataset | None, scores: pads.Dataset | None, amount: int, cold: int, seed: int
) -> list[str]:
    """Ids of the users to show, a fifth of them cold where there are so many.

    Args:
        users: The dataset's users, if there are any.
        scores: The scored output, if there is one: whoever was scored goes first.
        amount: Number of users.
        cold: A user with at most this many events, or never seen by train, is cold.
        seed: Of the choice.
    """
    size = amount * CANDIDATES_PER_USER
    cold_ids, warm_ids = _known_users(users, size, cold, seed) if users is not None else ([], [])
    other_ids: list[str] = []
    if scores is not None:
        # perhaps people whom the dataset does not know
        other_ids = _scored_users(scores, size, seed)
        scored = _scored(scores, [*cold_ids, *warm_ids])
        cold_ids = [user for user in cold_ids if user in scored]
        warm_ids = [user for user in warm_ids if user in scored]
    num_cold = min(len(cold_ids), max(round(amount * COLD_SHARE), amount - len(warm_ids)))
    chosen = [*cold_ids[:num_cold], *warm_ids[: amount - num_cold]]
    chosen += [user for user in other_ids if user not in chosen][: amount - len(chosen)]
    return [user for _, user in sorted(zip(hash_ids(chosen, seed).tolist(), chosen, strict=True))]


def _known_users(
    users: pads.Dataset, size: int, cold: int, seed: int
) -> tuple[list[str], list[str]]:
    """Cold and other users of the dataset, `size` each, by ascending hash."""
    colds, warms = _Smallest(size), _Smallest(size)
    for batch in scan(users, [c.USER_ID, c.USER_INDEX, c.NUM_EVENTS]):
        frame = batch.to_pandas()
        ids, hashes = frame[c.USER_ID].to_numpy(), hash_ids(frame[c.USER_ID], seed)
        is_cold = (frame[c.NUM_EVENTS] <= cold) | (frame[c.USER_INDEX] <= c.UNKNOWN_INDEX)
        for chosen, part in ((colds, is_cold.to_numpy()), (warms, ~is_cold.to_numpy())):
            chosen.offer(hashes[part], ids[part])
    return colds.ordered(), warms.ordered()


def _scored_users(scores: pads.Dataset, size: int, seed: int) -> list[str]:
    """Scored users by ascending hash."""
    found = _Smallest(size)
    for batch in scan(scores, [c.USER_ID], pads.field(c.RANK) <= 1):
        ids = batch.column(0).to_numpy(zero_copy_only=False)
        found.offer(hash_ids(ids, seed), ids)
    return found.ordered()


def _scored(scores: pads.Dataset, ids: Sequence[str]) -> set[str]:
    found: set[str] = set()
    if not ids:
        return found
    for batch in scan(scores, [c.USER_ID], (pads.field(c.RANK) <= 1) & among(c.USER_ID, ids)):
        found.update(batch.column(0).to_pylist())
    return found


def among(column: str, values: Iterable[Any]) -> pads.Expression:
    """Rows whose column holds one of the values, of which there is at least one."""
    return pads.field(column).isin(sorted(values))
