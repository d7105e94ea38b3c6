"""Whether a split has positives and negatives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distrec import columns as c
from distrec.dataset import DatasetManifest, Split
from distrec.errors import DataError
from distrec.reader import has_both_labels
from tests.synthetic import write_dataset


def with_weights(directory: Path, manifest: DatasetManifest, of_label: float) -> DatasetManifest:
    """The rows of train with this label count for nothing."""
    entries = []
    for entry in manifest.splits[c.TRAIN].files:
        path = directory / entry.path
        table = pq.read_table(path)
        weights = (table[c.LABEL].to_numpy() != of_label).astype(np.float32)
        place = table.schema.get_field_index(c.WEIGHT)
        table = table.set_column(place, table.schema.field(place), pa.array(weights))
        pq.write_table(table, path)
        entries.append(entry.model_copy(update={"num_bytes": path.stat().st_size}))
    split = Split(num_rows=manifest.splits[c.TRAIN].num_rows, files=tuple(entries))
    return manifest.model_copy(update={"splits": {**manifest.splits, c.TRAIN: split}})


def test_both_labels_are_needed_with_a_weight(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, labels=True)
    assert has_both_labels(tmp_path, manifest, c.TRAIN)
    # valid holds positives only
    assert not has_both_labels(tmp_path, manifest, c.VALID)
    for label in (0.0, 1.0):
        changed = with_weights(tmp_path, manifest, label)
        assert not has_both_labels(tmp_path, changed, c.TRAIN)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, labels=True)
    (tmp_path / manifest.splits[c.VALID].files[0].path).write_bytes(b"")
    with pytest.raises(DataError, match=r"size that the manifest gives. Received: .* 0 bytes"):
        has_both_labels(tmp_path, manifest, c.VALID)
