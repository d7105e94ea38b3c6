"""Ranking metrics against hand-computed values, a plain loop and two other libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, ndcg_score
from torchmetrics.functional import retrieval as peer

from distrec.batch import Batch, Jagged, QueryBatch
from distrec.columns import FIRST_INDEX, PADDING_INDEX, UNKNOWN_INDEX
from distrec.errors import DataError
from distrec.metrics.ranking import RankingMetrics, list_metrics, recommend
from distrec.metrics.top_k import top_k

INFINITY = float("inf")


def make_queries(
    targets: list[list[int]],
    seen: list[list[int]] | None = None,
    num_events: list[int] | None = None,
) -> QueryBatch:
    size = len(targets)
    zeros = torch.zeros(size, dtype=torch.int64)
    none = Jagged.from_lists([[] for _ in range(size)])
    batch = Batch(
        user_index=zeros,
        item_index=zeros,
        time=zeros,
        labels=torch.zeros(size, 1),
        weights=torch.ones(size),
        num_events=zeros if num_events is None else torch.tensor(num_events),
        history=none,
        history_times=none,
        ids={},
        dense=torch.zeros(size, 0),
    )
    return QueryBatch(
        batch, none if seen is None else Jagged.from_lists(seen), Jagged.from_lists(targets)
    )


def make_metrics(ks: list[int], num_columns: int, **options: object) -> RankingMetrics:
    counts = torch.zeros(num_columns, dtype=torch.int64)
    return RankingMetrics(
        ks, num_columns + FIRST_INDEX, counts, **{"beyond_accuracy": False, **options}
    )


# --- the order ---------------------------------------------------------------------------------


def test_ties_go_to_the_smaller_index() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0], [0.0, -0.0, 0.0, -0.0, 0.0]])
    assert top_k(scores, 2).tolist() == [[1, 2], [0, 1]]
    assert top_k(scores, 4).tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]


def test_many_ties_stay_in_order() -> None:
    scores = (torch.arange(5000) % 3).float().unsqueeze(0)
    expected = [column for rest in (2, 1, 0) for column in range(5000) if column % 3 == rest]
    assert top_k(scores, 4000).tolist() == [expected[:4000]]


def test_what_is_masked_is_never_taken() -> None:
    scores = torch.tensor([[-INFINITY, 5.0, -INFINITY], [-INFINITY, -INFINITY, INFINITY]])
    assert top_k(scores, 3).tolist() == [[1, -1, -1], [2, -1, -1]]
    # more than there are columns, and no rows
    assert top_k(scores, 5).tolist() == [[1, -1, -1, -1, -1], [2, -1, -1, -1, -1]]
    assert top_k(scores[:0], 5).shape == (0, 5)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_top_k_is_a_sort_by_score_and_index(data: st.DataObject) -> None:
    num_columns = data.draw(st.integers(1, 12))
    k = data.draw(st.integers(1, 14))
    value = st.sampled_from([-INFINITY, -1.0, -0.0, 0.0, 0.5, 2.0, INFINITY])
    rows = data.draw(
        st.lists(st.lists(value, min_size=num_columns, max_size=num_columns), max_size=4)
    )
    expected = []
    for row in rows:
        order = sorted((-score, column) for column, score in enumerate(row) if score > -INFINITY)
        expected.append(([column for _, column in order] + [-1] * k)[:k])
    result = top_k(torch.tensor(rows).reshape(len(rows), num_columns), k)
    assert result.tolist() == expected


def test_nan_is_an_error() -> None:
    scores = torch.tensor([[1.0, 2.0], [3.0, math.nan]])
    with pytest.raises(DataError, match=r"Received: NaN \(row 1 of a batch of 2\)"):
        top_k(scores, 1)


def test_seen_items_are_masked_unless_they_are_targets() -> None:
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0]] * 2)
    before = scores.clone()
    seen = Jagged.from_lists([[2, 3, PADDING_INDEX, UNKNOWN_INDEX], [2]])
    targets = Jagged.from_lists([[3], [3]])
    # item 3 is a target of both users; the second target keeps nothing of the first user's
    assert recommend(scores, 3, seen, targets).tolist() == [[3, 4, 5], [3, 4, 5]]
    assert recommend(scores, 4, seen, None).tolist() == [[4, 5, 0, 0], [3, 4, 5, 0]]
    assert torch.equal(scores, before)


def test_indexes_outside_the_catalogue_are_refused() -> None:
    metrics = make_metrics([1], 3)
    with pytest.raises(DataError, match=r"lies in \[2, 5\). Received: 5 in seen"):
        metrics.update(torch.zeros(1, 3), make_queries([[2]], seen=[[5]]))
    with pytest.raises(DataError, match=r"a target lies in \[0, 5\). Received: 5 to 5"):
        metrics.update(torch.zeros(1, 3), make_queries([[5]]))
    with pytest.raises(DataError, match=r"3 items of the catalogue. Received: shape \(1, 4\)"):
        metrics.update(torch.zeros(1, 4), make_queries([[2]]))
    with pytest.raises(DataError, match="Received: 2 queries, 1 rows"):
        metrics.update([torch.zeros(1, 3)], make_queries([[2], [2]]))


# --- the values --------------------------------------------------------------------------------


def test_hand_computed_values() -> None:
    # the list is 2, 3, 4, 5, 6; targets at ranks 2 and 4, and one that is in no catalogue
    metrics = make_metrics([1, 2, 4], 5)
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    metrics.update(scores, make_queries([[5, 3, 3, UNKNOWN_INDEX]]))
    gain = 1 / math.log2(3) + 1 / math.log2(5)
    expected = {
        "hr@1": 0.0, "hr@2": 1.0, "hr@4": 1.0,
        "recall@1": 0.0, "recall@2": 1 / 3, "recall@4": 2 / 3,
        "precision@1": 0.0, "precision@2": 1 / 2, "precision@4": 2 / 4,
        "ndcg@1": 0.0,
        "ndcg@2": (1 / math.log2(3)) / (1 + 1 / math.log2(3)),
        "ndcg@4": gain / (1 + 1 / math.log2(3) + 1 / 2),
        "mrr@1": 0.0, "mrr@2": 1 / 2, "mrr@4": 1 / 2,
        "map@1": 0.0, "map@2": (1 / 2) / 2, "map@4": (1 / 2 + 2 / 4) / 3,
    }  # fmt: skip
    assert metrics.compute() == pytest.approx(expected)


def test_a_free_index_is_never_recommended() -> None:
    # the best score is that of no item, so that the target stands first
    metrics = RankingMetrics([1], 5, torch.tensor([3, -1, 2]))
    metrics.update(torch.tensor([[1.0, 9.0, 2.0]]), make_queries([[4]]))
    values = metrics.compute()
    assert values["hr@1"] == 1.0
    # of two items
    assert values["coverage@1"] == 0.5
    assert values["popularity@1"] == 2.0


def test_users_without_targets_and_empty_batches_do_not_count() -> None:
    metrics = make_metrics([1], 2, beyond_accuracy=True)
    assert metrics.compute()["hr@1"] == 0.0
    metrics.update(torch.tensor([[2.0, 1.0]] * 3), make_queries([[2], [], [UNKNOWN_INDEX]]))
    metrics.update(torch.zeros(0, 2), make_queries([]))
    assert metrics.num_queries == 2
    assert metrics.compute()["hr@1"] == 0.5
    metrics.update(torch.tensor([[1.0, 2.0]]), make_queries([[]]))
    # item 3 was shown to nobody who counts
    assert metrics.compute()["coverage@1"] == 0.5


def test_lists_shorter_than_k_are_padded() -> None:
    metrics = make_metrics([5], 3)
    metrics.update(torch.tensor([[3.0, 2.0, 1.0]]), make_queries([[4]], seen=[[2]]))
    assert metrics.compute()["mrr@5"] == pytest.approx(1 / 2)
    assert metrics.compute()["precision@5"] == pytest.approx(1 / 5)


def test_slices() -> None:
    counts = torch.tensor([9, 5, 0])
    metrics = RankingMetrics(
        [1, 3], 5, counts, cold_user_events=2, cold_item_count=5, beyond_accuracy=False
    )
    # the list of both users is 2, 3, 4: only item 2 is warm
    scores = torch.tensor([[3.0, 2.0, 1.0]] * 2)
    queries = make_queries([[2, 4], [3, UNKNOWN_INDEX]], num_events=[2, 3])
    metrics.update(scores, queries)
    slices = metrics.compute_slices()
    sizes = {name: (part["num_queries"], part["num_targets"]) for name, part in slices.items()}
    assert sizes == {
        "cold_users": (1, 2), "warm_users": (1, 2), "cold_items": (2, 3), "warm_items": (1, 1),
        "new_items": (2, 2),
    }  # fmt: skip
    mrr = {name: part["metrics"]["mrr@3"] for name, part in slices.items()}
    # cold items: item 4 of the first user at rank 3, item 3 of the second at rank 2; new ones: item
    # 4, and the one in no catalogue, which cannot be found
    expected = {
        "cold_users": 1.0, "warm_users": 1 / 2,
        "cold_items": (1 / 3 + 1 / 2) / 2, "warm_items": 1.0, "new_items": (1 / 3) / 2,
    }  # fmt: skip
    assert mrr == pytest.approx(expected)
    assert slices["cold_items"]["metrics"]["recall@3"] == pytest.approx((1 + 1 / 2) / 2)


def test_new_items_among_themselves() -> None:
    # items 3, 4 and 6 are new; 5 stands for nothing
    metrics = RankingMetrics([1, 2], 7, torch.tensor([9, 0, 0, -1, 0]))
    scores = torch.tensor([[5.0, 2.0, 3.0, 9.0, 1.0]] * 5)
    queries = make_queries(
        # a new item behind a seen one and a warm one, both alike; a warm one; an unknown one
        [[3, 2], [6], [4, 4, 6, UNKNOWN_INDEX], [2], [UNKNOWN_INDEX]],
        seen=[[4], [], [3, 6], [], []],
    )
    metrics.update(iter((scores[:2], scores[2:])), queries)
    among = metrics.compute_slices()["among_new_items"]
    assert (among["num_queries"], among["num_targets"]) == (3, 4)
    # lists 3, 6 of the first; 4, 3 of the second; 4, 6 of the third, whose seen target stays
    found = {name: among["metrics"][name] for name in ("hr@1", "hr@2", "recall@2", "mrr@2")}
    assert found == pytest.approx({"hr@1": 2 / 3, "hr@2": 2 / 3, "recall@2": 2 / 3, "mrr@2": 2 / 3})
    twice = RankingMetrics([1, 2], 7, torch.tensor([9, 0, 0, -1, 0]))
    twice.load_state_vector(2 * metrics.state_vector())
    assert twice.compute_slices()["among_new_items"]["num_targets"] == 8
    assert twice.compute_slices()["among_new_items"]["metrics"] == among["metrics"]
    assert twice.compute() == metrics.compute()
    for counts, beyond_accuracy in (([9, 1, 1, -1, 1], True), ([9, 0, 0, -1, 0], False)):
        none = RankingMetrics([1], 7, torch.tensor(counts), beyond_accuracy=beyond_accuracy)
        none.update(scores, queries)
        assert "among_new_items" not in none.compute_slices()


# --- other implementations ---------------------------------------------------------------------


def plain(order: list[int], targets: list[int], k: int) -> dict[str, float]:
    """The definitions, one user at a time."""
    known = {target for target in targets if target >= FIRST_INDEX}
    size = len(known) + sum(target < FIRST_INDEX for target in targets)
    ranks = [rank for rank, item in enumerate(order[:k], start=1) if item in known]
    best = sum(1 / math.log2(1 + rank) for rank in range(1, min(k, size) + 1))
    return {
        "hr": float(bool(ranks)),
        "recall": len(ranks) / size,
        "precision": len(ranks) / k,
        "ndcg": sum(1 / math.log2(1 + rank) for rank in ranks) / best,
        "mrr": 1 / ranks[0] if ranks else 0.0,
        "map": sum((i + 1) / rank for i, rank in enumerate(ranks)) / min(k, size),
    }


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_agrees_with_the_definitions_on_any_queries(data: st.DataObject) -> None:
    num_columns = data.draw(st.integers(1, 8))
    num_users = data.draw(st.integers(1, 5))
    item = st.integers(FIRST_INDEX, num_columns + 1)
    score = st.sampled_from([0.0, 1.0, 1.5, 2.0])
    bag = st.lists(item, max_size=5)
    scores = [
        data.draw(st.lists(score, min_size=num_columns, max_size=num_columns))
        for _ in range(num_users)
    ]
    seen = [data.draw(bag) for _ in range(num_users)]
    any_item = st.one_of(item, st.just(UNKNOWN_INDEX))
    targets = [data.draw(st.lists(any_item, min_size=1, max_size=5)) for _ in range(num_users)]
    ks = data.draw(st.lists(st.integers(1, 10), min_size=1, max_size=3, unique=True))
    metrics = make_metrics(ks, num_columns)
    metrics.update(torch.tensor(scores), make_queries(targets, seen))
    sums: dict[str, float] = {}
    for row, had, wanted in zip(scores, seen, targets, strict=True):
        masked = set(had) - set(wanted)
        order = sorted(range(num_columns), key=lambda column: (-row[column], column))
        items = [c + FIRST_INDEX for c in order if c + FIRST_INDEX not in masked]
        for k in ks:
            for name, value in plain(items, wanted, k).items():
                sums[f"{name}@{k}"] = sums.get(f"{name}@{k}", 0.0) + value
    expected = {name: value / num_users for name, value in sums.items()}
    assert metrics.compute() == pytest.approx(expected)


def test_agrees_with_torchmetrics_and_sklearn() -> None:
    generator = torch.Generator().manual_seed(5)
    num_users, num_columns, ks = 40, 60, [1, 5, 20, 60]
    scores = torch.rand(num_users, num_columns, generator=generator)
    relevant = torch.rand(num_users, num_columns, generator=generator) < 0.1
    relevant[:, 7] = True
    targets = [(row.nonzero()[:, 0] + FIRST_INDEX).tolist() for row in relevant]
    metrics = make_metrics(ks, num_columns)
    metrics.update(scores, make_queries(targets))
    values = metrics.compute()
    peers = {
        "hr": peer.retrieval_hit_rate,
        "recall": peer.retrieval_recall,
        "precision": peer.retrieval_precision,
        "ndcg": peer.retrieval_normalized_dcg,
        "mrr": peer.retrieval_reciprocal_rank,
    }
    for k in ks:
        for name, function in peers.items():
            pairs = zip(scores, relevant, strict=True)
            expected = np.mean([float(function(row, wanted, top_k=k)) for row, wanted in pairs])
            assert values[f"{name}@{k}"] == pytest.approx(expected, abs=1e-6), (name, k)
        # torchmetrics divides by the hits in the list, we by min(K, |T|)
        total = 0.0
        for row, wanted in zip(scores, relevant, strict=True):
            hits = int(wanted[row.topk(k).indices].sum())
            mean = float(peer.retrieval_average_precision(row, wanted, top_k=k))
            total += mean * hits / min(k, int(wanted.sum()))
        assert values[f"map@{k}"] == pytest.approx(total / num_users, abs=1e-6)
        ndcg = ndcg_score(relevant.numpy(), scores.numpy(), k=k)
        assert values[f"ndcg@{k}"] == pytest.approx(ndcg, abs=1e-6)
    whole = [
        average_precision_score(wanted.numpy(), row.numpy())
        for row, wanted in zip(scores, relevant, strict=True)
    ]
    assert values["map@60"] == pytest.approx(np.mean(whole), abs=1e-6)


# --- state -------------------------------------------------------------------------------------


def random_batches(number: int) -> list[tuple[torch.Tensor, QueryBatch]]:
    rng = np.random.default_rng(number)
    batches = []
    for size in (4, 0, 7, 1)[:number]:
        targets = [rng.integers(1, 12, rng.integers(0, 4)).tolist() for _ in range(size)]
        seen = [rng.integers(0, 12, 3).tolist() for _ in range(size)]
        events = rng.integers(0, 20, size).tolist()
        batches.append((torch.rand(size, 10), make_queries(targets, seen, events)))
    return batches


@pytest.mark.parametrize("beyond_accuracy", [True, False])
def test_the_states_of_two_ranks_add_up_to_the_whole(beyond_accuracy: bool) -> None:
    def fresh() -> RankingMetrics:
        vectors = torch.nn.functional.normalize(torch.arange(30.0).sin().view(10, 3))
        return RankingMetrics(
            [3, 1], 12, torch.arange(10), item_vectors=vectors, cold_item_count=4,
            beyond_accuracy=beyond_accuracy,
        )  # fmt: skip

    whole, first, second, reduced = fresh(), fresh(), fresh(), fresh()
    for number, (scores, queries) in enumerate(random_batches(4)):
        whole.update(scores, queries)
        (first if number % 2 else second).update(scores, queries)
    state = first.state_vector() + second.state_vector()
    assert (state.dtype, state.dim()) == (torch.float64, 1)
    reduced.load_state_vector(state)
    assert reduced.compute() == pytest.approx(whole.compute(), abs=1e-12)
    assert reduced.compute_slices() == whole.compute_slices()
    assert ("coverage@3" in whole.compute()) == beyond_accuracy


def test_blocks_of_rows_give_the_same_as_one() -> None:
    [(scores, queries)] = random_batches(1)
    whole, blocks = make_metrics([3], 10), make_metrics([3], 10)
    whole.update(scores, queries)
    blocks.update(iter(scores.split(3)), queries)
    assert torch.equal(whole.state_vector(), blocks.state_vector())


def test_list_metrics_of_a_perfect_list_are_one() -> None:
    hits = torch.tensor([[True, True, True, False], [True, False, False, False]])
    values = list_metrics(hits, torch.tensor([3, 1]), [1, 2, 4])
    for metric in (0, 3, 4, 5):
        assert values[:, metric].tolist() == [[1.0] * 3] * 2
