"""Ticks of axes and the way numbers are written: pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

NumberFormat = Callable[[float], str]


def number(value: float) -> str:
    """Short text of a number: ``1,682``, ``0.0912``, ``1.2e-05``."""
    if not math.isfinite(value):
        return str(value)
    if value == round(value) and abs(value) < 1e15:
        return f"{round(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 1e-4:
        return f"{value:.4g}"
    return f"{value:.1e}"


def compact(value: float) -> str:
    """Shorter still, for ticks: ``20k``, ``1.5M``."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            unit = 1e3 if letter == "k" else size
            return f"{value / unit:.3g}{letter}"
    return number(value)


def metric(value: float) -> str:
    """A metric with four decimals, or in full thousands when it is large (mean popularity)."""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"


def num_bytes(value: float) -> str:
    """Bytes in binary units: ``1.4 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def seconds(value: float) -> str:
    """A duration: ``0.4 s``, ``12 s``, ``3 min 5 s``, ``2 h 7 min``."""
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def percent(share: float) -> str:
    """A share in per cent: ``12 %``, ``0.3 %``."""
    return f"{100 * share:.0f} %" if abs(share) >= 0.1 or share == 0 else f"{100 * share:.1f} %"


def linear_ticks(low: float, high: float, target: int = 5) -> list[float]:
    """Round numbers 1, 2 or 5 times a power of ten apart that cover [low, high]."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / target
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that cover [low, high], both positive; 1, 2, 5 when there are few of them."""
    first = math.floor(math.log10(low) + 1e-9)
    last = max(math.ceil(math.log10(high) - 1e-9), first + 1)
    if last - first > 2:
        step = math.ceil((last - first) / 6)
        return [10.0**power for power in range(first, last + step, step)]
    fine = [factor * 10.0**power for power in range(first, last) for factor in (1, 2, 5)]
    fine.append(10.0**last)
    below = [tick for tick in fine if tick <= low * (1 + 1e-9)]
    above = [tick for tick in fine if tick >= high * (1 - 1e-9)]
    kept = [tick for tick in fine if below[-1] <= tick <= above[0]]
    return kept if len(kept) > 1 else fine


@dataclass(frozen=True)
class Axis:
    """What an axis shows.

    Args:
        label: Quantity and unit.
        log: Logarithmic; the values are positive.
        zero: Start at zero.
        tick: Text of a tick.
        exact: Text of a value in a tooltip.
    """

    label: str
    log: bool = False
    zero: bool = False
    tick: NumberFormat = compact
    exact: NumberFormat = number


@dataclass(frozen=True)
class Scale:
    """Values to pixels.

    Args:
        ticks: Ascending; the first and the last are the ends of the scale.
        start: Pixel of the first tick.
        stop: Pixel of the last tick.
        log: Logarithmic.
    """

    ticks: Sequence[float]
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Pixel of a value."""
        low, high = self.ticks[0], self.ticks[-1]
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (value - low) / (high - low) * (self.stop - self.start)


def fit(axis: Axis, values: Iterable[float], start: float, stop: float, target: int = 5) -> Scale:
    """The scale on which all values lie; at least one value is needed."""
    kept = list(values)
    low, high = min(kept), max(kept)
    if axis.log:
        return Scale(log_ticks(low, high), start, stop, log=True)
    return Scale(linear_ticks(min(low, 0.0) if axis.zero else low, high, target), start, stop)
