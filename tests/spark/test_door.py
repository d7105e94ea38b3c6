"""What becomes of users at the door of prepare: hashed ids, and those who are left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from distrec import columns as c
from distrec.config import PrepareConfig, parse_config
from distrec.errors import ConfigError
from distrec.prepare.door import door_of, hashed_column
from distrec.prepare.extend import open_previous
from distrec.prepare.sources import read_sources
from distrec.prepare.workspace import Workspace
from distrec.scoring.lists import open_list
from distrec.scoring.users import ListedUsers
from distrec.user_key import ENVIRONMENT, hashed
from tests.synthetic import write_dataset

KEY = "a key of twenty bytes"
# a bad time, no user, and a line with a cell too many
EVENTS = "user,item,time\nu1,a,1\nu2,a,2\nu3,b,x\n,b,3\nü4,a,4\nu2,b,x\nu5,a,5,6\nu2,c,3\n"
USERS = "id,age\nu1,20\nu2,30\nu1,40\nu6,50\n"


def prepare(folder: Path, **keys: Any) -> PrepareConfig:
    (folder / "events.csv").write_text(EVENTS, encoding="utf-8")
    (folder / "users.csv").write_text(USERS)
    (folder / "gone.txt").write_text("u2\nnobody\n")
    section = {
        "events": {"paths": [str(folder / "events.csv")], "user": "user", "item": "item",
                   "time": "time"},
        "users": {"paths": [str(folder / "users.csv")], "id": "id", "duplicates": "first",
                  "features": [{"column": "age", "kind": "number"}]},
        "max_reject_share": 1.0, "exclude_users": str(folder / "gone.txt"), **keys,
    }  # fmt: skip
    return parse_config({"name": "t", "prepare": section}, "t").prepare


@pytest.mark.parametrize("hashes", [True, False])
def test_users_at_the_door(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashes: bool
) -> None:
    monkeypatch.setenv(ENVIRONMENT, KEY)
    config = prepare(tmp_path, hash_users=hashes)
    sources = read_sources(config, door_of(config), workspace)

    def own(user: str) -> str:
        return hashed(user, KEY.encode()) if hashes else user

    events = {(row[c.USER_ID], row[c.ITEM_ID]) for row in sources.events.collect()}
    assert events == {(own("u1"), "a"), (own("ü4"), "a")}
    assert sources.users is not None
    users = {(row[c.ID], row["raw_user_age"]) for row in sources.users.collect()}
    assert users == {(own("u1"), 20.0), (own("u6"), 50.0)}
    audit = sources.audit
    assert audit.num_excluded == {"events": 3, "users": 1}
    assert (audit.num_read, audit.num_rejected["events"]) == ({"events": 5, "users": 3}, 3)
    rejected = [json.loads(row[c.RAW_ROW]) for one in audit.rejected for row in one.collect()]
    names = {value for row in rejected for key, value in row.items() if key in ("user", "id")}
    text = json.dumps(rejected)
    if hashes:
        assert names <= {own("u1")}
        assert not any(user in text for user in ("u1", "u3", "u5"))
    else:
        assert names == {"u3", "u1"}
        assert "u5,a" in text
    # nor does any file that prepare has written on the way name them
    if hashes:
        for path in workspace.root.rglob("*.parquet"):
            data = path.read_bytes()
            assert not any(user.encode() in data for user in ("u1", "u2", "u3", "u5"))
            assert KEY.encode() not in data


def test_another_key_is_refused_before_any_work(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT, KEY)
    write_dataset(tmp_path / "dataset")
    document = prepare(tmp_path, hash_users=True, extend=str(tmp_path / "dataset"))
    config = parse_config({"name": "t", "prepare": document.model_dump(mode="json")}, "t")
    with pytest.raises(ConfigError, match=r"not hashed. Received: a key"):
        open_previous(config, door_of(config.prepare).key)


def test_listed_users_are_hashed_as_in_the_dataset(spark: SparkSession, tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path / "dataset")
    known = spark.read.parquet(str(tmp_path / "dataset" / "users"))
    items = spark.read.parquet(str(tmp_path / "dataset" / "items"))
    items = items.select(c.ITEM_ID, c.ITEM_INDEX)
    (tmp_path / "list.csv").write_text("user_id\nu1\nnew\n")
    (tmp_path / "work").mkdir()
    maker = ListedUsers(
        spark, tmp_path / "dataset", manifest, known, items, tmp_path / "work", KEY.encode()
    )
    path = str(tmp_path / "list.csv")
    users = maker.users(open_list(spark, path, "score.users", c.USER_ID), path)
    found = {row[c.USER_ID] for row in users.frame.collect()}
    assert found == {hashed(user, KEY.encode()) for user in ("u1", "new")}


def test_plans_do_not_show_the_key(spark: SparkSession) -> None:
    column = hashed_column(F.col("id").cast("string"), KEY.encode())
    plan = spark.range(1).select(column)._jdf.queryExecution().toString()
    assert "hash_each" in plan
    assert KEY not in plan
