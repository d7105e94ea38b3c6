"""Two or more jobs of several ranks that live side by side and work in turns.

A job's ranks answer orders, which are files in its folder. Out of turn they are stopped (SIGSTOP),
so that no polling thread of one side takes time from the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_POLL_SECONDS = 2e-3
_START_SECONDS, _TURN_SECONDS = 300, 300
_SHOWN_CHARACTERS = 6000


class Job:
    """Ranks under their launcher.

    Args:
        name: For messages.
        command: Starts them; each calls `serve` with `folder`.
        environment: Beside this process's own.
        num_ranks: How many.
        folder: Empty, of this job.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        num_ranks: int,
        folder: Path,
    ) -> None:
        # a benchmark that is told to end takes its ranks with it
        signal.signal(signal.SIGTERM, _leave)
        self.name = name
        self.num_ranks = num_ranks
        self._folder = folder
        self._orders = 0
        with (folder / "output.txt").open("w") as output:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._pids: list[int] = []
        try:
            self._pids = [found["pid"] for found in self._collect("ready", _START_SECONDS)]
        except BaseException:
            self.end()
            raise
        self._signal(signal.SIGSTOP)

    def turn(self, order: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Let every rank carry out an order; what they answer, by rank."""
        self._signal(signal.SIGCONT)
        _write(self._folder / f"order-{self._orders}.json", order)
        answers = self._collect(f"answer-{self._orders}", _TURN_SECONDS)
        self._orders += 1
        self._signal(signal.SIGSTOP)
        return answers

    def end(self) -> None:
        """Stop every rank; what they were to say they have said."""
        self._signal(signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _signal(self, number: int) -> None:
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _collect(self, stem: str, timeout: float) -> list[dict[str, Any]]:
        paths = [self._folder / f"{stem}-{rank}.json" for rank in range(self.num_ranks)]
        end = time.monotonic() + timeout
        while not all(path.exists() for path in paths):
            if self._process.poll() is not None or time.monotonic() > end:
                shown = (self._folder / "output.txt").read_text(errors="replace")
                raise SystemExit(f"{self.name} did not answer:\n{shown[-_SHOWN_CHARACTERS:]}")
            time.sleep(_POLL_SECONDS)
        return [json.loads(path.read_text()) for path in paths]


def serve(folder: Path, rank: int, answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """What a rank does: carry out orders until it is ended."""
    _write(folder / f"ready-{rank}.json", {"pid": os.getpid()})
    number = 0
    while True:
        path = folder / f"order-{number}.json"
        while not path.exists():
            time.sleep(_POLL_SECONDS)
        _write(folder / f"answer-{number}-{rank}.json", answer(json.loads(path.read_text())))
        number += 1


def _leave(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _write(path: Path, value: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value))
    partial.rename(path)
