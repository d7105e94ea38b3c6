"""`distrec forget`: nothing of the people is left, the rest stays, and a kill changes nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from distrec import checkpoint, evaluate, forget, pipeline
from distrec import columns as c
from distrec.cli import app
from distrec.compare import read_run
from distrec.config import Config
from distrec.dataset import MANIFEST, Split, Vocabulary, read_manifest
from distrec.errors import DataError
from distrec.files import describe_file
from distrec.forget import steps
from distrec.forget.found import Found, Stranger
from distrec.forget.scan import remains
from distrec.people import names_somebody, read_people
from distrec.reader import ExampleReader
from distrec.scoring.model import check_same_data, open_model
from distrec.sharding.collectives import OneProcess
from distrec.sharding.initial import initial_rows
from distrec.trainer import train
from distrec.world import World
from tests.synthetic import RECENT_AFTER
from tests.training import make_config, write_config

KEYS: dict[str, dict[str, Any]] = {
    # two full checkpoints, and a delta on each
    "train": {
        "max_epochs": 2, "max_steps": 8, "evaluate_every_steps": 0, "checkpoint_every_steps": 2,
        "full_checkpoint_every": 2, "keep_checkpoints": 4,
    },
    "score": {"checkpoint": "newest"},
    "report": {"sample_users": 60},
}  # fmt: skip
PEOPLE = frozenset({"u3", "u17", "u59", "nobody"})
IDS = [3 + c.FIRST_INDEX, 17 + c.FIRST_INDEX, 59 + c.FIRST_INDEX]


def write_scores(directory: Path) -> None:
    """Two files, of which one names somebody."""
    entries = []
    for number, users in enumerate((["u1", "u2"], ["u3", "u3", "u4"])):
        name = f"top_k/part-{number:05d}.parquet"
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            {c.USER_ID: user, c.RANK: 1, c.ITEM_ID: "i2", c.SCORE: 0.5, c.REASONS: [("cf", 0.5)]}
            for user in users
        ]
        kinds = pa.schema(
            [(c.USER_ID, pa.string()), (c.RANK, pa.int32()), (c.ITEM_ID, pa.string()),
             (c.SCORE, pa.float32()), (c.REASONS, pa.map_(pa.string(), pa.float32()))]
        )  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows, kinds), path)
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        entries.append(
            {"path": name, "num_rows": len(users), "num_bytes": len(data), "sha256": digest}
        )
    manifest = {"num_users": 4, "num_rows": 5, "files": entries, "model_version": "v"}
    (directory / MANIFEST).write_text(json.dumps(manifest))


def add_to_dataset(directory: Path) -> None:
    """A vocabulary of a feature of users, and rejected rows."""
    manifest = read_manifest(directory)
    ids = list(range(c.FIRST_INDEX, c.FIRST_INDEX + 4))
    vocabulary = {c.VALUE: ["g0", "g1", "g2", "g3"], c.ID: ids, c.COUNT: [15] * 4}
    rejects = {
        c.SOURCE: ["events", "events", "users", "items"],
        c.REASON: ["empty", "empty", "twice", "twice"],
        c.RAW_ROW: ['{"user":"u3","item":null}', '{"user":"u4"}', '{"id":"u17"}', '{"id":"u17"}'],
    }
    entries = {}
    for name, columns in (("vocab/user_group", vocabulary), ("rejects", rejects)):
        (directory / name).mkdir(parents=True)
        pq.write_table(pa.table(columns), directory / name / "part-00000.parquet")
        entries[name] = describe_file(directory, f"{name}/part-00000.parquet")
    group = Vocabulary(
        name="user_group", num_embeddings=6, sha256="0" * 64, files=(entries["vocab/user_group"],)
    )
    changed = manifest.model_copy(
        update={
            "vocabularies": {**manifest.vocabularies, "user_group": group},
            "splits": {
                **manifest.splits, c.REJECTS: Split(num_rows=4, files=(entries["rejects"],))
            },
            "schemas": {**manifest.schemas, c.REJECTS: dict.fromkeys(rejects, "string")},
            "rejects": {"events: empty": 2, "items: twice": 1, "users: twice": 1},
        }
    )  # fmt: skip
    (directory / MANIFEST).write_text(changed.model_dump_json())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has been trained, set aside, trained anew, evaluated, scored and reported."""
    kinds = ("view", "buy")
    config = make_config(tmp_path_factory.mktemp("forget") / "run", KEYS, event_types=kinds)
    add_to_dataset(config.dataset_directory)
    collectives = OneProcess(torch.device("cpu"))
    train(config, collectives)
    config = make_config(config.directory, {**KEYS, "loss": {"l2": 1e-4}})
    train(config, collectives)
    assert (config.directory / "checkpoints-before-1").is_dir()
    evaluate.run(config)
    write_scores(config.scores_directory)
    message = 'at most 1% may break. Received: 1 row, for example {"user":"u17","item":"i4"}'
    lines = [{"job": "prepare", "message": message}, {"job": "train", "message": "rank 17 died"}]
    (config.logs_directory / "jobs.jsonl").write_text("".join(json.dumps(e) + "\n" for e in lines))
    write_config(config)
    pipeline.report(config)
    return config.directory


