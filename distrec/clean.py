"""Left-overs of jobs that were killed, in a run's directory: what was never committed goes.

What a job had moved aside in the moment of a commit, and whose successor did not come, was
committed: it gets its name back.
"""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from distrec.config.store_url import checked_url
from distrec.errors import ConfigError
from distrec.status import read_status
from distrec.store import OUTPUTS, Store

_DIGITS = "[0-9a-f]{12}"
# as distrec.files and distrec.checkpoint.save name them
_MOVED_ASIDE = re.compile(rf"\.(?:(?P<output>.+)-old|partial-replaced-(?P<step>.+))-{_DIGITS}")
_STAGED = re.compile(rf"\..+-{_DIGITS}")
_HALF_WRITTEN = re.compile(r"\..+\.\d+|\.(?:heartbeat|rank)-\d+\.json")


@dataclass(frozen=True)
class Leftover:
    """Something that a dead job left.

    Args:
        path: What it is.
        original: The name that it gets back; None when it is deleted.
    """

    path: Path
    original: Path | None = None


def find_leftovers(directory: Path, min_age_seconds: float) -> list[Leftover]:
    """What is there and has not been written to for so long; nothing is changed.

    Raises:
        ConfigError: This is no run's directory, or ranks are running in it.
    """
    if read_status(directory).moving:
        raise ConfigError(
            f"a run is cleaned while nothing runs in it. Received: {directory}, whose ranks are "
            "running. Wait for their end, or stop them."
        )
    places = [directory, directory / "logs", *sorted(directory.glob("checkpoints*/"))]
    found = []
    for place in places:
        for path in sorted(place.iterdir()):
            if path.is_symlink() or time.time() - _written(path) < min_age_seconds:
                continue
            moved = _MOVED_ASIDE.fullmatch(path.name)
            if path.is_dir() and moved:
                original = place / str(moved["output"] or moved["step"])
                found.append(Leftover(path, None if original.exists() else original))
            elif (path.is_dir() and _STAGED.fullmatch(path.name)) or (
                path.is_file() and _HALF_WRITTEN.fullmatch(path.name)
            ):
                found.append(Leftover(path))
    return found


def _written(path: Path) -> float:
    """When anything of it was last written, in seconds since 1970."""
    times = [path.lstat().st_mtime]
    if path.is_dir():
        times += [inner.lstat().st_mtime for inner in path.rglob("*")]
    return max(times)


def remove(leftover: Leftover) -> None:
    """Delete it, or give it its name back."""
    if leftover.original is not None:
        leftover.path.rename(leftover.original)
    elif leftover.path.is_dir():
        shutil.rmtree(leftover.path)
    else:
        leftover.path.unlink()


def stored_leftovers(url: str, min_age_seconds: float) -> list[tuple[Store, str]]:
    """Folders below a run in a store that no pointer names, not written to for so long.

    Args:
        url: Of the run: <store>/<name>.
        min_age_seconds: More than the longest upload of one file takes.

    Raises:
        ConfigError: This is no address of a store, or it may not be read.
    """
    try:
        stores = [Store(checked_url(url), output) for output in OUTPUTS]
    except ValueError as error:
        raise ConfigError(f"{error}.") from None
    return [(store, folder) for store in stores for folder in store.leftovers(min_age_seconds)]
