"""What the benchmarks share: a header that says what is measured where, turns, one line of JSON.

A benchmark compares two sides in one run, in turns, so that a noisy machine is noisy for both, and
counts medians. Its last line is an object of `benchmark`, `figures`, `bars` and `met`, which is
null without bars.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any


def parser(doc: str, rounds: int, quick: str) -> argparse.ArgumentParser:
    """Options that every benchmark has.

    Args:
        doc: Of the benchmark's module; its first line is shown.
        rounds: How often each side is measured.
        quick: What --quick makes smaller.
    """
    result = argparse.ArgumentParser(description=doc.partition("\n")[0])
    result.add_argument("--quick", action="store_true", help=quick)
    result.add_argument("--rounds", type=int, default=rounds, help="turns of each side")
    return result


def print_header(packages: Iterable[str], threads: str = "1 thread") -> None:
    """Print the machine, the versions and the command.

    Args:
        packages: Names of distributions that decide what is measured.
        threads: How many work on each side.
    """
    print(f"hardware  {hardware()}; {threads}")
    print(f"versions  Python {platform.python_version()}, {versions(packages)}")
    print(f"command   {shlex.join(['python', *sys.argv])}", flush=True)


def hardware() -> str:
    """Processor, cores, memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    name = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB"


def versions(packages: Iterable[str]) -> str:
    """Of installed distributions."""
    return ", ".join(f"{name} {version(name)}" for name in packages)


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def alternate(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure every side once a round.

    Args:
        sides: By name; each gives what is measured.
        rounds: How many.

    Returns:
        By name, one number a round. Every second round goes through the sides backwards.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else reversed(list(sides)):
            found[name].append(sides[name]())
    return found


def medians(measured: Mapping[str, list[float]]) -> dict[str, float]:
    """Of every side."""
    return {name: statistics.median(values) for name, values in measured.items()}


def at_least(value: float) -> dict[str, float]:
    """A bar that a figure must reach."""
    return {"at_least": value}


def at_most(value: float) -> dict[str, float]:
    """A bar that a figure must not pass."""
    return {"at_most": value}


def print_result(
    benchmark: str, figures: Mapping[str, Any], bars: Mapping[str, Mapping[str, float]]
) -> None:
    """Print the last line.

    Args:
        benchmark: Its name.
        figures: What was found; a bar's name stands among them.
        bars: By figure, from `at_least` or `at_most`; none where nothing is promised.
    """
    reached = [
        figures[name] >= bar["at_least"] if "at_least" in bar else figures[name] <= bar["at_most"]
        for name, bar in bars.items()
    ]
    met = all(reached) if reached else None
    result = {"benchmark": benchmark, "figures": figures, "bars": bars, "met": met}
    print(json.dumps(result), flush=True)
