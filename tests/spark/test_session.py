"""The session's settings, and what is said when Spark cannot start."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from py4j.protocol import Py4JJavaError
from pyspark.sql import SparkSession

from distrec.config import SparkConfig, parse_config
from distrec.errors import LaunchError
from distrec.files import staging
from distrec.spark import (
    _require_java,
    _settings,
    is_local,
    local_cores,
    session,
    tasks_ended,
)


def test_an_active_session_is_taken_as_it_is(spark: SparkSession) -> None:
    document = {
        "name": "other", "prepare": {"events": {"paths": ["x"], "time": "t"}},
        "spark": {"master": "spark://nowhere:7077", "shuffle_partitions": 99},
    }  # fmt: skip
    assert session(parse_config(document, "tests"), "again") is spark
    assert spark.conf.get("spark.sql.shuffle.partitions") == "3"
    assert spark.conf.get("spark.sql.session.timeZone") == "UTC"
    assert spark.sparkContext.uiWebUrl is None


def test_settings_of_a_local_master_and_of_a_cluster() -> None:
    local = _settings(SparkConfig(driver_memory="2g"), "local[3]")
    assert (local["spark.sql.shuffle.partitions"], local["spark.driver.memory"]) == ("6", "2g")
    assert local["spark.driver.bindAddress"] == "127.0.0.1"
    assert local["spark.ui.enabled"] == "false"
    cluster = _settings(SparkConfig(conf={"spark.executor.memory": "3g"}), "yarn")
    assert cluster["spark.executor.memory"] == "3g"
    assert not {"spark.sql.shuffle.partitions", "spark.ui.enabled"} & cluster.keys()
    assert (local_cores("local"), local_cores("local[4,2]")) == (1, 4)
    assert local_cores("local[*]") >= 1
    assert not is_local("spark://localhost:7077")


def test_without_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(LaunchError, match=r"needs Java 17\. Received: JAVA_HOME = .*apt-get"):
        _require_java()
    monkeypatch.delenv("JAVA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="no java on the PATH"):
        _require_java()


# in a process of its own: the JVM of a process starts once
_FIRST_START = """
import os
import signal
import sys
import threading
import time
from distrec.config import parse_config
from distrec.errors import LaunchError
from distrec.job import configure_logging, execute
from distrec.spark import session
from distrec.spark_output import log_progress

def with_master(master):
    document = {"name": "n", "prepare": {"events": {"paths": ["x"], "time": "t"}}}
    settings = {"output": sys.argv[1], "spark": {"master": master, "driver_memory": "1g"}}
    return parse_config(document | settings, "tests")

configure_logging()
spark = session(with_master("local[1]"), "first")
context = spark.sparkContext
assert spark.range(7).count() == 7
log_progress(context, 0.5)
context.parallelize([0, 1], 2).foreach(lambda number: time.sleep(2))
context._jvm.org.slf4j.LoggerFactory.getLogger("org.apache.spark.Any").warn("it matters")

def interrupt():
    while not context.statusTracker().getActiveJobsIds():
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)

def work(config):
    threading.Thread(target=interrupt).start()
    context.parallelize([0], 1).foreach(lambda number: time.sleep(600))

print(execute("prepare", with_master("local[1]"), work, print_line=False))
while context.statusTracker().getActiveJobsIds():
    time.sleep(0.1)

spark.stop()
try:
    session(with_master("local[many]"), "second")
except LaunchError as error:
    print(error)
"""


def test_what_a_start_shows_an_interrupt_and_a_start_that_fails(tmp_path: Path) -> None:
    environment = {
        name: value
        for name, value in os.environ.items()
        # what the JVM or Spark of this machine would say of its own
        if name not in {"JAVA_TOOL_OPTIONS", "SPARK_HOME", "SPARK_CONF_DIR", "SPARK_LOCAL_IP"}
    }
    result = subprocess.run(
        [sys.executable, "-c", _FIRST_START, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    # what follows is about the start that was made to fail
    first_start, matters, _ = result.stderr.partition("W spark.Any: it matters\n")
    assert matters, result.stderr
    lines = re.sub(r"\d\d:\d\d:\d\d $", "", first_start).splitlines()
    progress = r"\d\d:\d\d:\d\d I distrec\.spark: stage \d+: \d of 2 tasks done"
    assert lines, "no progress"
    assert [line for line in lines if not re.fullmatch(progress, line)] == []
    assert "\r" not in result.stderr
    assert "Traceback" not in result.stderr
    # whatever py4j makes of an interrupt in the middle of a call
    assert result.stdout.startswith("130\n")
    assert "\nprepare: interrupted\n" in result.stderr
    assert re.search(
        r"spark\.master = 'local\[many\]'\. Received: .*Could not parse Master URL: "
        r"'local\[many\]'\. Check the master",
        result.stdout,
    ), result.stdout


def test_no_task_writes_on_after_another_has_failed(spark: SparkSession, tmp_path: Path) -> None:
    begun = tmp_path / "begun"

    def work(index: int, _rows: Iterator[int]) -> Iterator[int]:
        if index == 0:
            while not begun.exists():
                time.sleep(0.01)
            raise ValueError("as a full disk")
        # Hadoop makes the folders above a file too, and does not look whether its job lives
        begun.touch()
        for _ in range(1000):
            (root / "late").mkdir(parents=True, exist_ok=True)
            time.sleep(0.01)
        yield 0

    target = tmp_path / "out"
    with (
        pytest.raises(Py4JJavaError, match="as a full disk"),
        staging(target) as root,
        tasks_ended(spark),
    ):
        spark.sparkContext.parallelize([0, 1], 2).mapPartitionsWithIndex(work).count()
    time.sleep(0.3)
    assert list(tmp_path.iterdir()) == [begun]