@pytest.fixture
def config(made: Path, tmp_path: Path) -> Config:
    """A copy, with an exported table outside of the run's directory."""
    shutil.copytree(made, tmp_path / "run")
    config = make_config(tmp_path / "run", {**KEYS, "loss": {"l2": 1e-4}})
    arguments = ["export", str(write_config(config)), "--output", str(tmp_path / "user.parquet")]
    assert CliRunner().invoke(app, [*arguments, "--table", "user"]).exit_code == 0
    return config


def contents(directory: Path) -> dict[str, str]:
    """SHA-256 of every file but those that say when a job was run."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "jobs.jsonl"
    }


def table_of(path: Path, name: str) -> torch.Tensor:
    manifest = checkpoint.read_checkpoint_manifest(path)
    return checkpoint.read_rows(path, name, 0, manifest.tables[name].num_embeddings)


def test_nothing_of_the_people_is_left(config: Config, tmp_path: Path) -> None:
    before = {path: table_of(path, "user") for path in config.directory.glob("checkpoints*/step-*")}
    assert len(before) == 8
    users = tmp_path / "users.txt"
    users.write_text("\n".join(sorted(PEOPLE)) + "\n")
    config.bad_batches_directory.mkdir()
    shown = CliRunner().invoke(
        app, ["forget", str(config.directory / "config.toml"), "--users", str(users)]
    )
    assert shown.exit_code == 0, shown.output
    summary = json.loads(shown.stdout.splitlines()[-1])["summary"]
    assert (summary["people"], summary["unknown"], summary["left"]) == (4, 1, 0)
    assert (summary["scores"], summary["exports"], summary["messages"]) == (2, 3, 1)
    assert not PEOPLE & set(shown.output.replace('"', " ").split())

    manifest = read_manifest(config.dataset_directory)
    for name in (c.TRAIN, c.VALID, c.TEST, c.USERS, c.VALID_QUERIES, c.TEST_QUERIES):
        rows = [
            row
            for entry in manifest.splits[name].files
            for row in pq.read_table(config.dataset_directory / entry.path).to_pylist()
        ]
        assert len(rows) == manifest.splits[name].num_rows == 57 * (12 if name == c.TRAIN else 1)
        assert not {row[c.USER_INDEX] for row in rows} & set(IDS)
        assert not {row.get(c.USER_ID) for row in rows} & PEOPLE
    assert manifest.rejects == {"events: empty": 1, "items: twice": 1}
    free = manifest.vocabularies[c.USER_ID].free_files[0]
    assert pq.read_table(config.dataset_directory / free.path)[c.ID].to_pylist() == IDS
    for path, old in before.items():
        new = table_of(path, "user")
        stays = [index for index in range(len(old)) if index not in IDS]
        assert torch.equal(new[stays], old[stays])
        fresh = initial_rows("user", np.array(IDS), 8, config.seed, 0.05)
        assert torch.equal(new[IDS], torch.from_numpy(fresh))
        # some of them had been trained
        assert path.name == "step-00000002" or not torch.equal(old[IDS], new[IDS])
        for shard in path.glob("tables/user/*"):
            held = checkpoint.files.open_tensors(shard, None)
            rows = held["row_ids"].tolist() if "row_ids" in held else range(len(old))
            places = [place for place, index in enumerate(rows) if index in IDS]
            assert places
            assert not held["state"][places].any()
    kept = pq.read_table(tmp_path / "user.parquet")
    assert not set(kept[c.ID].to_pylist()) & set(IDS)
    assert len(kept) == 62 - 3
    lines = (config.logs_directory / "jobs.jsonl").read_text().splitlines()
    assert [json.loads(line).get("message") for line in lines[:2]] == ["", "rank 17 died"]
    assert not config.bad_batches_directory.exists()


def test_what_is_left_works_as_before(config: Config) -> None:
    forget.run(config, PEOPLE)
    manifest = read_manifest(config.dataset_directory)
    reader = ExampleReader(
        config.dataset_directory, manifest, c.TRAIN, World(),
        config.reader.model_copy(update={"verify": "sha256"}), 120, 1,
    )  # fmt: skip
    assert sum(batch.batch_size for batch in reader.batches(0)) == 57 * 12
    for directory in config.directory.glob("checkpoints*"):
        for path in checkpoint.committed(directory):
            checkpoint.verify(path)
            check_same_data(open_model(path), manifest, config.dataset_directory)
    path = checkpoint.find(config.checkpoint_directory, "best")
    best = checkpoint.read_best(config.checkpoint_directory)
    assert best is not None
    digest = hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
    assert best["manifest_sha256"] == digest
    # of the same users, in the order in which a new evaluation has them
    ranks = read_run(config.directory, "forgotten")
    evaluate.run(config)
    again = read_run(config.directory, "evaluated")
    columns = ["split", "model", "query", c.USER_INDEX, "num_targets"]
    assert ranks.ranks.select(columns).to_pylist() == again.ranks.select(columns).to_pylist()
    for split, part in again.document["splits"].items():
        assert ranks.document["splits"][split]["queries_hash"] == part["queries_hash"]


def test_counts_of_items_are_those_of_the_rest(config: Config) -> None:
    manifest = read_manifest(config.dataset_directory)
    forget.run(config, PEOPLE)
    rest = read_manifest(config.dataset_directory)

    def rows(split: str) -> list[dict[str, Any]]:
        return [
            row
            for entry in rest.splits[split].files
            for row in pq.read_table(config.dataset_directory / entry.path).to_pylist()
        ]

    events = {
        split: [(row[c.ITEM_INDEX], row[c.TIME]) for row in rows(split)]
        for split in (c.TRAIN, c.VALID, c.TEST)
    }
    items = rows(c.ITEMS)
    for row in items:
        assert row[c.COUNT] == [item for item, _ in events[c.TRAIN]].count(row[c.ITEM_INDEX])
    for split, pool in c.RECENT_POOLS.items():
        late = Counter(item for name in pool for item, time in events[name] if time > RECENT_AFTER)
        assert len(late) > 10
        assert [row[f"recent_{split}"] for row in items] == [
            late[row[c.ITEM_INDEX]] for row in items
        ]
    assert rest.content_hash != manifest.content_hash
    assert [one.content_hash for one in rest.forgotten] == [manifest.content_hash]


def test_values_that_nobody_else_has_go_too(config: Config) -> None:
    path = config.checkpoint_directory / "step-00000008"
    before = table_of(path, "user_group")
    forget.run(config, frozenset(f"u{number}" for number in range(3, 60, 4)))
    group = read_manifest(config.dataset_directory).vocabularies["user_group"]
    rows = pq.read_table(config.dataset_directory / group.files[0].path)
    assert rows[c.VALUE].to_pylist() == ["g0", "g1", "g2"]
    assert (group.num_embeddings, group.num_free) == (6, 1)
    after = table_of(path, "user_group")
    assert torch.equal(after[:5], before[:5])
    fresh = initial_rows("user_group", np.array([5]), 4, config.seed, 0.05)
    assert torch.equal(after[5:], torch.from_numpy(fresh))
    assert not torch.equal(after[5:], before[5:])


@pytest.fixture(scope="module")
def undisturbed(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What forgetting leaves."""
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    shutil.copytree(made, directory)
    forget.run(make_config(directory, {**KEYS, "loss": {"l2": 1e-4}}), PEOPLE)
    return contents(directory)


