"""What labels a split has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from distrec import columns as c
from distrec.dataset import DatasetManifest
from distrec.reader.files import open_split
from distrec.reader.layout import Layout


def has_both_labels(
    directory: str | Path, manifest: DatasetManifest, split: str, column: str = c.LABEL
) -> bool:
    """Whether a split has positives and negatives with a weight; reads until it has seen both.

    Args:
        directory: Of the dataset.
        manifest: Of the dataset.
        split: Which.
        column: Of the labels; those not known, NaN, are neither.

    Raises:
        DataError: The files are not those of the manifest.
    """
    layout = Layout(integers=(), floats=(column, c.WEIGHT), lists=(), dense=())
    positive = negative = False
    for file in open_split(directory, manifest, split, layout):
        with pq.ParquetFile(file.path) as source:
            for row_group in range(len(file.row_groups)):
                table = source.read_row_group(row_group, columns=list(layout.columns))
                label, weight = (table[name].to_numpy() for name in layout.floats)
                positive = positive or bool(np.any(weight * label > 0))
                negative = negative or bool(np.any(weight * (1 - label) > 0))
                if positive and negative:
                    return True
    return False
