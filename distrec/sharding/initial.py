"""First values of embedding rows: a pure function of seed, table, row and column.

So any rank makes any row, and the number of ranks does not change a model. A counter through a
mixing function needs no state and no order, unlike a random generator.

Source: SplitMix64; Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def initial_rows(
    table: str, row_ids: NDArray[np.int64], embedding_dim: int, seed: int, scale: float
) -> NDArray[np.float32]:
    """Uniform rows.

    Args:
        table: Name of the table.
        row_ids: (n,), in any order.
        embedding_dim: D.
        seed: Of the run.
        scale: Half the width of the interval.

    Returns:
        float32, (n, D), in [-scale, scale); row 0, the padding row, is zeros.
    """
    digest = hashlib.sha256(f"{seed} {table}".encode()).digest()
    key = np.uint64(int.from_bytes(digest[:8], "little"))
    rows = _mix((row_ids.astype(np.uint64) + np.uint64(1)) * _GOLDEN ^ key)
    columns = np.arange(1, embedding_dim + 1, dtype=np.uint64) * _GOLDEN
    bits = _mix(rows[:, None] + columns[None, :])
    # 24 bits are what a float32 holds exactly
    share = (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    values = (share * np.float32(2.0) - np.float32(1.0)) * np.float32(scale)
    values[row_ids == 0] = 0.0
    return values


def _mix(bits: NDArray[Any]) -> NDArray[Any]:
    """Every bit of the result depends on every bit of the argument."""
    bits = (bits ^ (bits >> np.uint64(30))) * _FIRST
    bits = (bits ^ (bits >> np.uint64(27))) * _SECOND
    return bits ^ (bits >> np.uint64(31))
