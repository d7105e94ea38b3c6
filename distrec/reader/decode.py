"""Arrow tables to batches: lists through their offsets, without a Python loop over rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from distrec import columns as c
from distrec.batch import Batch, ItemBatch, Jagged, QueryBatch
from distrec.dataset import FeatureSpec
from distrec.errors import DataError
from distrec.reader.files import type_name
from distrec.reader.layout import Layout, id_columns, query_layout

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]


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
    """Decoded rows, columns of a kind side by side: so they are cut and joined at one stroke.

    Args:
        layout: Names the columns.
        integers: int64, (len(layout.integers), B).
        floats: float32, (len(layout.floats), B).
        lists: By column.
        dense: float32, (B, num_dense).
    """

    layout: Layout
    integers: Integers
    floats: Floats
    lists: Mapping[str, Ragged]
    dense: Floats

    def slice(self, start: int, stop: int) -> Rows:
        """A view of rows [start, stop)."""
        return Rows(
            self.layout,
            self.integers[:, start:stop],
            self.floats[:, start:stop],
            {
                name: Ragged(lists.values, lists.offsets[start : stop + 1])
                for name, lists in self.lists.items()
            },
            self.dense[start:stop],
        )


# --- Arrow to NumPy ----------------------------------------------------------------------------


def decode(table: pa.Table, layout: Layout, origin: str, rows: Integers | None = None) -> Rows:
    """Decode the columns of a layout; others are ignored.

    Args:
        table: At least the columns of the layout.
        layout: What to decode.
        origin: Names the table in messages: a path.
        rows: The rows to take, in this order; None takes all as they are.

    Raises:
        DataError: A column is missing, has another type, holds a null, a vector has another length
            than its feature, or a history's kinds of event are not one each, or none of theirs.
    """
    arrays = _columns(table, layout.types, origin)
    dense = np.empty((table.num_rows, layout.num_dense), dtype=np.float32)
    left = 0
    for feature in layout.dense:
        right = left + feature.dim
        dense[:, left:right] = _dense_columns(arrays[feature.column], feature, origin)
        left = right
    lists = {name: Ragged(*_flatten(arrays[name], name, origin)) for name in layout.lists}
    if layout.num_event_types:
        _check_event_types(lists, layout.num_event_types, origin)
    if rows is not None:
        dense = dense.take(rows, axis=0)
        order = pa.array(rows)
        lists = {name: _take_lists(ragged, order) for name, ragged in lists.items()}
    return Rows(
        layout,
        _side_by_side([arrays[name] for name in layout.integers], len(dense), np.int64, rows),
        _side_by_side([arrays[name] for name in layout.floats], len(dense), np.float32, rows),
        lists,
        dense,
    )


def no_rows(layout: Layout) -> Rows:
    """Zero rows with the columns, types and widths of a layout."""
    empty = Ragged(np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64))
    return Rows(
        layout,
        np.zeros((len(layout.integers), 0), dtype=np.int64),
        np.zeros((len(layout.floats), 0), dtype=np.float32),
        dict.fromkeys(layout.lists, empty),
        np.zeros((0, layout.num_dense), dtype=np.float32),
    )


def _columns(table: pa.Table, types: Mapping[str, str], origin: str) -> dict[str, pa.Array]:
    """The named columns, each in one piece, of the type that it must have and without nulls."""
    received = {field.name: type_name(field.type) for field in table.schema}
    arrays = {}
    for name, kind in types.items():
        if name not in received:
            raise DataError(
                f"rows have a column {name!r} of type {kind}. Received: {list(received)} "
                f"({origin}). Run prepare again."
            )
        if received[name] != kind:
            raise DataError(
                f"column {name!r} has type {kind}. Received: {received[name]} ({origin}). Run "
                "prepare again."
            )
        column = table.column(name)
        if column.null_count:
            raise _null_error(column.null_count, name, origin)
        # combining copies, even a single chunk
        one = column.num_chunks == 1
        arrays[name] = column.chunk(0) if one else column.combine_chunks()
    return arrays


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


def _check_event_types(lists: Mapping[str, Ragged], num_types: int, origin: str) -> None:
    """Nothing else looks at them before they are rows of a parameter."""
    types = lists[c.HISTORY_TYPES]
    if not np.array_equal(types.offsets, lists[c.HISTORY].offsets):
        raise DataError(
            f"a history has one kind an event. Received: lists of column {c.HISTORY_TYPES!r} that "
            f"are not as long as those of {c.HISTORY!r} ({origin}). Run prepare again."
        )
    stop = c.FIRST_INDEX + num_types
    wrong = (types.values < c.UNKNOWN_INDEX) | (types.values >= stop)
    if wrong.any():
        raise DataError(
            f"kinds of event in column {c.HISTORY_TYPES!r} lie in [{c.UNKNOWN_INDEX}, {stop}). "
            f"Received: {types.values[wrong][0]} ({origin}). Run prepare again."
        )


def _side_by_side(
    arrays: Sequence[pa.Array], num_rows: int, dtype: DTypeLike, rows: Integers | None
) -> NDArray[Any]:
    """Columns as the rows of a matrix, (len(arrays), num_rows)."""
    block = np.empty((len(arrays), num_rows), dtype=dtype)
    for array, target in zip(arrays, block, strict=True):
        if rows is None:
            target[:] = array.to_numpy()
        else:
            # every other mode than "clip" writes into a buffer first
            array.to_numpy().take(rows, out=target, mode="clip")
    return block


def _take_lists(ragged: Ragged, rows: pa.Array) -> Ragged:
    """The lists of some rows, in their order."""
    size = ragged.values.itemsize
    # as strings of bytes they are moved list by list, and not number by number
    places = [None, pa.py_buffer(ragged.offsets * size), pa.py_buffer(ragged.values)]
    strings = pa.Array.from_buffers(pa.large_binary(), len(ragged.offsets) - 1, places)
    _, ends, data = strings.take(rows).buffers()
    offsets = np.frombuffer(ends, dtype=np.int64, count=len(rows) + 1) // size
    if not offsets[-1]:
        return Ragged(ragged.values[:0], offsets)
    return Ragged(np.frombuffer(data, ragged.values.dtype, count=offsets[-1]), offsets)


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


def _joined(arrays: Iterable[NDArray[Any]], axis: int = 0) -> Tensor:
    # concatenate copies, also a single part: tensors never share Arrow's read-only memory
    return torch.from_numpy(np.concatenate(list(arrays), axis=axis))


def _scalars(parts: Sequence[Rows]) -> dict[str, Tensor]:
    """int64 or float32, (B,), by column."""
    layout = parts[0].layout
    integers = _joined((part.integers for part in parts), axis=1)
    floats = _joined((part.floats for part in parts), axis=1)
    return dict(zip((*layout.integers, *layout.floats), (*integers, *floats), strict=True))


def _dense(parts: Sequence[Rows]) -> Tensor:
    return _joined(part.dense for part in parts)


def _jagged(parts: Sequence[Rows], name: str) -> Jagged:
    lists = [part.lists[name] for part in parts]
    values = _joined(part.values[part.offsets[0] : part.offsets[-1]] for part in lists)
    return Jagged.from_lengths(values, _joined(np.diff(part.offsets) for part in lists))


def _ids(
    parts: Sequence[Rows], scalars: Mapping[str, Tensor], names: Sequence[str]
) -> dict[str, Jagged]:
    # one value a row each, so all of them have the same offsets
    offsets = torch.arange(sum(len(part.dense) for part in parts) + 1)
    return {
        name: Jagged(scalars[name], offsets) if name in scalars else _jagged(parts, name)
        for name in names
    }


def to_batch(parts: Sequence[Rows], features: Sequence[FeatureSpec]) -> Batch:
    """One batch of the rows of all parts, one after the other.

    Args:
        parts: At least one. Rows without an item (queries) get padding, label 0 and weight 0.
        features: The manifest's.
    """
    layout, scalars = parts[0].layout, _scalars(parts)
    user_index = scalars[c.USER_INDEX]
    if c.ITEM_INDEX in scalars:
        item_index, weights = scalars[c.ITEM_INDEX], scalars[c.WEIGHT]
        names = [name for name in layout.floats if name != c.WEIGHT]
        labels = torch.stack([scalars[name] for name in names], dim=1)
    else:
        item_index = torch.full_like(user_index, c.PADDING_INDEX)
        labels, weights = torch.zeros(len(user_index), 1), torch.zeros(len(user_index))
    return Batch(
        user_index=user_index,
        item_index=item_index,
        time=scalars[c.TIME],
        labels=labels,
        weights=weights,
        num_events=scalars[c.NUM_EVENTS],
        history=_jagged(parts, c.HISTORY),
        history_times=_jagged(parts, c.HISTORY_TIMES),
        history_types=_jagged(parts, c.HISTORY_TYPES) if layout.num_event_types else None,
        ids=_ids(parts, scalars, id_columns(features, "user", "context")),
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
    """Items with their features; without a column of what was recent, nothing was."""
    scalars = _scalars(parts)
    recent = [scalars[name] for name in map(c.recent_column, c.RECENT_POOLS) if name in scalars]
    return ItemBatch(
        item_index=scalars[c.ITEM_INDEX],
        count=scalars[c.COUNT],
        recent=recent[0] if recent else torch.zeros_like(scalars[c.COUNT]),
        ids=_ids(parts, scalars, id_columns(features, "item")),
        dense=_dense(parts),
    )


def decode_queries(
    table: pa.Table | pa.RecordBatch,
    manifest_features: Sequence[FeatureSpec],
    event_types: Sequence[str] = (),
) -> QueryBatch:
    """Queries from rows of users/ or of a query split, wherever they were read.

    Args:
        table: Columns as distrec.dataset describes them; unknown ones are ignored. Without a
            column `targets` there are none.
        manifest_features: `manifest.features`.
        event_types: `manifest.event_types`.

    Raises:
        DataError: As `decode`.
    """
    if isinstance(table, pa.RecordBatch):
        table = pa.Table.from_batches([table])
    has_targets = c.TARGETS in table.column_names
    layout = query_layout(manifest_features, event_types, targets=has_targets)
    rows = decode(table, layout, "a table of users")
    return to_queries([rows], manifest_features)
