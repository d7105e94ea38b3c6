"""Blocked top-K against brute force in NumPy: ties, seen items, block lists, any block size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distrec.batch import Jagged
from distrec.errors import DataError
from distrec.scoring.top_k import blocked_top_k

Case = tuple[np.ndarray, np.ndarray, int, int, list[list[int]], np.ndarray]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small whole numbers, so that scores are exact in float32 and ties are everywhere."""
    num_users, num_items = draw(st.integers(0, 5)), draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    users = rng.integers(-2, 3, (num_users, 3)).astype(np.float32)
    items = rng.integers(-2, 3, (num_items, 3)).astype(np.float32)
    # item indexes; 0 and 1 are padding and unknown, which stand for no item
    seen = [rng.integers(0, num_items + 2, rng.integers(0, 12)).tolist() for _ in range(num_users)]
    blocked = rng.random(num_items) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    k, block = draw(st.integers(1, 12)), draw(st.integers(1, 40))
    return users, items, k, block, seen, blocked


def brute_force(case: Case) -> list[list[tuple[float, int]]]:
    """(score, column) of each user's list, from a plain sort."""
    users, items, k, _, seen, blocked = case
    lists = []
    for user, own in zip(users, seen, strict=True):
        allowed = [
            (-float(user @ item), column)
            for column, item in enumerate(items)
            if column + 2 not in own and not blocked[column]
        ]
        lists.append([(-score, column) for score, column in sorted(allowed)[:k]])
    return lists


@settings(max_examples=200, deadline=None)
@given(cases())
def test_equals_brute_force(case: Case) -> None:
    users, items, k, block, seen, blocked = case
    best = blocked_top_k(
        torch.from_numpy(users), torch.from_numpy(items), k, block,
        Jagged.from_lists(seen), torch.from_numpy(blocked),
    )  # fmt: skip
    assert best.scores.shape == best.columns.shape == (len(users), k)
    expected = brute_force(case)
    for row, whole in enumerate(expected):
        padding = k - len(whole)
        assert best.columns[row].tolist() == [column for _, column in whole] + [-1] * padding
        assert best.scores[row].tolist() == [score for score, _ in whole] + [-np.inf] * padding


def test_nothing_left_out() -> None:
    best = blocked_top_k(torch.tensor([[1.0]]), torch.tensor([[2.0], [3.0]]), 2, 1, None, None)
    assert best.columns.tolist() == [[1, 0]]


def test_scores_that_are_no_numbers_are_refused() -> None:
    items = torch.tensor([[1.0], [float("nan")]])
    with pytest.raises(DataError, match=r"a score is a number\. Received: NaN"):
        blocked_top_k(torch.ones(1, 1), items, 1, 1, None, None)


def test_seen_outside_the_catalogue() -> None:
    seen = Jagged.from_lists([[4]])
    with pytest.raises(DataError, match=r"in \[0, 4\). Received: 4\."):
        blocked_top_k(torch.ones(1, 1), torch.ones(2, 1), 1, 1, seen, None)