@pytest.mark.parametrize(
    ("place", "when"),
    [("replace_checkpoints", "before"), ("replace_checkpoints", "after"),
     ("outputs.replace_ranks", "after"), ("outputs.replace_log", "before"), ("commit", "before"),
     ("commit", "between"), ("commit", "after"), ("pipeline.mark_up_to_date", "after")],
)  # fmt: skip
def test_killed_anywhere_and_run_again_it_ends_the_same(
    config: Config,
    undisturbed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    when: str,
) -> None:
    owner: Any = steps
    *parents, name = place.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    whole = getattr(owner, name)

    def killed(*arguments: Any) -> None:
        if when == "after":
            whole(*arguments)
        if when == "between":
            arguments[1].rename(arguments[1].with_name(".dataset-old-0123456789ab"))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        # what a killed job would not have cleaned
        patch.setattr(shutil, "rmtree", lambda *arguments, **options: None)
        with pytest.raises(KeyboardInterrupt):
            forget.run(config, PEOPLE)
    forget.run(config, PEOPLE)
    expected, found = dict(undisturbed), contents(config.directory)
    # they name the directory
    for name in ("report.html", "config.toml"):
        expected.pop(name), found.pop(name)
    assert found == expected


def test_the_scan_finds_what_is_left(config: Config) -> None:
    places = remains(config.directory, PEOPLE, {})
    told = " ".join(places)
    for name in ("dataset/users/", "dataset/vocab/user_id/", "scores/top_k/part-00001",
                 "report.html: 1", "jobs.jsonl: 1", "user.parquet: 3", "queries/"):  # fmt: skip
        assert name in told
    manifest = read_manifest(config.dataset_directory)
    found = Found(PEOPLE, manifest, {c.USER_ID: np.array(IDS)})
    changes = steps._changes(found)
    told = " ".join(remains(config.directory, frozenset({"none"}), changes))
    for name in ("dataset/train/part-00002", "query_ranks.parquet", "step-00000004/manifest.json",
                 "checkpoints-before-1/step-00000008/manifest.json", "user.parquet"):  # fmt: skip
        assert name in told
    rest = config.checkpoint_directory / ".partial-step-00000010-0123456789ab"
    shutil.copytree(config.checkpoint_directory / "step-00000004", rest)
    (rest / MANIFEST).unlink()
    assert str(rest) in " ".join(remains(config.directory, frozenset({"none"}), {}))


