"""Download public data sets into canonical tab-separated files, checked and never half-written."""

from __future__ import annotations

import logging
import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path

from distrec.data.complete_journey import COMPLETE_JOURNEY
from distrec.data.movielens import MOVIELENS_100K
from distrec.data.sources import DataSet, Tables
from distrec.errors import ConfigError, DataError

logger = logging.getLogger("distrec.data")

DATA_SETS = {"movielens-100k": MOVIELENS_100K, "complete-journey": COMPLETE_JOURNEY}


def fetch(name: str, directory: Path) -> Path:
    """Put a public data set into `directory`, unless it is there and whole.

    Each is events.tsv, items.tsv and users.tsv with a header line; see the modules beside this one.

    Returns:
        The directory.

    Raises:
        ConfigError: No such data set.
        DataError: No source can be reached, or what came is not the data.
    """
    if name not in DATA_SETS:
        raise ConfigError(
            f"data sets that can be fetched: {', '.join(DATA_SETS)}. Received: {name!r}. Check the "
            "name."
        )
    directory = Path(directory)
    if _is_whole(DATA_SETS[name], directory):
        return directory
    tables = _first_that_works(DATA_SETS[name], name)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        for file, content in tables.items():
            (staging / file).write_bytes(content)
        directory.mkdir(exist_ok=True)
        for file in tables:
            (staging / file).replace(directory / file)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    logger.info("%s is in %s", name, directory)
    return directory


def _first_that_works(data_set: DataSet, name: str) -> Tables:
    faults = []
    for source, load in data_set.sources.items():
        logger.info("fetching %s from %s", name, source)
        try:
            tables = load()
            data_set.check(tables, source)
            return tables
        except (OSError, subprocess.SubprocessError, zipfile.BadZipFile, DataError) as error:
            logger.warning("%s: %s", source, error)
            faults.append(f"{source}: {error}")
    raise DataError(
        f"{name} must be fetched from one of its sources. Received: {'; '.join(faults)}. Check the "
        f"network and the proxy settings, or put {', '.join(data_set.headers)} there by hand."
    )


def _is_whole(data_set: DataSet, directory: Path) -> bool:
    try:
        data_set.check(
            {file: (directory / file).read_bytes() for file in data_set.headers}, str(directory)
        )
    except (FileNotFoundError, DataError):
        return False
    return True
