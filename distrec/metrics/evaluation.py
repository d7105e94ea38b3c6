"""Measuring a scorer on queries and on examples, the same way in training and in evaluate.

With sharded tables the look-up is collective: every rank calls these functions alike, with the same
catalogue and equally many batches, of zero rows if need be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from distrec import pulse
from distrec.batch import Batch, ItemBatch, Jagged, QueryBatch
from distrec.columns import FIRST_INDEX
from distrec.metrics.examples import ExampleMetrics
from distrec.metrics.ranking import RankingMetrics, slice_bags

SCORES_PER_BLOCK = 1 << 24
"""Scores held at once, 64 MiB."""

Scorer = Callable[[QueryBatch], Tensor | Iterable[Tensor]]
"""Scores of B queries for every catalogue item, (B, M), or that in blocks of consecutive rows."""
Lookup = Callable[[Mapping[str, Any]], Mapping[str, Tensor]]
"""As sharding.lookup.Lookup."""


class Encoder(Protocol):
    """What is needed of model.UnifiedModel."""

    tasks: tuple[str, ...]

    def user_requests(self, batch: Batch) -> Mapping[str, Any]:
        """Rows that encode_users needs."""

    def item_requests(self, items: ItemBatch) -> Mapping[str, Any]:
        """Rows that encode_items needs."""

    def encode_users(self, batch: Batch, rows: Mapping[str, Tensor]) -> Tensor:
        """User vectors, (B, W)."""

    def encode_items(self, items: ItemBatch, rows: Mapping[str, Tensor]) -> Tensor:
        """Item vectors, (M, W)."""

    def task_scores(self, users: Tensor, items: Tensor) -> Tensor:
        """Scores of B pairs of vectors, of each task: (B, T)."""


@contextmanager
def inference(model: torch.nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; the model's mode comes back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def slice_items(items: ItemBatch, start: int, stop: int, device: torch.device) -> ItemBatch:
    """Items start up to stop, on `device`."""

    def moved(bags: Jagged) -> Jagged:
        return slice_bags(bags, start, stop).to(device)

    return ItemBatch(
        item_index=items.item_index[start:stop].to(device),
        count=items.count[start:stop].to(device),
        recent=items.recent[start:stop].to(device),
        ids={name: moved(bags) for name, bags in items.ids.items()},
        dense=items.dense[start:stop].to(device),
    )


def encode_catalogue(
    model: Encoder, lookup: Lookup, items: ItemBatch, block: int, device: torch.device
) -> Tensor:
    """Vectors of all items, `block` items at a time.

    Call it inside `inference(model)`. Collective with sharded tables: the catalogue is the same on
    every rank, so the number of look-ups is too.

    Args:
        model: Encodes.
        lookup: Gives embedding rows.
        items: The whole catalogue, FIRST_INDEX first.
        block: Items in one look-up.
        device: Of the model.

    Returns:
        float32, (M, W), on `device`.
    """
    vectors = []
    num_items = len(items.item_index)
    for start in range(0, max(num_items, 1), block):
        pulse.beat()
        part = slice_items(items, start, min(start + block, num_items), device)
        vectors.append(model.encode_items(part, lookup(model.item_requests(part))))
    return torch.cat(vectors)


class ModelScorer:
    """Scores of a model: the inner products of user vectors with the vectors of the catalogue.

    Call it inside `inference(model)`.

    Args:
        model: Encodes users.
        lookup: Gives embedding rows; collective with sharded tables.
        item_vectors: float32, (M, W), from `encode_catalogue`; products are made where they lie.
        model_device: Where the model and the rows of the look-up lie; with item_vectors by default.
    """

    def __init__(
        self,
        model: Encoder,
        lookup: Lookup,
        item_vectors: Tensor,
        model_device: torch.device | None = None,
    ) -> None:
        self.model = model
        self.lookup = lookup
        self.item_vectors = item_vectors
        self.model_device = model_device or item_vectors.device

    def encode_users(self, batch: Batch) -> Tensor:
        """User vectors, float32 (B, W), where those of the items are."""
        batch = batch.to(self.model_device)
        users = self.model.encode_users(batch, self.lookup(self.model.user_requests(batch)))
        return users.to(self.item_vectors.device)

    def __call__(self, queries: QueryBatch) -> Iterator[Tensor]:
        """Scores (B, M) in blocks of rows. The look-up happens in the call, even for no rows."""
        users = self.encode_users(queries.batch)
        rows = rows_per_block(len(self.item_vectors))
        return (part @ self.item_vectors.T for part in users.split(rows) if len(part))

    def score_examples(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores of B examples and which of them have an item of the catalogue.

        Returns:
            float32, (B, T), of the label and of further tasks that the model predicts: log odds
            where the loss is binary, what `rating_of_score` takes where it is of ratings; bool,
            (B,). Where False the scores mean nothing.
        """
        users = self.encode_users(batch)
        positions = batch.item_index.to(users.device) - FIRST_INDEX
        is_known = (positions >= 0) & (positions < len(self.item_vectors))
        items = self.item_vectors[torch.where(is_known, positions, 0)].to(self.model_device)
        return self.model.task_scores(users.to(self.model_device), items), is_known


def rows_per_block(num_columns: int) -> int:
    """Rows of a block of scores that takes SCORES_PER_BLOCK."""
    return max(1, SCORES_PER_BLOCK // max(num_columns, 1))


def evaluate_queries(
    score: Scorer, queries: Iterable[QueryBatch], metrics: RankingMetrics
) -> RankingMetrics:
    """Add every query to the metrics, which are returned.

    On several ranks each one passes its share of the queries, and then
    ``metrics.load_state_vector(allreduce(metrics.state_vector()))`` gives all of them the whole.
    """
    for batch in queries:
        metrics.update(score(batch), batch)
    return metrics


def evaluate_examples(
    scorer: ModelScorer,
    batches: Iterable[Batch],
    metrics: ExampleMetrics,
) -> None:
    """Add every example whose item is in the catalogue to the metrics."""
    for batch in batches:
        scores, is_known = scorer.score_examples(batch)
        scores, is_known = scores.cpu(), is_known.cpu()
        labels, weights = batch.labels.cpu(), batch.weights.cpu()
        metrics.update(scores[is_known], labels[is_known], weights[is_known])
