"""The whole of `distrec forget`: what goes, in an order that can be cut off and begun again.

Everything is made anew beside what is there and swapped by rename, the dataset last: until then it
says which ids the people had, so that a second run finds the same work and comes to the same end.
What is done already is done again without effect. With a store it begins with what is published,
and ends with publishing what is left (`published.py`).
"""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distrec import checkpoint, pipeline
from distrec import columns as c
from distrec.clean import find_leftovers, remove
from distrec.config import Config
from distrec.dataset import DatasetManifest, read_manifest
from distrec.errors import DataError
from distrec.files import commit, replace_text, staging
from distrec.forget import outputs, published
from distrec.forget.checkpoints import Change, Changes, belongs, replace_checkpoints
from distrec.forget.dataset import extended_after_forgetting, write_rest
from distrec.forget.found import Found, find
from distrec.forget.scan import remains
from distrec.user_key import hashed, key_of_dataset

logger = logging.getLogger("distrec.forget")

JOURNAL = "forget.json"
_SHOWN = 10


def run(config: Config, people: frozenset[str], dry_run: bool = False) -> dict[str, Any]:
    """Take people out of everything that a run keeps, and look whether anything is left.

    Args:
        config: Of the run.
        people: Raw user values, as they stand in the events; hashed here where the dataset's are.
        dry_run: Take nobody out, and say what would be.

    Returns:
        Counts, without a name.

    Raises:
        ConfigError: Ranks are running, or the key of users is not there or another one.
        DataError: The dataset is damaged, nothing would be left of it, or the scan found something.
        CheckpointError: A checkpoint cannot be read.
        StoreError: The run's store cannot be reached.
    """
    if not dry_run:
        _recover(config)
    published.fetch(config, may_publish=not dry_run)
    manifest = read_manifest(config.dataset_directory)
    key = key_of_dataset(manifest.user_key_digest, config.prepare)
    names = people if key is None else people.union(hashed(one, key) for one in people)
    found = find(config.dataset_directory, manifest, names)
    changes = _changes(found)
    _check_checkpoints(config, changes)
    summary = {"people": len(people), "unknown": len(people) - len(found.known)}
    done = _told(config, found, changes) if dry_run else _forget(config, found, changes)
    return {**summary, **done}


def _runs(config: Config) -> Iterator[Path]:
    """The run's directory, and those of its variants, which have links to its dataset."""
    yield config.directory
    for link in sorted(config.directory.glob("*/*/dataset")):
        if link.is_symlink():
            yield link.parent


def _checkpoints(config: Config) -> Iterator[Path]:
    """Directories of checkpoints, those that were set aside included."""
    name = config.checkpoint_directory.name
    for directory in _runs(config):
        yield from (
            path
            for path in sorted(directory.glob(f"{name}*"))
            if path.is_dir() and not path.is_symlink()
        )


def _recover(config: Config) -> None:
    """What a killed job had moved aside comes back; what it had begun goes."""
    for directory in _runs(config):
        if (directory / config.logs_directory.name).is_dir():
            for leftover in find_leftovers(directory, 0):
                remove(leftover)


def _changes(found: Found) -> Changes:
    """How each vocabulary of which ids go changes; that of users always."""
    vocabularies = found.manifest.vocabularies
    return {
        name: Change(before := vocabularies[name].sha256, found.hashes.get(name, before), ids)
        for name, ids in found.ids.items()
        if len(ids) or name == c.USER_ID
    }


def _is_set_aside(config: Config, path: Path) -> bool:
    return path.name != config.checkpoint_directory.name


def _all_belong(path: Path, changes: Changes) -> bool:
    return all(
        belongs(checkpoint.read_checkpoint_manifest(one), changes)
        for one in checkpoint.committed(path)
    )


def _check_checkpoints(config: Config, changes: Changes) -> None:
    """Nobody can be taken out of checkpoints whose row numbers are of another dataset."""
    for path in _checkpoints(config):
        if not _is_set_aside(config, path) and not _all_belong(path, changes):
            raise DataError(
                f"people are taken out of checkpoints of the dataset that is there. Received: "
                f"{path}, trained on another one. Train first, or delete them; if an earlier "
                "forget was cut off, run it again with its own list first."
            )


