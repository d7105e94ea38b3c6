"""Processes below another one, and killing them at a moment."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path


def parents() -> dict[int, int]:
    """Every process and the one above it."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                status = (folder / "stat").read_text()
            except OSError:
                continue
            # the name in brackets may hold anything
            found[int(folder.name)] = int(status.rpartition(")")[2].split()[1])
    return found


def below(pid: int) -> list[int]:
    """All processes below one, itself first; those furthest down last."""
    above, found = parents(), [pid]
    for one in found:
        found += [child for child, parent in above.items() if parent == one]
    return found


def command_of(pid: int) -> str:
    """The command line of a process, empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    except OSError:
        return ""


def running(pid: int, part: str) -> Iterator[int]:
    """Processes below one whose command line has a part."""
    return (one for one in below(pid) if part in command_of(one))


def wait_until(condition: Callable[[], bool], seconds: float = 240) -> None:
    """Look again and again."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill(pid: int) -> None:
    """As the kernel does when memory runs out."""
    os.kill(pid, signal.SIGKILL)


def gone(pids: Sequence[int]) -> bool:
    """Whether none of some processes is left; one that only waits to be reaped is none."""
    return not any(map(command_of, pids))
