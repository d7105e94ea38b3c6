"""Whatever stands in a configuration, a manifest or a file: only distrec's own errors come out.

DISTREC_FUZZ in the environment is the number of examples of each test; `make fuzz` takes thousands.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distrec import checkpoint
from distrec.config import ReaderConfig, load_config
from distrec.dataset import read_manifest
from distrec.errors import CheckpointError, ConfigError, DataError, DistrecError
from distrec.files import sha256
from distrec.reader import ExampleReader, check_files, read_items
from distrec.sharding.collectives import start
from distrec.trainer import train
from distrec.world import World
from tests.bad_inputs import checkpoints, datasets
from tests.training import make_config

ROOT = Path(__file__).parents[2]
FUZZ = settings(
    max_examples=int(os.environ.get("DISTREC_FUZZ", "10")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 2**31, 2**53 + 1, 2**63, 2**64, 10**400])
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["", "..", "../x", "/etc/passwd", "\0", "a" * 5000, "nan", "step-00000001"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a document: what holds it, and its key there."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


@st.composite
def spoiled(draw: st.DrawFn, good: Any) -> Any:
    """A good document with one to three places replaced, taken away or added to."""
    document = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(document))
        if not found:
            break
        holder, key = found[draw(st.integers(0, len(found) - 1))]
        action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if action == "replace":
            holder[key] = draw(VALUES)
        elif action == "remove":
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=8))] = draw(VALUES)
        else:
            holder.append(draw(VALUES))
    return document


@st.composite
def spoiled_bytes(draw: st.DrawFn, good: bytes) -> bytes:
    """Some bytes changed, cut off or put in between."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        action = draw(st.sampled_from(["change", "change", "cut", "insert"]))
        if action == "cut":
            del data[place:]
        elif action == "insert":
            data[place:place] = draw(st.binary(max_size=16))
        elif data:
            data[place] = draw(st.integers(0, 255))
    return bytes(data)


# --- configurations ------------------------------------------------------------------------------

CONFIG = tomllib.loads((ROOT / "conf" / "movielens-100k.toml").read_text(encoding="utf-8"))


def load(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with suppress(ConfigError):
        load_config(path)


@FUZZ
@given(st.binary(max_size=200) | spoiled_bytes(tomli_w.dumps(CONFIG).encode()))
def test_bytes_as_configuration(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    load(tmp_path_factory.getbasetemp() / "bytes.toml", content)


@FUZZ
@given(spoiled(CONFIG))
def test_documents_as_configuration(
    tmp_path_factory: pytest.TempPathFactory, document: dict[str, Any]
) -> None:
    try:
        content = tomli_w.dumps(document).encode()
    except (TypeError, ValueError):
        # TOML has no null, and text of it no lone surrogates
        return
    load(tmp_path_factory.getbasetemp() / "document.toml", content)


@FUZZ
@given(st.text(max_size=60) | st.sampled_from(["train", "model.towers", "prepare.events"]), VALUES)
def test_overrides(key: str, value: Any) -> None:
    with suppress(ConfigError):
        load_config(ROOT / "conf" / "movielens-100k.toml", [f"{key}={json.dumps(value)}"])


# --- manifests and files of a run ----------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a small dataset and a checkpoint, which no test changes."""
    config = make_config(
        tmp_path_factory.mktemp("good"), {"train": {"max_steps": 2}}, num_users=12, num_files=1
    )
    train(config, start(config.launch, distributed=False))
    return config.directory


@pytest.fixture(scope="module")
def run(good: Path) -> Path:
    """A copy of it, of which each example changes a file."""
    return Path(shutil.copytree(good, good.with_name("fuzzed")))


def read_dataset(run: Path) -> None:
    """All that train reads of a dataset."""
    directory = run / "dataset"
    with suppress(DistrecError):
        manifest = read_manifest(directory)
        check_files(directory, manifest, "size")
        read_items(directory, manifest)
        # a batch for all rows, of which a forged count may promise any number
        reader = ExampleReader(directory, manifest, "train", World(), ReaderConfig(), 1024, 1)
        for _ in zip(range(3), reader.batches(0), strict=False):
            pass


def read_checkpoint(run: Path) -> None:
    """All that score and evaluate read of a checkpoint."""
    with suppress(CheckpointError, DataError):
        path = checkpoint.find(run / "checkpoints", "best")
        checkpoint.load_model(path)
        mapped = checkpoint.MappedTables(path)
        for table in mapped.manifest.tables:
            mapped.read_rows(table, 0, 2)


def fuzz(
    data: st.DataObject, file: Path, good_file: Path, as_json: bool, read: Callable[[], None]
) -> None:
    """Spoil a file, and read it."""
    if as_json:
        document = data.draw(spoiled(json.loads(good_file.read_text())))
        file.write_text(json.dumps(document), encoding="utf-8", errors="surrogatepass")
    else:
        file.write_bytes(data.draw(spoiled_bytes(good_file.read_bytes())))
    try:
        read()
    finally:
        shutil.copy(good_file, file)


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("dataset/manifest.json", read_dataset),
        (f"checkpoints/{checkpoints.STEP}/manifest.json", read_checkpoint),
        ("checkpoints/best.json", read_checkpoint),
    ],
)
@FUZZ
@given(data=st.data())
def test_manifests(
    good: Path,
    run: Path,
    name: str,
    read: Callable[[Path], None],
    as_json: bool,
    data: st.DataObject,
) -> None:
    fuzz(data, run / name, good / name, as_json, lambda: read(run))


@pytest.mark.parametrize("name", [checkpoints.DENSE, checkpoints.SHARD])
@FUZZ
@given(data=st.data())
def test_tensors(good: Path, run: Path, name: str, data: st.DataObject) -> None:
    """The manifest agrees with the spoiled file: its author is the forger."""
    path = f"checkpoints/{checkpoints.STEP}"

    def read() -> None:
        checkpoints.agree(run, name)
        read_checkpoint(run)
        shutil.copy(good / path / "manifest.json", run / path / "manifest.json")

    fuzz(data, run / path / name, good / path / name, False, read)


@pytest.mark.parametrize("name", ["train/part-00000.parquet", "items/part-00000.parquet"])
@FUZZ
@given(data=st.data())
def test_parquet(good: Path, run: Path, name: str, data: st.DataObject) -> None:
    file, manifest = run / "dataset" / name, run / "dataset" / "manifest.json"

    def read() -> None:
        datasets.agree(run, name)
        assert sha256(file) in manifest.read_text()
        read_dataset(run)
        shutil.copy(good / "dataset" / "manifest.json", manifest)

    fuzz(data, file, good / "dataset" / name, False, read)
