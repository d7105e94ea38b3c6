"""What travels: row numbers whole, numbers within the stated error, whatever their size."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distrec.config import ShardingConfig
from distrec.sharding import wire
from distrec.sharding.plan import TableSpec, plan_tables
from distrec.sharding.routing import Layout
from distrec.world import World

NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)
ROWS = st.lists(st.lists(NUMBERS, min_size=4, max_size=4), max_size=5)
# significant bits, the first one included
BITS = {"fp32": 24, "fp16": 11, "bf16": 8}


def tensor_of(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


@given(ROWS, st.sampled_from(["fp32", "fp16", "bf16"]))
def test_gradients_of_any_size(rows: list[list[float]], precision: wire.Precision) -> None:
    packed = wire.pack_gradients(tensor_of(rows), precision)
    found = wire.unpack_gradients(packed, precision)
    assert packed.element_size() * packed.shape[1] == wire.gradient_bytes(4, precision)
    unit = 2.0 ** -BITS[precision]
    for sent, received in zip(rows, found.tolist(), strict=True):
        for number, other in zip(sent, received, strict=True):
            if precision == "fp32":
                assert other == number
            elif abs(number) > 3.3e38:
                # the largest floats of all may be rounded up to infinity
                assert abs(other) > 3.3e38
            elif precision == "fp16":
                # the smallest floats of all are lost
                largest = max(map(abs, sent))
                assert abs(other - number) <= unit * largest + 2.0**-143
            else:
                assert abs(other - number) <= unit * abs(number) + 2.0**-133


@given(ROWS)
def test_rows_of_fp16_overflow_to_infinity_and_only_then(rows: list[list[float]]) -> None:
    found = wire.unpack_rows(wire.pack_rows(tensor_of(rows), "fp16")).flatten().tolist()
    for number, other in zip([n for row in rows for n in row], found, strict=True):
        if abs(number) > 65520:
            assert other == math.copysign(math.inf, number)
        else:
            assert abs(other - number) <= max(2.0**-11 * abs(number), 2.0**-25)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_what_is_not_finite_stays_so(precision: wire.Precision) -> None:
    rows = tensor_of([[1.0, math.inf, 2.0, -math.inf], [1.0, math.nan, 2.0, 3.0]])
    found = wire.unpack_gradients(wire.pack_gradients(rows, precision), precision)
    assert torch.equal(found.isinf(), rows.isinf())
    assert torch.equal(found.isnan(), rows.isnan())


@given(ROWS, st.sampled_from(["fp32", "fp16", "bf16"]), st.sampled_from(["int32", "int64"]))
def test_numbered_gradients(rows: list[list[float]], precision: wire.Precision, ids: str) -> None:
    dtype = getattr(torch, ids)
    largest = torch.iinfo(dtype).max
    row_ids = torch.tensor([largest - 7 * k for k in range(len(rows))], dtype=dtype)
    gradients = tensor_of(rows)
    packed = wire.pack_numbered(row_ids, gradients, precision)
    num_bytes = wire.gradient_bytes(4, precision) + dtype.itemsize
    assert packed.numel() * packed.element_size() == len(rows) * num_bytes
    found_ids, found = wire.unpack_numbered(packed, dtype, precision)
    assert found_ids.tolist() == row_ids.tolist()
    alone = wire.unpack_gradients(wire.pack_gradients(gradients, precision), precision)
    assert torch.equal(found, alone)


def test_row_numbers_are_int32_where_all_fit() -> None:
    config = ShardingConfig(placement="row_wise")
    for rows, dtype in ((2**32 - 2, torch.int32), (2**32, torch.int64)):
        plans = plan_tables([TableSpec("huge", rows, 4), TableSpec("small", 9, 8)], config, 2)
        layouts = [Layout(plans, World(rank, 2, 0, 1)) for rank in range(2)]
        # what counts are the rows on one rank
        assert [layout.id_dtype for layout in layouts] == [dtype] * 2
