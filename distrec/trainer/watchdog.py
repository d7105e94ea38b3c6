"""Notices a rank that no longer moves, says where it stands, and ends it.

Horovod waits without end for a rank that is alive but stuck. A thread of our own sees that the main
thread has not reported for too long, writes down every thread's stack and ends the process; the
launcher then ends the others. A heartbeat file tells, of a rank that was killed, what it last did.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

EXIT_CODE = 75
"""Of a process that the watchdog ended: try again (sysexits.h, EX_TEMPFAIL)."""
_INTERVAL_SECONDS = 0.5
# a rank that only waits for others gives the stuck one time to be named first
_GRACE_SHARE = 0.25
_WAITING_FILE = os.path.join("sharding", "collectives.py")

logger = logging.getLogger("distrec.train")


def heartbeat_path(logs_directory: Path, rank: int) -> Path:
    """What a rank is doing, written every half second."""
    return logs_directory / f"heartbeat-{rank}.json"


class Watchdog:
    """A thread that ends this process when `beat` has not been called for too long.

    Args:
        rank: Of this process.
        timeout_seconds: Longest time between two beats.
        logs_directory: Of the run.
        on_timeout: Called with the message before the process ends.
    """

    def __init__(
        self,
        rank: int,
        timeout_seconds: float,
        logs_directory: Path,
        on_timeout: Callable[[str, bool], None],
    ) -> None:
        self.rank = rank
        self.timeout_seconds = timeout_seconds
        self._path = heartbeat_path(logs_directory, rank)
        self._on_timeout = on_timeout
        self._latest = (time.monotonic(), "starting")
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, phase: str) -> None:
        """Report that the main thread moves, and what it does next."""
        self._latest = (time.monotonic(), phase)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        self._write_heartbeat()
        while not self._ended.wait(min(_INTERVAL_SECONDS, self.timeout_seconds / 4)):
            self._write_heartbeat()
            moved_at, phase = self._latest
            silent = time.monotonic() - moved_at
            if silent < self.timeout_seconds:
                continue
            waits = self._waits_for_others()
            if waits and silent < self.timeout_seconds * (1 + _GRACE_SHARE):
                continue
            self._end(phase, silent, waits)

    def _end(self, phase: str, silent: float, waits: bool) -> None:
        what = "waited for the other ranks" if waits else "was stuck"
        message = f"rank {self.rank} {what} for {silent:.0f} s in {phase}"
        logger.error("%s: ending it; stacks of its threads follow", message)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
        try:
            self._on_timeout(message, waits)
        finally:
            os._exit(EXIT_CODE)

    def _waits_for_others(self) -> bool:
        """Whether the main thread is inside a collective."""
        frame: FrameType | None = sys._current_frames().get(self._main)
        while frame is not None:
            if frame.f_code.co_filename.endswith(_WAITING_FILE):
                return True
            frame = frame.f_back
        return False

    def _write_heartbeat(self) -> None:
        moved_at, phase = self._latest
        record: dict[str, Any] = {
            "rank": self.rank,
            "pid": os.getpid(),
            "phase": phase,
            "silent_seconds": round(time.monotonic() - moved_at, 1),
            "time": time.time(),
        }
        partial = self._path.with_name(f".{self._path.name}")
        try:
            partial.write_text(json.dumps(record), encoding="utf-8")
            partial.replace(self._path)
        except OSError:
            # a full disk must not end training: the next save will say it
            logger.debug("heartbeat of rank %d could not be written", self.rank)
