"""The Spark session of prepare and score: spark-submit's own settings first, then [spark]."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from py4j.protocol import Py4JError, Py4JJavaError
from pyspark import SparkConf, SparkContext
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from distrec.config import Config, SparkConfig
from distrec.config.secrets import MASK
from distrec.errors import ConfigError, LaunchError
from distrec.job import note_interrupt
from distrec.spark_output import log_progress, on_terminal, start_quietly

# set by spark-submit for the Python program that it starts
_GATEWAY = "PYSPARK_GATEWAY_PORT"

_SECONDS_TO_CANCEL = 5
# tasks of a job that failed are told to end, and do so when they look
_SECONDS_TO_END = 30
_SECONDS_BETWEEN_LOOKS = 0.05
# what our SQL relies on, whoever started Spark: text of a time means UTC, and a cast that fails
# gives null, which validation then rejects with a reason
_SQL_SETTINGS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.ansi.enabled": "false",
    "spark.sql.debug.maxToStringFields": "200",
    # a row may be all that a user did at a time: of thousands of them the heap is full
    "spark.sql.windowExec.buffer.in.memory.threshold": "64",
}


def session(config: Config, application: str) -> SparkSession:
    """Start Spark, or take the session that is there.

    Under spark-submit, or with an active session, the master and every setting given there stay;
    [spark] fills in what is not set.

    Args:
        config: Of the run.
        application: Name of the job, shown by Spark as "distrec <application> <run>".

    Raises:
        LaunchError: There is no Java, or Spark does not start.
        ConfigError: [spark.conf] is that of a copy, without its secrets.
    """
    active = SparkSession.getActiveSession()
    if active is not None:
        for key, value in _SQL_SETTINGS.items():
            active.conf.set(key, value)
        return active
    submitted = _GATEWAY in os.environ
    if not submitted:
        _require_java()
    builder = _builder(config, application, submitted)
    try:
        if not submitted and SparkContext._gateway is None:
            start_quietly(_conf(config, application), is_local(config.spark.master))
        started = builder.getOrCreate()
    # py4j and the operating system raise whatever they like when the JVM does not come up
    except (PySparkException, Py4JError, OSError, RuntimeError) as error:
        raise LaunchError(
            f"Spark must start with spark.master = {config.spark.master!r}. Received: "
            f"{_cause(error)}. Check the master, spark.driver_memory and spark.conf."
        ) from error
    started.sparkContext.setLogLevel("WARN")
    _cancel_jobs_on_interrupt(started.sparkContext)
    if not on_terminal():
        log_progress(started.sparkContext)
    return started


@contextmanager
def tasks_ended(spark: SparkSession) -> Iterator[None]:
    """After an error, leave only once no task runs: one would write on into what is being removed.

    Spark raises as soon as one task has failed for good, with the others still at work.

    Args:
        spark: A session in which nothing else runs.
    """
    try:
        yield
    except BaseException:
        deadline = time.monotonic() + _SECONDS_TO_END
        # whatever py4j raises when Spark is gone: its tasks are too
        with suppress(Exception):
            while _num_running(spark.sparkContext) and time.monotonic() < deadline:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        raise


def _num_running(context: SparkContext) -> int:
    """Tasks that an executor is at, those of failed jobs too."""
    executors = context._jsc.sc().statusTracker().getExecutorInfos()
    return sum(executor.numRunningTasks() for executor in executors)


def _cancel_jobs_on_interrupt(context: SparkContext) -> None:
    """Replace pyspark's handler, which calls the JVM in the middle of a call to it."""

    def cancel() -> None:
        # whatever py4j raises when Spark has been stopped: there is nothing to cancel
        with suppress(Exception):
            context.cancelAllJobs()

    def interrupted(number: int, frame: FrameType | None) -> NoReturn:
        # py4j may make another error of what is raised here
        note_interrupt()
        # another thread has a connection to the JVM of its own
        canceller = threading.Thread(target=cancel, daemon=True)
        canceller.start()
        canceller.join(_SECONDS_TO_CANCEL)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, interrupted)


def _cause(error: Exception) -> str:
    """What went wrong, without the stack of the JVM."""
    if isinstance(error, Py4JJavaError):
        text = str(error.java_exception.toString()).partition("\n")[0]
    else:
        text = str(error)
    return text.strip()[:500].rstrip(".: ")


def _conf(config: Config, application: str) -> SparkConf:
    """Everything that a JVM of our own is started with."""
    spark = config.spark
    conf = SparkConf().setMaster(spark.master).setAppName(_application_name(config, application))
    return conf.setAll(list(_settings(spark, spark.master).items()))


def _application_name(config: Config, application: str) -> str:
    return f"distrec {application} {config.name}"


def _builder(config: Config, application: str, submitted: bool) -> SparkSession.Builder:
    given = SparkConf() if submitted or SparkContext._active_spark_context else None
    master = given.get("spark.master", config.spark.master) if given else config.spark.master
    assert master is not None
    builder = SparkSession.builder
    for key, value in _settings(config.spark, master).items():
        # a setting on the command line of spark-submit goes before the file's
        if key in _SQL_SETTINGS or given is None or not given.contains(key):
            _refuse_hidden(key, value)
            builder = builder.config(key, value)
    if given is None:
        builder = builder.master(master)
    if given is None or not given.contains("spark.app.name") or not submitted:
        builder = builder.appName(_application_name(config, application))
    if is_local(master):
        # Python workers must be this Python, whatever the PATH says
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    return builder


def _refuse_hidden(key: str, value: str) -> None:
    if MASK in value:
        raise ConfigError(
            f"Spark is started with settings as they are. Received: spark.conf has {key} = "
            f"{value!r}, as in the copy of a configuration, which hides secrets. Give the job the "
            "file that was copied, or take the key out and give it to Spark by spark-defaults.conf."
        )


def _settings(spark: SparkConfig, master: str) -> dict[str, str]:
    settings = {
        "spark.driver.memory": spark.driver_memory,
        "spark.ui.showConsoleProgress": str(on_terminal()).lower(),
        **_SQL_SETTINGS,
    }
    partitions = spark.shuffle_partitions
    if is_local(master):
        settings |= {
            "spark.ui.enabled": "false",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.driver.host": "127.0.0.1",
        }
        partitions = partitions or 2 * local_cores(master)
    if partitions:
        settings["spark.sql.shuffle.partitions"] = str(partitions)
    return settings | dict(spark.conf)


def is_local(master: str) -> bool:
    """Whether Spark runs inside one process: local, local[4], local[*]."""
    return re.fullmatch(r"local(\[.*\])?", master) is not None


def local_cores(master: str) -> int:
    """Cores of a local master.

    Example:
        >>> local_cores("local[3]"), local_cores("local")
        (3, 1)
    """
    match = re.fullmatch(r"local(?:\[(\d+|\*)(?:,\s*\d+)?\])?", master)
    threads = match.group(1) if match else None
    if threads == "*":
        return len(os.sched_getaffinity(0))
    return int(threads) if threads else 1


def _require_java() -> None:
    home = os.environ.get("JAVA_HOME")
    found = os.path.join(home, "bin", "java") if home else shutil.which("java")
    if not found or not os.access(found, os.X_OK):
        raise LaunchError(
            "Spark needs Java 17. Received: "
            + (f"JAVA_HOME = {home!r}, which has no bin/java" if home else "no java on the PATH")
            + ". Install it (Debian: apt-get install openjdk-17-jre-headless), or set JAVA_HOME."
        )
