"""The encoded catalogue on disk, for every executor to map into memory.

``<output>/export/<checkpoint name>/`` holds ``item_matrix.npy``, float32 (M, vector_width): row j
is the item of index j + FIRST_INDEX; and the raw ids as Arrow lays out text: ``item_ids.utf8``, all
of them one after the other, and ``item_id_offsets.npy``, int64 (M + 1,). Nothing of it is ever in
memory as a whole, neither here nor where it is read.
"""

from __future__ import annotations

import logging
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from distrec import columns as c
from distrec.batch import ItemBatch
from distrec.dataset import MANIFEST, DatasetManifest
from distrec.errors import DataError
from distrec.files import commit, staging
from distrec.reader.decode import decode, to_items
from distrec.reader.files import open_split
from distrec.reader.layout import item_layout
from distrec.scoring.model import ScoringModel

logger = logging.getLogger("distrec.score")

FORMAT_VERSION = 1
ITEM_MATRIX = "item_matrix.npy"
ITEM_IDS = "item_ids.utf8"
ITEM_ID_OFFSETS = "item_id_offsets.npy"
_FILES = (ITEM_MATRIX, ITEM_IDS, ITEM_ID_OFFSETS)
_ITEMS_PER_BLOCK = 16_384
_SECONDS_BETWEEN_LINES = 10.0


