"""Whether this rank was told to stop: by SIGTERM, or by the launcher through a file that all see.

The ranks agree on it in an exchange of each step (`train_step`), so that all of them save after the
same one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distrec.job import on_sigterm

# between two looks at a file system that may be another host's
_INTERVAL_SECONDS = 0.5


class StopRequest:
    """Asks once a step whether to stop.

    Args:
        path: The launcher's file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_made = False
        self._looked_at = 0.0

    def __call__(self) -> bool:
        """Whether this rank was told to stop."""
        now = time.monotonic()
        if not self._is_made and now - self._looked_at >= _INTERVAL_SECONDS:
            self._looked_at = now
            self._is_made = self._path.exists()
        return self._is_made

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM as a request, which by default ends the process where it stands."""
        with on_sigterm(self._note):
            yield

    def _note(self) -> None:
        self._is_made = True
