"""A prepare that fails or is killed leaves the dataset that was there before as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from distrec import prepare
from distrec.config import Config, parse_config
from distrec.errors import DataError
from distrec.prepare.output import Output

GOOD = "user_id,item_id,time\n" + "".join(f"u{k % 3},i{k},{k}\n" for k in range(12))


def make_config(folder: Path, events: dict[str, Any], **section: Any) -> Config:
    events = {"paths": [str(folder / "events.csv")], "time": "time", **events}
    document = {
        "name": "tests", "output": str(folder / "run"), "prepare": {"events": events, **section},
    }  # fmt: skip
    return parse_config(document, "tests")


def keep_old(config: Config) -> Callable[[], None]:
    """Put an old dataset in place; what is returned asserts that it is all there is."""
    directory = config.dataset_directory
    directory.mkdir(parents=True)
    (directory / "manifest.json").write_text("old")

    def unchanged() -> None:
        assert [path.name for path in directory.parent.iterdir()] == ["dataset"]
        assert [path.name for path in directory.iterdir()] == ["manifest.json"]
        assert (directory / "manifest.json").read_text() == "old"

    return unchanged


def test_failure_at_the_last_moment_and_a_killed_job(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old dataset stays until the new one is whole; the rest of a killed job is cleared."""
    (tmp_path / "events.csv").write_text(GOOD)
    config = make_config(tmp_path, {})
    unchanged = keep_old(config)

    def fail(self: Output) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Output, "manifest", fail)
        with pytest.raises(DataError, match="must fit on the disk"):
            prepare.run(spark, config)
    unchanged()
    # killed between the two renames, with a half-written dataset beside
    directory = config.dataset_directory
    directory.rename(directory.parent / ".dataset-old-0123456789ab")
    (directory.parent / ".dataset-ba9876543210").mkdir()
    with pytest.raises(DataError, match="must match a file"):
        prepare.run(spark, make_config(tmp_path, {"paths": [str(tmp_path / "none")]}))
    unchanged()
    manifest = prepare.run(spark, config)
    assert [path.name for path in directory.parent.iterdir()] == ["dataset"]
    # 12 events of 3 users: 2 of each are withheld
    assert manifest.counts["train"] == 6
