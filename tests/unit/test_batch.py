"""Jagged bags against plain Python lists."""

from __future__ import annotations

import doctest

import torch
from hypothesis import given
from hypothesis import strategies as st

from distrec import batch as batch_module
from distrec.batch import Batch, Jagged

BAGS = st.lists(st.lists(st.integers(-(2**62), 2**62), max_size=6), max_size=8)


def to_lists(bags: Jagged) -> list[list[int]]:
    values, offsets = bags.values.tolist(), bags.offsets.tolist()
    return [values[offsets[b] : offsets[b + 1]] for b in range(len(offsets) - 1)]


@given(BAGS)
def test_bags_survive_the_round_trip(lists: list[list[int]]) -> None:
    bags = Jagged.from_lists(lists)
    assert to_lists(bags) == lists
    assert bags.batch_size == len(lists)
    assert bags.lengths.tolist() == [len(one) for one in lists]
    assert bags.bag_of_value.tolist() == [b for b, one in enumerate(lists) for _ in one]
    for tensor in (bags.values, bags.offsets, bags.lengths, bags.bag_of_value):
        assert tensor.dtype == torch.int64
    assert torch.equal(Jagged.from_lengths(bags.values, bags.lengths).offsets, bags.offsets)


def test_singles_are_bags_of_one() -> None:
    assert to_lists(Jagged.singles(torch.tensor([7, 5]))) == [[7], [5]]
    assert Jagged.singles(torch.zeros(0, dtype=torch.int64)).offsets.tolist() == [0]


def test_a_batch_moves_with_all_its_parts() -> None:
    ids = torch.tensor([2, 3])
    bags = Jagged.from_lists([[4], []])
    batch = Batch(
        user_index=ids,
        item_index=ids + 1,
        time=ids + 2,
        labels=torch.ones(2, 1),
        weights=torch.ones(2),
        num_events=ids + 3,
        history=bags,
        history_times=bags,
        history_types=bags,
        ids={"user_group": Jagged.singles(ids)},
        dense=torch.zeros(2, 3),
    )
    chosen = batch.select(torch.tensor([1, 0, 0]))
    assert to_lists(chosen.history_types) == to_lists(chosen.history) == [[], [4], [4]]
    assert batch.to(torch.device("cpu")) is batch
    moved = batch.to(torch.device("meta"))
    assert moved.batch_size == 2
    for name, value in vars(moved).items():
        for part in value.values() if isinstance(value, dict) else [value]:
            tensors = [part.values, part.offsets] if isinstance(part, Jagged) else [part]
            assert {tensor.device.type for tensor in tensors} == {"meta"}, name
            assert [tensor.shape for tensor in tensors] != [], name


def test_the_examples_in_the_docstrings_run() -> None:
    result = doctest.testmod(batch_module)
    assert result.attempted > 0
    assert result.failed == 0
