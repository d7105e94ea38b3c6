"""What a run of training came to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TrainResult:
    """What training came to.

    Args:
        checkpoint: Directory of the best checkpoint; the newest one without validation data.
        metric: Name of the validation metric.
        value: Of the best checkpoint; None without validation data.
        steps: Optimizer updates of the run, those before a resume included.
        epochs: Passes over train that were finished.
        examples_per_second: Of this process' part of the run, over all ranks.
        seconds: Likewise.
        stopped_early: Whether patience ended the run.
        num_ranks: World size.
        epsilon: Of private training, what the run has spent.
    """

    checkpoint: Path
    metric: str
    value: float | None
    steps: int
    epochs: int
    examples_per_second: float
    seconds: float
    stopped_early: bool
    num_ranks: int
    epsilon: float | None = None

    def summary(self) -> dict[str, Any]:
        """The same, as JSON can hold it."""
        values = asdict(self)
        return {
            name: str(value) if isinstance(value, Path)
            else round(value, 6) if isinstance(value, float) else value
            for name, value in values.items()
            if name != "epsilon" or value is not None
        }  # fmt: skip
