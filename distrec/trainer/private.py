"""Turns a run that is built into one that trains with differential privacy."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch

from distrec import checkpoint, columns, pulse
from distrec.checkpoint.together import together
from distrec.config import PrivacyConfig
from distrec.errors import CheckpointError, ConfigError
from distrec.private import (
    PrivateObjective,
    SecretNoise,
    Spending,
    UserReader,
    affordable_steps,
    draw_key,
    find_noise_multiplier,
)
from distrec.trainer.setup import Run

# rows whose first values are drawn at once
_ROWS_PER_DRAW = 1 << 12

logger = logging.getLogger("distrec.train")


def make_private(run: Run, saved: checkpoint.CheckpointManifest | None) -> Run:
    """The same run on drawn users, with noise, and no longer than epsilon allows. Collective.

    Args:
        run: As `setup.build` gives it, nothing loaded yet.
        saved: Manifest of the checkpoint that it goes on from; its noise goes on, too.

    Raises:
        ConfigError: On every rank: the dataset or the numbers do not go with [privacy].
        DataError: On every rank: nobody to learn from.
        CheckpointError: The checkpoint does not say what it has spent.
    """
    config, collectives, inputs = run.config, run.collectives, run.inputs
    privacy = config.privacy
    assert privacy is not None
    noise = SecretNoise(draw_key(collectives))
    together("train.private", lambda: _check(privacy, run), collectives)
    reader = together(
        "train.users",
        lambda: UserReader(
            config.dataset_directory, inputs.manifest, collectives.world, privacy.sample_rate, noise
        ),
        collectives,
    )
    total_steps = config.train.max_epochs * reader.steps_per_epoch
    if config.train.max_steps is not None:
        total_steps = min(total_steps, config.train.max_steps)

    def plan() -> tuple[float, int]:
        if not collectives.world.is_first:
            return 0.0, 0
        spending = _spending(privacy, saved, total_steps)
        return spending.noise_multiplier, affordable_steps(
            spending, privacy.target_epsilon, total_steps
        )

    # found by rank 0 for all, for another release of the accountant may find another number
    planned = together("train.noise", plan, collectives)
    multiplier, steps = collectives.broadcast_object(planned, "train.noise.found")
    objective = PrivateObjective(
        run.model, inputs.items, config.loss, privacy, multiplier, reader.expected_users, noise,
        config.seed, collectives,
    )  # fmt: skip
    if saved is None:
        _draw_rows(run, noise)
    spending = Spending(multiplier, privacy.sample_rate, privacy.delta)
    if collectives.world.is_first:
        logger.info(
            "private training: %d steps of %.0f users each, noise multiplier %.3f, epsilon %.3g at "
            "delta %g at the end",
            steps, reader.expected_users, multiplier, spending.epsilon(steps), privacy.delta,
        )  # fmt: skip
    return replace(run, objective=objective, reader=reader, total_steps=steps, spending=spending)


def _check(privacy: PrivacyConfig, run: Run) -> None:
    manifest = run.inputs.manifest
    num_users = manifest.num_users - columns.FIRST_INDEX
    if manifest.train_rows != "events":
        raise ConfigError(
            "private training takes a row of train an event. Received: a dataset of "
            f'{manifest.train_rows}. Prepare it with prepare.train_rows = "events".'
        )
    if privacy.delta * num_users >= 1:
        raise ConfigError(
            "privacy.delta is below one over the number of users, else giving some of them away "
            f"whole would count as private. Received: delta = {privacy.delta} with {num_users} "
            "users. Lower it."
        )


def _spending(
    privacy: PrivacyConfig, saved: checkpoint.CheckpointManifest | None, total_steps: int
) -> Spending:
    if saved is not None:
        if saved.privacy is None:
            raise CheckpointError(
                "a checkpoint of private training says what it has spent. Received: one that does "
                "not. Set train.resume = false."
            )
        multiplier = saved.privacy.noise_multiplier
    else:
        multiplier = privacy.noise_multiplier or find_noise_multiplier(privacy, total_steps)
    return Spending(multiplier, privacy.sample_rate, privacy.delta)


def _draw_rows(run: Run, noise: SecretNoise) -> None:
    """First values that do not depend on row numbers, which are ranks of popularity.

    Uniform like those of other runs, and the same whatever the number of ranks.
    """
    scale = run.config.sharding.init_scale
    for plan in run.inputs.plans:
        parts = run.tables.held_parts(plan.name)
        for start in range(0, plan.num_embeddings, _ROWS_PER_DRAW):
            pulse.beat()
            stop = min(start + _ROWS_PER_DRAW, plan.num_embeddings)
            shape = stop - start, plan.embedding_dim
            numbers = noise.uniform(shape[0] * shape[1], "rows", plan.name, start)
            values = torch.from_numpy(((2.0 * numbers - 1.0) * scale).reshape(shape))
            if start == 0:
                values[columns.PADDING_INDEX] = 0.0
            for ids, weights, _ in parts:
                own = np.arange(len(ids))[_between(ids, start, stop)]
                rows = np.asarray(ids)[own] - start
                weights[own] = values[rows].to(weights)
    run.tables.rows_were_written()


def _between(ids: range, start: int, stop: int) -> slice:
    """Places of the ids in [start, stop)."""
    first = max(0, -((ids.start - start) // ids.step))
    last = max(0, -((ids.start - stop) // ids.step))
    return slice(first, last)
