"""Lets long work tell a watchdog that it moves, without knowing whether there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_listeners: list[Callable[[], None]] = []


def beat() -> None:
    """Called between two pieces of work that may take long in all: a chunk of rows, of a file."""
    for listener in _listeners:
        listener()


@contextmanager
def listening(listener: Callable[[], None]) -> Iterator[None]:
    """Call `listener` with every beat of this process, whichever thread it comes from."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
