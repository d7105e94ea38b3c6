"""What Spark shows on standard error: warnings, and progress where the reader can use it.

On a terminal Spark draws its own bar. Anywhere else a bar is a mess of carriage returns, so long
stages are logged as lines.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from pyspark import SparkConf, SparkContext
from pyspark.java_gateway import launch_gateway

_CONFIGURATION = Path(__file__).parent / "spark_conf"
# the JVM says so for the modules that spark-submit adds, and has no switch to be quiet
_INCUBATOR = b"WARNING: Using incubator modules: jdk.incubator.vector\n"
_SECONDS_BETWEEN_LINES = 30

logger = logging.getLogger("distrec.spark")


def start_quietly(conf: SparkConf, local: bool) -> SparkContext:
    """Start the JVM and Spark in it, without the lines that tell a reader nothing.

    Log settings of the user's (SPARK_CONF_DIR, or conf/ in SPARK_HOME) stay.

    Args:
        conf: With the master and the application's name.
        local: Whether Spark runs in the one process; then it needs no network name.
    """
    environment = {} if "SPARK_HOME" in os.environ else {"SPARK_CONF_DIR": str(_CONFIGURATION)}
    if local:
        environment["SPARK_LOCAL_IP"] = "127.0.0.1"
    source, sink = os.pipe()
    threading.Thread(target=_pass_on, args=(source,), name="spark-output", daemon=True).start()
    try:
        with _defaults(environment):
            gateway = launch_gateway(conf, {"stderr": sink})
    finally:
        os.close(sink)
    return SparkContext(conf=conf, gateway=gateway)


@contextlib.contextmanager
def _defaults(environment: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for a while, where they are not set."""
    added = environment.keys() - os.environ.keys()
    os.environ.update({name: environment[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _pass_on(source: int) -> None:
    """Copy what the JVM writes to our standard error; ends when the JVM does."""
    while chunk := os.read(source, 65536):
        # without a standard error there is nobody to tell, but the JVM must not block
        with contextlib.suppress(OSError):
            os.write(2, chunk.replace(_INCUBATOR, b""))
    os.close(source)


def on_terminal() -> bool:
    """Whether a line that is drawn again and again can be read."""
    return sys.stderr is not None and sys.stderr.isatty()


def log_progress(context: SparkContext, seconds: float = _SECONDS_BETWEEN_LINES) -> None:
    """Log stages that go on for long, one line each `seconds`, until the context stops."""
    threading.Thread(
        target=_log_stages, args=(context, seconds), name="spark-progress", daemon=True
    ).start()


def _log_stages(context: SparkContext, seconds: float) -> None:
    pause = threading.Event()
    seen: set[int] = set()
    # whatever py4j raises once the JVM is gone: progress is over
    with contextlib.suppress(Exception):
        while not pause.wait(seconds) and context._jsc is not None:
            tracker = context.statusTracker()
            running = set(tracker.getActiveStageIds())
            for stage in sorted(running & seen):
                info = tracker.getStageInfo(stage)
                if info is not None:
                    logger.info(
                        "stage %d: %s of %s tasks done",
                        stage,
                        f"{info.numCompletedTasks:,}",
                        f"{info.numTasks:,}",
                    )
            seen = running
