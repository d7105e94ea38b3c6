"""What is published of a run, without some people: brought here first, sent again in the end.

What is published counts. So a forget begins with it, even when an earlier one was cut off after it
had changed the run's directory: the published dataset, which is replaced last, still says which ids
the people had. Each output is replaced as a publication is, by a version of its own and one
pointer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from distrec import checkpoint
from distrec.config import Config
from distrec.dataset import MANIFEST, FileEntry, read_manifest
from distrec.errors import DataError
from distrec.files import staging
from distrec.forget.checkpoints import Changes
from distrec.forget.outputs import read_json
from distrec.forget.scan import remains
from distrec.sharding.collectives import OneProcess
from distrec.store import (
    CHECKPOINTS,
    DATASET,
    OUTPUTS,
    SCORES,
    Store,
    StoredFile,
    as_stored,
    dataset_files,
    fetch_dataset,
    fetch_version,
    get_version,
    open_output,
    published_manifests,
)
from distrec.store import publish as publish_output
from distrec.store.current import CURRENT

_FILES = TypeAdapter(tuple[FileEntry, ...])
_FETCHED = "published"


def score_files(directory: Path) -> list[StoredFile]:
    """Files of scored output, as its manifest has them."""
    return as_stored(_score_entries(directory))


def _score_entries(directory: Path) -> tuple[FileEntry, ...]:
    try:
        return _FILES.validate_python(read_json(directory / MANIFEST).get("files"))
    except ValidationError as error:
        raise DataError(
            f"the manifest of scores lists their files. Received: {directory / MANIFEST}: {error}. "
            "Score again."
        ) from error


_READERS: dict[str, Callable[[Path], list[StoredFile]]] = {
    DATASET: dataset_files,
    CHECKPOINTS: checkpoint.checkpoint_files,
    SCORES: score_files,
}


def fetch(config: Config, may_publish: bool) -> None:
    """Have here what is published; does nothing without a store.

    Args:
        config: Of the run.
        may_publish: Send checkpoints that an earlier train could not send.

    Raises:
        DistrecError: There is no dataset in the store, something is damaged, or the store cannot
            be reached.
    """
    if not config.store:
        return
    fetch_dataset(config)
    if checkpoint.fetch_what_differs(config) and may_publish:
        checkpoint.publish_checkpoints(config, OneProcess(torch.device("cpu")))
    store = open_output(config, SCORES)
    for version in store.current().versions.values():
        fetch_version(store, version, config.scores_directory, score_files)


def publish(config: Config) -> None:
    """Put what is left in place of what is published, the dataset last, and delete what was before.

    Does nothing without a store. What is done already is done again without effect.

    Raises:
        StoreError: The store cannot be reached; each output is as it was or as it is to be.
    """
    if not config.store:
        return
    if published_manifests(config, SCORES):
        scores = config.scores_directory
        publish_output(config, SCORES, scores, _score_entries(scores))
    checkpoint.publish_checkpoints(config, OneProcess(torch.device("cpu")))
    dataset = config.dataset_directory
    publish_output(config, DATASET, dataset, read_manifest(dataset).all_files())
    for output in OUTPUTS:
        open_output(config, output).drop_older()


def count(config: Config) -> dict[str, int]:
    """Versions by output; empty without a store."""
    if not config.store:
        return {}
    return {output: len(published_manifests(config, output)) for output in OUTPUTS}


def remains_published(config: Config, people: frozenset[str], changes: Changes) -> list[str]:
    """What is left of the people in the store, one line a place, as `remains` has it.

    Everything is fetched once more and looked through; what no version names counts as left.
    """
    if not config.store:
        return []
    found, named = [], set[str]()
    for output in OUTPUTS:
        store = open_output(config, output)
        for version in store.current().versions.values():
            with staging(config.directory / _FETCHED) as root:
                directory = root / version.folder
                directory.mkdir()
                get_version(store, version, directory, _READERS[output])
                paths = {path.relative_to(root).as_posix() for path in _files(directory)}
                named |= {f"{output}/{path}" for path in paths}
                left = remains(directory, people, changes)
                found += [line.replace(str(root), store.address, 1) for line in left]
        named.add(f"{output}/{CURRENT}")
    whole = Store(config.store, config.name)
    # a folder is one place, whatever is in it
    places = {"/".join(path.split("/")[:2]) for path in whole.files() if path not in named}
    found += [f"{whole.address}/{place}: of no version" for place in sorted(places)]
    return found


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]
