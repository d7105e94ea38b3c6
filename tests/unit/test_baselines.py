"""The baselines against dense matrices written out, and on a data set with planted groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

from distrec.batch import Batch, Jagged, QueryBatch
from distrec.columns import FIRST_INDEX, ITEM_INDEX, LABEL, TRAIN
from distrec.dataset import DatasetManifest
from distrec.errors import ConfigError, DataError
from distrec.metrics import baselines
from distrec.metrics.baselines import ItemKNN, Popularity, check_item_knn
from tests.synthetic import NUM_GROUPS, write_dataset


def make_queries(seen: list[list[int]], history: list[list[int]]) -> QueryBatch:
    size = len(seen)
    zeros = torch.zeros(size, dtype=torch.int64)
    batch = Batch(
        user_index=zeros,
        item_index=zeros,
        time=zeros,
        labels=torch.zeros(size, 1),
        weights=torch.ones(size),
        num_events=zeros,
        history=Jagged.from_lists(history),
        history_times=Jagged.from_lists(history),
        ids={},
        dense=torch.zeros(size, 0),
    )
    return QueryBatch(batch, Jagged.from_lists(seen), Jagged.from_lists([[]] * size))


def scores_of(scorer: ItemKNN, queries: QueryBatch) -> np.ndarray:
    return np.concatenate([block.numpy() for block in scorer(queries)])


def train_table(directory: Path, manifest: DatasetManifest) -> pa.Table:
    files = manifest.splits[TRAIN].files
    return pa.concat_tables([pq.read_table(directory / entry.path) for entry in files])


def test_item_knn_is_the_sum_of_cosines_to_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    dense = (rng.random((30, 9)) < 0.35).astype(np.float32)
    users, items = dense.nonzero()
    # an event twice counts once
    users, items = np.append(users, users[:5]), np.append(items, items[:5])
    cosine = cosine_similarity(dense.T)
    np.fill_diagonal(cosine, 0.0)
    for row in cosine:
        row[np.argsort(-row, kind="stable")[3:]] = 0.0
    history = np.zeros((2, 9))
    history[0, [1, 4, 8]] = 1.0
    history[1, 0] = 1.0
    queries = make_queries([[3, 6, 10, 3, 1, 0], [2]], [[], []])
    # several blocks of similarities and of scores
    monkeypatch.setattr(baselines, "rows_per_block", lambda num_columns: 2)
    scorer = ItemKNN(users, items, 9, num_neighbors=3)
    np.testing.assert_allclose(scores_of(scorer, queries), history @ cosine.T, atol=1e-6)


def test_without_events_everything_scores_zero() -> None:
    none = np.empty(0, np.int64)
    scorer = ItemKNN(none, none, 4, num_neighbors=3)
    assert scores_of(scorer, make_queries([[2]], [[]])).tolist() == [[0.0] * 4]


def test_popularity_counts_the_positive_events_of_train(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, labels=True)
    table = train_table(tmp_path, manifest).to_pandas()
    positives = table[table[LABEL] > 0]
    assert 0 < len(positives) < len(table)
    expected = positives.groupby(ITEM_INDEX).size()
    scores = Popularity.fit(tmp_path, manifest)(make_queries([[], []], [[], []]))
    assert scores.shape == (2, manifest.num_items - FIRST_INDEX)
    for index in range(FIRST_INDEX, manifest.num_items):
        assert scores[:, index - FIRST_INDEX].tolist() == [expected.get(index, 0)] * 2


def test_item_knn_finds_the_planted_groups(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, num_users=200)
    scorer = ItemKNN.fit(tmp_path, manifest, num_neighbors=9)
    scores = scores_of(scorer, make_queries([[6, 10, 14], []], [[], []]))
    # items 2, 6, 10 ... are one group; nothing is known of the second user
    best = np.argsort(-scores[0])[:9] + FIRST_INDEX
    assert {int(index - FIRST_INDEX) % NUM_GROUPS for index in best} == {0}
    assert not scores[1].any()


def test_with_labels_the_profile_is_the_positive_history(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, num_users=200, labels=True)
    scorer = ItemKNN.fit(tmp_path, manifest, num_neighbors=9)
    by_history = scores_of(scorer, make_queries([[3, 7]], [[6, 10]]))
    assert np.argmax(by_history[0]) % NUM_GROUPS == 0


def test_users_who_share_the_unknown_index_are_not_one_user(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path)
    for entry in manifest.splits[TRAIN].files:
        table = pq.read_table(tmp_path / entry.path)
        ones = pa.array([1] * table.num_rows, pa.int64())
        pq.write_table(table.set_column(0, "user_index", ones), tmp_path / entry.path)
    scorer = ItemKNN.fit(tmp_path, manifest, num_neighbors=9)
    assert not scores_of(scorer, make_queries([[2, 3, 4]], [[]])).any()


@pytest.mark.parametrize("large", ["items", "events"])
def test_item_knn_refuses_what_it_cannot_hold(tmp_path: Path, large: str) -> None:
    manifest = write_dataset(tmp_path)
    if large == "items":
        manifest = manifest.model_copy(update={"num_items": 200_003})
    else:
        train = manifest.splits[TRAIN].model_copy(update={"num_rows": 100_000_001})
        manifest = manifest.model_copy(update={"splits": {**manifest.splits, TRAIN: train}})
    received = {"items": "Received: 200,001 items", "events": "100,000,001 rows"}[large]
    with pytest.raises(ConfigError, match=received):
        check_item_knn(manifest)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path)
    path = tmp_path / manifest.splits[TRAIN].files[1].path
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"part-00001.parquet cannot be read"):
        Popularity.fit(tmp_path, manifest)


def test_an_item_outside_the_catalogue_is_refused(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path).model_copy(update={"num_items": 10})
    with pytest.raises(DataError, match=r"an item index lies below 10\. Received: "):
        Popularity.fit(tmp_path, manifest)
