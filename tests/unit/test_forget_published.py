"""`distrec forget` of a run with a store: nothing of the people is left there, whenever it dies."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from distrec import checkpoint, forget, pipeline
from distrec import columns as c
from distrec.clean import stored_leftovers
from distrec.config import Config
from distrec.dataset import MANIFEST, FileEntry, read_manifest
from distrec.errors import DataError
from distrec.files import sha256
from distrec.forget import published
from distrec.sharding.collectives import OneProcess
from distrec.sharding.initial import initial_rows
from distrec.store import CHECKPOINTS, DATASET, OUTPUTS, SCORES, Store, open_output, publish
from distrec.trainer import train
from tests.object_store import ObjectStore
from tests.training import make_config, write_config
from tests.unit.test_forget import write_scores

# a full checkpoint and a delta on it
KEYS: dict[str, dict[str, Any]] = {
    "train": {"max_steps": 4, "evaluate_every_steps": 0, "checkpoint_every_steps": 2,
              "full_checkpoint_every": 2, "keep_checkpoints": 4},
}  # fmt: skip
PEOPLE = frozenset({"u3", "u17"})
IDS = [3 + c.FIRST_INDEX, 17 + c.FIRST_INDEX]
FIRST, SECOND = "step-00000002", "step-00000004"
ONE = OneProcess(torch.device("cpu"))


def with_store(directory: Path, url: str) -> Config:
    return make_config(directory, KEYS).model_copy(update={"store": url})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has been trained and scored."""
    config = make_config(tmp_path_factory.mktemp("made") / "run", KEYS, num_users=20, num_files=1)
    train(config, ONE)
    write_scores(config.scores_directory)
    return config.directory


@pytest.fixture
def stored(made: Path, tmp_path: Path) -> Callable[[str], Config]:
    """Publishes the run, as jobs do that are cut off at times; the last checkpoint is not sent."""

    def publish_all(url: str) -> Config:
        shutil.copytree(made, tmp_path / "run")
        config = with_store(tmp_path / "run", url)
        dataset, directory = config.dataset_directory, config.checkpoint_directory
        publish(config, DATASET, dataset, read_manifest(dataset).all_files())
        (directory / SECOND).rename(tmp_path / SECOND)
        checkpoint.publish_checkpoints(config, ONE)
        (tmp_path / SECOND).rename(directory / SECOND)
        scores = config.scores_directory
        document = json.loads((scores / MANIFEST).read_text())
        for version in ("an older one", "v"):
            (scores / MANIFEST).write_text(json.dumps({**document, "model_version": version}))
            files = [FileEntry.model_validate(entry) for entry in document["files"]]
            publish(config, SCORES, scores, files)
        # a job that was killed while it sent
        open_output(config, DATASET).put("dataset-0123456789ab", dataset, [])
        half = published.dataset_files(dataset)[:2]
        open_output(config, DATASET).put("dataset-0123456789ab", dataset, half)
        return config

    return publish_all


def people_in(data: bytes) -> set[str]:
    """Who is in a Parquet file with users' values."""
    table = pq.read_table(io.BytesIO(data))
    names = [name for name in (c.USER_ID, c.VALUE) if name in table.column_names]
    return {one for name in names for one in table[name].to_pylist()} & PEOPLE


def test_nothing_of_the_people_is_left_in_the_store(
    object_store: ObjectStore, stored: Callable[[str], Config], made: Path, tmp_path: Path
) -> None:
    before = stored(object_store.url(tmp_path.name))
    checkpoint.publish_checkpoints(before, ONE)
    objects = object_store.objects(tmp_path.name)
    assert PEOPLE.issubset(*[people_in(data) for key, data in objects.items() if "/users/" in key])
    # on a machine that has nothing of the run
    config = with_store(made, before.store).model_copy(update={"output": str(tmp_path / "empty")})
    summary = forget.run(config, PEOPLE)
    assert (summary["people"], summary["unknown"], summary["left"]) == (2, 0, 0)
    assert summary["published"] == {DATASET: 1, CHECKPOINTS: 2, SCORES: 1}
    assert summary["scores"] == 2

    objects = object_store.objects(f"{tmp_path.name}/{config.name}")
    folders = Counter("/".join(key.split("/")[:2]) for key in objects)
    current = {output: open_output(config, output).current() for output in OUTPUTS}
    assert [one.previous for one in current.values()] == [(), (), ()]
    named = {
        f"{output}/{version.folder}"
        for output, one in current.items()
        for version in one.versions.values()
    }
    assert set(folders) == named | {f"{output}/CURRENT" for output in OUTPUTS}
    parquet = {key: data for key, data in objects.items() if key.endswith(".parquet")}
    assert not any(people_in(data) for data in parquet.values())
    (users,) = [data for key, data in parquet.items() if "/users/" in key]
    assert len(pq.read_table(io.BytesIO(users))) == 18

    # another machine goes on from there
    other = config.model_copy(update={"output": str(tmp_path / "other")})
    checkpoint.fetch_all(other)
    for name in (FIRST, SECOND):
        path = other.checkpoint_directory / name
        checkpoint.verify(path)
        rows = checkpoint.read_rows(path, "user", 0, 20 + c.FIRST_INDEX)[IDS]
        fresh = initial_rows("user", np.array(IDS), 8, config.seed, 0.05)
        assert torch.equal(rows, torch.from_numpy(fresh))
    old = checkpoint.read_rows(made / "checkpoints" / SECOND, "user", 0, 20 + c.FIRST_INDEX)
    assert not torch.equal(old[IDS], torch.from_numpy(fresh))


