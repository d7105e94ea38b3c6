"""Notices a rank that no longer moves, says where it stands, and ends it.

Horovod waits without end for a rank that is alive but stuck. A thread of our own sees that the main
thread has not reported for too long, writes down every thread's stack and ends the process; the
launcher then ends the others. Long work reports from its loops (`distrec.pulse`). A rank that waits
in a collective goes on waiting while another one moves, as the heartbeat files show, if all ranks
write them into one directory. The file tells, of a rank that was killed, what it last did.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from distrec import pulse

EXIT_CODE = 75
"""Of a process that the watchdog ended: try again (sysexits.h, EX_TEMPFAIL)."""
_INTERVAL_SECONDS = 0.5
# a rank that only waits for others gives the stuck one time to be named first
_GRACE_SHARE = 0.25
# of the timeout, after which a silent rank looks at the others
_PATIENT_SHARE = 0.5
_WAITING_FILE = os.path.join("sharding", "collectives.py")
_READING_DIRECTORY = os.sep + os.path.join("distrec", "reader") + os.sep
# looks at the main thread that the heartbeat's shares are of: a minute of them
_NUM_LOOKS = 120

logger = logging.getLogger("distrec.train")


def heartbeat_path(logs_directory: Path, rank: int) -> Path:
    """What a rank is doing, written every half second."""
    return logs_directory / f"heartbeat-{rank}.json"


def stacks_path(logs_directory: Path, rank: int) -> Path:
    """Stacks of a rank each time that it was ended, for later."""
    return logs_directory / f"stacks-{rank}.txt"


class _Peers:
    """Whether other ranks move, as their heartbeat files show.

    Args:
        logs_directory: Where all ranks write them; stale ones do no harm.
        rank: This one, which does not count.
    """

    def __init__(self, logs_directory: Path, rank: int) -> None:
        self._directory = logs_directory
        self._own = heartbeat_path(logs_directory, rank)
        self._seen: dict[str, int] = {}

    def forget(self) -> None:
        """What was seen is old."""
        self._seen = {}

    def have_moved(self) -> bool:
        """Whether one has reported since the last call; what is seen for the first time has not."""
        seen = {}
        for path in self._directory.glob("heartbeat-*.json"):
            if path != self._own:
                # a file is replaced as a whole, or being removed
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                    seen[path.name] = int(json.loads(path.read_text(encoding="utf-8"))["beats"])
        before, self._seen = self._seen, seen
        return any(name in before and beats != before[name] for name, beats in seen.items())


class Watchdog:
    """A thread that ends this process when `beat` has not been called for too long.

    Beats of `distrec.pulse` count too, those of the thread that made this.

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
        self._num_beats = 0
        self._peers = _Peers(logs_directory, rank)
        self._peers_moved_at = 0.0
        self._looks: deque[str] = deque(maxlen=_NUM_LOOKS)
        self._listening = contextlib.ExitStack()
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, phase: str) -> None:
        """Report that the main thread moves, and what it does next."""
        self._latest = (time.monotonic(), phase)
        self._num_beats += 1

    def _pulse(self) -> None:
        # a reader's thread may well move while the main one is stuck
        if threading.get_ident() == self._main:
            self.beat(self._latest[1])

    def __enter__(self) -> Watchdog:
        self._listening.enter_context(pulse.listening(self._pulse))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._listening.close()
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        self._write_heartbeat()
        while not self._ended.wait(min(_INTERVAL_SECONDS, self.timeout_seconds / 4)):
            self._looks.append(self._kind_of_work())
            self._write_heartbeat()
            moved_at, phase = self._latest
            silent = time.monotonic() - moved_at
            # not before, for on many ranks these are many files
            if silent < self.timeout_seconds * _PATIENT_SHARE:
                self._peers.forget()
                continue
            waits = self._waits_for_others()
            if self._peers.have_moved():
                self._peers_moved_at = time.monotonic()
            if waits:
                others = time.monotonic() - self._peers_moved_at
                is_over = min(silent, others) >= self.timeout_seconds * (1 + _GRACE_SHARE)
            else:
                is_over = silent >= self.timeout_seconds
            if is_over:
                self._end(phase, silent, waits)

    def _end(self, phase: str, silent: float, waits: bool) -> None:
        what = "waited for the other ranks" if waits else "was stuck"
        message = f"rank {self.rank} {what} for {silent:.0f} s in {phase}"
        logger.error("%s: ending it; stacks of its threads follow", message)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
        with (
            contextlib.suppress(OSError),
            stacks_path(self._path.parent, self.rank).open("a") as log,
        ):
            log.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {message}\n")
            log.flush()
            faulthandler.dump_traceback(file=log, all_threads=True)
        try:
            self._on_timeout(message, waits)
        finally:
            os._exit(EXIT_CODE)

    def _waits_for_others(self) -> bool:
        """Whether the main thread is inside a collective."""
        return self._kind_of_work() == "exchange"

    def _kind_of_work(self) -> str:
        """What the main thread does: exchange (in a collective), input (in the reader), compute."""
        frame: FrameType | None = sys._current_frames().get(self._main)
        while frame is not None:
            if frame.f_code.co_filename.endswith(_WAITING_FILE):
                return "exchange"
            if _READING_DIRECTORY in frame.f_code.co_filename:
                return "input"
            frame = frame.f_back
        return "compute"

    def _write_heartbeat(self) -> None:
        moved_at, phase = self._latest
        record: dict[str, Any] = {
            "rank": self.rank,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "phase": phase,
            "beats": self._num_beats,
            "silent_seconds": round(time.monotonic() - moved_at, 1),
            "time": time.time(),
            "shares": {
                kind: round(self._looks.count(kind) / max(len(self._looks), 1), 3)
                for kind in ("input", "exchange", "compute")
            },
        }
        partial = self._path.with_name(f".{self._path.name}")
        try:
            partial.write_text(json.dumps(record), encoding="utf-8")
            partial.replace(self._path)
        except OSError:
            # a full disk must not end training: the next save will say it
            logger.debug("heartbeat of rank %d could not be written", self.rank)
