"""The ranks of targets, written and read again, give the metrics that were added up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from distrec.batch import Jagged, QueryBatch
from distrec.metrics.names import metric_names
from distrec.metrics.query_ranks import QueriesHash, QueryRanksWriter, values_of
from distrec.metrics.ranking import RankingMetrics
from tests.unit.test_baselines import make_queries

NUM_ITEMS = 32
KS = (1, 3, 10)


def draw_queries(seed: int, size: int) -> QueryBatch:
    """None to five targets a user, warm, cold and in no catalogue, some of them twice."""
    generator = np.random.default_rng(seed)
    targets = [
        generator.integers(1, NUM_ITEMS, generator.integers(0, 6)).tolist() for _ in range(size)
    ]
    queries = make_queries([[]] * size, [[]] * size)
    queries.batch.num_events.copy_(torch.from_numpy(generator.integers(0, 20, size)))
    queries.batch.user_index.copy_(torch.arange(2, size + 2))
    return QueryBatch(queries.batch, queries.seen, Jagged.from_lists(targets))


def test_the_ranks_give_the_metrics_of_every_slice(tmp_path: Path) -> None:
    counts = torch.arange(NUM_ITEMS - 2)
    metrics = RankingMetrics(KS, NUM_ITEMS, counts, cold_item_count=12, beyond_accuracy=False)
    path = tmp_path / "ranks.parquet"
    with QueryRanksWriter(path) as writer:
        for number in range(3):
            queries = draw_queries(number, 40)
            scores = torch.rand(40, NUM_ITEMS - 2, generator=torch.Generator().manual_seed(number))
            lists = metrics.update(scores, queries)
            writer.add(("test", "model"), 40 * number, queries, lists, metrics)
    table = pq.read_table(path)
    assert len(table) == metrics.num_queries < 120
    slices = {"all": {"num_queries": len(table), "metrics": metrics.compute()}}
    slices |= metrics.compute_slices()
    for group, part in slices.items():
        values = values_of(table, group, KS).reshape(len(table), -1)
        counted = ~np.isnan(values[:, 0])
        assert 0 < counted.sum() == part["num_queries"]
        means = dict(zip(metric_names(KS), values[counted].mean(axis=0), strict=True))
        assert means == pytest.approx(part["metrics"])


def moved(queries: QueryBatch, order: list[int]) -> QueryBatch:
    """The queries in another order."""
    bags = [
        queries.targets.values[start:stop].tolist()
        for start, stop in zip(
            queries.targets.offsets[:-1].tolist(), queries.targets.offsets[1:].tolist(), strict=True
        )
    ]
    batch = make_queries([[]] * len(order), [[]] * len(order)).batch
    batch.user_index.copy_(queries.batch.user_index[order])
    return QueryBatch(batch, queries.seen, Jagged.from_lists([bags[place] for place in order]))


def hash_of(*parts: QueryBatch, vocabulary: str = "v") -> str:
    same = QueriesHash([vocabulary])
    for part in parts:
        same.add(part)
    return same.hexdigest()


def test_the_hash_is_that_of_users_and_targets_in_any_order() -> None:
    queries = draw_queries(0, 6)
    whole = hash_of(queries)
    turned = [5, 3, 4, 0, 2, 1]
    assert hash_of(moved(queries, turned)) == whole
    assert hash_of(moved(queries, turned[:2]), moved(queries, turned[2:])) == whole
    assert hash_of(queries, vocabulary="w") != whole
    assert hash_of(moved(queries, [0, 1, 2, 3, 4])) != whole
    # the targets of two users changed hands
    other = moved(queries, turned)
    other.batch.user_index.copy_(queries.batch.user_index)
    assert hash_of(other) != whole
    # users without an index of their own are told apart by their order
    queries.batch.user_index.fill_(1)
    assert hash_of(moved(queries, turned)) != hash_of(queries)
