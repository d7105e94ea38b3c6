"""The checkpoints of a run in its store: the same ones as in its directory, best.json included."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from distrec.checkpoint.find import BEST, committed, read_best
from distrec.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    ShardEntry,
    files_of,
    parse_manifest,
    read_checkpoint_manifest,
)
from distrec.checkpoint.together import together
from distrec.config import Config
from distrec.errors import CheckpointError
from distrec.files import commit, replace_text, sha256, staging
from distrec.store import (
    CHECKPOINTS,
    Current,
    Store,
    StoredFile,
    fetch_version,
    forget,
    get_version,
    new_folder,
    open_output,
)

if TYPE_CHECKING:
    from distrec.sharding.collectives import Collectives

logger = logging.getLogger("distrec.checkpoint")


def publish_checkpoints(config: Config, collectives: Collectives) -> None:
    """Let the run's store hold the checkpoints of its directory, and no others.

    Collective. Each rank sends the shards that it has written; the first rank sends the manifests
    and swaps the pointer. Does nothing without a store. What an earlier call could not send goes
    now.

    Raises:
        StoreError: On every rank; what was published before is.
    """
    if not config.store:
        return
    world, started = collectives.world, time.monotonic()
    directory = config.checkpoint_directory
    store = together("publish.open", lambda: _open(config), collectives)
    plan = together(
        "publish.plan", lambda: _plan(store, directory) if world.is_first else None, collectives
    )
    folders: dict[str, str] = collectives.broadcast_object(plan, "publish.folders")
    try:
        together(
            "publish.files",
            lambda: _send(store, directory, folders, world.rank, world.world_size),
            collectives,
        )
        together(
            "publish.commit",
            lambda: _commit(store, directory, folders) if world.is_first else None,
            collectives,
        )
    except Exception:
        if world.is_first:
            forget(store, *folders.values())
        raise
    for name in folders:
        seconds = time.monotonic() - started
        logger.info("published %s in %s (%.1f s)", name, store.address, seconds)


def _open(config: Config) -> Store:
    return open_output(config, CHECKPOINTS, damaged=CheckpointError)


def _plan(store: Store, directory: Path) -> dict[str, str]:
    """The checkpoints that the store does not have, and the folder that each is to get."""
    known = store.current().manifests
    return {
        path.name: new_folder(path.name)
        for path in committed(directory)
        if known.get(path.name) != sha256(path / MANIFEST)
    }


def _send(
    store: Store, directory: Path, folders: Mapping[str, str], rank: int, world_size: int
) -> None:
    for name, folder in folders.items():
        manifest = read_checkpoint_manifest(directory / name)
        # the dense part is the first rank's
        own = [
            StoredFile(path, entry.num_bytes, entry.sha256)
            for path, entry in files_of(manifest)
            if (entry.index if isinstance(entry, ShardEntry) else 0) % world_size == rank
        ]
        store.put(folder, directory / name, own)


def checkpoint_files(path: Path) -> list[StoredFile]:
    """Files of a checkpoint, as its manifest has them."""
    files = files_of(parse_manifest(path / MANIFEST))
    return [StoredFile(name, entry.num_bytes, entry.sha256) for name, entry in files]


def _commit(store: Store, directory: Path, folders: Mapping[str, str]) -> None:
    current = store.current()
    known, best = current.versions, read_best(directory)
    versions = {}
    for path in committed(directory):
        if path.name in folders:
            versions[path.name] = store.put_manifest(
                folders[path.name], path, checkpoint_files(path)
            )
        else:
            versions[path.name] = known[path.name]
    if (versions, best) != (known, current.best):
        store.swap(current.followed_by(versions, best))


def newest_published(config: Config) -> CheckpointManifest | None:
    """The manifest of the published checkpoint of the highest step; None: there is none.

    Raises:
        CheckpointError: It is damaged.
        StoreError: The store cannot be reached.
    """
    if not config.store:
        return None
    store = _open(config)
    versions = store.current().versions
    if not versions:
        return None
    with staging(config.checkpoint_directory) as root:
        store.get_manifest(versions[_newest(versions)], root)
        return parse_manifest(root / MANIFEST)


def _newest(names: Iterable[str]) -> str:
    # checkpoint_name pads steps: the longer one is the higher
    return max(names, key=lambda name: (len(name), name))


def fetch_all(config: Config) -> None:
    """Put all published checkpoints in place of those in the run's directory, at one stroke.

    Raises:
        CheckpointError: One is damaged or missing; what was there before stays.
        StoreError: The store cannot be reached.
    """
    store, directory = _open(config), config.checkpoint_directory
    current = store.current()
    with staging(directory) as root:
        for name, version in current.versions.items():
            (root / name).mkdir()
            get_version(store, version, root / name, checkpoint_files)
        if current.best is not None:
            replace_text(root / BEST, json.dumps(current.best, indent=1) + "\n")
        commit(root, directory)
    logger.info("fetched %d checkpoints from %s", len(current.versions), store.address)


def fetch_what_differs(config: Config) -> bool:
    """Have the published checkpoints here, and no others, unless those here go on from them.

    Returns:
        Whether they do: an earlier train could not send its last ones.

    Raises:
        CheckpointError: One is damaged or missing; what was there before stays.
        StoreError: The store cannot be reached.
    """
    current, directory = _open(config).current(), config.checkpoint_directory
    here = {path.name: sha256(path / MANIFEST) for path in committed(directory)}
    published = current.manifests
    newest = _newest(published) if published else None
    if newest in here and here[newest] == published[newest] and _newest(here) != newest:
        return True
    if published and (here, read_best(directory)) != (published, current.best):
        fetch_all(config)
    return False


def fetch_one(config: Config, which: Literal["best", "newest"]) -> None:
    """Bring the best or the newest published checkpoint, and its base, into the run's directory.

    Does nothing without a store, or where they are already.

    Raises:
        CheckpointError: None is published, or it is damaged or missing.
        StoreError: The store cannot be reached.
    """
    if not config.store:
        return
    store, directory = _open(config), config.checkpoint_directory
    current = store.current()
    name = _chosen(current, which)
    if name is None:
        raise CheckpointError(
            "a job of a run with a store reads what is published. Received: no "
            f"{which} checkpoint in {store.address}. Train first."
        )
    directory.mkdir(parents=True, exist_ok=True)
    manifest = _fetch_into(store, current, name, directory)
    if manifest.base is not None:
        _fetch_into(store, current, manifest.base.checkpoint, directory)
    if which == "best" and read_best(directory) != current.best:
        replace_text(directory / BEST, json.dumps(current.best, indent=1) + "\n")


def _chosen(current: Current, which: Literal["best", "newest"]) -> str | None:
    if which == "newest":
        return _newest(current.versions) if current.versions else None
    name = None if current.best is None else current.best.get("checkpoint")
    return name if isinstance(name, str) and name in current.versions else None


def _fetch_into(store: Store, current: Current, name: str, directory: Path) -> CheckpointManifest:
    version = current.versions.get(name)
    if version is None:
        raise CheckpointError(
            f"a delta is published with its base. Received: no {name} in {store.address}. Use "
            "another checkpoint."
        )
    fetch_version(store, version, directory / name, checkpoint_files)
    return parse_manifest(directory / name / MANIFEST)
