"""Compressed tables: ids that share rows, and of which rows each is composed; pure.

Rows of a compressed table, in this order: one for each of the ids [0, num_own), which are padding,
unknown and the most frequent values; num_buckets rows that ids are hashed to, or one a remainder;
one a quotient. A vocabulary that grows needs more quotients only, so that no row ever changes its
meaning. Who asks for ids of such a table need not know: look-ups ask for the rows and compose them.

Source: several hash functions into one table as in Serrà and Karatzoglou 2017, "Getting deep
recommenders fit: Bloom embeddings for sparse binary input/output networks", arXiv:1706.03993;
quotients and remainders as in Shi et al. 2019, arXiv:1909.02107, section 3.1.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from distrec.columns import FIRST_INDEX

_MOST = 2**48
# SplitMix64, see sharding/initial.py, as signed numbers
_GOLDEN, _FIRST, _SECOND = (
    number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


class Composition(BaseModel):
    """Which rows make up the vector of an id, and how; stored in checkpoints.

    hash: the sum of num_hashes rows. quotient_remainder: with j = id - num_own, q the row of
    j // num_buckets and r that of j % num_buckets, q + r (sum) or q * (1 + r) (product). The 1
    makes a product start about as large as a sum; an id with a row of its own has r = 0.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    method: Literal["hash", "quotient_remainder"]
    operation: Literal["sum", "product"]
    num_ids: int = Field(ge=1, lt=_MOST)
    """Ids lie in [0, num_ids)."""
    num_own: int = Field(ge=FIRST_INDEX, lt=_MOST)
    """Ids below this have a row of their own."""
    num_buckets: int = Field(ge=1, lt=_MOST)
    """Rows that ids are hashed to, or the number that ids are divided by."""
    rows_per_id: int = Field(ge=1, le=8)
    """K: num_hashes, or a quotient and a remainder."""

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        rows = self.num_own + self.num_buckets
        if self.method == "quotient_remainder":
            rows += -(-max(self.num_ids - self.num_own, 0) // self.num_buckets)
        return rows

    def row_ids(self, table: str, ids: Tensor) -> Tensor:
        """The rows of each id: int64 (n,) in [0, num_ids) to (n, K); padding where it has fewer.

        A function of its arguments alone: the same on all ranks, in training and in scoring. Two
        tables hash in different ways, so that ids that share rows in one do not in the other.

        Example:
            >>> composition = Composition(
            ...     method="quotient_remainder", operation="sum", num_ids=20, num_own=4,
            ...     num_buckets=5, rows_per_id=2)
            >>> composition.row_ids("item", torch.tensor([0, 3, 4, 15])).tolist()
            [[0, 0], [3, 0], [9, 4], [11, 5]]
        """
        own = torch.zeros(len(ids), self.rows_per_id, dtype=torch.int64, device=ids.device)
        own[:, 0] = ids
        if self.method == "hash":
            shared = torch.stack(
                [_buckets(f"{table} {k}", ids, self.num_buckets) for k in range(self.rows_per_id)],
                dim=1,
            )
        else:
            rest = ids - self.num_own
            quotients = rest.div(self.num_buckets, rounding_mode="floor") + self.num_buckets
            shared = torch.stack([quotients, rest % self.num_buckets], dim=1)
        return torch.where((ids < self.num_own).unsqueeze(1), own, shared + self.num_own)

    def continues(self, older: Composition) -> bool:
        """Whether every id of an older table is composed of the same rows in this one."""
        return self.num_ids >= older.num_ids and self == older.model_copy(
            update={"num_ids": self.num_ids}
        )


def _buckets(salt: str, ids: Tensor, num_buckets: int) -> Tensor:
    """A number in [0, num_buckets) for each id, int64 (n,); one hash function a salt."""
    key = int.from_bytes(hashlib.sha256(salt.encode()).digest()[:8], "little", signed=True)
    bits = (ids + 1) * _GOLDEN ^ key
    bits = (bits ^ _shift(bits, 30)) * _FIRST
    bits = (bits ^ _shift(bits, 27)) * _SECOND
    # without the lowest bit it is not negative
    return _shift(bits ^ _shift(bits, 31), 1) % num_buckets


def _shift(bits: Tensor, by: int) -> Tensor:
    """To the right with zeros; torch itself fills up with the sign."""
    return (bits >> by) & (2 ** (64 - by) - 1)
