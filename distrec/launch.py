"""Starting the ranks: with horovodrun, alone in one process, or on Spark's executors.

Static horovodrun only: Horovod's elastic mode overwrites shards of tables with rank 0's. Its
control ports are open to the network that they are on, so that must be a private one; on one
machine everything stays on the loopback. When a rank is lost, all of them are started again: a
shard of a table cannot be had from the ranks that are left, only from the checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from distrec.attempt import HOROVOD_FIX, StopOrder, run_attempt
from distrec.config import Config, dump_config, parse_config
from distrec.errors import DistrecError, LaunchError, StoppedError
from distrec.failure import explain, last_lines, read_heartbeats, read_records
from distrec.job import log_line

RESTART = "train restart"
"""Name of a failed attempt's line in logs/jobs.jsonl."""
_LONGEST_BACKOFF_SECONDS = 300.0
_SSH_SECONDS = 10

logger = logging.getLogger("distrec.train")


def train_locally(config: Config) -> dict[str, Any]:
    """Start config.launch.num_ranks ranks from this machine, again when one is lost.

    Returns:
        The summary of rank 0, TrainResult.summary(), and the number of restarts.

    Raises:
        StoppedError: SIGTERM came; the ranks have saved a checkpoint if there was time.
        DistrecError: The error of the rank that failed first, or RankLostError with the rank that
            died, if it is not worth another attempt or there have been enough.
    """
    logs = config.logs_directory
    logs.mkdir(parents=True, exist_ok=True)
    order = StopOrder(config.stop_path, config.launch.grace_seconds)
    earlier = _checkpoints(config)
    restarts = in_a_row = 0
    progress = -1
    with order.listening():
        while True:
            present = without_absent_hosts(config)
            try:
                summary = run_attempt(present, order, is_first=restarts == 0)
                return {**summary, "restarts": restarts}
            except DistrecError as error:
                step = max((step for step, _ in _checkpoints(config) - earlier), default=-1)
                in_a_row = 0 if step > progress else in_a_row
                progress = max(step, progress)
                again = error.may_pass and in_a_row < config.launch.max_restarts
                wait = backoff_seconds(config.launch.restart_backoff_seconds, in_a_row)
                _tell(present, error, wait if again and not order.is_given else None)
                if error.may_pass and order.is_given:
                    raise StoppedError(
                        "training was stopped by SIGTERM before its ranks could save a checkpoint "
                        "within launch.grace_seconds. The next train goes on from the last one."
                    ) from error
                if not again:
                    raise
            _wait(wait, order)
            restarts, in_a_row = restarts + 1, in_a_row + 1
            if progress >= 0:
                # with train.resume = false, what this job has saved is still to be gone on from
                train = config.train.model_copy(update={"resume": True})
                config = config.model_copy(update={"train": train})


def backoff_seconds(first: float, restarts: int) -> float:
    """Wait before the next restart, after so many in a row."""
    return min(first * 2.0 ** min(restarts, 30), _LONGEST_BACKOFF_SECONDS)


def _checkpoints(config: Config) -> set[tuple[int, int]]:
    """Step and time of writing of each, by which one of this job is known."""
    found = set()
    # the package of checkpoints needs torch, which a launcher leaves to its ranks
    for path in config.checkpoint_directory.glob("step-*/manifest.json"):
        # the oldest ones are deleted now and then
        with contextlib.suppress(OSError, ValueError):
            step = int(path.parent.name.removeprefix("step-"))
            found.add((step, path.stat().st_mtime_ns))
    return found


def _tell(config: Config, error: DistrecError, wait: float | None) -> None:
    """Say what was lost, where, and what comes of it; keep it in the logs."""
    if not error.may_pass:
        return
    rank: int | None = getattr(error, "rank", None)
    logs, num_ranks = config.logs_directory, config.launch.num_ranks
    lines = last_lines(logs, rank)
    heartbeat = {} if rank is None else read_heartbeats(logs, num_ranks).get(rank, {})
    then = "not starting again" if wait is None else f"starting again in {wait:g} s"
    shown = "".join(f"\n    {line}" for line in lines)
    logger.warning("%s Last lines%s:%s\n%s", error,
                   "" if rank is None else f" of rank {rank}", shown or " none", then)  # fmt: skip
    entry = {
        "job": RESTART,
        "run": config.name,
        "num_ranks": num_ranks,
        "rank": rank,
        "phase": heartbeat.get("phase"),
        "exit_code": error.exit_code,
        "error": type(error).__name__,
        "message": str(error),
        "last_lines": lines,
        "restart_in_seconds": wait,
    }
    try:
        log_line(logs, entry)
    except OSError as failure:
        logger.warning("the log line could not be written: %s", failure)


def _wait(seconds: float, order: StopOrder) -> None:
    deadline = time.monotonic() + seconds
    while not order.is_given and time.monotonic() < deadline:
        time.sleep(min(0.2, seconds))
    if order.is_given:
        raise StoppedError(
            "training was stopped by SIGTERM while no rank was running. The next train goes on "
            "from the last checkpoint."
        )


def without_absent_hosts(config: Config) -> Config:
    """The configuration without hosts that ssh does not reach, if launch.min_ranks allows that."""
    launch = config.launch
    if not launch.hosts or launch.min_ranks is None or launch.min_ranks == launch.num_ranks:
        return config
    from horovod.runner.util.network import filter_local_addresses  # only several hosts need it

    names = filter_local_addresses([entry.partition(":")[0] for entry in launch.hosts])
    if not names:
        return config
    with ThreadPoolExecutor(len(names)) as pool:
        answers = pool.map(lambda name: _answers(config, name), names)
        absent = {name for name, answer in zip(names, answers, strict=True) if not answer}
    return fewer_ranks(config, absent)


def fewer_ranks(config: Config, absent: Collection[str]) -> Config:
    """The configuration for the hosts that are left, on at most as many ranks as before.

    As it was, when they have fewer slots than launch.min_ranks: horovodrun then says what is wrong.
    """
    if not absent:
        return config
    launch = config.launch
    left = [entry for entry in launch.hosts if entry.partition(":")[0] not in absent]
    slots = sum(int(entry.partition(":")[2] or 0) for entry in left)
    num_ranks = min(launch.num_ranks, slots)
    if num_ranks < (launch.min_ranks or launch.num_ranks):
        logger.warning("hosts that ssh does not reach: %s", ", ".join(sorted(absent)))
        return config
    logger.warning(
        "going on without %s, on %d of %d ranks", ", ".join(sorted(absent)), num_ranks,
        launch.num_ranks,
    )  # fmt: skip
    changed = launch.model_copy(
        update={"hosts": tuple(left), "num_ranks": num_ranks, "min_ranks": num_ranks}
    )
    return config.model_copy(update={"launch": changed})


def _answers(config: Config, host: str) -> bool:
    command = ["ssh", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no"]
    command += ["-o", f"ConnectTimeout={_SSH_SECONDS}", "-p", str(config.launch.ssh_port)]
    if config.launch.ssh_identity_file is not None:
        command += ["-i", config.launch.ssh_identity_file]
    try:
        done = subprocess.run(
            [*command, host, "true"], stdin=subprocess.DEVNULL, capture_output=True,
            timeout=2 * _SSH_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


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
            raise explain(
                num_ranks, 1, {}, records, read_heartbeats(logs, num_ranks), logs
            ) from error
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
