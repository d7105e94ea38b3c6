"""Which rows of which tables a training step looks up, asked of the model itself.

The model makes its requests for a sample of train and for the whole catalogue; here each request is
weighed with the chance that its example or item is in a rank's part of a step. So a new tower needs
nothing here. Memory follows the size of the sample and of the features' vocabularies, not that of
the catalogue: its rows are runs of one count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from distrec.batch import ItemBatch
from distrec.columns import FIRST_INDEX, PADDING_INDEX
from distrec.config import LossConfig
from distrec.dataset import TrainRows
from distrec.model import LABELLED, SAMPLED, ModelSpec, UnifiedModel, resolve_loss_kind
from distrec.model.contrastive import longest_histories, view_requests
from distrec.model.losses import block_rows
from distrec.model.positions import window_targets
from distrec.planner.dataset import Sample
from distrec.sharding.lookup import Request
from distrec.sharding.plan import TablePlan
from distrec.sharding.sizing import Floats, Integers, RowChances, log_absence_of_events

# entries kept before those of one row are added up
_PENDING = 2**22


@dataclass(frozen=True)
class TableLookups:
    """What one rank looks up of one table in one step.

    Args:
        num_ids: Expected rows of the ids of examples and items, repeated ones counted.
        rows: Chance of each row to be among them.
    """

    num_ids: float
    rows: RowChances


@dataclass(frozen=True)
class StepLookups:
    """What one rank looks up in one step.

    Args:
        tables: By table.
        num_candidates: Items that it is expected to encode.
        num_logits: Scores that it holds at one time.
        num_examples: Its part of the batch.
        num_targets: What it predicts of them: one each, or every event of windows.
        num_pairs: Pairs of events of one history that look at each other; 0 without that tower.
        num_views: Histories encoded once more, for loss.contrastive.
    """

    tables: Mapping[str, TableLookups]
    num_candidates: float
    num_logits: float
    num_examples: float
    num_targets: float
    num_pairs: float
    num_views: float


def step_lookups(
    model: UnifiedModel,
    plans: Sequence[TablePlan],
    loss: LossConfig,
    sample: Sample,
    catalogue: Callable[[], Iterator[ItemBatch]],
    num_rows: int,
    batch_rows: float,
    train_rows: TrainRows = "events",
    world_size: int = 1,
) -> StepLookups:
    """Expected look-ups of a rank's part of a full training step.

    Args:
        model: Of the dataset; its weights may be on the meta device.
        plans: Of its tables.
        loss: Section [loss].
        sample: Rows of train, at least `batch_rows` of them.
        catalogue: Gives all items in pieces, each time it is called.
        num_rows: Rows of train.
        batch_rows: A rank's part of a global batch.
        train_rows: What a row of train is.
        world_size: N; its ranks may share negatives that come of all their parts of the batch.
    """
    model.train()
    by_name = {plan.name: plan for plan in plans}
    tables = {name: _Collected() for name in by_name}
    share = batch_rows / sample.batch.batch_size
    num_sampled = sample.batch.batch_size
    positions = window_targets(sample.batch)[0] if train_rows == "windows" else None
    for name, requests in _by_table(model.user_requests(sample.batch, positions)).items():
        # one in `share` of the examples of the sample is in the step
        log_absences = np.full(num_sampled, log_absence_of_events(np.array([1]), share)[0])
        _collect(tables[name], by_name[name], requests, log_absences, np.full(num_sampled, share))
    num_candidates = 0.0
    chance = _candidate_chance(model.spec, loss, catalogue, batch_rows / num_rows, world_size)
    for items in catalogue():
        log_absences = chance(items)
        chances = -np.expm1(log_absences)
        num_candidates += float(chances.sum())
        for name, requests in _by_table(model.item_requests(items)).items():
            _collect(tables[name], by_name[name], requests, log_absences, chances)
    found = {name: TableLookups(one.num_ids, one.chances()) for name, one in tables.items()}
    kind = resolve_loss_kind(model.spec, loss)
    num_targets = batch_rows if positions is None else share * len(positions.example)
    num_logits = num_targets
    if kind not in LABELLED:
        num_logits = min(num_targets, block_rows(math.ceil(num_candidates))) * num_candidates
    histories, num_views = [sample.batch.history], 0.0
    if loss.contrastive and model.history_towers():
        view = longest_histories(sample.batch)
        histories += [view.history] * 2
        num_views = share * 2 * view.batch_size
        # of the rows that the examples have, nearly all: they count as ids only
        for request in view_requests(model, (view, view)).values():
            ids = by_name[request.table].row_ids(request.ids.values)
            num_ids = share * float((ids != PADDING_INDEX).sum())
            one = found[request.table]
            found[request.table] = replace(one, num_ids=one.num_ids + num_ids)
    num_users = num_views / 2
    num_logits = max(num_logits, min(num_users, block_rows(math.ceil(num_users))) * num_users)
    num_pairs = 0.0
    if "sequence" in model.tower_names:
        num_pairs = share * sum(float((one.lengths + 1).square().sum()) for one in histories)
    return StepLookups(
        found, num_candidates, num_logits, batch_rows, num_targets, num_pairs, num_views
    )


def _by_table(requests: Mapping[str, Request]) -> dict[str, list[Request]]:
    grouped: dict[str, list[Request]] = {}
    for request in requests.values():
        grouped.setdefault(request.table, []).append(request)
    return grouped


def _candidate_chance(
    spec: ModelSpec,
    loss: LossConfig,
    catalogue: Callable[[], Iterator[ItemBatch]],
    share: float,
    world_size: int,
) -> Callable[[ItemBatch], Floats]:
    """Logarithm of the chance that an item is not among the items a rank encodes, by loss."""
    kind = resolve_loss_kind(spec, loss)
    power, total = 0.0, 0.0
    if loss.negatives == "popularity":
        power = loss.sampling_power
    num_draws = 0
    if kind in SAMPLED and loss.negatives != "in_batch":
        num_draws = loss.num_negatives
    if kind in SAMPLED and loss.negatives in ("in_batch", "mixed"):
        share *= world_size
    if num_draws:
        total = sum(
            float((_trained(items, spec) * (_counts(items) + 1.0) ** power).sum())
            for items in catalogue()
        )

    def log_absence(items: ItemBatch) -> Floats:
        if kind == "softmax":
            return np.where(_trained(items, spec), -np.inf, 0.0)
        counts = _counts(items)
        result = log_absence_of_events(counts, min(share, 1.0))
        if num_draws:
            drawn = (counts + 1.0) ** power / total
            result = result + _trained(items, spec) * num_draws * np.log1p(-drawn)
        return result

    return log_absence


def _trained(items: ItemBatch, spec: ModelSpec) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    trained = (items.item_index < spec.num_trained_items) & ~items.is_free
    flags: np.ndarray[tuple[int], np.dtype[np.bool_]] = trained.numpy()
    return flags


def _counts(items: ItemBatch) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Events in train; a free index has none."""
    counts: np.ndarray[tuple[int], np.dtype[np.int64]] = items.count.clamp(min=0).numpy()
    return counts


