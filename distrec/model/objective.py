"""What training minimises: the loss of a batch as a sum, and the rows it needs looked up.

The sum is over this rank's examples and is not normalised: the trainer divides by the sum of
weights over all ranks, so that N ranks compute what one computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distrec.batch import Batch, ItemBatch, Jagged
from distrec.columns import FIRST_INDEX
from distrec.config import LossConfig
from distrec.errors import ConfigError, DataError
from distrec.model.losses import binary_loss, sampled_softmax_loss, softmax_loss
from distrec.model.sampling import NegativeSampler
from distrec.model.spec import ModelSpec
from distrec.model.unified import UnifiedModel
from distrec.sharding.lookup import Request

LossKind = Literal["softmax", "sampled_softmax", "binary"]


@dataclass(frozen=True)
class Candidates:
    """The items that a step encodes.

    Args:
        items: M items.
        positives: int64, (B,): place of each example's item among them; 0 where it has none.
        has_place: bool, (B,): whether the example's item is among those that the loss knows.
        negatives: int64, (S,): places of the sampled items; empty without sampling.
        log_weights: float32, (S,): of the sampled items, see `sampled_softmax_loss`.
    """

    items: ItemBatch
    positives: Tensor
    has_place: Tensor
    negatives: Tensor
    log_weights: Tensor


def resolve_loss_kind(spec: ModelSpec, config: LossConfig) -> LossKind:
    """The loss that kind = "auto" stands for.

    Raises:
        ConfigError: label_smoothing together with the sampled softmax.
    """
    kind: LossKind
    if config.kind != "auto":
        kind = config.kind
    elif spec.has_labels:
        kind = "binary"
    elif spec.num_trained_items - FIRST_INDEX <= config.full_softmax_items:
        kind = "softmax"
    else:
        kind = "sampled_softmax"
    if kind == "sampled_softmax" and config.label_smoothing > 0:
        raise ConfigError(
            "label smoothing spreads the target over all items, which a sample does not have. "
            f"Received: loss.label_smoothing = {config.label_smoothing} with sampled_softmax. Set "
            "it to 0, or loss.kind to softmax."
        )
    return kind


def select_items(items: ItemBatch, positions: Tensor) -> ItemBatch:
    """The items at the given positions (int64, (M,)), in that order."""
    return ItemBatch(
        item_index=items.item_index[positions],
        count=items.count[positions],
        ids={name: _select_bags(bags, positions) for name, bags in items.ids.items()},
        dense=items.dense[positions],
    )


def _select_bags(bags: Jagged, positions: Tensor) -> Jagged:
    lengths = bags.lengths[positions]
    selected = Jagged.from_lengths(torch.arange(int(lengths.sum()), device=lengths.device), lengths)
    # place in its own bag + start of the bag it comes from
    shift = bags.offsets[positions] - selected.offsets[:-1]
    values = bags.values[selected.values + torch.repeat_interleave(shift, lengths)]
    return Jagged(values, selected.offsets)


def _on_device(items: ItemBatch, device: torch.device) -> ItemBatch:
    return ItemBatch(
        item_index=items.item_index.to(device),
        count=items.count.to(device),
        ids={name: bags.to(device) for name, bags in items.ids.items()},
        dense=items.dense.to(device),
    )


class Objective:
    """The loss of a model on a catalogue. Create it once the model is on its device.

    softmax and sampled_softmax learn from positives (label > 0) whose item train has seen; binary
    from every example whose item is in the catalogue. The others have weight 0.

    Args:
        model: The model, whose dense part is trained by the caller.
        catalogue: All items, item_index ascending from FIRST_INDEX without a gap.
        config: Section [loss].
        seed: Decides the sampled negatives, with the step.

    Raises:
        ConfigError: The loss cannot be had with these settings.
        DataError: The catalogue is not whole, or train saw no item.
    """

    def __init__(
        self, model: UnifiedModel, catalogue: ItemBatch, config: LossConfig, seed: int
    ) -> None:
        self.model = model
        self.config = config
        self.kind = resolve_loss_kind(model.spec, config)
        self._check(catalogue)
        self.device = model.global_bias.device
        # cold items have no positives: as negatives they would only learn to be bad
        last = model.spec.num_items if self.kind == "binary" else model.spec.num_trained_items
        self._num_candidates = last - FIRST_INDEX
        is_item = ~catalogue.is_free[: self._num_candidates].cpu()
        places = is_item.nonzero()[:, 0]
        # position in the catalogue -> among the candidates, which free indexes are not
        self._places = None if bool(is_item.all()) else (is_item.cumsum(0) - 1).to(self.device)
        self._items = _on_device(select_items(catalogue, places), self.device)
        self._sampler = NegativeSampler(
            self._items.count, config.sampling_power, config.num_negatives, seed
        )
        self._latest: tuple[Batch, int, Candidates] | None = None

    def _check(self, catalogue: ItemBatch) -> None:
        spec = self.model.spec
        expected = torch.arange(FIRST_INDEX, spec.num_items)
        if not torch.equal(catalogue.item_index.cpu(), expected):
            raise DataError(
                f"the catalogue holds items {FIRST_INDEX} to {spec.num_items - 1}, ascending, each "
                f"once. Received: {len(catalogue.item_index)} other item indexes. Run prepare "
                "again."
            )
        if spec.num_trained_items <= FIRST_INDEX:
            raise DataError(
                "a model needs items in train. Received: none. Loosen the filters of [prepare]."
            )

    def requests(self, batch: Batch, global_step: int) -> dict[str, Request]:
        """The rows that `loss_sum` needs, for one look-up."""
        items = self._candidates(batch, global_step).items
        return {**self.model.user_requests(batch), **self.model.item_requests(items)}

    def loss_sum(
        self, batch: Batch, rows: Mapping[str, Tensor], global_step: int
    ) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum of the loss over this rank's examples.

        Args:
            batch: B examples; zero are allowed, and give a zero with zero gradients everywhere.
            rows: What the look-up gave for `requests(batch, global_step)`.
            global_step: The same on every rank.

        Returns:
            The sum with L2, float32 scalar, and its parts "loss" and "l2" as numbers.
        """
        candidates = self._candidates(batch, global_step)
        users = self.model.encode_users(batch, rows)
        items = self.model.encode_items(candidates.items, rows)
        weights = self._weights(batch, candidates.has_place)
        loss = (weights * self._losses(batch, candidates, users, items)).sum()
        squared_norms = (
            self.model.user_squared_norms(batch, rows)
            + self.model.item_squared_norms(candidates.items, rows)[candidates.positives]
        )
        l2 = self.config.l2 * (weights * squared_norms).sum()
        return loss + l2, {"loss": float(loss.detach()), "l2": float(l2.detach())}

    def weight_sum(self, batch: Batch) -> Tensor:
        """This rank's part of what the trainer divides by: float32 scalar."""
        return self._weights(batch, self._has_place(batch)).sum()

    def _losses(self, batch: Batch, candidates: Candidates, users: Tensor, items: Tensor) -> Tensor:
        if self.kind == "softmax":
            return softmax_loss(users @ items.T, candidates.positives, self.config.label_smoothing)
        scores = (users * items[candidates.positives]).sum(dim=1)
        if self.kind == "binary":
            return binary_loss(scores, batch.labels[:, 0], self.config.label_smoothing)
        is_positive = candidates.positives.unsqueeze(1) == candidates.negatives
        return sampled_softmax_loss(
            scores, users @ items[candidates.negatives].T, candidates.log_weights, is_positive
        )

    def _weights(self, batch: Batch, has_place: Tensor) -> Tensor:
        counts = has_place if self.kind == "binary" else has_place & (batch.labels[:, 0] > 0)
        return batch.weights * counts

    def _has_place(self, batch: Batch) -> Tensor:
        positions = batch.item_index - FIRST_INDEX
        return (positions >= 0) & (positions < self._num_candidates)

    def _candidates(self, batch: Batch, global_step: int) -> Candidates:
        # asked for twice a step, for the requests and for the loss
        if self._latest is not None and self._latest[0] is batch and self._latest[1] == global_step:
            return self._latest[2]
        candidates = self._choose(batch, global_step)
        self._latest = (batch, global_step, candidates)
        return candidates

    def _choose(self, batch: Batch, global_step: int) -> Candidates:
        has_place = self._has_place(batch)
        positions = torch.where(has_place, batch.item_index - FIRST_INDEX, 0)
        if self._places is not None:
            positions = self._places[positions].clamp(min=0)
        none = positions.new_empty(0)
        if self.kind == "softmax":
            return Candidates(self._items, positions, has_place, none, torch.empty(0))
        sampled, log_weights = none, torch.empty(0)
        if self.kind == "sampled_softmax":
            sampled, log_weights = self._sampler.draw(global_step)
        wanted = torch.cat([positions, sampled.to(self.device)])
        needed, places = torch.unique(wanted, return_inverse=True)
        return Candidates(
            items=select_items(self._items, needed),
            positives=places[: len(positions)],
            has_place=has_place,
            negatives=places[len(positions) :],
            log_weights=log_weights.to(self.device),
        )
