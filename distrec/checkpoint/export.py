"""An embedding table of a checkpoint as one Parquet file: id, value, vector; in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import torch
from torch import Tensor

from distrec import columns as c
from distrec.checkpoint.files import StoredRows
from distrec.checkpoint.manifest import (
    CheckpointManifest,
    read_base,
    read_checkpoint_manifest,
    rows_of_shard,
)
from distrec.checkpoint.shards import check_row_ids, open_shard, stored_rows
from distrec.checkpoint.tables import MappedTables
from distrec.dataset import DatasetManifest
from distrec.errors import CheckpointError, ConfigError, DataError
from distrec.files import fsync
from distrec.model.unified import vocabulary_of

# bytes of vectors in a row group: what is in memory at once, a few times over
_GROUP_BYTES = 8 * 2**20
_MAX_GROUP_ROWS = 2**17
VECTOR = "vector"
SCHEMA = pa.schema(
    [
        pa.field(c.ID, pa.int64(), nullable=False),
        pa.field(c.VALUE, pa.string()),
        pa.field(VECTOR, pa.list_(pa.float32()), nullable=False),
    ]
)


def export_table(
    path: Path,
    table: str,
    output: Path,
    dataset_directory: Path,
    dataset: DatasetManifest,
    start: int = 0,
    stop: int | None = None,
) -> int:
    """Write the vectors of ids [start, stop) of a table; the file appears whole or not at all.

    Those of a compressed table are composed, as look-ups do it.

    Columns: id int64, ascending; value text, as in the vocabulary, null for an id that is nobody's
    (padding, unknown) and where the ids are no vocabulary (hashes); vector list of float32.

    Args:
        path: The checkpoint's directory; it may be a delta.
        table: Its name.
        output: The file; one that is there is replaced.
        dataset_directory: Where `dataset` lies.
        dataset: Manifest.
        start: First id.
        stop: The one after the last; None: all.

    Returns:
        Rows written.

    Raises:
        ConfigError: There is no such table, or not so many ids.
        CheckpointError: The checkpoint is damaged, or of another dataset.
        DataError: The file cannot be written, or the vocabulary cannot be read.
    """
    rows = TableRows(path, table)
    stop = rows.num_ids if stop is None else stop
    if not 0 <= start < stop <= rows.num_ids:
        raise ConfigError(
            f"ids of table {table!r} lie in [0, {rows.num_ids}). Received: start {start}, "
            f"stop {stop}. Ask for a range of them."
        )
    values = _Values(rows.manifest, table, dataset_directory, dataset)
    step = max(1, min(_MAX_GROUP_ROWS, _GROUP_BYTES // (4 * rows.embedding_dim)))
    metadata = {"distrec.checkpoint": path.name, "distrec.table": table}
    schema = SCHEMA.with_metadata(metadata)
    with (
        _whole_file(output) as partial,
        pq.ParquetWriter(partial, schema, compression="zstd", use_dictionary=False) as file,
    ):
        for first in range(start, stop, step):
            file.write_table(_row_group(first, min(first + step, stop), values, rows))
    return stop - start


def _row_group(first: int, last: int, values: _Values, rows: TableRows) -> pa.Table:
    vectors = rows.read(first, last).numpy()
    offsets = pa.array(range(0, vectors.size + 1, vectors.shape[1]), pa.int32())
    ids = pa.array(range(first, last), pa.int64())
    columns = [
        ids,
        values.read(first, last),
        pa.ListArray.from_arrays(offsets, pa.array(vectors.reshape(-1))),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


@contextmanager
def _whole_file(output: Path) -> Iterator[Path]:
    """A name beside `output`; what was written there takes its place when all went well."""
    if output.is_dir():
        raise ConfigError(f"the output is a file. Received: {output}, a directory. Name a file.")
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        yield partial
        fsync(partial)
        partial.rename(output)
        fsync(output.absolute().parent)
    except OSError as error:
        raise DataError(
            f"{output} cannot be written: {error}. Free space, or name another file."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


class TableRows:
    """Vectors of one table of a checkpoint, range by range; rows are read and not mapped.

    The rows that an id is composed of lie anywhere: those of a compressed table are mapped.

    Args:
        path: The checkpoint's directory; it may be a delta.
        table: Its name.

    Attributes:
        manifest: Of the checkpoint.

    Raises:
        ConfigError: There is no such table.
    """

    def __init__(self, path: Path, table: str) -> None:
        self.manifest = read_checkpoint_manifest(path)
        if table not in self.manifest.tables:
            raise ConfigError(
                f"{path} has no table {table!r}. Tables: {', '.join(sorted(self.manifest.tables))}."
            )
        self._table, self._entry = table, self.manifest.tables[table]
        base = read_base(path, self.manifest)
        # row numbers, mapped, and the rows
        self._changed: list[tuple[Tensor, StoredRows]] = []
        self._mapped = MappedTables(path) if self._entry.composition is not None else None
        if self.manifest.base is not None and base is not None:
            for index in range(len(self._entry.shards)):
                row_ids = open_shard(path, table, self._entry, index, is_delta=True)["row_ids"]
                check_row_ids(path, table, self._entry, index, row_ids)
                stored = stored_rows(path, table, self._entry, index, is_delta=True)
                self._changed.append((row_ids, stored["weights"]))
            path, self._entry = path.parent / self.manifest.base.checkpoint, base.tables[table]
        self._stored = [
            stored_rows(path, table, self._entry, index)["weights"]
            for index in range(len(self._entry.shards))
        ]

    @property
    def num_ids(self) -> int:
        """Ids lie in [0, num_ids)."""
        return self._entry.num_ids

    @property
    def embedding_dim(self) -> int:
        """Their width."""
        return self._entry.embedding_dim

    def read(self, start: int, stop: int) -> Tensor:
        """Vectors of ids [start, stop): float32, (stop - start, D)."""
        if self._mapped is not None:
            return self._mapped.read_rows(self._table, start, stop)
        rows = torch.empty(stop - start, self.embedding_dim)
        count = len(self._stored)
        for index, stored in enumerate(self._stored):
            # the first place at or after a row: how many of the shard's rows lie before it
            first, last = (rows_of_shard(row, index, count) for row in (start, stop))
            offset = first * count + index - start
            stored.copy_into(first, rows[offset::count][: last - first])
        for row_ids, changed in self._changed:
            first, last = torch.searchsorted(row_ids, torch.tensor([start, stop])).tolist()
            rows[row_ids[first:last] - start] = changed.read(first, last).to(torch.float32)
        return rows


class _Values:
    """Raw values of ids, from the vocabulary that a table goes by, if any."""

    def __init__(
        self,
        checkpoint: CheckpointManifest,
        table: str,
        directory: Path,
        dataset: DatasetManifest,
    ) -> None:
        name = vocabulary_of(table, checkpoint.model_spec)
        vocabulary = dataset.vocabularies.get(name)
        stored = checkpoint.vocabularies.get(name)
        if stored != (None if vocabulary is None else vocabulary.sha256):
            raise CheckpointError(
                f"a table's ids are those of the dataset that it was trained on. Received: the "
                f"vocabulary {name!r} of {directory} is another one. Put back the other dataset, "
                "or train on this one."
            )
        self._dataset: pads.Dataset | None = None
        if vocabulary is not None and vocabulary.files:
            files = [str(directory / entry.path) for entry in vocabulary.files]
            try:
                self._dataset = pads.dataset(files, format="parquet")
            except (OSError, pa.ArrowInvalid) as error:
                raise DataError(
                    f"the vocabulary {name!r} can be read. Received: {error}. Run prepare again."
                ) from error

    def read(self, start: int, stop: int) -> pa.Array:
        """Values of ids [start, stop), null for those that are nobody's."""
        if self._dataset is None:
            return pa.nulls(stop - start, pa.string())
        chosen = (pads.field(c.ID) >= start) & (pads.field(c.ID) < stop)
        # files are in the order of ids, so that most row groups are passed over unread
        found = self._dataset.to_table(
            columns=[c.ID, c.VALUE], filter=chosen, use_threads=False,
            batch_readahead=1, fragment_readahead=1,
        )  # fmt: skip
        places: list[int | None] = [None] * (stop - start)
        for place, index in enumerate(found[c.ID].to_pylist()):
            places[index - start] = place
        values = found[c.VALUE].combine_chunks().cast(pa.string())
        return values.take(pa.array(places, pa.int64()))
