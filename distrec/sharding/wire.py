"""How rows, their gradients and their numbers travel between ranks: fewer bytes, a known error.

fp32 is exact. bf16 keeps the range of fp32 and 8 bits: each number is within a factor of
1 +- 2^-8. fp16 keeps 11 bits in a small range. Rows are in it: they are within a factor of
1 +- 2^-11, below 2^-14 within 2^-25, and infinite beyond 65504, which stops a run. Gradients are
not in it, for a loss is divided by the global batch: each row of them travels with its own power of
two, so that none overflows or vanishes, and each number is within 2^-11 of the largest of its row.
Who receives sums in fp32.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Precision = Literal["fp32", "fp16", "bf16"]

_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# 2^120 is a float32, and so is what it brings to [0.5, 1)
_LEAST_EXPONENT = -120


def pack_rows(rows: Tensor, precision: Precision) -> Tensor:
    """Rows as they are sent: float32 (n, D) to (n, D) of the precision's type."""
    return rows.to(_TYPES[precision])


def unpack_rows(packed: Tensor) -> Tensor:
    """Rows as float32 again."""
    return packed.to(torch.float32)


def pack_gradients(gradients: Tensor, precision: Precision) -> Tensor:
    """Gradients as they are sent: float32 (n, D) to (n, D), or for fp16 to int16 (n, 1 + D).

    A number that is not finite stays so.
    """
    if precision != "fp16":
        return gradients.to(_TYPES[precision])
    largest = gradients.abs().amax(dim=1, keepdim=True).nan_to_num(nan=1.0, posinf=1.0)
    exponents = torch.frexp(largest).exponent.clamp(min=_LEAST_EXPONENT)
    halves = torch.ldexp(gradients, -exponents).to(torch.float16)
    return torch.cat([exponents.to(torch.int16), halves.view(torch.int16)], dim=1)


def unpack_gradients(packed: Tensor, precision: Precision) -> Tensor:
    """Gradients as float32 (n, D) again."""
    if precision != "fp16":
        return packed.to(torch.float32)
    halves = packed[:, 1:].contiguous().view(torch.float16)
    return torch.ldexp(halves.to(torch.float32), packed[:, :1].to(torch.int32))


def pack_numbered(row_ids: Tensor, gradients: Tensor, precision: Precision) -> Tensor:
    """Row numbers (int32 or int64, (n,)) and their packed gradients in one tensor of integers."""
    packed = pack_gradients(gradients, precision)
    word = torch.int32 if packed.element_size() == 4 else torch.int16
    return torch.cat([row_ids.unsqueeze(1).view(word), packed.view(word)], dim=1)


def unpack_numbered(
    received: Tensor, id_dtype: torch.dtype, precision: Precision
) -> tuple[Tensor, Tensor]:
    """Row numbers, int64 (n,), and gradients, float32 (n, D)."""
    words = id_dtype.itemsize // received.element_size()
    # copies: contiguous() keeps strides that a view of wider words refuses, in a single row or none
    first, packed = (part.clone(memory_format=torch.contiguous_format)
                     for part in (received[:, :words], received[:, words:]))  # fmt: skip
    row_ids = first.view(id_dtype).squeeze(1)
    if precision != "fp16":
        packed = packed.view(_TYPES[precision])
    return row_ids.to(torch.int64), unpack_gradients(packed, precision)


def gradient_bytes(embedding_dim: int, precision: Precision) -> int:
    """Bytes that the gradient of one row takes on its way."""
    size = _TYPES[precision].itemsize
    return embedding_dim * size + (size if precision == "fp16" else 0)
