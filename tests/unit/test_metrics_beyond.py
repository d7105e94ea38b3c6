"""Coverage, popularity and diversity by hand; item vectors against exact cosines."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

from distrec import columns as c
from distrec.batch import ItemBatch, Jagged
from distrec.metrics.beyond_accuracy import BeyondAccuracy
from distrec.metrics.item_vectors import (
    EXACT_WIDTH,
    feature_vectors,
    item_vectors,
    sketch,
)
from tests.synthetic import write_dataset


def test_coverage_and_popularity_by_hand() -> None:
    # items 2 to 5, counts 8, 4, 2, 1
    beyond = BeyondAccuracy([1, 3], 6, torch.tensor([8, 4, 2, 1]), None)
    beyond.update(torch.tensor([[2, 3, 4], [2, 4, 0]]))
    expected = {
        "coverage@1": 1 / 4,
        "coverage@3": 3 / 4,
        "popularity@1": 8.0,
        # the padding is no item
        "popularity@3": (8 + 4 + 2 + 8 + 2) / 5,
    }
    assert beyond.compute() == pytest.approx(expected)


def test_diversity_is_one_minus_the_mean_cosine_of_pairs() -> None:
    half = math.sqrt(0.5)
    vectors = torch.tensor([[1.0, 0.0], [half, half], [0.0, 1.0], [0.0, 0.0]])
    beyond = BeyondAccuracy([1, 2, 3], 6, torch.ones(4, dtype=torch.int64), vectors)
    beyond.update(torch.tensor([[2, 3, 4], [2, 5, 0], [4, 0, 0]]))
    values = beyond.compute()
    # a list of one has no pairs; item 5 has no vector and is like nothing
    assert values["diversity@1"] == 0.0
    assert values["diversity@2"] == pytest.approx(((1 - half) + 1) / 2)
    assert values["diversity@3"] == pytest.approx(((1 - (half + half + 0) / 3) + 1) / 2)


def items_with(ids: dict[str, list[list[int]]], dense: list[list[float]]) -> ItemBatch:
    size = len(dense)
    return ItemBatch(
        item_index=torch.arange(2, size + 2),
        count=torch.ones(size, dtype=torch.int64),
        recent=torch.zeros(size, dtype=torch.int64),
        ids={name: Jagged.from_lists(bags) for name, bags in ids.items()},
        dense=torch.tensor(dense).reshape(size, -1),
    )


def test_feature_vectors_weigh_each_feature_alike() -> None:
    items = items_with(
        {"item_genres": [[2, 3], [3, 4], [2, 3]], "item_brand": [[2], [2], [3]]},
        [[3.0, 4.0], [6.0, 8.0], [4.0, -3.0]],
    )
    vectors = feature_vectors(items)
    assert vectors is not None
    cosines = vectors @ vectors.T
    # genres 1/2, brand 1, numbers 1; and genres 1, brand 0, numbers 0
    assert cosines[0, 1].item() == pytest.approx((0.5 + 1 + 1) / 3)
    assert cosines[0, 2].item() == pytest.approx((1 + 0 + 0) / 3, abs=1e-6)


def test_padding_and_unknown_values_do_not_make_items_alike() -> None:
    items = items_with({"item_brand": [[1], [1], [0], []]}, [[], [], [], []])
    vectors = feature_vectors(items)
    assert vectors is not None
    assert float(vectors.abs().sum()) == 0.0
    assert feature_vectors(items_with({}, [[], []])) is None


def test_a_sketch_of_many_keys_keeps_cosines_on_average() -> None:
    generator = torch.Generator().manual_seed(3)
    num_keys = 20 * EXACT_WIDTH
    matrix = (torch.rand(40, num_keys, generator=generator) < 0.02).float()
    matrix[1::2] = torch.where(
        torch.rand(num_keys, generator=generator) < 0.5, matrix[::2], matrix[1::2]
    )
    rows, keys = matrix.nonzero(as_tuple=True)
    weights = matrix[rows, keys]
    half = len(rows) // 2
    parts = [(rows[:half], keys[:half], weights[:half]), (rows[half:], keys[half:], weights[half:])]
    vectors = sketch(40, num_keys, parts)
    assert vectors.shape == (40, EXACT_WIDTH)
    exact = torch.tensor(cosine_similarity(matrix.numpy()))
    error = vectors @ vectors.T - exact
    # standard error of one cosine is about 1 / sqrt(width) = 0.06, without bias
    assert float(error.square().mean().sqrt()) < 0.1
    assert abs(float(error.mean())) < 0.01
    assert float((vectors @ vectors.T)[0, 1]) > 0.4


def test_items_without_features_are_alike_when_the_same_users_took_them(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path)
    size = manifest.num_items - c.FIRST_INDEX
    vectors = item_vectors(tmp_path, manifest, items_with({}, [[]] * size))
    counts = np.zeros((size, manifest.num_users))
    for entry in manifest.splits[c.TRAIN].files:
        table = pq.read_table(tmp_path / entry.path)
        np.add.at(counts, (table[c.ITEM_INDEX].to_numpy() - 2, table[c.USER_INDEX].to_numpy()), 1)
    # 62 users fit without hashing
    expected = cosine_similarity(counts)
    np.testing.assert_allclose((vectors @ vectors.T).numpy(), expected, atol=1e-6)
