"""Which checkpoints a run has, which of them is whole, which is best, and which may go."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any, Literal

from distrec.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    files_of,
    read_base,
    read_checkpoint_manifest,
)
from distrec.errors import CheckpointError
from distrec.files import replace_text, sha256

BEST = "best.json"
PARTIAL_PREFIX = ".partial-"
_NAME = re.compile(r"step-(\d{8,})")

logger = logging.getLogger("distrec.checkpoint")


def checkpoint_name(global_step: int) -> str:
    """Directory name of the checkpoint of a step."""
    return f"step-{global_step:08d}"


def committed(directory: str | Path) -> list[Path]:
    """Checkpoints with a manifest, oldest first."""
    found = []
    directory = Path(directory)
    if not directory.is_dir():
        return []
    for path in directory.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and not path.is_symlink() and (path / MANIFEST).is_file():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def verify(path: str | Path) -> None:
    """Read every file of a checkpoint, and of a delta's base, and compare with the manifest.

    Raises:
        CheckpointError: With the file that is missing or differs.
    """
    manifest = read_checkpoint_manifest(path)
    base = read_base(path, manifest)
    _verify_files(Path(path), manifest)
    if manifest.base is not None and base is not None:
        _verify_files(Path(path).parent / manifest.base.checkpoint, base)


def _verify_files(path: Path, manifest: CheckpointManifest) -> None:
    for name, entry in files_of(manifest):
        file = path / name
        received = sha256(file)
        if received != entry.sha256:
            raise CheckpointError(
                f"a file has the SHA-256 that the manifest gives. Received: {file} with "
                f"{received}, expected {entry.sha256}: it is damaged. Use another checkpoint, or "
                "copy this one again."
            )


def find(directory: str | Path, which: Literal["best", "newest"] = "best") -> Path:
    """The best or the newest checkpoint of a run that is whole.

    A damaged newest one is passed over for the one before it, with a warning. The best one is never
    replaced in silence.

    Args:
        directory: Of all checkpoints of the run.
        which: best: the one that best.json names; newest: of the highest step.

    Raises:
        CheckpointError: There is none, or the best one is damaged.
    """
    if which == "best":
        return _find_best(Path(directory))
    paths = committed(directory)
    for path in reversed(paths):
        try:
            verify(path)
        except CheckpointError as error:
            logger.warning("passing over checkpoint %s: %s", path.name, error)
            continue
        return path
    seen = f"{len(paths)} damaged ones" if paths else "none"
    raise CheckpointError(
        f"there is no checkpoint that can be used in {directory}. Received: {seen}. Train first."
    )


def _find_best(directory: Path) -> Path:
    record = read_best(directory)
    if record is None:
        raise CheckpointError(
            f"{directory / BEST} names the best checkpoint. Received: no such file, or not one of "
            "ours. Train first, or ask for the newest checkpoint."
        )
    path = directory / str(record["checkpoint"])
    try:
        verify(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"the best checkpoint cannot be used: {error} Or ask for the newest checkpoint."
        ) from error
    return path


def read_best(directory: str | Path) -> dict[str, Any] | None:
    """What best.json says: checkpoint, global_step, metric, value; None without a usable one."""
    try:
        record = json.loads((Path(directory) / BEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    name = record.get("checkpoint") if isinstance(record, dict) else None
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return None
    return dict(record)


def mark_best(path: Path, metric: str, value: float | None) -> None:
    """Point best.json at a checkpoint, at one stroke. Called by rank 0 alone."""
    record = {
        "checkpoint": path.name,
        "global_step": int(path.name.rpartition("-")[2]),
        "metric": metric,
        "value": value,
        # tells this checkpoint from one of the same step of an earlier run
        "manifest_sha256": sha256(path / MANIFEST),
    }
    replace_text(path.parent / BEST, json.dumps(record, indent=1) + "\n")


def prune(directory: str | Path, keep: int) -> list[str]:
    """Delete all but the best and the `keep` newest checkpoints, and the rests of failed saves.

    What a delta that stays is based on stays too. Called by rank 0 alone, while nobody saves.

    Returns:
        The names that were deleted.
    """
    directory = Path(directory)
    best = read_best(directory)
    kept = {path.name for path in committed(directory)[-keep:]}
    kept |= {str(best["checkpoint"])} if best else set()
    kept |= {base for name in kept for base in _base_name(directory / name)}
    deleted = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        is_rest = path.name.startswith(PARTIAL_PREFIX)
        is_old = _NAME.fullmatch(path.name) is not None and path.name not in kept
        if path.is_dir() and not path.is_symlink() and (is_rest or is_old):
            # without its manifest it is no checkpoint any more, even if deleting stops half-way
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
            deleted.append(path.name)
    return deleted


def _base_name(path: Path) -> list[str]:
    """Of the checkpoint that a delta needs, whatever else is wrong with it."""
    try:
        base = json.loads((path / MANIFEST).read_text(encoding="utf-8")).get("base")
        return [] if base is None else [str(base["checkpoint"])]
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError):
        return []
