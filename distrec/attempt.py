"""One start of a job's ranks from this machine: begin, watch, and end them when that is due.

Horovod's launcher ends a job when a rank has ended. What it does not see is a job in which no rank
moves any more, which the heartbeat files show here, and an order to stop.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distrec.config import Config, dump_config
from distrec.errors import LaunchError, RankLostError
from distrec.failure import RANK_LINE, TRAIN_LOG, explain, read_heartbeats, read_records
from distrec.job import on_sigterm

RANK_CONFIG = "train.toml"
HOROVOD_FIX = "python -m distrec.horovod_build"
_EXIT = re.compile(r"Process (?P<rank>\d+) exit with status code (?P<code>\d+)\.")
# as distrec.job.configure_logging writes them
_SERIOUS = re.compile(r"^\d\d:\d\d:\d\d [WEC] ")
# a rank's error, which the launcher raises and its caller prints
_REPORTED = re.compile(r"^train: ")
# of linux/prctl.h
_PR_SET_PDEATHSIG = 1
_INTERVAL_SECONDS = 0.5
# horovodrun gives its ranks 5 s to end before it kills them
_LAUNCHER_ENDS_SECONDS = 12.0
# of launch.timeout_seconds, after which a heartbeat that stands still means a frozen rank; as long
# as another rank moves, that one notices it sooner
_FROZEN_SHARE = 1.5

logger = logging.getLogger("distrec.train")


class StopOrder:
    """Whether this process was told by SIGTERM to stop; it tells the ranks by a file.

    Args:
        path: Of the file, Config.stop_path.
        grace_seconds: How long the ranks then have.
    """

    def __init__(self, path: Path, grace_seconds: float) -> None:
        self._path = path
        self._grace_seconds = grace_seconds
        self._asked_at: float | None = None

    @property
    def is_given(self) -> bool:
        """Whether the signal came."""
        return self._asked_at is not None

    @property
    def is_overdue(self) -> bool:
        """Whether the ranks have had their time."""
        asked_at = self._asked_at
        return asked_at is not None and time.monotonic() - asked_at >= self._grace_seconds

    @contextmanager
    def listening(self) -> Iterator[None]:
        """By default SIGTERM ends this process alone, and the ranks train on."""
        self._path.unlink(missing_ok=True)
        try:
            with on_sigterm(self._note):
                yield
        finally:
            self._path.unlink(missing_ok=True)

    def _note(self) -> None:
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            # on a full disk the ranks are ended when their time is over
            with contextlib.suppress(OSError):
                self._path.touch()


def run_attempt(config: Config, order: StopOrder, is_first: bool) -> dict[str, Any]:
    """Start config.launch.num_ranks ranks and wait for them.

    Args:
        config: Of the run.
        order: To stop, if it comes.
        is_first: Whether the log begins anew; else it goes on.

    Returns:
        The summary of rank 0, TrainResult.summary().

    Raises:
        DistrecError: The error of the rank that failed first, or RankLostError with the rank that
            died, was stuck or frozen.
    """
    logs, num_ranks = config.logs_directory, config.launch.num_ranks
    for path in (*logs.glob("rank-*.json"), *logs.glob("heartbeat-*.json")):
        path.unlink(missing_ok=True)
    config_path = logs / RANK_CONFIG
    config_path.write_text(dump_config(config), encoding="utf-8")
    several = num_ranks > 1
    command = (horovodrun_command(config) if several else []) + rank_command(config_path)
    job = _Job(command, config, order, several)
    code = job.run("w" if is_first else "a")
    records = read_records(logs, num_ranks)
    if code == 0 and 0 in records and "summary" in records[0]:
        return dict(records[0]["summary"])
    heartbeats = read_heartbeats(logs, num_ranks)
    _end_rest(heartbeats)
    if job.frozen is not None:
        phase = heartbeats.get(job.frozen, {}).get("phase", "its start")
        raise RankLostError(
            f"rank {job.frozen} was frozen: nothing was heard of it for more than "
            f"{config.launch.timeout_seconds * _FROZEN_SHARE:.0f} s in {phase}, and the job was "
            f"ended. All output is in {logs / TRAIN_LOG}.",
            job.frozen,
        )
    if several and code < 0:
        # it takes its ranks with it, who may say that they were asked to stop
        raise RankLostError(
            f"horovodrun was ended by signal {-code}. All output is in {logs / TRAIN_LOG}."
        )
    raise explain(num_ranks, code, job.exits, records, heartbeats, logs)


def rank_command(config_path: Path) -> list[str]:
    """What starts one rank."""
    return [sys.executable, "-m", "distrec.trainer", "--config", str(config_path.absolute())]


def horovodrun_command(config: Config) -> list[str]:
    """The launcher with its options, without what it is to start.

    Raises:
        LaunchError: Horovod is not installed.
    """
    launcher = Path(sysconfig.get_path("scripts")) / "horovodrun"
    if importlib.util.find_spec("horovod") is None or not launcher.exists():
        raise LaunchError(
            "several ranks need Horovod. Received: launch.num_ranks = "
            f"{config.launch.num_ranks}, no horovodrun in {launcher.parent}. Install it with "
            f"{HOROVOD_FIX}, or set launch.num_ranks = 1."
        )
    launch = config.launch
    command = [sys.executable, str(launcher), "-np", str(launch.num_ranks), "--gloo"]
    command += ["--gloo-timeout-seconds", str(launch.timeout_seconds)]
    if launch.hosts:
        command += ["-H", ",".join(launch.hosts), "--ssh-port", str(launch.ssh_port)]
        if launch.ssh_identity_file is not None:
            command += ["--ssh-identity-file", launch.ssh_identity_file]
    interfaces = launch.network_interfaces or (() if launch.hosts else ("lo",))
    if interfaces:
        command += ["--network-interfaces", ",".join(interfaces)]
    return command


def _environment(config: Config) -> dict[str, str]:
    """Of the ranks: this one without what would make a rank think it is another launcher's."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HOROVOD_", "OMPI_", "PMI_"))
    }
    scripts = sysconfig.get_path("scripts")
    root = str(Path(__file__).parents[1])
    return {
        **kept,
        "OMP_NUM_THREADS": str(config.launch.threads_per_rank),
        "PATH": os.pathsep.join([scripts, kept.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(filter(None, [root, kept.get("PYTHONPATH", "")])),
        "PYTHONUNBUFFERED": "1",
    }


def _end_with_launcher() -> Callable[[], None]:
    """For a child to call: the kernel sends it SIGTERM when this process is killed outright."""
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))

    return ask


