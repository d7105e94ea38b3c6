"""One rank as a process: join the others, train under a watchdog, leave a record of how it ended.

The record, ``logs/rank-<r>.json``, is how the launcher learns what happened: Horovod's own launcher
always ends with 1, and may name the wrong rank.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from distrec.config import Config
from distrec.errors import DistrecError, LaunchError
from distrec.sharding import collectives as collective
from distrec.trainer.loop import train
from distrec.trainer.preemption import StopRequest
from distrec.trainer.watchdog import EXIT_CODE, Watchdog, heartbeat_path

_RANK_VARIABLES = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")

logger = logging.getLogger("distrec.train")


def rank_of_environment() -> int:
    """This process' rank as its launcher says, before anything is joined; 0 when it is alone."""
    for name in _RANK_VARIABLES:
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return 0


def record_path(logs_directory: Path, rank: int) -> Path:
    """How a rank ended."""
    return logs_directory / f"rank-{rank}.json"


def run_rank(config: Config) -> dict[str, Any]:
    """Train as one rank, from joining to leaving.

    Returns:
        TrainResult.summary().

    Raises:
        DistrecError: Of this rank; its record is written.
    """
    rank = rank_of_environment()
    _begin(config, rank)
    try:
        group = collective.start(config.launch)
        stop = StopRequest(config.stop_path)
        with (
            stop.listening(),
            Watchdog(
                rank,
                config.launch.timeout_seconds,
                config.logs_directory,
                lambda message, waits: _record_timeout(config, rank, message, waits),
            ) as watchdog,
        ):
            summary = train(config, group, watchdog.beat, stop).summary()
        group.barrier("train.end")
    except BaseException as error:
        code = error.exit_code if isinstance(error, DistrecError) else 1
        _record(
            config,
            rank,
            {"error": type(error).__name__, "message": str(error), "exit_code": code},
        )
        raise
    _record(config, rank, {"exit_code": 0, "summary": summary})
    group.shutdown()
    return summary


def _begin(config: Config, rank: int) -> None:
    if rank > 0:
        logging.getLogger("distrec").setLevel(logging.WARNING)
    try:
        config.logs_directory.mkdir(parents=True, exist_ok=True)
        record_path(config.logs_directory, rank).unlink(missing_ok=True)
        heartbeat_path(config.logs_directory, rank).unlink(missing_ok=True)
    except OSError as error:
        raise LaunchError(
            f"a rank writes its logs. Received: {error}. Set output to a directory that every "
            "rank may write."
        ) from error


def _record(config: Config, rank: int, entry: dict[str, Any]) -> None:
    path = record_path(config.logs_directory, rank)
    partial = path.with_name(f".{path.name}")
    try:
        partial.write_text(json.dumps({"rank": rank, **entry}), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        # the error itself matters more than its record
        logger.warning("the record of rank %d could not be written: %s", rank, error)


def _record_timeout(config: Config, rank: int, message: str, waits: bool) -> None:
    _record(
        config,
        rank,
        {"error": "Timeout", "message": message, "exit_code": EXIT_CODE, "waits": waits},
    )


def run_and_report(config: Config) -> int:
    """`run_rank` for a process that only its launcher listens to; returns the exit code."""
    try:
        run_rank(config)
    except DistrecError as error:
        print(f"train: rank {rank_of_environment()}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except Exception:
        logger.exception("train: rank %d failed", rank_of_environment())
        return 1
    return 0
