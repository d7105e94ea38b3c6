"""Early stopping: which validation was the best, and whether to go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class EarlyStopping:
    """Remembers the best validation.

    Args:
        patience: Validations without an improvement after which to stop; 0: never.
        higher_is_better: Of the metric.
        best_value: Of the best validation so far.
        best_step: Its global step.
        num_without_improvement: Validations since.
        newest_is_best: Whatever the values, for a choice by them would tell of the data.
    """

    patience: int
    higher_is_better: bool
    best_value: float | None = None
    best_step: int = 0
    num_without_improvement: int = 0
    newest_is_best: bool = False

    def update(self, global_step: int, value: float) -> bool:
        """Add a validation; whether it is the best so far (equal is no improvement)."""
        better = (
            self.newest_is_best
            or self.best_value is None
            or (value > self.best_value if self.higher_is_better else value < self.best_value)
        )
        if better:
            self.best_value, self.best_step = value, global_step
            self.num_without_improvement = 0
        else:
            self.num_without_improvement += 1
        return better

    @property
    def should_stop(self) -> bool:
        """Whether patience is at its end."""
        return 0 < self.patience <= self.num_without_improvement

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "best_value": self.best_value,
            "best_step": self.best_step,
            "num_without_improvement": self.num_without_improvement,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        value = state.get("best_value")
        self.best_value = None if value is None else float(value)
        self.best_step = int(state.get("best_step", 0))
        self.num_without_improvement = int(state.get("num_without_improvement", 0))