def state(config: Config) -> dict[str, Any]:
    """What lies here and in the store, whatever its folders are called; all of it is whole."""
    kept = {
        str(path.relative_to(config.directory)): sha256(path)
        for path in sorted(config.directory.rglob("*"))
        if path.is_file() and path.parent.name != "logs"
    }
    for output in OUTPUTS:
        store = open_output(config, output)
        current = store.current()
        kept[output] = [current.manifests, current.best, current.previous]
        kept[f"{output}: files"] = len(store.files())
    return kept


def readable(config: Config, directory: Path) -> None:
    """Each pointer names versions that are whole, each checked by checksum."""
    shutil.rmtree(directory, ignore_errors=True)
    other = config.model_copy(update={"output": str(directory)})
    published.fetch(other, may_publish=False)
    for path in checkpoint.committed(other.checkpoint_directory):
        checkpoint.verify(path)


class Killed(BaseException):
    """As if the process had gone: nobody handles it."""


def kill_at(patch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Let nothing be written to a store any more from the `number`-th time on; names what was."""
    done: list[str] = []

    def stop_before(name: str) -> None:
        whole = getattr(Store, name)

        def killed(self: Store, *arguments: Any) -> Any:
            if len(done) >= number:
                raise Killed
            done.append(f"{self.address.rpartition('/')[2]}: {name}")
            return whole(self, *arguments)

        patch.setattr(Store, name, killed)

    for name in ("put", "put_manifest", "_put_bytes", "swap", "drop"):
        stop_before(name)
    return done


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Any]:
    """What a forget leaves, and what it writes to the store on its way; filled by the first."""
    return {}


# of what a forget writes; all were tried once
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_killed_anywhere_and_run_again_the_store_ends_the_same(
    share: float,
    undisturbed: dict[str, Any],
    stored: Callable[[str], Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = stored(f"file://{tmp_path}/store")
    if not undisturbed:
        copy = config.model_copy(update={"output": str(tmp_path / "copy")})
        shutil.copytree(config.directory, copy.directory)
        shutil.copytree(tmp_path / "store", tmp_path / "store-copy")
        with monkeypatch.context() as patch:
            undisturbed["steps"] = kill_at(patch, 10**6)
            forget.run(config, PEOPLE)
        undisturbed["state"] = state(config)
        shutil.rmtree(config.directory), shutil.rmtree(tmp_path / "store")
        (tmp_path / "copy").rename(config.directory)
        (tmp_path / "store-copy").rename(tmp_path / "store")
    with monkeypatch.context() as patch:
        kill_at(patch, int(share * len(undisturbed["steps"])))
        # what a killed job would not have cleaned
        patch.setattr(shutil, "rmtree", lambda *arguments, **options: None)
        with pytest.raises(Killed):
            forget.run(config, PEOPLE)
    readable(config, tmp_path / "other")
    forget.run(config, PEOPLE)
    assert state(config) == undisturbed["state"]
    for name in ("dataset: swap", "checkpoints: swap", "scores: swap", "dataset: drop"):
        assert name in undisturbed["steps"]


@pytest.mark.parametrize("what", ["not published", "not dropped", "an object of nobody"])
def test_the_scan_covers_the_store(
    what: str, stored: Callable[[str], Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stored(f"file://{tmp_path}/store")
    folder = open_output(config, DATASET).current().versions[DATASET].folder
    place = f"{tmp_path}/store/{config.name}/{DATASET}/{folder}"
    if what == "not published":
        monkeypatch.setattr(published, "publish", lambda _: None)
        expected = rf"{place}/users/part-00000\.parquet: 4"
    elif what == "not dropped":
        monkeypatch.setattr(Store, "drop", lambda *_: None)
        expected = rf"{place}: of no version"
    else:
        (tmp_path / "store" / config.name / "notes.txt").write_text("u3")
        expected = r"notes\.txt: of no version"
    with pytest.raises(DataError, match=rf"nothing of the people is left.*{expected}") as error:
        forget.run(config, PEOPLE)
    assert "u3" not in str(error.value)


def test_a_dry_run_changes_nothing_in_the_store(
    stored: Callable[[str], Config], tmp_path: Path
) -> None:
    config = stored(f"file://{tmp_path}/store")
    before = state(config)
    summary = forget.run(config, PEOPLE, dry_run=True)
    assert state(config) == before
    assert summary["dataset"]["users"] == 2
    assert summary["published"] == {DATASET: 1, CHECKPOINTS: 1, SCORES: 1}
    assert stored_leftovers(f"file://{tmp_path}/store/{config.name}", 0)


def test_stages_of_a_run_with_a_store_are_up_to_date_again(
    stored: Callable[[str], Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stored(f"file://{tmp_path}/store")
    checkpoint.publish_checkpoints(config, ONE)
    write_config(config)
    monkeypatch.setattr(pipeline, "_raw_files", lambda _: ())
    outputs = {one.name: pipeline._output_hash(one, config) for one in pipeline.STAGES}
    stages = {
        one.name: {"key": pipeline.stage_key(one, config, outputs), "output": outputs[one.name]}
        for one in pipeline.STAGES
    }
    (config.directory / pipeline.STATE).write_text(json.dumps(stages))
    assert pipeline.up_to_date(config) == ["prepare", "train", "score"]
    forget.run(config, PEOPLE)
    assert pipeline.up_to_date(config) == ["prepare", "train", "score"]
