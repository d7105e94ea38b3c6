"""One Spark session for the whole run, and a place for intermediate tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from distrec.config import parse_config
from distrec.prepare.workspace import Workspace
from distrec.spark import session
from tests.java import QUICK_JAVA


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    """local[2], few partitions."""
    conf = {"spark.driver.extraJavaOptions": QUICK_JAVA}
    settings = {
        "master": "local[2]", "driver_memory": "1g", "shuffle_partitions": 3, "conf": conf,
    }  # fmt: skip
    config = parse_config(
        {
            "name": "tests",
            "prepare": {"events": {"paths": ["none"], "time": "t"}},
            "spark": settings,
        },
        "tests",
    )
    started = session(config, "tests")
    yield started
    started.stop()


@pytest.fixture
def workspace(spark: SparkSession, tmp_path: Path) -> Workspace:
    """Of one test."""
    root = tmp_path / "workspace"
    root.mkdir()
    return Workspace(spark, root)
