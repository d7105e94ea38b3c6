"""Arrow tables to batches: lists through their offsets, without a Python loop over rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from distrec import columns as c
from distrec.batch import Batch, ItemBatch, Jagged, QueryBatch
from distrec.dataset import FeatureSpec
from distrec.errors import DataError
from distrec.reader.files import type_name
from distrec.reader.layout import Layout, id_columns, query_layout

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Ragged:
    """One list an example: list b is values[offsets[b]:offsets[b + 1]]; offsets start at any value.

    Args:
        values: int64, at least offsets[-1] of them.
        offsets: int64, (B + 1,).
    """

    values: Integers
    offsets: Integers


@dataclass(frozen=True)
class Rows:
    """Decoded rows: views of Arrow's memory where nothing had to be moved.

    Args:
        scalars: int64 or float32, (B,), by column.
        lists: By column.
        dense: float32, (B, num_dense).
    """

    scalars: Mapping[str, NDArray[Any]]
    lists: Mapping[str, Ragged]
    dense: NDArray[np.float32]

    def take(self, rows: Integers) -> Rows:
        """A copy of the given rows, in the given order."""
        scalars = {name: values[rows] for name, values in self.scalars.items()}
        return Rows(scalars, _take_lists(self.lists, rows), self.dense[rows])

    def slice(self, start: int, stop: int) -> Rows:
        """A view of rows [start, stop)."""
        return Rows(
            {name: values[start:stop] for name, values in self.scalars.items()},
            {
                name: Ragged(lists.values, lists.offsets[start : stop + 1])
                for name, lists in self.lists.items()
            },
            self.dense[start:stop],
        )


def _take_lists(lists: Mapping[str, Ragged], rows: Integers) -> dict[str, Ragged]:
    result: dict[str, Ragged] = {}
    # a history and its times have the same offsets: where their values come from is found once
    known: Integers | None = None
    for name, ragged in lists.items():
        if known is None or not np.array_equal(known, ragged.offsets):
            known = ragged.offsets
            lengths = np.diff(known)[rows]
            offsets = np.zeros(len(rows) + 1, dtype=np.int64)
            np.cumsum(lengths, out=offsets[1:])
            source = np.repeat(known[:-1][rows] - offsets[:-1], lengths)
            source += np.arange(offsets[-1])
        result[name] = Ragged(ragged.values[source], offsets)
    return result


# --- Arrow to NumPy ----------------------------------------------------------------------------


def decode(table: pa.Table, layout: Layout, origin: str) -> Rows:
    """Decode the columns of a layout; others are ignored.

    Args:
        table: At least the columns of the layout.
        layout: What to decode.
        origin: Names the table in messages: a path.

    Raises:
        DataError: A column is missing, has another type, holds a null, or a vector has another
            length than its feature.
    """
    arrays = {name: _column(table, name, kind, origin) for name, kind in layout.types.items()}
    dense = np.empty((table.num_rows, layout.num_dense), dtype=np.float32)
    left = 0
    for feature in layout.dense:
        right = left + feature.dim
        dense[:, left:right] = _dense_columns(arrays[feature.column], feature, origin)
        left = right
    return Rows(
        {name: arrays[name].to_numpy() for name in (*layout.integers, *layout.floats)},
        {name: _ragged(arrays[name], name, origin) for name in layout.lists},
        dense,
    )


def no_rows(layout: Layout) -> Rows:
    """Zero rows with the columns, types and widths of a layout."""
    integers = dict.fromkeys(layout.integers, np.zeros(0, dtype=np.int64))
    floats = dict.fromkeys(layout.floats, np.zeros(0, dtype=np.float32))
    empty = Ragged(np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64))
    return Rows(
        {**integers, **floats},
        dict.fromkeys(layout.lists, empty),
        np.zeros((0, layout.num_dense), dtype=np.float32),
    )


def _column(table: pa.Table, name: str, kind: str, origin: str) -> pa.Array:
    if name not in table.column_names:
        raise DataError(
            f"rows have a column {name!r} of type {kind}. Received: {table.column_names} "
            f"({origin}). Run prepare again."
        )
    column = table.column(name)
    if type_name(column.type) != kind:
        raise DataError(
            f"column {name!r} has type {kind}. Received: {type_name(column.type)} ({origin}). Run "
            "prepare again."
        )
    if column.null_count:
        raise _null_error(column.null_count, name, origin)
    # combining copies, even a single chunk
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _null_error(count: int, name: str, origin: str) -> DataError:
    return DataError(
        f"a dataset has no nulls. Received: {count} nulls in column {name!r} ({origin}). Run "
        "prepare again."
    )


def _flatten(array: pa.ListArray, name: str, origin: str) -> tuple[NDArray[Any], Integers]:
    offsets = array.offsets.to_numpy().astype(np.int64)
    values = array.values.slice(offsets[0], offsets[-1] - offsets[0])
    if values.null_count:
        raise _null_error(values.null_count, name, origin)
    return values.to_numpy(), offsets - offsets[0]


def _ragged(array: pa.ListArray, name: str, origin: str) -> Ragged:
    return Ragged(*_flatten(array, name, origin))


def _dense_columns(array: pa.Array, feature: FeatureSpec, origin: str) -> NDArray[np.float32]:
    """float32, (B, dim)."""
    if feature.kind == "number":
        return array.to_numpy()[:, None]
    values, offsets = _flatten(array, feature.column, origin)
    lengths = np.diff(offsets)
    if (lengths != feature.dim).any():
        wrong = int(lengths[lengths != feature.dim][0])
        raise DataError(
            f"vectors of column {feature.column!r} have {feature.dim} numbers. Received: one with "
            f"{wrong} ({origin}). Run prepare again."
        )
    return values.reshape(-1, feature.dim)


# --- NumPy to tensors --------------------------------------------------------------------------


def _joined(arrays: Iterable[NDArray[Any]]) -> Tensor:
    # concatenate copies, also a single part: tensors never share Arrow's read-only memory
    return torch.from_numpy(np.concatenate(list(arrays)))


def _scalar(parts: Sequence[Rows], name: str) -> Tensor:
    return _joined(part.scalars[name] for part in parts)


def _dense(parts: Sequence[Rows]) -> Tensor:
    return _joined(part.dense for part in parts)


def _jagged(parts: Sequence[Rows], name: str) -> Jagged:
    lists = [part.lists[name] for part in parts]
    values = _joined(part.values[part.offsets[0] : part.offsets[-1]] for part in lists)
    return Jagged.from_lengths(values, _joined(np.diff(part.offsets) for part in lists))


def _ids(parts: Sequence[Rows], names: Sequence[str]) -> dict[str, Jagged]:
    return {
        name: Jagged.singles(_scalar(parts, name))
        if name in parts[0].scalars
        else _jagged(parts, name)
        for name in names
    }


def to_batch(parts: Sequence[Rows], features: Sequence[FeatureSpec]) -> Batch:
    """One batch of the rows of all parts, one after the other.

    Args:
        parts: At least one. Rows without an item (queries) get padding, label 0 and weight 0.
        features: The manifest's.
    """
    user_index = _scalar(parts, c.USER_INDEX)
    if c.ITEM_INDEX in parts[0].scalars:
        item_index = _scalar(parts, c.ITEM_INDEX)
        labels, weights = _scalar(parts, c.LABEL), _scalar(parts, c.WEIGHT)
    else:
        item_index = torch.full_like(user_index, c.PADDING_INDEX)
        labels, weights = torch.zeros(len(user_index)), torch.zeros(len(user_index))
    return Batch(
        user_index=user_index,
        item_index=item_index,
        time=_scalar(parts, c.TIME),
        labels=labels[:, None],
        weights=weights,
        num_events=_scalar(parts, c.NUM_EVENTS),
        history=_jagged(parts, c.HISTORY),
        history_times=_jagged(parts, c.HISTORY_TIMES),
        ids=_ids(parts, id_columns(features, "user", "context")),
        dense=_dense(parts),
    )


def to_queries(parts: Sequence[Rows], features: Sequence[FeatureSpec]) -> QueryBatch:
    """One batch of queries; without a column of targets they are empty."""
    batch = to_batch(parts, features)
    if c.TARGETS in parts[0].lists:
        targets = _jagged(parts, c.TARGETS)
    else:
        targets = Jagged.from_lengths(
            torch.zeros(0, dtype=torch.int64), torch.zeros(batch.batch_size, dtype=torch.int64)
        )
    return QueryBatch(batch=batch, seen=_jagged(parts, c.SEEN), targets=targets)


def to_items(parts: Sequence[Rows], features: Sequence[FeatureSpec]) -> ItemBatch:
    """Items with their features."""
    return ItemBatch(
        item_index=_scalar(parts, c.ITEM_INDEX),
        count=_scalar(parts, c.COUNT),
        ids=_ids(parts, id_columns(features, "item")),
        dense=_dense(parts),
    )


def decode_queries(
    table: pa.Table | pa.RecordBatch, manifest_features: Sequence[FeatureSpec]
) -> QueryBatch:
    """Queries from rows of users/ or of a query split, wherever they were read.

    Args:
        table: Columns as distrec.dataset describes them; unknown ones are ignored. Without a
            column `targets` there are none.
        manifest_features: `manifest.features`.

    Raises:
        DataError: As `decode`.
    """
    if isinstance(table, pa.RecordBatch):
        table = pa.Table.from_batches([table])
    layout = query_layout(manifest_features, targets=c.TARGETS in table.column_names)
    rows = decode(table, layout, "a table of users")
    return to_queries([rows], manifest_features)
