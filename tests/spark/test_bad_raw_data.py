"""Raw data that is bad: refused with its message and exit code, or row by row sent to rejects."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from distrec import prepare
from distrec.config import Config, load_config
from distrec.job import execute
from distrec.prepare.door import door_of
from distrec.prepare.sources import read_sources
from distrec.prepare.workspace import Workspace
from tests.bad_inputs import raw
from tests.bad_inputs.case import Case, snapshot
from tests.bad_inputs.datasets import RAN

CONFIG = """
name = "bad"
output = "{run}"

[prepare.events]
paths = ["{run}/events.csv"]
time = "time"
"""


def configuration(run: Path, settings: tuple[str, ...] = ()) -> Config:
    path = run / "config.toml"
    path.write_text(CONFIG.format(run=run))
    return load_config(path, [setting.format(run=run) for setting in settings])


@pytest.mark.parametrize("case", raw.CASES, ids=str)
def test_refused(
    spark: SparkSession, case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case.make(tmp_path)
    # the dataset of last night
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "manifest.json").write_text("old")
    config = configuration(tmp_path, case.settings)
    before = snapshot(tmp_path)
    code = execute("prepare", config, lambda config: prepare.run(spark, config).counts)
    assert code == case.exit_code, capsys.readouterr().err
    assert case.pattern.search(capsys.readouterr().err)
    assert snapshot(tmp_path) == before
    assert not (tmp_path / RAN).exists()


def test_bad_rows_go_to_rejects(spark: SparkSession, workspace: Workspace, tmp_path: Path) -> None:
    raw.write_rows(tmp_path)
    config = configuration(tmp_path, raw.ROW_SETTINGS)
    sources = read_sources(config.prepare, door_of(config.prepare), workspace)
    expected = Counter(f"events: {reason}" for _, reason in raw.ROWS.values())
    assert sources.audit.reasons == expected
    assert sources.events.count() == 12


def test_keys_of_one_broken_line_of_json_are_no_columns(
    workspace: Workspace, tmp_path: Path
) -> None:
    """Spark takes Item_id for item_id, and gets half a character as another one."""
    broken = ['{"user_id": "u", "Item_id": "i", "time": 3}', '{"user_id": "u", "time\\ud800": 3}']
    raw.events(raw.JSON + "\n".join(broken))(tmp_path)
    config = configuration(tmp_path, (raw.AS_JSON, "prepare.max_reject_share=1.0"))
    sources = read_sources(config.prepare, door_of(config.prepare), workspace)
    assert sources.audit.reasons == {"events: column 'item_id' is empty": 2}
    assert sources.events.count() == 1


def test_a_byte_order_mark_is_no_part_of_the_first_column(
    workspace: Workspace, tmp_path: Path
) -> None:
    raw.events(b"\xef\xbb\xbf" + raw.GOOD.encode())(tmp_path)
    config = configuration(tmp_path)
    sources = read_sources(config.prepare, door_of(config.prepare), workspace)
    assert sources.events.count() == 12
