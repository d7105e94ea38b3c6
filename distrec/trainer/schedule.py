"""The learning rate as a pure function of the step, so that a resumed run needs no state of it."""

from __future__ import annotations

import math
from typing import Literal


def rate_share(
    global_step: int,
    total_steps: int,
    warmup_steps: int,
    decay: Literal["none", "linear", "cosine"],
    min_share: float,
) -> float:
    """Share of the highest learning rate at one step; for the dense part and the tables alike.

    Args:
        global_step: Updates done before this one, in [0, total_steps).
        total_steps: Of the whole run.
        warmup_steps: The share rises from 1 / warmup_steps to 1 over these.
        decay: What follows.
        min_share: Share at the last step, when there is a decay.

    Returns:
        In (0, 1], or min_share if that is 0.

    Example:
        >>> [round(rate_share(step, 6, 2, "linear", 0.4), 6) for step in range(6)]
        [0.5, 1.0, 1.0, 0.8, 0.6, 0.4]
    """
    if global_step < warmup_steps:
        return (global_step + 1) / warmup_steps
    if decay == "none":
        return 1.0
    last = total_steps - 1
    progress = (global_step - warmup_steps) / max(1, last - warmup_steps)
    progress = min(max(progress, 0.0), 1.0)
    remaining = 1.0 - progress if decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return min_share + (1.0 - min_share) * remaining