def _rest(config: Config, found: Found, root: Path) -> DatasetManifest:
    """The dataset without the people; the manifest as it is when it stays as it is."""
    manifest, extend = found.manifest, config.prepare.extend
    previous = None
    if extend is not None and Path(extend).is_dir():
        previous = read_manifest(extend)
    extends = extended_after_forgetting(manifest.extends, previous)
    if not found.is_there and extends == manifest.extends:
        return manifest
    return write_rest(config.dataset_directory, found, extends, root)


def _told(config: Config, found: Found, changes: Changes) -> dict[str, Any]:
    """What would be done."""
    stays = [path for path in _checkpoints(config) if _all_belong(path, changes)]
    counts = {name: len(rows) for name, rows in sorted(found.rows.items()) if len(rows)}
    return {
        "dry_run": True,
        "dataset": counts,
        "ids": {name: len(change.ids) for name, change in sorted(changes.items())},
        "checkpoints": sum(len(checkpoint.committed(path)) for path in stays),
        "deleted": [str(path) for path in _checkpoints(config) if path not in stays],
        "scores": sum((path / "manifest.json").is_file() for path in _scores(config)),
        "exports": sum(1 for path in _runs(config) for _ in outputs.exported_tables(path / "logs")),
        "published": published.count(config),
    }


def _scores(config: Config) -> list[Path]:
    return [directory / config.scores_directory.name for directory in _runs(config)]


def _forget(config: Config, found: Found, changes: Changes) -> dict[str, Any]:
    up_to_date = _begin(config)
    target, people = config.dataset_directory, found.people
    with staging(target) as root:
        after = _rest(config, found, root)
        rows, deleted = 0, []
        for path in _checkpoints(config):
            if not _all_belong(path, changes):
                logger.warning("deleting %s: of another dataset, so that nobody can say who is "
                               "in it", path)  # fmt: skip
                deleted.append(str(path))
                # under this name what a kill leaves of it is found and deleted
                rest = path.with_name(f".{path.name}-{uuid.uuid4().hex[:12]}")
                path.rename(rest)
                shutil.rmtree(rest)
            elif checkpoint.committed(path) and any(len(one.ids) for one in changes.values()):
                rows += replace_checkpoints(path, changes)
        summary: dict[str, Any] = {
            "dataset": found.num_rows,
            "checkpoint_rows": rows,
            "deleted": deleted,
            "scores": sum(outputs.replace_scores(path, people) for path in _scores(config)),
        }
        for directory in _runs(config):
            logs = directory / config.logs_directory.name
            shutil.rmtree(directory / config.bad_batches_directory.name, ignore_errors=True)
            if after is not found.manifest:
                outputs.replace_ranks(directory, found, root, after.content_hash)
            _add(summary, "exports", outputs.replace_exports(logs, found))
            _add(summary, "messages", outputs.replace_log(logs, people))
        if after is not found.manifest:
            commit(root, target)
    published.publish(config)
    _end(config, up_to_date)
    left = remains(config.directory, people, changes)
    left += published.remains_published(config, people, changes)
    if left:
        raise DataError(
            f"nothing of the people is left after forgetting. Received: {len(left)} places where "
            f"something is: {'; '.join(left[:_SHOWN])}. Run `distrec clean` for what dead jobs "
            "left, delete what distrec has not written, and run this again."
        )
    return {**summary, "published": published.count(config), "left": 0}


def _add(summary: dict[str, Any], name: str, count: int) -> None:
    summary[name] = summary.get(name, 0) + count


def _begin(config: Config) -> Sequence[str]:
    """Write down, once, which stages are up to date: they are so again in the end."""
    path = config.directory / JOURNAL
    if not path.is_file():
        stages = pipeline.up_to_date(config)
        replace_text(path, json.dumps({"up_to_date": stages}))
    return list(outputs.read_json(path)["up_to_date"])


def _end(config: Config, up_to_date: Sequence[str]) -> None:
    if config.report_path.is_file():
        pipeline.report(config)
    pipeline.mark_up_to_date(config, up_to_date)
    (config.directory / JOURNAL).unlink(missing_ok=True)
