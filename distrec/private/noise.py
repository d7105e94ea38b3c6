"""Random numbers that nobody can draw again: of a key that lives in the memory of the ranks only.

Whoever knows which users were in a step, or the noise, can take the noise off. So neither follows
from the seed of the run, nor from a generator whose later numbers follow from earlier ones. Each
number is a pure function of the key and of what it is for: all ranks draw the same, without an
exchange and in any order.

Not covered: floating-point numbers have gaps, which noise made of them shows (Mironov 2012, "On
significance of the least significant bits for differential privacy").
"""

from __future__ import annotations

import hashlib
import secrets
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from distrec.sharding.collectives import Collectives

KEY_BYTES = 32


def draw_key(collectives: Collectives) -> bytes:
    """A new key from the operating system, the same on every rank. Collective.

    It is written nowhere: a run that goes on draws a new one, so that no noise serves twice.
    """
    own = secrets.token_bytes(KEY_BYTES).hex() if collectives.world.is_first else ""
    return bytes.fromhex(str(collectives.broadcast_object(own, "train.private.key")))


class SecretNoise:
    """Numbers by purpose.

    Args:
        key: KEY_BYTES bytes.
    """

    def __init__(self, key: bytes) -> None:
        assert len(key) == KEY_BYTES, len(key)
        self._key = key

    def uniform(self, count: int, *purpose: str | int) -> NDArray[np.float64]:
        """Numbers in (0, 1): float64, (count,).

        Args:
            count: How many.
            purpose: What they are for; other purposes have other numbers.

        Source: SHAKE-256 of key and purpose, FIPS 202; 52 of each 64 bits.
        """
        stream = hashlib.shake_256(self._key + repr(purpose).encode()).digest(8 * count)
        bits = np.frombuffer(stream, dtype="<u8") >> np.uint64(12)
        return (bits.astype(np.float64) + 0.5) * 2.0**-52

    def gaussian(self, rows: int, width: int, *purpose: str | int) -> Tensor:
        """Standard normal numbers: float32, (rows, width).

        Source: Box and Muller 1958, "A note on the generation of random normal deviates".
        """
        half = -(-rows * width // 2)
        first, second = self.uniform(2 * half, *purpose).reshape(2, half)
        radius, angle = np.sqrt(-2.0 * np.log(first)), 2.0 * np.pi * second
        both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return torch.from_numpy(both[: rows * width].astype(np.float32).reshape(rows, width))
