"""One training step: look up, loss over all ranks, backward, update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from distrec import pulse
from distrec.batch import Batch
from distrec.errors import DataError, TrainingError
from distrec.sharding.dense import DenseGradients
from distrec.sharding.exchange import Asked
from distrec.sharding.lookup import Request
from distrec.trainer import bad_loss
from distrec.trainer.schedule import rate_share
from distrec.trainer.setup import Run

# keeps these draws apart from other uses of the same seed
_STREAM = 0x53544550


@dataclass(frozen=True)
class StepResult:
    """What a step did, summed over all ranks.

    Args:
        loss: Sum of the weighted losses, without L2. With several tasks their weighted means count,
            times `weight`.
        l2: Sum of the L2 term.
        weight: Sum of the weights.
        num_rows: Examples.
        learning_rate: Of the dense part.
        gradient_norm: Of the dense part, before clipping.
        is_stopped: Whether any rank was told to stop.
        skipped: Why nothing of the step was applied; empty if it was.
    """

    loss: float
    l2: float
    weight: float
    num_rows: int
    learning_rate: float
    gradient_norm: float
    is_stopped: bool
    skipped: str = ""


@dataclass(frozen=True)
class PreparedBatch:
    """A batch with the rows it needs, before any row is looked up.

    Args:
        batch: This rank's examples, on the device.
        requests: Of its look-up.
        asked: Of the look-up whose row numbers were sent ahead.
        random_states: Of the generators after the requests were drawn, when they were drawn ahead.
    """

    batch: Batch
    requests: Mapping[str, Request]
    asked: Asked | None = None
    random_states: tuple[Tensor, ...] = ()


def prepare_batch(
    run: Run, batch: Batch, global_step: int, ahead: bool = False, with_rows: bool = False
) -> PreparedBatch:
    """Draw what a step needs; with `ahead`, which is collective, send its row numbers already.

    Args:
        run: What trains.
        batch: This rank's examples, perhaps none.
        global_step: Updates done before the step.
        ahead: Whether another step is still being computed.
        with_rows: Send the rows as well, see `EmbeddingTables.ask`.
    """
    collectives = run.collectives
    torch.manual_seed(step_seed(run.config.seed, global_step, collectives.world.rank))
    batch = batch.to(collectives.device)
    requests = run.objective.requests(batch, global_step)
    if not ahead:
        return PreparedBatch(batch, requests)
    return PreparedBatch(
        batch, requests, run.tables.ask(requests, with_rows), _random_states(collectives.device)
    )


def _random_states(device: torch.device) -> tuple[Tensor, ...]:
    if device.type == "cuda":
        return torch.get_rng_state(), torch.cuda.get_rng_state(device)
    return (torch.get_rng_state(),)


def _set_random_states(states: tuple[Tensor, ...], device: torch.device) -> None:
    if states:
        torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def train_step(
    run: Run,
    batch: Batch | PreparedBatch,
    global_step: int,
    place: str,
    before_backward: Callable[[], None] = lambda: None,
    stop: bool = False,
    may_skip: bool = False,
) -> StepResult:
    """Do one optimizer update. Collective.

    The loss of each task is divided by the sum of its weights over all ranks, and gradients are
    summed: N ranks compute what one computes.

    Args:
        run: What trains.
        batch: This rank's examples, perhaps none; or what `prepare_batch` made of them.
        global_step: Updates done so far.
        place: Where in the data that is, for errors.
        before_backward: Called once nothing random is left to do in this step.
        stop: Whether this rank was told to stop after this step.
        may_skip: Whether a step with a bad loss is left out, rather than an error; the same on all
            ranks.

    Raises:
        TrainingError: On every rank, when the loss is bad, or a gradient of any rank not finite. A
            loss is found before any row or parameter is updated.
        DataError: On every rank, when an id of any rank is outside its table or the catalogue.
    """
    config, collectives = run.config, run.collectives
    share = _set_rates(run, global_step)
    prepared = batch if isinstance(batch, PreparedBatch) else prepare_batch(run, batch, global_step)
    batch = prepared.batch
    run.optimizer.zero_grad()
    _set_random_states(prepared.random_states, collectives.device)
    dense = DenseGradients(run.model.parameters(), collectives)
    rows = run.tables(prepared.requests, prepared.asked, meanwhile=dense.start)
    frozen = run.model.frozen_tables
    if frozen:
        tables = {name: request.table for name, request in prepared.requests.items()}
        # their gradients are zeros, by which no optimizer of rows moves
        rows = {name: row.detach() if tables[name] in frozen else row for name, row in rows.items()}
    loss_sums, parts = run.objective.loss_sum(batch, rows, global_step)
    weight_sums = run.objective.weight_sum(batch).double()
    strangers = _num_strangers(batch, run.inputs.spec.num_items)
    further = [parts["loss"], parts["l2"], float(batch.batch_size), float(stop), float(strangers)]
    further += [parts[f"loss:{task}"] for task in run.model.tasks]
    own = torch.cat(
        [
            loss_sums.detach().double().sum().reshape(1),
            weight_sums[:1],
            weight_sums.new_tensor(further),
            weight_sums[1:],
        ]
    )
    totals = collectives.allreduce(own, "train.totals").tolist()
    task_losses, task_weights = _by_task(totals, len(run.model.tasks))
    if totals[6]:
        raise DataError(
            f"items of examples lie in [0, {run.inputs.spec.num_items}). Received: {totals[6]:.0f} "
            f"examples over all ranks with others, at {place}. Nothing of this step was applied. "
            "Run prepare again."
        )
    result = StepResult(
        loss=sum(
            factor * loss * (totals[1] / weight)
            for factor, loss, weight in zip(
                run.objective.task_weights, task_losses, task_weights, strict=True
            )
        ),
        l2=totals[3],
        weight=totals[1],
        num_rows=round(totals[4]),
        learning_rate=config.train.learning_rate * share,
        gradient_norm=0.0,
        is_stopped=totals[5] > 0,
    )
    if bad_loss.is_bad(totals, result.loss, result.weight, config):
        reason = bad_loss.explain(batch, own, totals, place, global_step + 1, run)
        if may_skip:
            return replace(result, loss=0.0, l2=0.0, weight=0.0, skipped=reason)
        raise TrainingError(
            "the loss is finite at every step, and at most train.bad_loss_above. Received: "
            f"{reason}. Nothing of this step was applied, and the last checkpoint is kept. Look "
            "for NaN or huge numbers in that batch, lower train.learning_rate and "
            "sharding.learning_rate, or leave some such steps out: train.on_bad_loss."
        )
    before_backward()
    (loss_sums / loss_sums.new_tensor(task_weights)).sum().backward()
    norm = dense.step(run.optimizer, config.train.gradient_clip)
    if not math.isfinite(norm):
        # rows were updated in the backward pass, so this step cannot be left out
        where = bad_loss.set_aside(batch, True, global_step + 1, run)
        raise TrainingError(
            f"gradients are finite at every step. Received: a norm of {norm} at {place}. {where}. "
            "The last checkpoint is kept. Lower train.learning_rate or sharding.learning_rate."
        )
    if run.average is not None:
        run.average.update(global_step + 1)
    return replace(result, gradient_norm=norm)


def _by_task(totals: Sequence[float], num_further: int) -> tuple[list[float], list[float]]:
    """Loss and weight of each task, out of what ranks have summed.

    Where nothing of a task counts, as in a batch without positives, its loss is zero and its weight
    is 1, by which it can be divided.
    """
    losses = [totals[2], *totals[7 : 7 + num_further]]
    weights = [totals[1], *totals[7 + num_further :]]
    return losses, [weight if weight > 0 else 1.0 for weight in weights]


def _num_strangers(batch: Batch, num_items: int) -> int:
    """Examples whose item is none; a loss over a catalogue would pass over them in silence."""
    return int(((batch.item_index < 0) | (batch.item_index >= num_items)).sum())


def step_seed(seed: int, global_step: int, rank: int) -> int:
    """Seed of everything that is drawn in one step on one rank."""
    state = np.random.SeedSequence((_STREAM, seed, global_step, rank)).generate_state(1, np.uint64)
    return int(state[0]) >> 1


def _set_rates(run: Run, global_step: int) -> float:
    train, sharding = run.config.train, run.config.sharding
    share = rate_share(
        global_step, run.total_steps, train.warmup_steps, train.decay,
        train.min_learning_rate_share,
    )  # fmt: skip
    for group in run.optimizer.param_groups:
        group["lr"] = train.learning_rate * share
    run.tables.set_learning_rate(sharding.learning_rate * share)
    return share


def _is_finite(rows: Tensor) -> bool:
    """Whether every number of a table's part is finite: (n, D), D may be 0."""
    pulse.beat()
    # neither a mask nor a copy of the table's size: NaN goes through, and infinity is an extreme
    if not rows.numel():
        return True
    return all(math.isfinite(float(extreme)) for extreme in torch.aminmax(rows))


def check_state(run: Run, place: str) -> None:
    """Refuse to keep weights that are not finite. Collective.

    Raises:
        TrainingError: On every rank, with the ranks and the tensors.
    """
    broken = [
        name for name, tensor in run.model.state_dict().items() if not bool(tensor.isfinite().all())
    ]
    for plan in run.inputs.plans:
        parts = run.tables.local_parts(plan.name)
        if not all(_is_finite(tensor) for _, *tensors in parts for tensor in tensors):
            broken.append(f"table {plan.name}")
    answers = run.collectives.gather_objects(broken, "train.state")
    found = [f"rank {rank}: {', '.join(names)}" for rank, names in enumerate(answers) if names]
    if found:
        raise TrainingError(
            f"weights are finite when they are saved. Received: {'; '.join(found)} at {place}. The "
            "last checkpoint is kept. Lower train.learning_rate or sharding.learning_rate."
        )
