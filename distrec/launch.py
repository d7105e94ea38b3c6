"""Starting the ranks: with horovodrun, alone in one process, or on Spark's executors.

Static horovodrun only: Horovod's elastic mode overwrites shards of tables with rank 0's. Its
control ports are open to the network that they are on, so that must be a private one; on one
machine everything stays on the loopback.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from distrec import errors
from distrec.config import Config, dump_config, parse_config
from distrec.errors import DistrecError, LaunchError

TRAIN_LOG = "train.log"
RANK_CONFIG = "train.toml"
HOROVOD_FIX = "python -m distrec.horovod_build"
# horovodrun marks every line with the rank it is from
_LINE = re.compile(r"^\[(?P<rank>\d+)\]<(?:stdout|stderr)>:(?P<text>.*)$")
_EXIT = re.compile(r"Process (?P<rank>\d+) exit with status code (?P<code>\d+)\.")
# as distrec.job.configure_logging writes them
_SERIOUS = re.compile(r"^\d\d:\d\d:\d\d [WEC] ")
# a rank's error, which the launcher raises and its caller prints
_REPORTED = re.compile(r"^train: ")
# of linux/prctl.h
_PR_SET_PDEATHSIG = 1
_SIGNALS = {
    134: "SIGABRT",
    135: "SIGBUS",
    137: "SIGKILL, perhaps for want of memory",
    139: "SIGSEGV",
}

logger = logging.getLogger("distrec.train")


def train_locally(config: Config) -> dict[str, Any]:
    """Start config.launch.num_ranks ranks from this machine and wait for them.

    Returns:
        The summary of rank 0, TrainResult.summary().

    Raises:
        DistrecError: The error of the rank that failed first, or LaunchError with the rank that
            died.
    """
    logs = config.logs_directory
    logs.mkdir(parents=True, exist_ok=True)
    for path in (*logs.glob("rank-*.json"), *logs.glob("heartbeat-*.json")):
        path.unlink()
    config_path = logs / RANK_CONFIG
    config_path.write_text(dump_config(config), encoding="utf-8")
    rank_command = [
        sys.executable,
        "-m",
        "distrec.trainer",
        "--config",
        str(config_path.absolute()),
    ]
    several = config.launch.num_ranks > 1
    command = (horovodrun_command(config) if several else []) + rank_command
    with _stopped_by_sigterm():
        code, exits = _run(command, _environment(config), logs / TRAIN_LOG, several)
    records = read_records(logs, config.launch.num_ranks)
    if code == 0 and 0 in records and "summary" in records[0]:
        return dict(records[0]["summary"])
    raise explain(config.launch.num_ranks, code, exits, records, _heartbeats(config), logs)


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


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Make SIGTERM an error: by default it ends this process alone, and the ranks train on."""
    # signals are the main thread's business
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        # once: the ranks are ended in peace
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise LaunchError(
            "training was stopped by SIGTERM, and its ranks with it. The next train goes on from "
            "the last checkpoint."
        )

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_with_launcher() -> Callable[[], None]:
    """For a child to call: the kernel sends it SIGTERM when this process is killed outright."""
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))

    return ask


def _run(
    command: list[str], environment: Mapping[str, str], log: Path, several: bool
) -> tuple[int, dict[int, int]]:
    """Run the launcher, show rank 0's lines and the others' warnings, keep everything in the log.

    Returns:
        Its exit code, and the exit codes of ranks that it told.
    """
    exits: dict[int, int] = {}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=dict(environment),
        preexec_fn=_end_with_launcher() if sys.platform == "linux" else None,
    )
    assert process.stdout is not None
    try:
        with log.open("w", encoding="utf-8") as stream:
            for line in process.stdout:
                stream.write(line)
                stream.flush()
                match = _EXIT.search(line)
                if match:
                    exits.setdefault(int(match["rank"]), int(match["code"]))
                shown = _shown(line.rstrip("\n"), several)
                if shown is not None:
                    print(shown, file=sys.stderr, flush=True)
        return process.wait(), exits
    except BaseException:
        # horovodrun passes it on to its ranks, and kills those that do not listen
        process.terminate()
        process.wait()
        raise


def _shown(line: str, several: bool) -> str | None:
    """What the console gets of a line; None for nothing."""
    match = _LINE.match(line)
    if match is None:
        # one rank speaks for itself; of several, this is horovodrun's own
        return None if several or _REPORTED.match(line) else line
    rank, text = match["rank"], match["text"]
    if _REPORTED.match(text):
        return None
    if rank == "0":
        return text
    return f"[rank {rank}] {text}" if _SERIOUS.match(text) else None


def read_records(logs: Path, num_ranks: int) -> dict[int, dict[str, Any]]:
    """How each rank says it ended; a rank that was killed says nothing."""
    return dict(_read_each(logs, "rank-{}.json", num_ranks))


def _heartbeats(config: Config) -> dict[int, dict[str, Any]]:
    return dict(_read_each(config.logs_directory, "heartbeat-{}.json", config.launch.num_ranks))


def _read_each(logs: Path, pattern: str, num_ranks: int) -> Iterator[tuple[int, dict[str, Any]]]:
    for rank in range(num_ranks):
        try:
            record = json.loads((logs / pattern.format(rank)).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict):
            yield rank, record