def test_what_it_cannot_take_out_is_an_error(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distrec.forget.outputs.replace_exports", lambda *_: 0)
    with pytest.raises(
        DataError, match=r"nothing of the people is left.*1 places.*user.parquet"
    ) as error:
        forget.run(config, PEOPLE)
    assert "u3" not in str(error.value)


def test_a_dry_run_changes_nothing(config: Config) -> None:
    before = contents(config.directory)
    summary = forget.run(config, PEOPLE, dry_run=True)
    assert contents(config.directory) == before
    rows = {"train": 36, "valid": 3, "test": 3, "users": 3, "valid_queries": 3, "test_queries": 3}
    assert summary["dataset"] == {**rows, "rejects": 2}
    assert (summary["ids"], summary["checkpoints"]) == ({c.USER_ID: 3}, 8)
    assert (summary["deleted"], summary["exports"]) == ([], 1)


def test_checkpoints_of_another_dataset_are_deleted_or_refused(config: Config) -> None:
    def of_another(directory: Path) -> None:
        for path in directory.glob("step-*/manifest.json"):
            document = json.loads(path.read_text())
            document["vocabularies"][c.USER_ID] = "0" * 64
            path.write_text(json.dumps(document))

    aside = config.directory / "checkpoints-before-1"
    of_another(aside)
    assert forget.run(config, PEOPLE, dry_run=True)["deleted"] == [str(aside)]
    forget.run(config, PEOPLE)
    assert not aside.exists()
    of_another(config.checkpoint_directory)
    before = contents(config.directory)
    with pytest.raises(DataError, match="trained on another one"):
        forget.run(config, frozenset({"u5"}))
    assert contents(config.directory) == before


def test_stages_that_were_up_to_date_still_are(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = config.directory / "raw.csv"
    raw.write_text("x")
    monkeypatch.setattr(pipeline, "_raw_files", lambda _: (str(raw),))
    state = {}
    outputs = {one.name: pipeline._output_hash(one, config) for one in pipeline.STAGES}
    for stage in pipeline.STAGES:
        key = pipeline.stage_key(stage, config, outputs)
        state[stage.name] = {"key": key, "output": outputs[stage.name], "seconds": 1.0}
    state["score"]["key"] = "of other settings"
    (config.directory / pipeline.STATE).write_text(json.dumps(state))
    stages = ["prepare", "train", "evaluate", "report"]
    assert pipeline.up_to_date(config) == stages
    forget.run(config, PEOPLE)
    assert pipeline.up_to_date(config) == stages


def test_rows_of_users_without_an_id_go_by_what_they_hold(tmp_path: Path) -> None:
    config = make_config(tmp_path, {})
    directory = config.dataset_directory
    manifest = read_manifest(directory)
    strangers = ["u7", "u8"]
    splits = dict(manifest.splits)
    for name, split in manifest.splits.items():
        if name == c.ITEMS:
            continue
        files = []
        for entry in split.files:
            table = pq.read_table(directory / entry.path)
            index = table[c.USER_INDEX].to_numpy().copy()
            index[np.isin(index, [9, 10])] = c.UNKNOWN_INDEX
            place = table.column_names.index(c.USER_INDEX)
            pq.write_table(
                table.set_column(place, c.USER_INDEX, pa.array(index)), directory / entry.path
            )
            size = (directory / entry.path).stat().st_size
            files.append(entry.model_copy(update={"num_bytes": size}))
        splits[name] = split.model_copy(update={"files": tuple(files)})
    path = directory / manifest.vocabularies[c.USER_ID].files[0].path
    table = pq.read_table(path)
    pq.write_table(
        table.filter(pa.compute.invert(pa.compute.is_in(table["value"], pa.array(strangers)))), path
    )
    text = manifest.model_copy(update={"splits": splits}).model_dump_json()
    (directory / MANIFEST).write_text(text)
    forget.run(config, frozenset({"u7"}))
    rest = read_manifest(directory)
    rows = [
        row
        for name in (c.TRAIN, c.VALID, c.TEST)
        for entry in rest.splits[name].files
        for row in pq.read_table(directory / entry.path).to_pylist()
    ]
    # 8 of u7's 14 events are within the history that users/ shows; u8 has lost none
    assert sum(row[c.USER_INDEX] == c.UNKNOWN_INDEX for row in rows) == 14
    assert rest.splits[c.TRAIN].num_rows == 59 * 12


@pytest.mark.parametrize(
    ("row", "num_events", "could_be"),
    [({}, 2, True), ({c.TIME: 11}, 2, False), ({c.TIME: 11}, 3, True), ({c.TIME: 22}, 3, False),
     ({c.ITEM_INDEX: 4}, 3, False), ({c.HISTORY: [3], c.HISTORY_TIMES: [5]}, 2, False),
     ({c.HISTORY: [4], c.HISTORY_TIMES: [20]}, 3, False), ({c.NUM_EVENTS: 4}, 3, False),
     ({c.LABEL: 0.0, c.TIME: 15}, 2, True), ({c.ITEM_INDEX: 1, c.TIME: 15}, 3, True)],
)  # fmt: skip
def test_which_rows_could_be_a_strangers(
    row: dict[str, Any], num_events: int, could_be: bool
) -> None:
    one = Stranger(frozenset({1, 2, 3}), frozenset({(2, 10), (3, 20)}), num_events, 21)
    whole = {c.ITEM_INDEX: 2, c.TIME: 10, c.LABEL: 1.0, c.NUM_EVENTS: 0}
    whole |= {c.HISTORY: [], c.HISTORY_TIMES: [], **row}
    assert one.could_be(whole, has_negatives=True) is could_be


@pytest.mark.parametrize("name", ["users.txt", "users.csv", "users.parquet"])
def test_lists_of_people(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.table({"who": pa.array([7.0, None, 12.0])}), path)
    elif name.endswith("csv"):
        path.write_text("x,who\n1,7\n2,\n3,12\n")
    else:
        path.write_text("\ufeff7\r\n\n12", encoding="utf-8")
    assert read_people(path, "who") == {"7", "12"}
    path.unlink()
    with pytest.raises(DataError, match="a list of users is a file"):
        read_people(path, "who")


def test_lists_that_name_nobody_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x\n1\n")
    with pytest.raises(DataError, match="a column 'user_id' or 'who'"):
        read_people(tmp_path / "a.csv", "who")
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(DataError, match="at least one"):
        read_people(tmp_path / "a.txt", "who")


@pytest.mark.parametrize(
    ("text", "is_there"),
    [('{"user": 7, "item": "x"}', True), ('{"user": 7.0}', True), ('{"user": "17"}', False),
     ('{"line": "7::4::x"}', True), ('{"line": "x;\\"7\\";y"}', True), ("for example 77", False),
     ('for example {\\"user\\": \\"7\\"}', True), ('{"a": ["x", {"b": "7"}]}', True)],
)  # fmt: skip
def test_whether_a_row_names_somebody(text: str, is_there: bool) -> None:
    assert names_somebody(text, frozenset({"7"})) is is_there