class _Job:
    """The launcher as a process, and a thread that ends it when the ranks no longer move.

    Args:
        command: To run.
        config: Of the run.
        order: To stop, if it comes.
        several: Whether the command is horovodrun's.
    """

    def __init__(self, command: list[str], config: Config, order: StopOrder, several: bool) -> None:
        self.exits: dict[int, int] = {}
        """Exit codes of ranks, as far as the launcher tells them."""
        self.frozen: int | None = None
        """The rank for which the job was ended."""
        self._command = command
        self._config = config
        self._order = order
        self._several = several
        self._ended = threading.Event()

    def run(self, mode: str) -> int:
        """Show rank 0's lines and the others' warnings, keep everything; returns the exit code."""
        process = subprocess.Popen(
            self._command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=_environment(self._config),
            preexec_fn=_end_with_launcher() if sys.platform == "linux" else None,
        )
        watch = threading.Thread(
            target=self._watch, args=(process,), name="supervisor", daemon=True
        )
        watch.start()
        assert process.stdout is not None
        log = self._config.logs_directory / TRAIN_LOG
        try:
            with log.open(mode, encoding="utf-8") as stream:
                for line in process.stdout:
                    stream.write(line)
                    stream.flush()
                    match = _EXIT.search(line)
                    if match:
                        self.exits.setdefault(int(match["rank"]), int(match["code"]))
                    shown = _shown(line.rstrip("\n"), self._several)
                    if shown is not None:
                        print(shown, file=sys.stderr, flush=True)
            return process.wait()
        except BaseException:
            _end(process)
            raise
        finally:
            self._ended.set()
            watch.join()

    def _watch(self, process: subprocess.Popen[str]) -> None:
        pulses = Pulses(self._config.launch.timeout_seconds * _FROZEN_SHARE)
        told = False
        while not self._ended.wait(_INTERVAL_SECONDS):
            if self._order.is_given and not told:
                told = True
                logger.warning(
                    "SIGTERM: the ranks save a checkpoint and end, within %g s",
                    self._config.launch.grace_seconds,
                )
            if self._order.is_overdue:
                _end(process)
                return
            logs, num_ranks = self._config.logs_directory, self._config.launch.num_ranks
            self.frozen = pulses.stopped(read_heartbeats(logs, num_ranks), time.monotonic())
            if self.frozen is not None:
                _end(process)
                return


class Pulses:
    """Which rank's heartbeat stands still; clocks of other hosts play no part.

    Args:
        limit_seconds: For how long it may.
    """

    def __init__(self, limit_seconds: float) -> None:
        self._limit_seconds = limit_seconds
        self._seen: dict[int, tuple[Any, float]] = {}

    def stopped(self, heartbeats: Mapping[int, Mapping[str, Any]], now: float) -> int | None:
        """The rank that has stood still longest, if it is too long.

        Args:
            heartbeats: Of the ranks that have begun.
            now: A clock in seconds that only goes forward.
        """
        for rank, heartbeat in heartbeats.items():
            pulse = (heartbeat.get("pid"), heartbeat.get("time"))
            if rank not in self._seen or self._seen[rank][0] != pulse:
                self._seen[rank] = (pulse, now)
        since, rank = min(((since, rank) for rank, (_, since) in self._seen.items()),
                          default=(now, -1))  # fmt: skip
        return rank if now - since > self._limit_seconds else None


def _end(process: subprocess.Popen[str]) -> None:
    """horovodrun passes it on to its ranks, and kills those that do not listen."""
    process.terminate()
    try:
        process.wait(_LAUNCHER_ENDS_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_rest(heartbeats: Mapping[int, Mapping[str, Any]]) -> None:
    """Wait for this host's ranks of a launcher that died, so that no two jobs write one run."""
    host = socket.gethostname()
    pids = [int(beat["pid"]) for beat in heartbeats.values() if beat.get("host") == host]
    deadline = time.monotonic() + _LAUNCHER_ENDS_SECONDS
    while (left := [pid for pid in pids if _is_rank(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _is_rank(pid: int) -> bool:
    """Whether a process of this number is there and is one of ours; a zombie has no command."""
    try:
        return RANK_CONFIG.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _shown(line: str, several: bool) -> str | None:
    """What the console gets of a line; None for nothing."""
    match = RANK_LINE.match(line)
    if match is None:
        # one rank speaks for itself; of several, this is horovodrun's own
        return None if several or _REPORTED.match(line) else line
    rank, text = match["rank"], match["text"]
    if _REPORTED.match(text):
        return None
    if rank == "0":
        return text
    return f"[rank {rank}] {text}" if _SERIOUS.match(text) else None
