"""Waiting for something to happen, and for processes to end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path


def command_of(pid: int) -> str:
    """The command line of a process, empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    except OSError:
        return ""


def wait_until(condition: Callable[[], bool], seconds: float = 240) -> None:
    """Look again and again."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def gone(pids: Sequence[int]) -> bool:
    """Whether none of some processes is left; one that only waits to be reaped is none."""
    return not any(map(command_of, pids))
