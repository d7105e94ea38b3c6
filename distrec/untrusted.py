"""What comes from a directory that anybody may have written: plain files of bounded size, no links.

The same for datasets and checkpoints; the caller says which error it is.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from distrec.errors import DistrecError

# far above what a manifest of thousands of files takes
MAX_MANIFEST_BYTES = 256 * 2**20


def read_manifest_text(file: Path, error: type[DistrecError]) -> str:
    """The text of a manifest, which is a plain file of bounded size.

    Raises:
        DistrecError: Of the class `error`: it is a link, a directory, too large or not UTF-8.
    """
    try:
        status = os.lstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_MANIFEST_BYTES:
            raise error(
                f"{file.name} is a plain file of at most {MAX_MANIFEST_BYTES} bytes, no link. "
                f"Received: {file}, {status.st_size} bytes. Copy the directory again, whole."
            )
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise error(f"{file} cannot be read: {cause}. Copy it again.") from cause


def plain_size(directory: Path, name: str, error: type[DistrecError]) -> int:
    """Bytes of a plain file below a directory; nothing on the way from there is a link.

    Args:
        directory: Which may be a link itself.
        name: Relative, with forward slashes.
        error: Class of what is raised.

    Raises:
        DistrecError: Of the class `error`: it is not there, a link could lead out of the directory,
            or it is no file.
    """
    file = directory
    for part in name.split("/"):
        file = file / part
        try:
            status = os.lstat(file)
        except (OSError, ValueError):
            raise error(
                f"every file of the manifest is there. Received: no file {file}. Copy the "
                "directory again, whole."
            ) from None
        if stat.S_ISLNK(status.st_mode):
            raise error(
                f"what a manifest names holds no links. Received: {file} is one. Copy the files "
                "themselves."
            )
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{file} is a plain file. Received: something else. Copy it again.")
    return status.st_size