def _collect(
    collected: _Collected,
    plan: TablePlan,
    requests: list[Request],
    log_absences: Floats,
    chances: Floats,
) -> None:
    """Add what some examples or items ask of one table.

    Args:
        collected: Of the table.
        plan: Of the table.
        requests: One bag an example; a bag more, the last, is looked up in any case.
        log_absences: Of each example: float64, (B,).
        chances: Of each example to be there: float64, (B,).
    """
    certain = np.append(log_absences, -np.inf)
    # the unknown row comes with every piece, and counts as no look-up of an example
    present = np.append(chances, 0.0)
    bags = np.concatenate([request.ids.bag_of_value.numpy() for request in requests])
    ids = plan.row_ids(torch.cat([request.ids.values for request in requests])).numpy()
    # a compressed table has several rows an id
    bags = np.repeat(bags, len(ids) // max(len(bags), 1))
    bags, ids = bags[ids != PADDING_INDEX], ids[ids != PADDING_INDEX]
    collected.num_ids += float(present[bags].sum())
    if not len(ids):
        return
    pairs = torch.from_numpy(ids * len(certain) + bags)
    pairs = torch.unique(pairs).numpy()
    rows, place = np.unique(pairs // len(certain), return_inverse=True)
    collected.add(rows, _sums(place, certain[pairs % len(certain)]))


@dataclass
class _Collected:
    """Log-absences of rows that come piece by piece; those of one row add up."""

    num_ids: float = 0.0
    _pieces: list[RowChances] = field(default_factory=list)
    _reserved: Floats = field(default_factory=lambda: np.zeros(FIRST_INDEX))
    _last: int = -1
    _apart: bool = True
    _pending: int = 0

    def add(self, ids: Integers, log_absences: Floats) -> None:
        """Rows ascending, each once."""
        split = int(np.searchsorted(ids, FIRST_INDEX))
        self._reserved[ids[:split]] += log_absences[:split]
        if split == len(ids):
            return
        piece = RowChances.from_ids(ids[split:], log_absences[split:])
        # an item's own rows come in order; a feature's values come again and again
        self._apart &= int(piece.first_ids[0]) > self._last
        self._last = max(self._last, int(ids[-1]))
        self._pieces.append(piece)
        self._pending += len(piece.first_ids)
        if not self._apart and self._pending > _PENDING:
            self._add_up()

    def chances(self) -> RowChances:
        """Of all rows."""
        if not self._apart:
            self._add_up()
        reserved = np.flatnonzero(self._reserved)
        pieces = [RowChances.from_ids(reserved, self._reserved[reserved]), *self._pieces]
        joined = [
            np.concatenate([getattr(piece, name) for piece in pieces])
            for name in ("first_ids", "num_ids", "chances")
        ]
        return RowChances(joined[0], joined[1], -np.expm1(joined[2]))

    def _add_up(self) -> None:
        ids = np.concatenate([_all_ids(piece) for piece in self._pieces])
        logs = np.concatenate([np.repeat(p.chances, p.num_ids) for p in self._pieces])
        rows, place = np.unique(ids, return_inverse=True)
        self._pieces = [RowChances.from_ids(rows, _sums(place, logs))]
        self._pending = 0


def _sums(place: Integers, weights: Floats) -> Floats:
    sums: Floats = np.bincount(place, weights=weights).astype(np.float64, copy=False)
    return sums


def _all_ids(piece: RowChances) -> Integers:
    before = np.cumsum(piece.num_ids) - piece.num_ids
    shift = np.repeat(piece.first_ids - before, piece.num_ids)
    return shift + np.arange(len(shift))
