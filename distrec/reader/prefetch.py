"""Makes the elements of an iterator in a background thread, a bounded number ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from contextlib import closing
from typing import Generic, TypeVar

T = TypeVar("T")
# how long the thread may take to notice that nobody takes its elements any more
_POLL_SECONDS = 0.05


class _End:
    """What the thread puts last: the error that ended it, or none."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Prefetcher(Generic[T]):
    """A thread that fills a queue from an iterator.

    Args:
        source: Advanced, and closed, in the thread only.
        depth: Elements made ahead, at least 1.
        name: Of the thread.
    """

    def __init__(self, source: Generator[T, None, None], depth: int, name: str) -> None:
        self._source = source
        self._queue: queue.Queue[T | _End] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        # a daemon: a process that dies of an error elsewhere does not wait for it
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def __iter__(self) -> Generator[T, None, None]:
        """Elements in order; an error of the source is raised here.

        The thread starts with the first element, and has ended when the iteration has: at its end,
        by an error, or because the consumer stopped early and closed it.
        """
        self._thread.start()
        try:
            while True:
                element = self._queue.get()
                if isinstance(element, _End):
                    if element.error is not None:
                        raise element.error
                    return
                yield element
        finally:
            self._stopped.set()
            self._thread.join()

    def _work(self) -> None:
        error: BaseException | None = None
        try:
            with closing(self._source):
                for element in self._source:
                    if not self._put(element):
                        return
        except BaseException as caught:
            error = caught
        self._put(_End(error))

    def _put(self, element: T | _End) -> bool:
        """Wait for room; False once the consumer has stopped."""
        while not self._stopped.is_set():
            try:
                self._queue.put(element, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False