class ExportManifest(BaseModel):
    """What an export was made of."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format_version: int = FORMAT_VERSION
    identity: str
    """Of this export alone: a worker that has an older one mapped must not go on with it."""
    created_at: str
    model_version: str
    dataset_hash: str
    num_items: int
    vector_width: int
    num_bytes: dict[str, int]


def export_items(
    model: ScoringModel,
    dataset_directory: Path,
    dataset: DatasetManifest,
    parent: Path,
) -> Path:
    """Encode the whole catalogue, or find it encoded.

    Args:
        model: Encodes.
        dataset_directory: Where `dataset` lies.
        dataset: Manifest.
        parent: Of all exports; those of checkpoints that are gone are removed.

    Returns:
        The export's directory.

    Raises:
        DataError: The items are not those of the manifest, or the disk is full.
    """
    target = parent / model.path.name
    _prune(parent, model.path.parent)
    num_items = dataset.num_items - c.FIRST_INDEX
    expected = (model.version, dataset.content_hash, num_items, model.model.vector_width)
    if _matches(target, expected):
        logger.info("items: %d, encoded before (%s)", num_items, target)
        return target
    started = time.monotonic()
    try:
        with staging(target) as root:
            _write(root, model, dataset_directory, dataset)
            manifest = ExportManifest(
                identity=uuid.uuid4().hex,
                created_at=datetime.now(UTC).isoformat(timespec="seconds"),
                model_version=model.version,
                dataset_hash=dataset.content_hash,
                num_items=num_items,
                vector_width=model.model.vector_width,
                num_bytes={name: (root / name).stat().st_size for name in _FILES},
            )
            (root / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
            commit(root, target)
    except OSError as error:
        raise DataError(
            f"the encoded catalogue must fit on the disk. Received: {target}: {error}. Free some "
            "space, or set output to a larger disk."
        ) from error
    logger.info("items: %d encoded in %.1f s", num_items, time.monotonic() - started)
    return target


def read_export_manifest(export: Path) -> ExportManifest:
    """The manifest of an export.

    Raises:
        DataError: There is none, or it is damaged.
    """
    path = export / MANIFEST
    try:
        return ExportManifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise DataError(
            f"an encoded catalogue has a {MANIFEST}. Received: {path}: {error}. Delete {export} "
            "and score again."
        ) from error


def open_item_matrix(export: Path) -> Tensor:
    """The item matrix, mapped read-only: float32, (M, vector_width)."""
    return map_tensor(export / ITEM_MATRIX)


def open_item_ids(export: Path) -> pa.LargeStringArray:
    """The raw ids, mapped read-only; row j belongs to row j of the item matrix."""
    offsets = np.load(export / ITEM_ID_OFFSETS, mmap_mode="r")
    path = export / ITEM_IDS
    # an empty file cannot be mapped
    text = pa.memory_map(str(path)).read_buffer() if path.stat().st_size else pa.py_buffer(b"")
    return pa.LargeStringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), text)


def map_tensor(path: Path) -> Tensor:
    """A .npy file as a tensor that must not be written to."""
    array = np.load(path, mmap_mode="r")
    with warnings.catch_warnings():
        # torch warns that the memory is read-only. A private writable map would be silent, but
        # counts against the memory of the machine
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _matches(target: Path, expected: tuple[str, str, int, int]) -> bool:
    try:
        manifest = read_export_manifest(target)
        sizes = {name: (target / name).stat().st_size for name in _FILES}
    except (OSError, DataError):
        return False
    found = (
        manifest.model_version,
        manifest.dataset_hash,
        manifest.num_items,
        manifest.vector_width,
    )
    known = manifest.format_version == FORMAT_VERSION
    return known and found == expected and sizes == manifest.num_bytes


def _prune(parent: Path, checkpoints: Path) -> None:
    for path in parent.iterdir() if parent.is_dir() else ():
        ours = path.is_dir() and not path.is_symlink() and path.name.startswith("step-")
        if ours and not (checkpoints / path.name).exists():
            shutil.rmtree(path, ignore_errors=True)


def _write(
    root: Path, model: ScoringModel, dataset_directory: Path, dataset: DatasetManifest
) -> None:
    num_items = dataset.num_items - c.FIRST_INDEX
    matrix = np.lib.format.open_memmap(
        root / ITEM_MATRIX, "w+", np.float32, (num_items, model.model.vector_width)
    )
    offsets = np.lib.format.open_memmap(root / ITEM_ID_OFFSETS, "w+", np.int64, (num_items + 1,))
    offsets[0] = 0
    start = 0
    said = time.monotonic()
    with (root / ITEM_IDS).open("wb") as stream:
        for ids, items in _item_blocks(dataset_directory, dataset):
            stop = start + len(ids)
            _check_indexes(items.item_index, start, num_items, dataset_directory)
            matrix[start:stop] = model.encode_items(items).numpy()
            text, ends = _text(ids)
            stream.write(text)
            offsets[start + 1 : stop + 1] = offsets[start] + ends
            start = stop
            if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                logger.info("items: %d of %d encoded", start, num_items)
    if start != num_items:
        raise _wrong_items(f"{start} items", num_items, dataset_directory)
    matrix.flush()
    offsets.flush()


def _item_blocks(directory: Path, dataset: DatasetManifest) -> Iterator[tuple[pa.Array, ItemBatch]]:
    layout = item_layout(dataset.features, dataset.recent_column(c.USERS))
    for file in open_split(directory, dataset, c.ITEMS, layout):
        with pq.ParquetFile(file.path) as parquet:
            names = [c.ITEM_ID, *layout.columns]
            for batch in parquet.iter_batches(batch_size=_ITEMS_PER_BLOCK, columns=names):
                rows = decode(pa.Table.from_batches([batch]), layout, str(file.path))
                yield batch.column(c.ITEM_ID), to_items([rows], dataset.features)


def _check_indexes(index: Tensor, start: int, num_items: int, directory: Path) -> None:
    first = start + c.FIRST_INDEX
    expected = torch.arange(first, first + len(index))
    if start + len(index) > num_items or not torch.equal(index, expected):
        received = f"{int(index.min())} to {int(index.max())} after {start} items"
        raise _wrong_items(received, num_items, directory)


def _wrong_items(received: str, num_items: int, directory: Path) -> DataError:
    return DataError(
        f"items are {c.FIRST_INDEX} to {num_items + c.FIRST_INDEX - 1}, ascending, without a gap. "
        f"Received: {received} ({directory / c.ITEMS}). Run prepare again."
    )


def _text(ids: pa.Array) -> tuple[bytes, NDArray[np.int64]]:
    """The bytes of all strings of an array, and where each ends, int64."""
    # concatenating one array copies it, so that its offsets start at zero
    whole = pa.concat_arrays([ids.cast(pa.large_string())])
    _, offsets, text = whole.buffers()
    ends = np.frombuffer(offsets, dtype=np.int64, count=len(whole) + 1, offset=8 * whole.offset)
    data = text.slice(int(ends[0]), int(ends[-1] - ends[0])).to_pybytes() if text else b""
    return data, ends[1:] - ends[0]
