"""Who is to be forgotten: a list of raw user values, read once and written nowhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from distrec import columns as c
from distrec.errors import DataError

_CSV_ENDINGS = (".csv", ".csv.gz")
# what separates the cells of a line that could not be read as a row
_BETWEEN_CELLS = re.compile(r"[\s,;|\"'{}\[\]()<>=\\]+|::?")


def read_people(path: Path, column: str) -> frozenset[str]:
    """The values of a list, as text, as prepare makes text of ids.

    Args:
        path: Parquet (.parquet), CSV with a header (.csv, .csv.gz), or any other file with a value
            a line.
        column: Of the events' user; a column user_id is taken first.

    Raises:
        DataError: The file is missing, damaged or empty, or has no such column.
    """
    try:
        if path.suffix == ".parquet":
            values = _texts(pq.read_table(path, columns=[_column(path, column)]).column(0))
        elif path.name.endswith(_CSV_ENDINGS):
            values = _texts(_read_csv(path, column))
        else:
            values = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"a list of users is a file with a value a line, or Parquet or CSV. Received: {path}: "
            f"{error}. Check the path and the file."
        ) from error
    people = frozenset(value for value in values if value.strip())
    if not people:
        raise DataError(f"a list of users names at least one. Received: {path}, which has none.")
    return people


def _column(path: Path, column: str) -> str:
    return _chosen(pq.read_schema(path).names, path, column)


def _chosen(names: list[str], path: Path, column: str) -> str:
    for name in (c.USER_ID, column):
        if name in names:
            return name
    raise DataError(
        f"a list of users has a column {c.USER_ID!r} or {column!r}. Received: {path} with the "
        f"columns {names}. Rename its column."
    )


def _read_csv(path: Path, column: str) -> pa.ChunkedArray:
    names = pacsv.open_csv(path).schema.names
    name = _chosen(names, path, column)
    options = pacsv.ConvertOptions(include_columns=[name], column_types={name: pa.string()})
    return pacsv.read_csv(path, convert_options=options).column(0)


def _texts(values: pa.ChunkedArray) -> Iterable[str]:
    """As Checks.text of prepare: whole numbers that a missing value made floats are whole."""
    for value in values.to_pylist():
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None:
            yield str(value)


def names_somebody(text: str, people: frozenset[str]) -> bool:
    """Whether a value stands in a text: as a value of JSON, or as a cell of a line.

    A number that is somebody's id is taken for them, whatever it meant.
    """
    try:
        leaves = list(_leaves(json.loads(text)))
    except ValueError:
        leaves = [text]
    return any(
        leaf in people or not people.isdisjoint(_BETWEEN_CELLS.split(leaf)) for leaf in leaves
    )


def _leaves(value: object) -> Iterable[str]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, float) and value.is_integer():
        yield str(int(value))
    elif value is not None:
        yield str(value)