def explain(
    num_ranks: int,
    code: int,
    exits: Mapping[int, int],
    records: Mapping[int, Mapping[str, Any]],
    heartbeats: Mapping[int, Mapping[str, Any]],
    logs: Path,
) -> DistrecError:
    """The error to raise for a job that failed: the first cause, not what followed from it.

    A rank's own error comes before a rank that ended without a word, which comes before a rank that
    was stuck; that others failed in a collective follows from one of them.

    Args:
        num_ranks: Of the job.
        code: Exit code of the launcher.
        exits: Exit codes of ranks, as far as the launcher told them.
        records: Of the ranks that could still write one.
        heartbeats: What each rank was doing last.
        logs: Where they are.
    """
    failed = {rank: record for rank, record in records.items() if record.get("exit_code") != 0}
    for rank, record in sorted(failed.items()):
        error = _own_error(rank, record)
        if error is not None:
            return error
    where = f"All output is in {logs / TRAIN_LOG}."
    stuck = [record for record in failed.values() if record.get("error") == "Timeout"]
    for record in sorted(stuck, key=lambda record: bool(record.get("waits"))):
        if not record.get("waits"):
            return LaunchError(f"{record['message']}, and was ended. {where}")
    if not records and not heartbeats:
        return LaunchError(
            f"the launcher ended with {code} before any rank had started: {_last_line(logs)} "
            f"{where}"
        )
    silent = [rank for rank in range(num_ranks) if rank not in records]
    if silent and (failed or exits or code):
        return LaunchError(f"{_died(silent, exits, heartbeats, code)} {where}")
    if stuck:
        return LaunchError(f"{stuck[0]['message']}. {where}")
    for record in failed.values():
        return LaunchError(f"{record.get('message')} {where}")
    return LaunchError(f"the launcher ended with {code}, and no rank says why. {where}")


def _last_line(logs: Path) -> str:
    try:
        lines = (logs / TRAIN_LOG).read_text(encoding="utf-8").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing.")


def _own_error(rank: int, record: Mapping[str, Any]) -> DistrecError | None:
    """The rank's error, unless it only says that the other ranks went away."""
    name, message = str(record.get("error")), str(record.get("message"))
    known = getattr(errors, name, None)
    if isinstance(known, type) and issubclass(known, DistrecError):
        if known is LaunchError and message.startswith("collective "):
            return None
        return known(message)
    if name in ("Timeout", "HorovodInternalError", "KeyboardInterrupt", "SystemExit"):
        return None
    return DistrecError(f"rank {rank} failed: {name}: {message}")


def _died(
    silent: list[int],
    exits: Mapping[int, int],
    heartbeats: Mapping[int, Mapping[str, Any]],
    code: int,
) -> str:
    parts = []
    for rank in silent:
        status = exits.get(rank, code if len(silent) == 1 and not exits else None)
        how = "" if status is None else f" with exit code {status}"
        if status is not None and (status if status > 0 else 128 - status) in _SIGNALS:
            how += f" ({_SIGNALS[status if status > 0 else 128 - status]})"
        phase = heartbeats.get(rank, {}).get("phase")
        doing = f", last seen at: {phase}" if phase else ", before it had joined the others"
        parts.append(f"rank {rank} died{how}{doing}")
    return "; ".join(parts) + "."


def train_on_spark(config: Config) -> dict[str, Any]:
    """Train with a rank on each of config.launch.num_ranks Spark tasks that run at one time.

    Needs a Spark session of spark-submit (or makes one after [spark]) with that many free cores,
    this package on the executors, and the run's directory on a file system that all of them share.

    Returns:
        The summary of rank 0.

    Raises:
        DistrecError: As in `train_locally`.
    """
    try:
        import horovod.spark  # only this launcher needs it, and it needs Horovod
    except ImportError as error:
        raise LaunchError(
            f"ranks on Spark need Horovod. Received: {error}. Install it with {HOROVOD_FIX}."
        ) from error
    from distrec.spark import session

    session(config, "train")
    # an executor works in a directory of its own
    config = config.model_copy(update={"output": str(config.directory.absolute())})
    num_ranks = config.launch.num_ranks
    nics = list(config.launch.network_interfaces) or None
    environment = {
        "OMP_NUM_THREADS": str(config.launch.threads_per_rank),
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "PATH": os.environ.get("PATH", ""),
        "HOROVOD_GLOO_TIMEOUT_SECONDS": str(config.launch.timeout_seconds),
    }
    try:
        outcomes = horovod.spark.run(
            _spark_rank,
            args=(dump_config(config),),
            num_proc=num_ranks,
            use_gloo=True,
            env=environment,
            start_timeout=config.launch.timeout_seconds,
            nics=nics,
            verbose=0,
        )
    except Exception as error:
        logs = config.logs_directory
        records = read_records(logs, num_ranks)
        if any(record.get("exit_code") for record in records.values()):
            raise explain(num_ranks, 1, {}, records, _heartbeats(config), logs) from error
        raise LaunchError(
            f"Spark could not run {num_ranks} ranks: {error}. They need {num_ranks} free cores at "
            "one time, and distrec on every executor (PYTHONPATH, or installed)."
        ) from error
    return dict(outcomes[0])


def _spark_rank(config_text: str) -> dict[str, Any]:
    """One rank, on an executor."""
    import tomllib

    from distrec.job import configure_logging
    from distrec.trainer.rank import run_rank

    configure_logging()
    return run_rank(
        parse_config(tomllib.loads(config_text), "the configuration sent by the driver")
    )


LAUNCHERS: Mapping[str, Callable[[Config], dict[str, Any]]] = {
    "local": train_locally,
    "spark": train_on_spark,
}
