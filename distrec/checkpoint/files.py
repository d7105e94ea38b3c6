"""Files of tensors on disk: written in one pass in bounded memory, read only when they fit.

The files are plain safetensors. They are written here and not by its library, which wants every
tensor whole and contiguous: a table is written from where it lies, piece by piece, while its
SHA-256 is taken by a second thread. Mapped files are checked by the library: the header against the
file there, and here what the tensors are, before one is touched.
"""

from __future__ import annotations

import json
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256 as new_sha256
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distrec import pulse
from distrec.checkpoint.manifest import FileEntry
from distrec.errors import CheckpointError

# safetensors' names of the types that checkpoints hold, in the order in which it lays them out
DTYPES = {"I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
# read, hashed and written at once: beyond it only memory grows
CHUNK_BYTES = 4 * 2**20
# that the hashing may be late by, so that neither thread waits for the other at every piece
_PIECES_BEHIND = 3
# the header is padded to this, so that tensors lie at even addresses when mapped
_ALIGNMENT = 8
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Source:
    """A tensor that is written piece by piece.

    Args:
        shape: Of the whole.
        dtype: Of the whole.
        pieces: Gives consecutive pieces, each of a few MiB at most, on any device.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterable[Tensor]]


def rows_per_chunk(row_bytes: int) -> int:
    """Rows that are held in memory at once."""
    return max(1, CHUNK_BYTES // max(row_bytes, 1))


def whole(parts: Sequence[Tensor]) -> Source:
    """All rows of some tensors one after the other, (n, ...) each; views are not copied whole."""
    first = parts[0]
    if first.dim() == 0:
        return Source((), first.dtype, lambda: iter(parts))
    shape = (sum(len(part) for part in parts), *first.shape[1:])
    step = rows_per_chunk(first.element_size() * (first[:1].numel() if len(first) else 1))

    def pieces() -> Iterator[Tensor]:
        for part in parts:
            for start in range(0, len(part), step):
                yield part[start : start + step]

    return Source(shape, first.dtype, pieces)


def write_tensors(path: Path, tensors: Mapping[str, Tensor | Source]) -> FileEntry:
    """Write tensors as safetensors, fsynced; never more than a few pieces are in memory.

    Raises:
        CheckpointError: The disk is full, or the directory cannot be written.
    """
    sources = {
        name: whole([tensor.detach()]) if isinstance(tensor, Tensor) else tensor
        for name, tensor in tensors.items()
    }
    order = list(DTYPES.values())
    names = sorted(sources, key=lambda name: (order.index(sources[name].dtype), name))
    digest = new_sha256()
    # the worker must be idle before the file is closed on an error
    with ThreadPoolExecutor(1) as hashing:
        try:
            with path.open("wb", buffering=0) as file:
                behind: deque[Future[None]] = deque()
                for data in _data(names, sources):
                    behind.append(hashing.submit(digest.update, data))
                    start = file.tell()
                    _write_all(file, data)
                    # has the system begin to write to the disk, for which fsync would wait later
                    os.posix_fadvise(file.fileno(), start, len(data), os.POSIX_FADV_DONTNEED)
                    if len(behind) > _PIECES_BEHIND:
                        behind.popleft().result()
                os.fsync(file.fileno())
                for hashed in behind:
                    hashed.result()
                num_bytes = file.tell()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error}") from error
    return FileEntry(path=path.name, num_bytes=num_bytes, sha256=digest.hexdigest())


def _data(names: Sequence[str], sources: Mapping[str, Source]) -> Iterator[memoryview]:
    """The bytes of the file, in order."""
    yield memoryview(_header(names, sources))
    for name in names:
        source, expected = sources[name], 1
        for length in source.shape:
            expected *= length
        for piece in source.pieces():
            pulse.beat()
            expected -= piece.numel()
            if piece.numel():
                assert piece.dtype == source.dtype, (name, piece.dtype)
                # of a row-wise view on the CPU this is no copy
                flat = piece.detach().cpu().contiguous().reshape(-1)
                yield flat.view(torch.uint8).numpy().data
        assert expected == 0, (name, source.shape, expected)


def _header(names: Sequence[str], sources: Mapping[str, Source]) -> bytes:
    labels = {dtype: label for label, dtype in DTYPES.items()}
    entries, offset = {}, 0
    for name in names:
        source = sources[name]
        size = source.dtype.itemsize
        for length in source.shape:
            size *= length
        entries[name] = {
            "dtype": labels[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return _LENGTH.pack(len(text)) + text


def _write_all(file: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


class StoredRows:
    """Rows of one tensor of a file, read from the file rather than mapped.

    Mapped pages count as memory of the process for as long as the system likes.

    Args:
        path: The file, which `check_tensors` has checked.
        name: Of the tensor.

    Attributes:
        shape: (rows, width) or (rows,).
        dtype: Of the tensor.
        bytes_read: So far.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self.bytes_read = 0
        with _reading(path), path.open("rb") as file:
            length = _LENGTH.unpack(file.read(_LENGTH.size))[0]
            entry = json.loads(file.read(length))[name]
        self._start = _LENGTH.size + length + int(entry["data_offsets"][0])
        self.shape = tuple(entry["shape"])
        self.dtype = DTYPES[entry["dtype"]]

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop)."""
        rows = torch.empty(stop - start, *self.shape[1:], dtype=self.dtype)
        self._read_into(start, rows)
        return rows

    def copy_into(self, start: int, target: Tensor) -> None:
        """Fill a tensor or view, (n, width), with the rows from `start` on.

        In one pass where it lies as in the file, else chunk by chunk.
        """
        if target.is_contiguous() and target.is_cpu and target.dtype == self.dtype:
            self._read_into(start, target)
            return
        step = rows_per_chunk(target.element_size() * max(target[:1].numel(), 1))
        for first in range(0, len(target), step):
            pulse.beat()
            part = target[first : first + step]
            part.copy_(self.read(start + first, start + first + len(part)))

    def _read_into(self, start: int, rows: Tensor) -> None:
        """Rows from `start` on into contiguous memory."""
        if not rows.numel():
            return
        row_bytes = rows[0].numel() * rows.element_size()
        left = rows.detach().reshape(-1).view(torch.uint8).numpy().data
        with _reading(self._path), self._path.open("rb", buffering=0) as file:
            file.seek(self._start + start * row_bytes)
            while left:
                pulse.beat()
                count = file.readinto(left[:CHUNK_BYTES])  # type: ignore[attr-defined]
                if not count:
                    raise OSError("the file ends too early")
                left = left[count:]
                self.bytes_read += count


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong while reading a file into one kind of error."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError, struct.error) as error:
        raise CheckpointError(
            f"{path} is damaged: {error}. Use another checkpoint, or copy this one again."
        ) from error


def check_tensors(
    path: Path, expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]] | None
) -> None:
    """Refuse a safetensors file that does not hold what it must; no tensor is read.

    Args:
        path: The file.
        expected: Name -> shape and type of everything that must be there, and nothing else; None
            takes what there is of the types in DTYPES.

    Raises:
        CheckpointError: The file is damaged, or does not hold what is expected.
    """
    with _reading(path), safe_open(str(path), framework="pt") as file:
        names = list(file.keys())
        if expected is not None and set(names) != set(expected):
            raise CheckpointError(
                f"{path} holds {sorted(expected)}. Received: {sorted(names)}. Use another "
                "checkpoint."
            )
        for name in names:
            part = file.get_slice(name)
            shape, kind = tuple(part.get_shape()), DTYPES.get(part.get_dtype())
            wanted = (shape, kind) if expected is None else expected[name]
            if kind is None or (shape, kind) != wanted:
                raise CheckpointError(
                    f"{name} of {path} has shape {wanted[0]} and type {wanted[1]}. Received: "
                    f"{shape}, {part.get_dtype()}. Use another checkpoint."
                )


def open_tensors(
    path: Path, expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]] | None
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, checked as by `check_tensors` and mapped into memory."""
    check_tensors(path, expected)
    with _reading(path), safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
