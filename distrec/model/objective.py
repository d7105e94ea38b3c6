"""What training minimises: the loss of a batch as a sum, and the rows it needs looked up.

The sum is over this rank's examples and is not normalised: the trainer divides by the sum of
weights over all ranks, so that N ranks compute what one computes. Each of several tasks has a sum
and weights of its own, for a label may be known of some examples only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from distrec.batch import Batch, ItemBatch
from distrec.columns import FIRST_INDEX, LABEL
from distrec.config import LossConfig
from distrec.dataset import TrainRows
from distrec.errors import ConfigError, DataError
from distrec.model.adversarial import perturbed_rows
from distrec.model.augmentation import augment
from distrec.model.contrastive import contrastive_loss, draw_views, view_requests
from distrec.model.l2 import SquaredNorms
from distrec.model.loss_kind import LABELLED, resolve_loss_kind
from distrec.model.losses import (
    LeftOut,
    binary_loss,
    calibration_exponent,
    pairwise_loss,
    sampled_binary_loss,
    sampled_loss_sum,
    sampled_softmax_loss,
    softmax_loss_sum,
    squared_loss,
    task_loss_sums,
)
from distrec.model.ordinal import ordinal_loss
from distrec.model.positions import Positions, at, window_targets
from distrec.model.sampling import NegativeSampler
from distrec.model.step_inputs import Candidates, Inputs, Targets, select_items
from distrec.model.unified import UnifiedModel
from distrec.sharding.collectives import Collectives, OneProcess
from distrec.sharding.lookup import Request


def _on_device(items: ItemBatch, device: torch.device) -> ItemBatch:
    return ItemBatch(
        item_index=items.item_index.to(device),
        count=items.count.to(device),
        recent=items.recent.to(device),
        ids={name: bags.to(device) for name, bags in items.ids.items()},
        dense=items.dense.to(device),
    )


class Objective:
    """The loss of a model on a catalogue. Create it once the model is on its device.

    binary and squared learn from every example whose item is in the catalogue; the other losses
    learn from positives (label > 0) whose item train has seen. The others have weight 0. Of windows
    every event is a target, predicted from the events before it.

    Args:
        model: The model, whose dense part is trained by the caller.
        catalogue: All items, item_index ascending from FIRST_INDEX without a gap.
        config: Section [loss].
        seed: Decides the sampled negatives, with the step.
        train_rows: Of the dataset's manifest: what the examples are.
        collectives: Of the job; by default one process.
        similar: int64, (num_items, n): what may stand in for each item, where model.augment has
            substitute.
        exclude_seen: Whether an example's history is left out of its candidates, but for its item;
            without effect on losses of labels.

    Attributes:
        task_weights: Of the T tasks; one task of weight 1 without model.multi_task.

    Raises:
        ConfigError: The loss cannot be had with these settings.
        DataError: The catalogue is not whole, or train saw no item.
    """

    def __init__(
        self,
        model: UnifiedModel,
        catalogue: ItemBatch,
        config: LossConfig,
        seed: int,
        train_rows: TrainRows = "events",
        collectives: Collectives | None = None,
        similar: Tensor | None = None,
        exclude_seen: bool = False,
    ) -> None:
        self.model = model
        self.config = config
        self.train_rows = train_rows
        self.kind = resolve_loss_kind(model.spec, config)
        self._check(catalogue)
        if model.config.pair_crosses and self.kind not in LABELLED:
            raise ConfigError(
                "model.pair_crosses is for losses of labels, binary and squared. Received: "
                f"pair_crosses = {model.config.pair_crosses} with {self.kind}. Set it to 0."
            )
        if model.tasks and self.kind != "binary":
            raise ConfigError(
                "model.multi_task is for the loss of labels, binary. Received: "
                f'{model.config.multi_task} with {self.kind}. Set loss.kind = "binary".'
            )
        if (self.kind == "ordinal") != (model.thresholds is not None):
            raise ConfigError(
                'loss.kind = "ordinal" and model.rating_levels go together. Received: '
                f"rating_levels = {model.config.rating_levels} with {self.kind}. Set both, or "
                "neither."
            )
        if config.towers and self.kind in LABELLED:
            raise ConfigError(
                "loss.towers is for losses over the catalogue. Received: towers = "
                f"{config.towers} with {self.kind}. Set it to 0."
            )
        if config.exclude_seen and self.kind in LABELLED:
            raise ConfigError(
                "loss.exclude_seen is for losses over the catalogue. Received: exclude_seen = "
                f"true with {self.kind}. Set it to false."
            )
        self._norms = SquaredNorms(model, config)
        self._trains_towers = config.towers > 0 and len(model.tower_names) > 1
        self.device = model.global_bias.device
        self.collectives = collectives or OneProcess(self.device)
        self.task_weights = [config.task_weights.get(task, 1.0) for task in (LABEL, *model.tasks)]
        self._excludes_seen = exclude_seen
        self._similar = None if similar is None else similar.to(self.device)
        # cold items have no positives: as negatives they would only learn to be bad
        last = model.spec.num_items if self.kind in LABELLED else model.spec.num_trained_items
        self._num_candidates = last - FIRST_INDEX
        is_item = ~catalogue.is_free[: self._num_candidates].cpu()
        places = is_item.nonzero()[:, 0]
        # position in the catalogue -> among the candidates; -1 of free indexes, which are none
        if bool(is_item.all()):
            self._places = None
        else:
            self._places = torch.where(is_item, is_item.cumsum(0) - 1, -1).to(self.device)
        self._items = _on_device(select_items(catalogue, places), self.device)
        self._sampler = NegativeSampler(
            self._items.count, config.negatives, config.sampling_power, config.num_negatives, seed
        )
        self._latest_inputs: tuple[Batch, Inputs] | None = None
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
        """The rows that `loss_sum` needs, for one look-up. Collective with in-batch negatives."""
        items = self._candidates(batch, global_step).items
        inputs = self._inputs(batch)
        requests = self.model.user_requests(inputs.batch, inputs.targets.positions)
        if inputs.views is not None:
            requests |= view_requests(self.model, inputs.views)
        requests |= self.model.item_requests(items)
        self._norms.note(requests)
        return requests

    def loss_sum(
        self, batch: Batch, rows: Mapping[str, Tensor], global_step: int
    ) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum of the loss over this rank's examples, of each task.

        Args:
            batch: B examples; zero are allowed, and give zeros with zero gradients everywhere.
            rows: What the look-up gave for `requests(batch, global_step)`.
            global_step: The same on every rank.

        Returns:
            Of each task the sum times its weight, float32, (T,), the first with all that is added
            to the loss. And as numbers, without the tasks' weights, "l2", the first task's loss
            alone, with those of loss.towers, as "loss", and those of others as "loss:<task>".
        """
        candidates = self._candidates(batch, global_step)
        inputs = self._inputs(batch)
        moves_rows = self.config.adversarial > 0
        with self._draws_again() if moves_rows else nullcontext():
            losses = self._predict(inputs, candidates, rows)
        l2 = self._squared_norms(inputs, candidates, rows)
        added = l2
        divergence = self.model.take_divergence() if self.model.training else None
        if divergence is not None:
            weight = self.model.config.autoencoder_kl
            weight *= min(1.0, (global_step + 1) / self.model.config.autoencoder_kl_steps)
            added = added + weight * (inputs.targets.weights * divergence).sum()
        total = losses
        if moves_rows:
            moved = perturbed_rows(
                losses[0],
                inputs.batch,
                rows,
                self.model.history_row_names(),
                self.config.adversarial,
            )
            total = total + self._predict(inputs, candidates, {**rows, **moved})
        if inputs.views is not None:
            temperature = self.config.contrastive_temperature
            mean = contrastive_loss(self.model, inputs.views, rows, temperature)
            # a mean of users counts as much as the examples that they stand for
            added = added + self.config.contrastive * inputs.targets.weights.sum() * mean
        total = total * total.new_tensor(self.task_weights)
        names = ("loss", *(f"loss:{task}" for task in self.model.tasks))
        parts = dict(zip(names, losses.tolist(), strict=True))
        return torch.cat([total[:1] + added, total[1:]]), {**parts, "l2": float(l2.detach())}

    def _draws_again(self) -> AbstractContextManager[None]:
        """What is drawn inside is drawn once more after it: another model would be attacked."""
        return torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])

    def _predict(
        self, inputs: Inputs, candidates: Candidates, rows: Mapping[str, Tensor]
    ) -> Tensor:
        """The weighted sum of the loss of each task, (T,)."""
        own_users: list[Tensor] | None = [] if self._trains_towers else None
        own_items: list[Tensor] | None = [] if self._trains_towers else None
        positions = inputs.targets.positions
        users = self.model.encode_users(inputs.batch, rows, positions, own_users)
        items = self.model.encode_items(candidates.items, rows, own_items)
        if self.model.tasks:
            scores = self.model.task_scores(users, items[candidates.positives])
            targets, smoothing = inputs.targets, self.config.label_smoothing
            return task_loss_sums(scores, targets.labels, targets.weights, smoothing)
        total = self._loss_sum(inputs.targets, candidates, users, items)
        # a weight of the examples, for the losses' gradients are not scaled twice
        weights = inputs.targets.weights * self.config.towers
        targets = replace(inputs.targets, weights=weights)
        for own in zip(own_users or (), own_items or (), strict=True):
            total = total + self._loss_sum(targets, candidates, *own)
        return total.reshape(1)

    def _squared_norms(
        self, inputs: Inputs, candidates: Candidates, rows: Mapping[str, Tensor]
    ) -> Tensor:
        """The weighted sum of the squared norms of the rows that each target uses."""
        targets = inputs.targets
        of_users = at(targets.positions, self._norms.of_users(inputs.batch, rows))
        of_items = self._norms.of_items(candidates.items, rows)
        return (targets.weights * (of_users + of_items[candidates.positives])).sum()

    def weight_sum(self, batch: Batch) -> Tensor:
        """This rank's part of what the trainer divides the sum of each task by: float32, (T,)."""
        targets = self._inputs(batch).targets
        weights = targets.weights.sum().reshape(1)
        known = ~targets.labels[:, 1:].isnan()
        return torch.cat([weights, (targets.weights.unsqueeze(1) * known).sum(dim=0)])

    def _loss_sum(
        self, targets: Targets, candidates: Candidates, users: Tensor, items: Tensor
    ) -> Tensor:
        smoothing, labels = self.config.label_smoothing, targets.labels[:, 0]
        if self.kind == "softmax":
            return softmax_loss_sum(
                users, items, candidates.positives, targets.weights, smoothing, candidates.left_out
            )
        if self.kind in LABELLED:
            scores = self.model.pair_scores(users, items[candidates.positives])
            scale = self.model.spec.rating_scale
            if self.model.thresholds is not None and scale is not None:
                thresholds = self.model.thresholds()
                losses = ordinal_loss(scores, labels, thresholds, scale)
                return (targets.weights * losses).sum()
            if self.kind == "squared" and scale is not None:
                return (targets.weights * squared_loss(scores, labels, scale)).sum()
            return (targets.weights * binary_loss(scores, labels, smoothing)).sum()
        return sampled_loss_sum(
            self._sampled_loss(candidates), users, items, candidates.positives,
            candidates.negatives, targets.weights, candidates.left_out,
        )  # fmt: skip

    def _sampled_loss(self, candidates: Candidates) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Of positive scores, negative scores and accidental hits."""
        times, log_weights = candidates.times, candidates.log_weights
        if self.kind == "sampled_softmax":
            return lambda own, others, hits: sampled_softmax_loss(own, others, log_weights, hits)
        if self.kind == "bpr":
            return lambda own, others, hits: pairwise_loss(own, others, times, hits)
        beta = calibration_exponent(
            float(times.sum()), len(self._items.item_index), self.config.calibration
        )
        return lambda own, others, hits: sampled_binary_loss(own, others, times, hits, beta)

    def _inputs(self, batch: Batch) -> Inputs:
        # asked for more than once a step, and partly drawn
        if self._latest_inputs is None or self._latest_inputs[0] is not batch:
            changed, seen, views, config = batch, batch, None, self.model.config
            if self.model.training:
                changed, seen = augment(
                    batch, config.augment, config.augment_rate, config.augment_share, self._similar
                )
                if self.config.contrastive and self.model.history_towers():
                    views = draw_views(batch, self.model, self._similar)
            self._latest_inputs = batch, Inputs(seen, self._find_targets(changed), views)
        return self._latest_inputs[1]

    def _find_targets(self, batch: Batch) -> Targets:
        positions, item_index = None, batch.item_index
        if self.train_rows == "windows":
            positions, item_index = window_targets(batch)
        places = item_index - FIRST_INDEX
        counts = (places >= 0) & (places < self._num_candidates)
        labels = at(positions, batch.labels[:, : len(self.task_weights)])
        places = torch.where(counts, places, 0)
        if self.kind not in LABELLED:
            counts = counts & (labels[:, 0] > 0)
        return Targets(positions, places, labels, at(positions, batch.weights) * counts)

    def _candidates(self, batch: Batch, global_step: int) -> Candidates:
        # asked for twice a step, for the requests and for the loss
        if self._latest is not None and self._latest[0] is batch and self._latest[1] == global_step:
            return self._latest[2]
        candidates = self._choose(batch, global_step)
        self._latest = (batch, global_step, candidates)
        return candidates

    def _choose(self, batch: Batch, global_step: int) -> Candidates:
        targets = self._inputs(batch).targets
        wanted = targets.places
        if self._places is not None:
            wanted = self._places[wanted].clamp(min=0)
        none, no_weights = wanted.new_empty(0), torch.empty(0)
        if self.kind == "softmax":
            left_out = self._left_out(batch, targets.positions)
            return Candidates(self._items, wanted, none, no_weights, no_weights, left_out)
        if self.kind in LABELLED:
            needed, places = torch.unique(wanted, return_inverse=True)
            items = select_items(self._items, needed)
            return Candidates(items, places, none, no_weights, no_weights)
        of_all = None
        if self._sampler.uses_targets:
            of_all = self.collectives.allgather(wanted[targets.weights > 0], "loss.targets")
        drawn = self._sampler.draw(global_step, of_all)
        both = torch.cat([wanted, drawn.places.to(self.device)])
        needed, places = torch.unique(both, return_inverse=True)
        return Candidates(
            items=select_items(self._items, needed),
            positives=places[: len(wanted)],
            negatives=places[len(wanted) :],
            times=drawn.times.to(self.device),
            log_weights=drawn.log_weights.to(self.device),
            left_out=self._left_out(batch, targets.positions, drawn.places.to(self.device)),
        )

    def _left_out(
        self, batch: Batch, positions: Positions | None, drawn: Tensor | None = None
    ) -> LeftOut | None:
        """What each target's history holds: places among the candidates, or among those drawn."""
        if not self._excludes_seen:
            return None
        history = self._inputs(batch).batch.history
        places = history.values - FIRST_INDEX
        counts = (places >= 0) & (places < self._num_candidates)
        columns = torch.where(counts, places, 0)
        if self._places is not None:
            columns = self._places[columns]
            counts = counts & (columns >= 0)
        if drawn is not None:
            counts = counts & torch.isin(columns, drawn)
            columns = torch.searchsorted(drawn, columns)
        lengths = history.lengths if positions is None else positions.length
        starts = at(positions, history.offsets[:-1])
        return LeftOut(torch.where(counts, columns, -1), starts, lengths)
