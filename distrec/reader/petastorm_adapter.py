"""Row groups by name through petastorm: the only file that imports it.

Of petastorm this takes the Arrow worker and the pool that works in the calling thread: its thread
pool ends an epoch early now and then without an error. The worker is handed an explicit list of
files, never a directory, in which petastorm would unpickle ``_common_metadata``. Its results stay
``pyarrow.Table``s, since petastorm's own conversion refuses ragged lists.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from petastorm.arrow_reader_worker import ArrowReaderWorker
from petastorm.cache import NullCache
from petastorm.fs_utils import FilesystemResolver
from petastorm.unischema import Unischema, UnischemaField
from petastorm.workers_pool import EmptyResultError
from petastorm.workers_pool.dummy_pool import DummyPool

from distrec.errors import DataError
from distrec.reader.files import SplitFile

MIB = 1 << 20


@dataclass(frozen=True)
class _Piece:
    """What the worker needs to know of a row group."""

    path: str
    row_group: int


class _TableWorker(ArrowReaderWorker):
    """Reads a row group in one opening of its file, in the file's order."""

    def _read_with_shuffle_row_drop(
        self, piece: _Piece, pq_file: pq.ParquetFile, column_names: set[str], _: tuple[int, int]
    ) -> pa.Table:
        # petastorm opens the file, then its piece would open it again; this uses the first opening,
        # and closes it, which petastorm leaves to the garbage collector
        try:
            return pq_file.read_row_group(piece.row_group, columns=sorted(column_names))
        finally:
            pq_file.close(force=True)


class RowGroupReader:
    """Reads row groups of the files of a split, in any order, with a bounded cache.

    The cache keeps what was read first until it is full and the last row group beside it: an epoch
    passes over everything once, which is the order in which dropping the oldest would keep nothing.

    Args:
        files: The checked files of the split.
        columns: Those that are read.
        cache_mib: Bound of the cache, in MiB.
    """

    def __init__(self, files: Sequence[SplitFile], columns: Sequence[str], cache_mib: int) -> None:
        self._files = files
        self._first_piece = np.cumsum([0, *(len(file.row_groups) for file in files)])
        pieces = [
            _Piece(str(file.path), row_group)
            for file in files
            for row_group in range(len(file.row_groups))
        ]
        fields = [UnischemaField(name, np.void, (), None, False) for name in columns]
        schema = Unischema("columns", fields)
        # petastorm reads through the API that pyarrow 14 has deprecated; 14 is what it needs
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"petastorm\..*")
        self._pool = DummyPool()
        paths = [str(file.path) for file in files]
        filesystem = FilesystemResolver("file:///").filesystem()
        no_ngram = no_transform = no_filters = no_seed = None
        self._pool.start(
            _TableWorker,
            (filesystem, paths, schema, no_ngram, pieces, NullCache(), no_transform, schema,
             no_filters, False, no_seed),
        )  # fmt: skip
        self._lock = threading.Lock()
        self._cache: dict[tuple[int, int], pa.Table] = {}
        self._free_bytes = cache_mib * MIB
        self._last: tuple[tuple[int, int], pa.Table] | None = None

    def read(self, file: int, row_group: int) -> pa.Table:
        """The columns of one row group; may be called from any thread.

        Raises:
            DataError: The row group cannot be read, or has another number of rows than its footer
                says.
        """
        key = (file, row_group)
        with self._lock:
            if key in self._cache:
                return self._cache[key]
            if self._last is not None and self._last[0] == key:
                return self._last[1]
            table = self._read(file, row_group)
            self._last = (key, table)
            if table.nbytes <= self._free_bytes:
                self._cache[key] = table
                self._free_bytes -= table.nbytes
            return table

    def _read(self, file: int, row_group: int) -> pa.Table:
        path = self._files[file].path
        try:
            self._pool.ventilate(
                piece_index=int(self._first_piece[file]) + row_group,
                worker_predicate=None,
                shuffle_row_drop_partition=(0, 1),
            )
            table = self._pool.get_results()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(
                f"row group {row_group} of {path} cannot be read: {error}. Copy the file again, or "
                "run prepare again."
            ) from error
        except EmptyResultError:
            table = pa.table({})
        expected = self._files[file].row_groups[row_group]
        if table.num_rows != expected:
            raise DataError(
                f"a row group gives the rows that its footer promises. Received: {table.num_rows} "
                f"of row group {row_group} of {path}, expected {expected}. Copy the file again."
            )
        return table
