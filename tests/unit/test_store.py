"""What is published counts as a whole or not at all, on S3-like stores, HDFS and a disk."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs as fs
import pytest
from typer.testing import CliRunner

from distrec.cli import app
from distrec.columns import TRAIN
from distrec.config import Config, parse_config
from distrec.dataset import MANIFEST, read_manifest
from distrec.errors import ConfigError, DataError, StoreError
from distrec.job import execute
from distrec.store import DATASET, Store, StoredFile, fetch_dataset, open_output, publish
from tests.object_store import SECRET, ObjectStore
from tests.synthetic import write_dataset

NAME = "shop"


class RenamesToFreeNamesOnly:
    """A disk that behaves like HDFS: a rename does not replace."""

    type_name = "hdfs"

    def __init__(self, inner: fs.FileSystem) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def move(self, source: str, target: str) -> None:
        if Path(target).exists():
            raise OSError(f"{target} exists")
        self._inner.move(source, target)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three that differ, of one file each: a server in Python takes its time for each."""
    root = tmp_path_factory.mktemp("datasets")
    for index in range(3):
        whole = write_dataset(root / str(index), num_users=10 + index, num_files=1)
        small = whole.model_copy(
            update={"splits": {TRAIN: whole.splits[TRAIN]}, "vocabularies": {}}
        )
        (root / str(index) / MANIFEST).write_text(small.model_dump_json())
    return [root / str(index) for index in range(3)]


def config_of(url: str, output: Path) -> Config:
    document = {"name": NAME, "output": str(output), "store": url}
    return parse_config(
        {**document, "prepare": {"events": {"paths": ["none.csv"], "time": "t"}}}, "the test"
    )


def publish_dataset(config: Config, directory: Path) -> None:
    publish(config, DATASET, directory, read_manifest(directory).all_files())


def content(directory: Path) -> dict[str, bytes]:
    """Of the files of a dataset's manifest, and the manifest."""
    names = [MANIFEST, *(file.path for file in read_manifest(directory).all_files())]
    return {name: (directory / name).read_bytes() for name in names}


