"""The outputs of a run in its store: what is published after a job, and fetched before one.

The store counts. A job that reads an output has the version of the store brought into the run's
directory first, unless it lies there already.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from distrec.config import Config
from distrec.dataset import FileEntry, read_manifest
from distrec.errors import DataError, DistrecError
from distrec.files import commit, sha256, staging
from distrec.store.current import Version
from distrec.store.store import MANIFEST, Store, StoredFile, new_folder

DATASET, CHECKPOINTS, SCORES = "dataset", "checkpoints", "scores"
OUTPUTS = (DATASET, CHECKPOINTS, SCORES)
_WRITTEN_BY = {"prepare": DATASET, "train": CHECKPOINTS, "score": SCORES, "forget": DATASET}

logger = logging.getLogger("distrec.store")


def open_output(config: Config, output: str, damaged: type[DistrecError] = DataError) -> Store:
    """One of OUTPUTS of a run that has a store."""
    return Store(config.store, config.name, output, damaged=damaged)


def check_store(config: Config, job: str) -> None:
    """Refuse a store that a job cannot use, before Spark or a rank is started; none is all right.

    Raises:
        ConfigError: There is no such bucket, or permission is denied.
        StoreError: It cannot be reached.
    """
    if config.store:
        written = _WRITTEN_BY.get(job)
        open_output(config, written or DATASET).check(writes=written is not None)


def published_manifests(config: Config, output: str) -> dict[str, str]:
    """SHA-256 of the manifest of each version in the store, by name; none without a store."""
    return open_output(config, output).current().manifests if config.store else {}


def publish(config: Config, output: str, directory: Path, files: Iterable[FileEntry]) -> None:
    """Put a finished dataset or scores into the run's store, whole or not at all.

    Does nothing without a store, or when just this is published already.

    Raises:
        StoreError: The store cannot be reached; what was published before is.
    """
    if not config.store:
        return
    store, started = open_output(config, output), time.monotonic()
    current = store.current()
    if current.manifests == {output: sha256(directory / MANIFEST)}:
        return
    folder, sent = new_folder(output), as_stored(files)
    try:
        store.put(folder, directory, sent)
        version = store.put_manifest(folder, directory, sent)
        store.swap(current.followed_by({output: version}))
    except Exception:
        forget(store, folder)
        raise
    logger.info(
        "published %s/%s: %.1f MiB in %.1f s",
        *(store.address, folder, sum(file.num_bytes for file in sent) / 2**20),
        time.monotonic() - started,
    )


def as_stored(files: Iterable[FileEntry]) -> list[StoredFile]:
    """Entries of a manifest as a store takes them."""
    return [StoredFile(file.path, file.num_bytes, file.sha256) for file in files]


def forget(store: Store, *folders: str) -> None:
    """Delete what was not committed, as far as that is possible."""
    try:
        for folder in sorted({*folders} - store.current().folders):
            store.drop(folder)
    except DistrecError as error:
        logger.warning("left over in %s: %s: %s", store.address, ", ".join(folders), error)


def fetch_dataset(config: Config) -> None:
    """Bring the published dataset into the run's directory, unless it is there.

    Raises:
        DataError: None is published, or it is damaged; what was there before stays.
    """
    if not config.store:
        return
    store, directory = open_output(config, DATASET), config.dataset_directory
    version = store.current().versions.get(DATASET)
    if version is None:
        raise DataError(
            f"a job of a run with a store reads what is published. Received: no dataset in "
            f"{store.address}. Run prepare, which publishes it."
        )
    fetch_version(store, version, directory, dataset_files)


def dataset_files(directory: Path) -> list[StoredFile]:
    """Files of a dataset, as its manifest has them."""
    return as_stored(read_manifest(directory).all_files())


def fetch_version(
    store: Store, version: Version, directory: Path, files: Callable[[Path], list[StoredFile]]
) -> None:
    """Put a published version in place of a directory, unless it is there.

    Args:
        store: Of the output.
        version: Of it.
        directory: Its place here.
        files: Reads the manifest in a directory.

    Raises:
        DistrecError: It is damaged; what was there before stays.
    """
    if is_here(directory, version):
        return
    with staging(directory) as root:
        get_version(store, version, root, files)
        commit(root, directory)
    logger.info("fetched %s/%s", store.address, version.folder)


def get_version(
    store: Store, version: Version, root: Path, files: Callable[[Path], list[StoredFile]]
) -> None:
    """Bring a published version into an empty directory, as `fetch_version` does."""
    store.get_manifest(version, root)
    store.get(version.folder, root, files(root))


def is_here(directory: Path, version: Version) -> bool:
    """Whether a directory holds this version; readers check its files anyway."""
    try:
        return sha256(directory / MANIFEST) == version.manifest_sha256
    except OSError:
        return False
