"""The section of `distrec tune`: which keys are searched, over what, and how often."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from distrec.config.section import Section


class RangeConfig(Section):
    """The values that one key may take: low to high, or choices."""

    low: int | float | None = None
    """Lowest value."""
    high: int | float | None = None
    """Highest value."""
    log: bool = False
    """Search the logarithm: for rates and penalties."""
    step: int | float | None = None
    """Only low, low + step, low + 2 step ..."""
    choices: tuple[Any, ...] = ()
    """Instead of a range: these values. Required for keys that are no numbers."""

    @model_validator(mode="after")
    def _possible(self) -> RangeConfig:
        given = {name: getattr(self, name) for name in ("low", "high", "step", "choices")}
        if self.choices:
            if self.low is not None or self.high is not None or self.step is not None or self.log:
                raise ValueError(
                    f"a range has low and high, or choices. Received: {given}. Remove one of them"
                )
            if len(self.choices) < 2:
                raise ValueError(f"choices are at least two. Received: {list(self.choices)}")
            return self
        low, high = self.low, self.high
        if low is None or high is None or not math.isfinite(high - low) or low >= high:
            raise ValueError(f"a range has low < high, or choices. Received: {given}")
        if self.log and (low <= 0 or self.step is not None):
            raise ValueError(f"log needs low > 0, and no step. Received: {given}")
        if self.step is not None and not 0 < self.step <= high - low:
            raise ValueError(f"a step is above 0 and fits between low and high. Received: {given}")
        return self


class TuneConfig(Section):
    """A search over keys of training for the best valid metric; test is not looked at."""

    trials: int = Field(default=30, ge=1)
    """Configurations tried, over all calls; the file's own values come first."""
    parameters: Mapping[str, RangeConfig] = {}
    """Key -> its range, such as "train.learning_rate" = { low = 1e-4, high = 1e-1, log = true }."""
