"""What an extended dataset must be, before Spark reads any of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from distrec.config import Config, parse_config
from distrec.dataset import MANIFEST, MAX_ANCESTORS, Extension
from distrec.errors import ConfigError, DataError
from distrec.prepare.extend import Continuation, open_previous
from tests.synthetic import write_dataset

# side of prepare -> features there; "blurb" has another name than its column
FEATURES: dict[str, list[dict[str, Any]]] = {
    "users": [{"column": "city", "kind": "hashed", "num_buckets": 50}],
    "items": [
        {"column": "price", "kind": "number"},
        {"column": "image", "kind": "vector", "dim": 3},
        {"column": "words", "name": "blurb", "kind": "text"},
    ],
    "events": [{"column": "hour", "kind": "categorical"}],
}


def config_of(folder: Path, features: dict[str, list[dict[str, Any]]], **prepare: Any) -> Config:
    section = {
        "events": {"paths": ["x"], "time": "t", "context": features["events"]},
        "items": {"paths": ["x"], "id": "item", "features": features["items"]},
        "users": {"paths": ["x"], "id": "user", "features": features["users"]},
        **prepare,
    }
    return parse_config({"name": "t", "output": str(folder), "prepare": section}, "the test")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run whose dataset was made before some keys of features were known."""
    config = config_of(tmp_path_factory.mktemp("old"), FEATURES)
    manifest = write_dataset(config.dataset_directory, num_users=4, num_items=4)
    stored = config.model_dump(mode="json")
    for feature in stored["prepare"]["items"]["features"]:
        del feature["ngrams"]
    changed = manifest.model_copy(update={"config": stored})
    (config.dataset_directory / MANIFEST).write_text(changed.model_dump_json())
    return config


@pytest.mark.parametrize(
    ("side", "place", "changes", "text"),
    [
        ("events", 0, {"kind": "multi_categorical"}, "kind = .* context feature 'hour'"),
        ("items", 0, {"transform": "log"}, "transform = .* item feature 'price'"),
        ("items", 0, {"clip": (0.0, 9.0)}, "clip = .* item feature 'price'"),
        ("items", 0, {"missing": "zero"}, "missing = .* item feature 'price'"),
        ("items", 0, {"num_buckets": 4}, "num_buckets = 4 .* item feature 'price'"),
        ("items", 1, {"dim": 4}, "dim = 4 .* item feature 'image', which has 3"),
        ("items", 2, {"ngrams": 1}, "ngrams = 1 .* item feature 'blurb', which has 2"),
        ("users", 0, {"num_hashes": 3}, "num_hashes = 3 .* user feature 'city', which has 2"),
    ],
)
def test_a_feature_keeps_its_meaning(
    old: Config, tmp_path: Path, side: str, place: int, changes: dict[str, Any], text: str
) -> None:
    features = {name: [dict(one) for one in own] for name, own in FEATURES.items()}
    extend = str(old.dataset_directory)
    assert open_previous(config_of(tmp_path, features, extend=extend)).generation == 1
    features[side][place] |= changes
    with pytest.raises(ConfigError, match=f"keeps its meaning. Received: {text}"):
        open_previous(config_of(tmp_path, features, extend=extend))


def test_kinds_of_event_keep_their_places(tmp_path: Path) -> None:
    write_dataset(tmp_path / "old", num_users=4, num_items=4, event_types=("view", "buy"))

    def config(time: str | None, *event_types: str) -> Config:
        events = {"paths": ["x"], "event_type": "kind", **({"time": time} if time else {})}
        section = {
            "events": events, "event_types": event_types, "extend": str(tmp_path / "old"),
            "split": {"method": "random"},
        }  # fmt: skip
        return parse_config({"name": "t", "output": str(tmp_path), "prepare": section}, "the test")

    for kinds in (("view", "buy"), ("view", "buy", "cart")):
        assert open_previous(config("t", *kinds)).generation == 1
    for time, *kinds in (("t", "buy", "view"), ("t", "view"), ("t",), (None, "view", "buy")):
        with pytest.raises(ConfigError, match=r"keep their places.*old has \['view', 'buy'\]"):
            open_previous(config(time, *kinds))
    with pytest.raises(ConfigError, match="event_types names each kind once"):
        config("t", "view", "view")


def test_the_own_dataset_is_not_extended_by_whatever_path(old: Config) -> None:
    extend = os.path.relpath(old.dataset_directory)
    with pytest.raises(ConfigError, match="names another run's dataset"):
        open_previous(config_of(Path(old.output), FEATURES, extend=extend))


def test_a_vocabulary_file_that_is_gone(old: Config, tmp_path: Path) -> None:
    config = config_of(tmp_path / "new", FEATURES, extend=str(tmp_path / "copy"))
    write_dataset(tmp_path / "copy", num_users=4, num_items=4)
    gone = tmp_path / "copy" / "vocab" / "item_id" / "part-00000.parquet"
    gone.unlink()
    with pytest.raises(DataError, match=f"is there. Received: no file {gone}"):
        open_previous(config)


def test_the_newest_ancestor_comes_first_and_the_oldest_are_forgotten(old: Config) -> None:
    previous = open_previous(config_of(Path("elsewhere"), FEATURES, extend=str(
        old.dataset_directory
    ))).previous  # fmt: skip
    assert previous is not None
    own = previous.as_ancestor()
    before = tuple(own.model_copy(update={"content_hash": f"{k}"}) for k in range(MAX_ANCESTORS))
    extends = Extension(generation=MAX_ANCESTORS, ancestors=before)
    found = Continuation(
        old.dataset_directory, previous.model_copy(update={"extends": extends})
    ).extension()
    assert found is not None
    hashes = [one.content_hash for one in found.ancestors]
    assert hashes == [own.content_hash, *(f"{k}" for k in range(MAX_ANCESTORS - 1))]
