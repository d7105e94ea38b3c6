"""Ranking metrics over the whole catalogue, as sums that add up over batches and over ranks.

Conventions. The list of a user is the K best items that are not masked; T is the set of the user's
targets. A target that is in the catalogue counts once however often it stands there; every
UNKNOWN_INDEX counts as one target that cannot be found. Users without targets are left out. A
target is never masked, even if the user has seen it before. Each metric is a mean over users of:

- ``hr``: 1 if a target is in the list;
- ``recall``: targets in the list / |T|;
- ``precision``: targets in the list / K;
- ``ndcg``: sum of 1 / log2(1 + rank) over the targets in the list, over the same for a list that
  starts with min(K, |T|) targets;
- ``mrr``: 1 / rank of the first target in the list, or 0;
- ``map``: sum over the targets in the list of the precision at their rank, / min(K, |T|).

The denominators of ndcg and map are what the best possible list of K would give, so both reach 1.

Source: Järvelin and Kekäläinen 2002, doi:10.1145/582415.582418 (ndcg, with gains of 0 and 1);
Manning, Raghavan and Schütze 2008, Introduction to Information Retrieval, chapter 8 (the others).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from distrec.batch import Jagged, QueryBatch
from distrec.columns import FIRST_INDEX, PADDING_INDEX
from distrec.errors import DataError
from distrec.metrics.beyond_accuracy import BeyondAccuracy
from distrec.metrics.names import ACCURACY, AMONG_NEW, MetricName, metric_names, parse_metric_name
from distrec.metrics.top_k import top_k

__all__ = [
    "GROUPS",
    "MetricName",
    "RankingMetrics",
    "catalogue_positions",
    "list_metrics",
    "metric_names",
    "parse_metric_name",
    "recommend",
    "slice_bags",
    "without_seen",
]

# the whole, and slices: of users by num_events, of targets by their count in train;
# new items, which have none, are cold as well
GROUPS = ("all", "cold_users", "warm_users", "cold_items", "warm_items", "new_items")


def recommend(scores: Tensor, k: int, seen: Jagged | None, targets: Jagged | None) -> Tensor:
    """The k best items of each user among those that are not masked.

    Args:
        scores: float, (B, M), for the items FIRST_INDEX to FIRST_INDEX + M - 1; not changed.
        k: Length of the lists.
        seen: Item indexes to mask, B bags; None masks nothing.
        targets: Item indexes that stay, seen or not, B bags.

    Returns:
        int64 item indexes, (B, k), best first; PADDING_INDEX where a list is shorter.

    Raises:
        DataError: A score is NaN, or an index lies outside the catalogue.
    """
    chosen = top_k(without_seen(scores.float(), seen, targets), k)
    return torch.where(chosen < 0, PADDING_INDEX, chosen + FIRST_INDEX)


def without_seen(scores: Tensor, seen: Jagged | None, targets: Jagged | None) -> Tensor:
    """Scores with -inf where an item is masked; arguments and errors as of `recommend`."""
    num_rows, num_columns = scores.shape
    if seen is not None and len(seen.values):
        seen = seen.to(scores.device)
        rows, columns = catalogue_positions(seen, num_rows, num_columns, "seen")
        if targets is not None:
            cells = rows * num_columns + columns
            targets = targets.to(scores.device)
            kept = catalogue_positions(targets, num_rows, num_columns, "targets")
            masked = ~torch.isin(cells, kept[0] * num_columns + kept[1])
            rows, columns = rows[masked], columns[masked]
        scores = scores.index_put((rows, columns), scores.new_tensor(float("-inf")))
    return scores


def slice_bags(bags: Jagged, start: int, stop: int) -> Jagged:
    """The bags from start up to stop, without copying their values."""
    offsets = bags.offsets[start : stop + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    return Jagged(bags.values[first:last], offsets - first)


def catalogue_positions(
    bags: Jagged, num_rows: int, num_columns: int, name: str
) -> tuple[Tensor, Tensor]:
    """Row and column of each value that is an item of the catalogue.

    Args:
        bags: Item indexes; some may be UNKNOWN_INDEX.
        num_rows: Bags that are expected.
        num_columns: Items of the catalogue.
        name: Of the bags, for messages.

    Raises:
        DataError: There are other items, or more or fewer bags.
    """
    if bags.batch_size != num_rows:
        raise DataError(
            f"{name} has a bag for each row of the scores. Received: {bags.batch_size} bags, "
            f"{num_rows} rows."
        )
    known = bags.values >= FIRST_INDEX
    rows, columns = bags.bag_of_value[known], bags.values[known] - FIRST_INDEX
    if len(columns) and int(columns.max()) >= num_columns:
        raise DataError(
            f"an item index lies in [{FIRST_INDEX}, {num_columns + FIRST_INDEX}). Received: "
            f"{int(columns.max()) + FIRST_INDEX} in {name}. The dataset and the scores are not of "
            "the same catalogue: run prepare and train again."
        )
    return rows, columns


def list_metrics(hits: Tensor, num_targets: Tensor, ks: Sequence[int]) -> Tensor:
    """The accuracy metrics of each list.

    Args:
        hits: bool, (B, K), best first: whether the item is one of the user's targets; K >= max(ks).
        num_targets: int64, (B,), each >= 1: |T|.
        ks: Cut-offs.

    Returns:
        float64, (B, len(ACCURACY), len(ks)), in the order of `names.ACCURACY`.
    """
    width = hits.shape[1]
    hit = hits.double()
    ranks = torch.arange(1, width + 1, dtype=torch.float64)
    discount = 1.0 / torch.log2(ranks + 1.0)
    num_hits = hit.cumsum(1)
    gain = (hit * discount).cumsum(1)
    ideal = discount.cumsum(0)
    precision_at_hits = (hit * num_hits / ranks).cumsum(1)
    first = torch.where(num_hits == 1, hit / ranks, 0.0).cumsum(1)
    columns = []
    for k in ks:
        found = num_hits[:, k - 1]
        reachable = num_targets.clamp(max=k)
        columns.append(
            torch.stack(
                [
                    (found > 0).double(),
                    found / num_targets,
                    found / k,
                    gain[:, k - 1] / ideal[reachable - 1],
                    first[:, k - 1],
                    precision_at_hits[:, k - 1] / reachable,
                ],
                dim=1,
            )
        )
    return torch.stack(columns, dim=2)


class RankingMetrics:
    """Accumulates metrics over batches of queries; the states of several ranks add up.

    Args:
        ks: Cut-offs K.
        num_items: Rows of the item matrix, the manifest's num_items.
        item_counts: int64, (num_items - FIRST_INDEX,): events in train, as ItemBatch.count; below
            zero for free indexes, which are not recommended.
        exclude_seen: Mask what the user has already had.
        cold_user_events: A user with at most this many events is cold.
        cold_item_count: An item with at most this many train events is cold.
        item_vectors: float32, (num_items - FIRST_INDEX, F), of length one or zero, for diversity;
            None leaves diversity out.
        beyond_accuracy: Whether coverage, popularity and diversity are measured, for which the
            state holds len(ks) * num_items more numbers, and new items among themselves.
    """

    def __init__(
        self,
        ks: Sequence[int],
        num_items: int,
        item_counts: Tensor,
        *,
        exclude_seen: bool = True,
        cold_user_events: int = 10,
        cold_item_count: int = 10,
        item_vectors: Tensor | None = None,
        beyond_accuracy: bool = True,
    ) -> None:
        assert len(item_counts) == num_items - FIRST_INDEX, (len(item_counts), num_items)
        self.ks = tuple(sorted(set(ks)))
        self.num_items = num_items
        self.exclude_seen = exclude_seen
        self.cold_user_events = cold_user_events
        # by item index; what is in no catalogue has no train events
        self.is_cold = torch.ones(num_items, dtype=torch.bool)
        self.is_cold[FIRST_INDEX:] = item_counts.cpu() <= cold_item_count
        self.is_new = torch.ones(num_items, dtype=torch.bool)
        self.is_new[FIRST_INDEX:] = item_counts.cpu() <= 0
        is_new_item = item_counts.cpu() == 0
        ranks_new = beyond_accuracy and bool(is_new_item.any())
        self._is_no_new_item = ~is_new_item if ranks_new else None
        free = (item_counts.cpu() < 0).nonzero()[:, 0]
        self._free = free if len(free) else None
        # a group a row: queries, targets, then each metric at each K
        self._sums = torch.zeros(len(GROUPS), 2 + len(ACCURACY) * len(self.ks)).double()
        self._among_new = torch.zeros_like(self._sums[0])
        self._beyond = (
            BeyondAccuracy(self.ks, num_items, item_counts.cpu(), item_vectors)
            if beyond_accuracy
            else None
        )

    @property
    def num_queries(self) -> int:
        """Queries with at least one target so far."""
        return int(self._sums[0, 0])

    def is_cold_user(self, num_events: Tensor) -> Tensor:
        """Which of B users are cold: bool, (B,)."""
        return num_events.cpu() <= self.cold_user_events

    def update(self, scores: Tensor | Iterable[Tensor], queries: QueryBatch) -> Tensor:
        """Add B queries.

        Args:
            scores: float, (B, num_items - FIRST_INDEX), on any device; not changed. Or that in
                blocks of consecutive rows, when the whole is too large to be held at once.
            queries: The same B users.

        Returns:
            The lists: item indexes, int64, (B, max(ks)), best first, PADDING_INDEX at the end.

        Raises:
            DataError: A score is NaN, or the shapes or indexes do not fit the catalogue.
        """
        num_queries = queries.batch.batch_size
        lists = torch.full((num_queries, self.ks[-1]), PADDING_INDEX)
        start = 0
        for block in [scores] if isinstance(scores, Tensor) else scores:
            stop = start + len(block)
            self._check_shape(block, stop <= num_queries)
            seen = slice_bags(queries.seen, start, stop) if self.exclude_seen else None
            targets = slice_bags(queries.targets, start, stop)
            if self._free is not None:
                block = block.index_fill(1, self._free.to(block.device), -torch.inf)
            lists[start:stop] = recommend(block, self.ks[-1], seen, targets)
            if self._is_no_new_item is not None:
                self._update_among_new(block, seen, targets, self._is_no_new_item)
            start = stop
        if start != num_queries:
            raise DataError(
                f"every query is scored. Received: {num_queries} queries, {start} rows."
            )
        self.update_lists(lists, queries.targets, queries.batch.num_events)
        return lists

    def _update_among_new(
        self, block: Tensor, seen: Jagged | None, targets: Jagged, is_other: Tensor
    ) -> None:
        """Add the queries of a block that have a new item of the catalogue as a target."""
        items = targets.values.cpu()
        is_target = self.is_new[items] & (items >= FIRST_INDEX)
        bags = targets.bag_of_value.cpu()
        rows = torch.unique(bags[is_target])
        if not len(rows):
            return
        lengths = torch.bincount(bags[is_target], minlength=len(block))[rows]
        wanted = Jagged.from_lengths(items[is_target], lengths)
        scores = block[rows.to(block.device)].masked_fill(is_other.to(block.device), -torch.inf)
        seen = None if seen is None else seen.select(rows.to(seen.offsets.device))
        lists = recommend(scores, self.ks[-1], seen, wanted).cpu()
        cells = torch.arange(len(lists)).unsqueeze(1) * self.num_items + lists
        self._among_new += self._group(cells, *self.distinct_targets(wanted)).sum(0)

    def _check_shape(self, block: Tensor, fits: bool) -> None:
        width = self.num_items - FIRST_INDEX
        if not fits or block.dim() != 2 or block.shape[1] != width:
            raise DataError(
                f"scores have a row a query and a column for each of the {width} items of the "
                f"catalogue. Received: shape {tuple(block.shape)}."
            )

    def update_lists(self, lists: Tensor, targets: Jagged, num_events: Tensor) -> None:
        """Add B lists that are already made.

        Args:
            lists: Item indexes, int64, (B, max(ks)), best first, PADDING_INDEX at the end.
            targets: Item indexes, B bags.
            num_events: int64, (B,).
        """
        cpu = torch.device("cpu")
        lists, targets, num_events = lists.to(cpu), targets.to(cpu), num_events.to(cpu)
        bags, items = self.distinct_targets(targets)
        cold_target = self.is_cold[items]
        cold_user = self.is_cold_user(num_events)
        cells = torch.arange(len(lists)).unsqueeze(1) * self.num_items + lists
        whole = self._group(cells, bags, items)
        self._sums[0] += whole.sum(0)
        for row, users in ((1, cold_user), (2, ~cold_user)):
            self._sums[row] += whole[users].sum(0)
        for row, chosen in ((3, cold_target), (4, ~cold_target), (5, self.is_new[items])):
            self._sums[row] += self._group(cells, bags[chosen], items[chosen]).sum(0)
        if self._beyond is not None:
            self._beyond.update(lists[targets.lengths > 0])

    def distinct_targets(self, targets: Jagged) -> tuple[Tensor, Tensor]:
        """Bag and item of each target, a known item once a bag, an unknown one every time."""
        bags, items = targets.bag_of_value, targets.values
        if len(items) and not 0 <= int(items.min()) <= int(items.max()) < self.num_items:
            raise DataError(
                f"a target lies in [0, {self.num_items}). Received: {int(items.min())} to "
                f"{int(items.max())}."
            )
        unknown = items < FIRST_INDEX
        cells = torch.unique(bags[~unknown] * self.num_items + items[~unknown])
        known_bags = torch.div(cells, self.num_items, rounding_mode="floor")
        return (
            torch.cat([known_bags, bags[unknown]]),
            torch.cat([cells % self.num_items, items[unknown]]),
        )

    def _group(self, cells: Tensor, bags: Tensor, items: Tensor) -> Tensor:
        """One row a query, zeros where it has no target: 1, |T|, then the metrics. (B, 2 + ...)."""
        num_targets = torch.bincount(bags, minlength=len(cells))
        rows = torch.zeros(len(cells), self._sums.shape[1]).double()
        counted = num_targets > 0
        known = items >= FIRST_INDEX
        hits = torch.isin(cells[counted], bags[known] * self.num_items + items[known])
        rows[counted, 0] = 1.0
        rows[:, 1] = num_targets.double()
        rows[counted, 2:] = list_metrics(hits, num_targets[counted], self.ks).flatten(1)
        return rows

    def state_vector(self) -> Tensor:
        """Everything accumulated, float64, 1-D: the sum over ranks is the state of the whole."""
        parts = [self._sums.flatten(), self._among_new]
        if self._beyond is not None:
            parts.append(self._beyond.state_vector())
        return torch.cat(parts)

    def load_state_vector(self, state: Tensor) -> None:
        """Replace what was accumulated, by the sum of the vectors of metrics made alike."""
        state = state.to("cpu", torch.float64)
        assert state.shape == self.state_vector().shape, state.shape
        sizes = [self._sums.numel(), self._among_new.numel()]
        sums, among_new, rest = state.split([*sizes, len(state) - sum(sizes)])
        self._sums = sums.reshape(self._sums.shape).clone()
        self._among_new = among_new.clone()
        if self._beyond is not None:
            self._beyond.load_state_vector(rest)

    def compute(self) -> dict[str, float]:
        """Means over all queries by name (``ndcg@10``); zeros when there were no queries."""
        values = self._means(self._sums[0])
        if self._beyond is not None:
            values |= self._beyond.compute()
        return values

    def compute_slices(self) -> dict[str, dict[str, Any]]:
        """By slice: num_queries, num_targets, metrics.

        A slice of users holds whole queries. A slice of items keeps, of each query, the targets
        that are in the slice, and leaves out queries that have none. AMONG_NEW, where it is
        measured, has the targets that are new items of the catalogue, in lists of such items alone.
        """
        sums = dict(zip(GROUPS[1:], self._sums[1:], strict=True))
        if self._is_no_new_item is not None:
            sums[AMONG_NEW] = self._among_new
        return {
            name: {
                "num_queries": int(row[0]),
                "num_targets": int(row[1]),
                "metrics": self._means(row),
            }
            for name, row in sums.items()
        }

    def _means(self, row: Tensor) -> dict[str, float]:
        means = row[2:] / row[0].clamp(min=1.0)
        return dict(zip(metric_names(self.ks), means.tolist(), strict=True))
