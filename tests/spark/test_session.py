"""The session's settings, and what is said when Spark cannot start."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from distrec.config import SparkConfig, parse_config
from distrec.errors import LaunchError
from distrec.spark import _require_java, _settings, is_local, local_cores, session


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
