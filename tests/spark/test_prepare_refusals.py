"""Bad input ends with a message that helps, and leaves what was there before as it was."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from distrec import prepare
from distrec.config import Config, parse_config
from distrec.errors import ConfigError, DataError
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


def truncated_parquet(spark: SparkSession, folder: Path) -> bytes:
    spark.range(100).write.parquet(str(folder / "whole"))
    whole = next((folder / "whole").glob("part-*")).read_bytes()
    return whole[: len(whole) // 2]


CASES: dict[str, tuple[str | bytes | None, dict[str, Any], dict[str, Any], str]] = {
    "missing file": (
        None, {"paths": ["/no such/ö events.csv"]}, {},
        r"every path of events must match a file\. Received: /no such/ö events\.csv, which",
    ),
    "wrong column": (
        GOOD, {"user": "user"}, {},
        r"prepare\.events\.user must name a column.*'user'; the columns there are \['user_id', "
        r"'item_id', 'time'\]\. Did you mean 'user_id'",
    ),
    "empty file": ("", {}, {}, "events must have rows.*which is empty"),
    "only a header": ("user_id,item_id,time\n", {}, {}, "events must have rows. Received: none"),
    "text in a number": (
        GOOD + "u1,i1,never\n", {}, {},
        r"at most 1\.00%.*Received: 1 of 13 rows of events: 1 x column 'time' is not a time, for "
        r'example \{"user_id":"u1","item_id":"i1","time":"never"\}',
    ),
    "a time in the future": (
        GOOD, {}, {"latest_time": 10}, "1 of 12 rows of events: 1 x column 'time' lies in the fut",
    ),
    "label": (
        GOOD, {"label": "time", "time": None}, {"split": {"method": "random"}},
        "10 of 12 rows of events: 10 x column 'time' is not 0 or 1",
    ),
    "not UTF-8": (GOOD.encode() + b"u\xe9,i1,1\n", {}, {}, "1 x bytes that are not UTF-8"),
    "not JSON": (
        '{"user_id": 1, "item_id": 2, "time": 3}\n{"user_id": 1', {"format": "json"}, {},
        '1 of 2 rows of events: 1 x line is not JSON, for example {"line":"{\\\\"user_id\\\\": 1"}',
    ),
    "not UTF-8 in JSON": (
        b'{"user_id": "u\xe9", "item_id": 2, "time": 3}\n', {"format": "json"}, {},
        "1 x bytes that are not UTF-8",
    ),
    "empty JSON": (
        "", {"format": "json"}, {}, "events must have rows.*a JSON object.*where there is none",
    ),
    "nobody left": (
        GOOD, {}, {"user_k_core": 5},
        "filtering must leave users. Received: none; rows by step: read 12, k_core 12",
    ),
    "nothing in test": (
        GOOD, {}, {"split": {"method": "temporal", "test_time": 99, "valid_time": 50}},
        r"must leave rows in train and in test.*'test': 0.*none in test",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused(spark: SparkSession, tmp_path: Path, case: str) -> None:
    content, events, section, message = CASES[case]
    if content is not None:
        content = content.encode() if isinstance(content, str) else content
        (tmp_path / "events.csv").write_bytes(content)
    config = make_config(tmp_path, events, **section)
    unchanged = keep_old(config)
    with pytest.raises(DataError, match=message):
        prepare.run(spark, config)
    unchanged()


def test_truncated_files(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "events.parquet").write_bytes(truncated_parquet(spark, tmp_path))
    whole = gzip.compress(GOOD.encode() * 100)
    (tmp_path / "events.csv.gz").write_bytes(whole[: len(whole) // 2])
    for name, file_format in (("events.parquet", "parquet"), ("events.csv.gz", "csv")):
        paths = [str(tmp_path / name)]
        config = make_config(tmp_path, {"paths": paths, "format": file_format})
        with pytest.raises(DataError, match=rf"must be whole and of its format.*{name}"):
            prepare.run(spark, config)
        assert list(config.directory.iterdir()) == []


def test_item_twice_in_the_catalogue(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text(GOOD)
    (tmp_path / "items.csv").write_text("item_id\ni1\ni2\ni1\n")
    config = make_config(
        tmp_path, {}, items={"paths": [str(tmp_path / "items.csv")], "id": "item_id"}
    )
    with pytest.raises(DataError, match=r"stands once in items. Received: 1 ids .* example 'i1'"):
        prepare.run(spark, config)


def test_headers_that_differ(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text(GOOD)
    (tmp_path / "other.csv").write_text("item_id,user_id,time\ni1,u1,1\n")
    config = make_config(tmp_path, {"paths": [str(tmp_path / "*.csv")]})
    with pytest.raises(DataError, match="all files of events must have the same header"):
        prepare.run(spark, config)


def test_pattern_of_times(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text(GOOD)
    with pytest.raises(ConfigError, match=r"time_format must be .*Received: 'when\?'"):
        prepare.run(spark, make_config(tmp_path, {"time_format": "when?"}))


def test_encoding(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text(GOOD)
    for file_format in ("csv", "json"):
        config = make_config(tmp_path, {"encoding": "utf-99", "format": file_format})
        with pytest.raises(ConfigError, match=r"events\.encoding must be .*Received: 'utf-99'"):
            prepare.run(spark, config)


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
