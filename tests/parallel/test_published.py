"""Two ranks that publish to an S3-like store; two that go on from there on an empty disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distrec import checkpoint
from distrec.checkpoint.manifest import files_of
from distrec.config import Config, parse_config
from distrec.dataset import read_manifest
from distrec.errors import CheckpointError, StoppedError
from distrec.sharding.collectives import Collectives
from distrec.store import CHECKPOINTS, DATASET, open_output, publish
from distrec.trainer import train
from tests.object_store import ObjectStore
from tests.parallel.harness import run_ranks
from tests.training import log_entries, make_config

# steps 4, 8 and 12; 8 is a delta on 4
KEYS = {
    "train": {"max_steps": 12, "checkpoint_every_steps": 4, "evaluate_every_steps": 4,
              "full_checkpoint_every": 2, "keep_checkpoints": 2},
}  # fmt: skip


def with_store(config: Config, url: str, output: Path) -> Config:
    document = config.model_dump(mode="json", exclude_none=True)
    return parse_config({**document, "store": url, "output": str(output)}, "the test")


def hashes(config: Config) -> dict[str, str]:
    path = checkpoint.find(config.checkpoint_directory, "newest")
    files = files_of(checkpoint.read_checkpoint_manifest(path))
    return {f"{path.name}/{name}": entry.sha256 for name, entry in files}


def body(collectives: Collectives, directory: str, url: str) -> dict[str, Any]:
    """Train undisturbed without a store; until a stop with one; on, from an empty directory."""
    undisturbed = make_config(Path(directory) / "undisturbed", KEYS)
    train(undisturbed, collectives)
    first = with_store(undisturbed, url, Path(directory) / "first")
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == 8

    try:
        train(first, collectives, stop=stop)
    except StoppedError as error:
        stopped = str(error)
    second = with_store(undisturbed, url, Path(directory) / "second")
    train(second, collectives)
    return {
        "undisturbed": hashes(undisturbed),
        "second": hashes(second),
        "steps": [entry["step"] for entry in log_entries(second, "step")],
        "stopped": stopped,
    }


def test_a_run_goes_on_from_what_is_published(object_store: ObjectStore, tmp_path: Path) -> None:
    url = object_store.url(tmp_path.name)
    config = make_config(tmp_path / "undisturbed", KEYS)
    dataset = config.dataset_directory
    published = with_store(config, url, tmp_path / "first")
    publish(published, DATASET, dataset, read_manifest(dataset).all_files())
    answers = run_ranks(
        2, "tests.parallel.test_published:body", {"directory": str(tmp_path), "url": url}, tmp_path
    )
    for answer in answers:
        assert "after step 8 of 12" in answer["stopped"]
        assert answer["second"] == answer["undisturbed"]
    # the first rank writes the log
    assert answers[0]["steps"] == [9, 10, 11, 12]
    second = with_store(config, url, tmp_path / "second")
    names = [path.name for path in checkpoint.committed(second.checkpoint_directory)]
    current = open_output(second, CHECKPOINTS).current()
    assert list(current.versions) == names
    assert current.best == checkpoint.read_best(second.checkpoint_directory)
    assert open_output(second, CHECKPOINTS).leftovers(0) == []

    # a host that scores takes what it needs
    for which in ("newest", "best"):
        third = with_store(config, url, tmp_path / f"third-{which}")
        checkpoint.fetch_one(third, which)
        chosen = checkpoint.find(third.checkpoint_directory, which)
        assert chosen.name == checkpoint.find(second.checkpoint_directory, which).name
        assert len(checkpoint.committed(third.checkpoint_directory)) <= 2

    # a damaged one is refused, and what lies here stays
    (newest,) = [version for name, version in current.versions.items() if name == names[-1]]
    key = f"{tmp_path.name}/synthetic/{CHECKPOINTS}/{newest.folder}/dense.safetensors"
    object_store.write(key, object_store.read(key)[:-1])
    fourth = with_store(config, url, tmp_path / "fourth")
    with pytest.raises(CheckpointError, match="has the size and the SHA-256"):
        checkpoint.fetch_one(fourth, "newest")
    with pytest.raises(CheckpointError, match="has the size and the SHA-256"):
        checkpoint.fetch_all(fourth)
    assert checkpoint.committed(fourth.checkpoint_directory) == []
