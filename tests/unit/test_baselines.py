"""The baselines against dense matrices written out, and on a data set with planted groups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

from distrec.baselines import (
    ALS,
    EASE,
    ItemKNN,
    Markov,
    Popularity,
    check_baselines,
    chosen_baselines,
    ease,
    fit_baseline,
    profiles,
)
from distrec.baselines.als import ALSOptions
from distrec.batch import Batch, Jagged, QueryBatch
from distrec.columns import (
    FIRST_INDEX,
    HISTORY,
    HISTORY_TIMES,
    ITEM_INDEX,
    LABEL,
    NUM_EVENTS,
    TIME,
    TRAIN,
    USER_INDEX,
    VALID,
)
from distrec.config import Config, parse_config
from distrec.dataset import DatasetManifest, TrainRows
from distrec.errors import ConfigError, DataError
from distrec.metrics import item_neighbors
from distrec.metrics.evaluation import Scorer
from distrec.metrics.events import positive_events, positive_transitions
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


def scores_of(scorer: Scorer, queries: QueryBatch) -> np.ndarray:
    return np.concatenate([block.numpy() for block in scorer(queries)])


def make_config(directory: Path, **options: object) -> Config:
    document = {
        "name": "baselines",
        "output": str(directory),
        "prepare": {"events": {"paths": ["none.csv"], "time": "time"}},
        "evaluate": options,
    }
    return parse_config(document, "the test")


def table_of(directory: Path, manifest: DatasetManifest, split: str = TRAIN) -> pa.Table:
    files = manifest.splits[split].files
    return pa.concat_tables([pq.read_table(directory / entry.path) for entry in files])


def test_item_knn_is_the_sum_of_cosines_to_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    dense = (rng.random((30, 9)) < 0.35).astype(np.float32)
    users, items = dense.nonzero()
    # an event twice counts once
    users, items = np.append(users, users[:5]), np.append(items, items[:5])
    matrix = profiles.binary(users, items, (30, 9))
    cosine = cosine_similarity(dense.T)
    np.fill_diagonal(cosine, 0.0)
    for row in cosine:
        row[np.argsort(-row, kind="stable")[3:]] = 0.0
    history = np.zeros((2, 9))
    history[0, [1, 4, 8]] = 1.0
    history[1, 0] = 1.0
    queries = make_queries([[3, 6, 10, 3, 1, 0], [2]], [[], []])
    # several blocks of similarities and of scores
    for module in (item_neighbors, profiles):
        monkeypatch.setattr(module, "rows_per_block", lambda num_columns: 2)
    scorer = ItemKNN(matrix, num_neighbors=3)
    np.testing.assert_allclose(scores_of(scorer, queries), history @ cosine.T, atol=1e-6)


def test_without_events_everything_scores_zero() -> None:
    none = np.empty(0, np.int64)
    scorers = [
        ItemKNN(profiles.binary(none, none, (1, 4)), num_neighbors=3),
        EASE(profiles.binary(none, none, (1, 4)), l2=1.0),
        Markov(none, none, 4, length=2, decay=0.5, smoothing=1.0),
    ]
    for scorer in scorers:
        assert scores_of(scorer, make_queries([[2]], [[2]])).tolist() == [[0.0] * 4]


def test_popularity_counts_the_positive_events_of_train(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, labels=True)
    table = table_of(tmp_path, manifest).to_pandas()
    positives = table[table[LABEL] > 0]
    assert 0 < len(positives) < len(table)
    expected = positives.groupby(ITEM_INDEX).size()
    scores = Popularity.fit(tmp_path, manifest)(make_queries([[], []], [[], []]))
    assert scores.shape == (2, manifest.num_items - FIRST_INDEX)
    for index in range(FIRST_INDEX, manifest.num_items):
        assert scores[:, index - FIRST_INDEX].tolist() == [expected.get(index, 0)] * 2


@pytest.mark.parametrize("read", [positive_events, positive_transitions])
def test_windows_give_every_event_of_train_once(tmp_path: Path, read: Callable) -> None:
    def events(train_rows: TrainRows) -> np.ndarray:
        folder = tmp_path / train_rows
        manifest = write_dataset(
            folder, events_per_user=11, history_length=4, train_rows=train_rows
        )
        pairs = np.concatenate([np.stack(part) for part in read(folder, manifest)], axis=1)
        return pairs[:, np.lexsort(pairs)]

    found = events("windows")
    assert found.shape == (2, 60 * (11 if read is positive_events else 10))
    np.testing.assert_array_equal(found, events("events"))


def test_of_one_time_windows_look_back_to_an_earlier_one(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, num_files=1, train_rows="windows")
    path = tmp_path / manifest.splits[TRAIN].files[0].path
    table = pq.read_table(path).slice(0, 2)
    # a whole window, and one whose first event, and the next, are of the window before
    columns = {
        USER_INDEX: [2, 3], ITEM_INDEX: [9, 20], TIME: [30, 50], NUM_EVENTS: [4, 9],
        HISTORY: [[5, 6, 7, 8], [16, 17, 18, 19]],
        HISTORY_TIMES: [[10, 10, 20, 30], [40, 40, 50, 50]],
    }  # fmt: skip
    for name, values in columns.items():
        column = pa.array(values, table.schema.field(name).type)
        table = table.set_column(table.schema.names.index(name), name, column)
    pq.write_table(table, path)
    ((previous, items),) = positive_transitions(tmp_path, manifest)
    assert list(zip(previous.tolist(), items.tolist(), strict=True)) == [
        (6, 7), (7, 8), (7, 9), (17, 18), (17, 19), (17, 20)
    ]  # fmt: skip


def test_item_knn_finds_the_planted_groups(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, num_users=200)
    scorer = ItemKNN.fit(tmp_path, manifest, num_neighbors=9)
    scores = scores_of(scorer, make_queries([[6, 10, 14], []], [[], []]))
    # items 2, 6, 10 ... are one group; nothing is known of the second user
    best = np.argsort(-scores[0])[:9] + FIRST_INDEX
    assert {int(index - FIRST_INDEX) % NUM_GROUPS for index in best} == {0}
    assert not scores[1].any()
    similar = item_neighbors.similar_items(tmp_path, manifest, 3)
    items = torch.arange(FIRST_INDEX, manifest.num_trained_items)
    found = similar[FIRST_INDEX : manifest.num_trained_items]
    assert bool(((found - items.unsqueeze(1)) % NUM_GROUPS == 0).all())
    assert not bool((found == items.unsqueeze(1)).any())


def test_an_item_without_neighbors_stands_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    # items 2 and 4 were had together, 3 and 5 alone
    matrix = profiles.binary(np.array([0, 0, 1, 2]), np.array([0, 2, 1, 3]), (3, 4))
    monkeypatch.setattr(item_neighbors, "user_items", lambda directory, manifest: matrix)
    found = item_neighbors.similar_items(Path(), SimpleNamespace(num_items=6), 2)
    assert found.tolist() == [[0, 0], [1, 1], [4, 2], [3, 3], [2, 4], [5, 5]]


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


def ease_by_numpy(dense: np.ndarray, l2: float) -> np.ndarray:
    """Column j: the ridge regression of item j on all the others, one by one."""
    num_items = dense.shape[1]
    weights = np.zeros((num_items, num_items))
    for item in range(num_items):
        others = np.delete(np.arange(num_items), item)
        left = dense[:, others].T @ dense[:, others] + l2 * np.eye(len(others))
        weights[others, item] = np.linalg.solve(left, dense[:, others].T @ dense[:, item])
    return weights


def test_ease_regresses_each_item_on_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    dense = (rng.random((40, 11)) < 0.3).astype(np.float64)
    matrix = profiles.binary(*dense.nonzero(), dense.shape)
    history = np.zeros((3, 11))
    history[0, [0, 5, 10]] = 1.0
    history[2, 3] = 1.0
    for module in (ease, profiles):
        monkeypatch.setattr(module, "rows_per_block", lambda num_columns: 4)
    scores = scores_of(EASE(matrix, l2=3.0), make_queries([[2, 7, 12], [], [5]], [[]] * 3))
    np.testing.assert_allclose(scores, history @ ease_by_numpy(dense, 3.0), atol=1e-6)


def test_ease_says_when_the_gram_matrix_has_no_inverse() -> None:
    twins = profiles.binary(np.arange(50).repeat(2), np.tile([0, 1], 50), (50, 2))
    with pytest.raises(ConfigError, match=r"ease_l2 = 1e-09, with which it is singular. Raise it"):
        EASE(twins, l2=1e-9)


def markov_by_loops(
    pairs: list[tuple[int, int]], history: list[int], num_items: int, smoothing: float
) -> np.ndarray:
    """Length 3, decay 0.5, written out; items as positions from 0."""
    scores = np.zeros(num_items)
    for age, item in enumerate(reversed(history[-3:])):
        after = [second for first, second in pairs if first == item]
        for other in range(num_items):
            share = sum(second == other for _, second in pairs) / len(pairs)
            chance = (after.count(other) + smoothing * share) / (len(after) + smoothing)
            scores[other] += 0.5**age * chance
    return scores


def test_markov_adds_up_what_followed_the_last_items(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    previous, items = rng.integers(0, 6, (2, 50))
    histories = [[5, 2, 2, 4], [], [3], [2, 3, 4, 5, 6]]
    monkeypatch.setattr(profiles, "rows_per_block", lambda num_columns: 2)
    scorer = Markov(previous, items, 7, length=3, decay=0.5, smoothing=1.5)
    scores = scores_of(scorer, make_queries([[]] * 4, histories))
    pairs = list(zip(previous.tolist(), items.tolist(), strict=True))
    for row, history in enumerate(histories):
        known = [index - FIRST_INDEX for index in history]
        expected = markov_by_loops(pairs, known, 7, 1.5)
        np.testing.assert_allclose(scores[row], expected, atol=1e-6)
    # the unknown item before the last takes its place in time, and says nothing
    scores = scores_of(scorer, make_queries([[]], [[4, 1, 5]]))
    expected = markov_by_loops(pairs, [3], 7, 1.5) + 0.25 * markov_by_loops(pairs, [2], 7, 1.5)
    np.testing.assert_allclose(scores[0], expected, atol=1e-6)


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("splits", [(TRAIN,), (TRAIN, VALID)])
def test_transitions_end_with_positive_events(
    tmp_path: Path, labels: bool, splits: tuple[str, ...]
) -> None:
    manifest = write_dataset(tmp_path, labels=labels)
    expected = []
    for split in splits:
        table = table_of(tmp_path, manifest, split).to_pandas()
        for row in table.itertuples():
            if len(row.history) and row.label > 0:
                expected.append((row.history[-1], row.item_index))
    parts = list(positive_transitions(tmp_path, manifest, splits))
    assert sorted(tuple(pair) for part in parts for pair in np.stack(part, 1)) == sorted(expected)


def test_markov_of_a_dataset_ranks_what_follows(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, num_users=200)
    scorer = Markov.fit(tmp_path, manifest, length=2, decay=0.5, smoothing=1.0)
    scores = scores_of(scorer, make_queries([[]], [[6, 10]]))
    best = np.argsort(-scores[0])[:9]
    assert {int(position) % NUM_GROUPS for position in best} == {0}


def test_als_solves_for_the_user_what_it_minimises() -> None:
    rng = np.random.default_rng(3)
    factors = rng.normal(size=(8, 3)).astype(np.float32)
    options = ALSOptions(factors=3, iterations=1, regularization=0.2, alpha=5.0, seed=0)
    had = np.zeros((2, 8))
    had[0, [1, 4, 6]] = 1.0
    scores = scores_of(ALS(factors, options), make_queries([[3, 6, 8], []], [[], []]))
    confidence = np.diag(1.0 + 5.0 * had[0])
    left = factors.T @ confidence @ factors + 0.2 * 3 * np.eye(3)
    user = np.linalg.solve(left, factors.T @ confidence @ had[0])
    np.testing.assert_allclose(scores, [factors @ user, np.zeros(8)], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("item_knn", {"num_items": 200_003}, "up to 200,000 items.*Received: 200,001 items"),
        ("item_knn", {"num_rows": 100_000_001}, "Received: 100,000,001 events"),
        ("ease", {"num_items": 30_003}, "up to 30,000 items.*Received: 30,001 items"),
        ("ease", {"num_rows": 100_000_001}, "Received: 100,000,001 events"),
        ("markov", {"num_rows": 100_000_001}, "Received: 100,000,001 events"),
        ("markov", {"num_rows": 12_500_001, "train_rows": "windows"}, "Received: 100,000,008 ev"),
        ("markov", {"has_time": False}, "Received: a dataset without times"),
    ],
)
def test_what_a_baseline_cannot_take_is_refused_by_name_and_left_out_by_default(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    manifest, changes = write_dataset(tmp_path), dict(changes)
    if "num_rows" in changes:
        train = manifest.splits[TRAIN].model_copy(update={"num_rows": changes.pop("num_rows")})
        changes["splits"] = {**manifest.splits, TRAIN: train}
    config = make_config(tmp_path)
    assert chosen_baselines(config, manifest) == ("popularity", "item_knn", "markov")
    manifest = manifest.model_copy(update=changes)
    with pytest.raises(ConfigError, match=f"baseline {name} .*{message}.* out of evaluate.base"):
        check_baselines([name], manifest)
    assert name not in chosen_baselines(config, manifest)
    chosen = make_config(tmp_path, baselines=[name])
    assert chosen_baselines(chosen, manifest) == (name,)


@pytest.mark.parametrize("name", ["popularity", "item_knn", "markov", "ease"])
def test_valid_counts_when_it_is_named(tmp_path: Path, name: str) -> None:
    config = make_config(tmp_path)
    manifest = write_dataset(config.dataset_directory, num_users=200)
    queries = make_queries([[2, 6]], [[2, 6]])
    without = scores_of(fit_baseline(name, config, manifest), queries)
    along = scores_of(fit_baseline(name, config, manifest, (TRAIN, VALID)), queries)
    assert not np.allclose(without, along)


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