@pytest.fixture(params=["file", "hdfs", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "s3":
        store: ObjectStore = request.getfixturevalue("object_store")
        return store.url(tmp_path.name)
    if request.param == "hdfs":
        opened = RenamesToFreeNamesOnly(fs.LocalFileSystem())

        class Opener:
            @staticmethod
            def from_uri(url: str) -> tuple[RenamesToFreeNamesOnly, str]:
                return opened, url.removeprefix("file://")

        monkeypatch.setattr("distrec.store.store.fs.FileSystem", Opener)
    return f"file://{tmp_path}/store"


def test_each_version_has_a_folder_and_readers_get_the_newest(
    url: str, tmp_path: Path, datasets: list[Path]
) -> None:
    config = config_of(url, tmp_path / "run")
    store = open_output(config, DATASET)
    folders = []
    for dataset in datasets:
        publish_dataset(config, dataset)
        folders.append(store.current().versions[DATASET].folder)
        # the one before stays for readers that have begun
        assert store.current().folders == set(folders[-2:])
        # nothing new to publish
        publish_dataset(config, dataset)
        assert store.current().folders == set(folders[-2:])
        fetch_dataset(config)
        assert content(config.dataset_directory) == content(dataset)
    assert len(set(folders)) == 3
    assert store.leftovers(0) == []
    with pytest.raises(DataError, match=f"no {store.address}/{folders[0]}/manifest.json"):
        store.get(folders[0], tmp_path, [StoredFile("manifest.json", 1, "0" * 64)])


def test_what_lies_there_already_is_not_fetched(
    tmp_path: Path, datasets: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(f"file://{tmp_path}/store", tmp_path / "run")
    publish_dataset(config, datasets[0])
    fetch_dataset(config)
    before = (config.dataset_directory / MANIFEST).stat().st_ino
    monkeypatch.setattr(Store, "get", lambda *_: pytest.fail("fetched again"))
    fetch_dataset(config)
    # it is the very directory that was there
    assert (config.dataset_directory / MANIFEST).stat().st_ino == before
    assert content(config.dataset_directory) == content(datasets[0])


@pytest.mark.parametrize("step", ["_put_file", "put_manifest", "swap"])
def test_a_publication_that_fails_leaves_the_one_before(
    url: str, step: str, tmp_path: Path, datasets: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(url, tmp_path / "run")
    publish_dataset(config, datasets[0])

    def fail(*_: Any) -> None:
        raise StoreError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(Store, step, fail)
        with pytest.raises(StoreError, match="gone"):
            publish_dataset(config, datasets[1])
    assert open_output(config, DATASET).leftovers(0) == []
    fetch_dataset(config)
    assert content(config.dataset_directory) == content(datasets[0])


def test_a_publisher_that_is_killed_leaves_the_version_before_and_a_folder_to_clean(
    object_store: ObjectStore, tmp_path: Path, datasets: list[Path]
) -> None:
    url = object_store.url(tmp_path.name)
    config = config_of(url, tmp_path / "run")
    publish_dataset(config, datasets[0])
    whole = object_store.objects(tmp_path.name)
    code = (
        "import os; from pathlib import Path; from tests.unit import test_store as t\n"
        "t.Store.put_manifest = lambda *_: os._exit(9)\n"
        f"t.publish_dataset(t.config_of({url!r}, Path({str(tmp_path)!r})), "
        f"Path({str(datasets[1])!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 9
    assert len(object_store.objects(tmp_path.name)) > len(whole)
    fetch_dataset(config)
    assert content(config.dataset_directory) == content(datasets[0])
    place = f"{url.replace('?', f'/{NAME}?')}"
    young = CliRunner().invoke(app, ["clean", place])
    assert young.output == ""
    shown = CliRunner().invoke(app, ["clean", place, "--older-than", "0", "--dry-run"])
    assert "left-over" in shown.output
    CliRunner().invoke(app, ["clean", place, "--older-than", "0"])
    assert object_store.objects(tmp_path.name) == whole


def test_a_writer_that_dies_between_the_two_renames_of_hdfs(
    tmp_path: Path, datasets: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = RenamesToFreeNamesOnly(fs.LocalFileSystem())
    config = config_of(f"file://{tmp_path}/store", tmp_path / "run")
    store = open_output(config, DATASET)
    store._fs, store._is_local = opened, False
    publish_dataset(config, datasets[0])
    first = store.current()
    new = first.followed_by({})
    with monkeypatch.context() as patch:
        patch.setattr(opened, "move", _interrupted, raising=False)
        with pytest.raises(KeyboardInterrupt):
            store.swap(new)
    assert store.current() == new
    with monkeypatch.context() as patch:
        # while the next one is half written, the pending one counts
        put = store._put_bytes

        def put_half(name: str, data: bytes) -> None:
            put(name, data[: len(data) // 2])
            raise KeyboardInterrupt

        patch.setattr(store, "_put_bytes", put_half)
        with pytest.raises(KeyboardInterrupt):
            store.swap(first)
    assert store.current() == new
    store.swap(first)
    assert store.current() == first


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def _truncated(data: bytes) -> bytes:
    return data[:-1]


def _flipped(data: bytes) -> bytes:
    return data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]


def _longer(data: bytes) -> bytes:
    return data + b"0"


@pytest.mark.parametrize("name", ["manifest.json", "train/part-00000.parquet"])
@pytest.mark.parametrize("damage", [_truncated, _flipped, _longer, None])
def test_objects_that_are_not_what_the_manifest_says_are_refused(
    name: str,
    damage: Callable[[bytes], bytes] | None,
    object_store: ObjectStore,
    tmp_path: Path,
    datasets: list[Path],
) -> None:
    config = config_of(object_store.url(tmp_path.name), tmp_path / "run")
    publish_dataset(config, datasets[0])
    fetch_dataset(config)
    publish_dataset(config, datasets[1])
    folder = open_output(config, DATASET).current().versions[DATASET].folder
    key = f"{tmp_path.name}/{NAME}/{DATASET}/{folder}/{name}"
    if damage is None:
        object_store.client.delete_object(Bucket=object_store.bucket, Key=key)
    else:
        object_store.write(key, damage(object_store.read(key)))
    message = "is in the store" if damage is None else "has the size and the SHA-256"
    with pytest.raises(DataError, match=message) as refused:
        fetch_dataset(config)
    assert f"{folder}/{name}" in str(refused.value)
    assert content(config.dataset_directory) == content(datasets[0])
    assert [path.name for path in config.directory.iterdir()] == [DATASET]


def test_what_was_taken_away_in_between_is_not_committed(
    tmp_path: Path, datasets: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a clean that takes a long upload for the rest of a dead job."""
    config = config_of(f"file://{tmp_path}/store", tmp_path / "run")
    publish_dataset(config, datasets[0])
    put = Store.put

    def put_and_lose(store: Store, folder: str, *arguments: Any) -> None:
        put(store, folder, *arguments)
        store.drop(folder)

    monkeypatch.setattr(Store, "put", put_and_lose)
    with pytest.raises(StoreError, match=r"part-00000\.parquet with None bytes"):
        publish_dataset(config, datasets[1])
    fetch_dataset(config)
    assert content(config.dataset_directory) == content(datasets[0])


VERSION = {"folder": "dataset-1", "manifest_sha256": "0" * 64, "manifest_bytes": 1}


@pytest.mark.parametrize(
    "pointer",
    [
        "{",
        "[]",
        json.dumps({"versions": {}, "extra": 1}),
        json.dumps({"format_version": 2}),
        json.dumps({"versions": {"dataset": {**VERSION, "folder": "../other"}}}),
        json.dumps({"versions": {"dataset": {**VERSION, "folder": "/etc"}}}),
        json.dumps({"versions": {"..": VERSION}}),
        json.dumps({"versions": {"dataset": {**VERSION, "manifest_bytes": 2**40}}}),
        json.dumps({"previous": [".."]}),
        " " * 2**20 + "{}",
    ],
)
def test_pointers_are_checked_as_anybodys(pointer: str, tmp_path: Path) -> None:
    config = config_of(f"file://{tmp_path}/store", tmp_path / "run")
    file = tmp_path / "store" / NAME / DATASET / "CURRENT"
    file.parent.mkdir(parents=True)
    file.write_text(pointer)
    with pytest.raises(DataError, match="CURRENT names the versions of an output"):
        fetch_dataset(config)


@pytest.mark.parametrize("path", ["../x", "/x", "a/../../x", "a\\x"])
def test_files_of_a_version_lie_inside_it(path: str) -> None:
    with pytest.raises(DataError, match="inside its folder"):
        StoredFile(path, 1, "0" * 64)


def test_a_store_that_cannot_be_used_is_refused_before_the_job(
    object_store: ObjectStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(job: str, **place: Any) -> tuple[int, str]:
        config = config_of(object_store.url(tmp_path.name, **place), tmp_path / "run")
        code = execute(job, config, lambda _: pytest.fail("the job has begun"), print_line=False)
        return code, capsys.readouterr().err

    code, told = run("prepare", bucket="another")
    assert (code, "no bucket 'another'" in told) == (2, True)
    code, told = run("evaluate", bucket="another")
    assert (code, "no bucket 'another'" in told) == (2, True)
    try:
        object_store.deny("PutObject")
        code, told = run("train")
        assert (code, "ACCESS_DENIED" in told, "credentials" in told) == (2, True, True)
    finally:
        object_store.deny("")
    code, told = run("score", port=9)
    assert (code, "can be reached" in told) == (6, True)
    log = (tmp_path / "run" / "logs" / "jobs.jsonl").read_text()
    assert SECRET not in log
    assert object_store.objects(tmp_path.name) == {}


def test_reading_may_be_denied(
    object_store: ObjectStore, tmp_path: Path, datasets: list[Path]
) -> None:
    config = config_of(object_store.url(tmp_path.name), tmp_path / "run")
    publish_dataset(config, datasets[0])
    try:
        object_store.deny("GetObject")
        with pytest.raises(ConfigError, match="may be read and written by this job"):
            fetch_dataset(config)
    finally:
        object_store.deny("")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"s3://key:{SECRET}@bucket/x", "holds no user, key or password"),
        (f"hdfs://{SECRET}@host:1/x", "holds no user, key or password"),
        (f"s3://bucket/x?secret_key={SECRET}", "Received: secret_key"),
        (f"s3://bucket/x#{SECRET}", "holds no user, key or password"),
        (f"file:///x?a={SECRET}", "others have none"),
        (f"file://{SECRET}/x", "three slashes"),
        (f"/{SECRET}", "Received: an address that begins with ''"),
        ("gs://bucket/x", "begins with 'gs'"),
        ("s3:///x", "followed by a name"),
        ("s3://bucket/../x", "goes down only"),
    ],
)
def test_addresses_that_are_refused_are_not_repeated(
    url: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        config_of(url, tmp_path)
    assert SECRET not in str(refused.value)


def test_passwords_in_what_manifests_repeat_are_refused(tmp_path: Path) -> None:
    document = config_of("", tmp_path).model_dump(mode="json", exclude_none=True)
    document["prepare"]["events"]["paths"] = ["s3a://bucket/a:b@c"]
    parse_config(document, "the test")
    document["prepare"]["extend"] = f"s3a://key:{SECRET}@bucket/x"
    with pytest.raises(ConfigError, match="addresses hold no passwords") as refused:
        parse_config(document, "the test")
    assert SECRET not in str(refused.value)


def test_secrets_of_the_environment_go_nowhere(
    object_store: ObjectStore,
    tmp_path: Path,
    datasets: list[Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET
    caplog.set_level(logging.DEBUG)
    config = config_of(object_store.url(tmp_path.name), tmp_path / "run")
    execute("prepare", config, lambda one: publish_dataset(one, datasets[0]) or {}, False)
    fetch_dataset(config)
    assert "published s3://bucket/" in caplog.text
    files = [path.read_bytes() for path in config.directory.rglob("*") if path.is_file()]
    for text in (caplog.text.encode(), *object_store.objects(tmp_path.name).values(), *files):
        assert SECRET.encode() not in text


def test_without_a_store_nothing_is_published_or_fetched(
    tmp_path: Path, datasets: list[Path]
) -> None:
    config = config_of("", tmp_path / "run")
    publish_dataset(config, datasets[0])
    fetch_dataset(config)
    assert not config.directory.exists()


def test_a_run_that_has_published_nothing_says_so(tmp_path: Path) -> None:
    config = config_of(f"file://{tmp_path}/store", tmp_path / "run")
    with pytest.raises(DataError, match=r"no dataset in file:///.*/store/shop/dataset\. Run prep"):
        fetch_dataset(config)
