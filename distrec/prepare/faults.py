"""What Spark says when data cannot be read or written, turned into errors that say what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from py4j.protocol import Py4JJavaError  # type: ignore[import-untyped]
from pyspark.errors import PySparkException

from distrec.errors import ConfigError, DataError, DistrecError, LaunchError

# a path may hold spaces, so it ends where the line or Spark's sentence does
_FILE = re.compile(
    r"(?:reading file|CSV file:|Path does not exist:) ?(?:file:(?://(?=/))?)?"
    r"(.+?)[.,]?[ \t]*(?:SQLSTATE: .*)?$",
    re.MULTILINE,
)
_CHARSET = re.compile(r"CHARSET.* but got (\S+?)\. ")
_CAUSE = re.compile(r"Caused by: (?:[\w.$]+: )?(.+)")


@contextmanager
def translated(source: str) -> Iterator[None]:
    """Raise a DataError for what is known to go wrong while `source` is read or written."""
    try:
        yield
    except (PySparkException, Py4JJavaError) as error:
        known = explain(f"{error}\n{_stack(error)}", source)
        if known is None:
            raise
        raise known from error
    except OSError as error:
        if "No space left on device" not in str(error):
            raise
        raise _full(source) from error


def _stack(error: Exception) -> str:
    if isinstance(error, Py4JJavaError):
        return str(error)
    return str(getattr(error, "_stackTrace", "") or getattr(error, "stackTrace", "") or "")


def explain(text: str, source: str) -> DistrecError | None:
    """The error for a message of Spark, or None when it is not a known one."""
    match = _FILE.search(text)
    path = match.group(1) if match else source
    if "No space left on device" in text:
        return _full(source)
    if "PATH_NOT_FOUND" in text or "FILE_NOT_EXIST" in text or "does not exist" in text:
        return DataError(
            f"every path of {source} must match a file. Received: {path}, which matches none. "
            "Check the path, and from which directory the job is started."
        )
    charset = _CHARSET.search(text)
    if charset:
        return ConfigError(
            f"prepare.{source}.encoding must be one that Java knows. Received: "
            f"{charset.group(1)!r}. Write UTF-8, UTF-16, ISO-8859-1 or windows-1252, say."
        )
    if "CSV header does not conform" in text:
        header = re.search(r"Header: (.*)", text)
        return DataError(
            f"all files of {source} must have the same header. Received: "
            f"{header.group(1) if header else 'another one'} ({path}). Make the files alike."
        )
    if "COLUMN_ALREADY_EXISTS" in text:
        column = re.search(r"column `(.+?)` already", text)
        return DataError(
            f"columns of {source} differ in more than upper and lower case. Received: "
            f"{column.group(1) if column else 'one'} more than once ({path}). Rename one of them."
        )
    if "FAILED_READ_FILE" in text or "is not a Parquet file" in text:
        causes = _CAUSE.findall(text)
        return DataError(
            f"every file of {source} must be whole and of its format. Received: {path}: "
            f"{causes[-1].strip() if causes else 'it cannot be read'}. Copy the file again, or "
            "check format."
        )
    if "Executor heartbeat timed out" in text or "SparkContext was shut down" in text:
        return LaunchError(f"Spark stopped while {source} was worked on. Run the job again.")
    return None


def _full(source: str) -> DataError:
    return DataError(
        f"{source} must fit on the disk. Received: no space left on device. Free some space, or "
        "set output (and spark.local.dir in [spark.conf]) to a larger disk."
    )
