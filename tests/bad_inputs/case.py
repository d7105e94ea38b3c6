"""What a bad input is: how it is made, which job it is given to, and what that job says."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

CONFIG, DATA, CHECKPOINT, TRAINING = 2, 3, 4, 5
"""Exit codes, as distrec.errors has them."""


@dataclass(frozen=True)
class Case:
    """One bad input.

    Args:
        name: What is bad, for people.
        job: Which is given it: load (of a configuration), prepare, train, evaluate or score.
        make: Spoils a run that is good; takes its directory.
        message: Part of what the job says; "..." stands for anything.
        exit_code: Of the job.
        settings: As of --set.
    """

    name: str
    job: str
    make: Callable[[Path], None]
    message: str
    exit_code: int
    settings: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        return self.name

    @property
    def pattern(self) -> re.Pattern[str]:
        """Finds the message."""
        parts = (re.escape(part) for part in self.message.split("..."))
        return re.compile(".*".join(parts), re.DOTALL)


def snapshot(directory: Path) -> dict[str, bytes | str]:
    """Everything below a directory but its logs and bad batches: contents, targets of links."""
    found: dict[str, bytes | str] = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if name.split("/")[0] in ("logs", "bad_batches"):
            continue
        if path.is_symlink():
            found[name] = str(path.readlink())
        elif path.is_file():
            found[name] = path.read_bytes()
        else:
            found[name] = "directory"
    return found
