"""EASE: a linear autoencoder in closed form, from one inverse of the items' Gram matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.linalg import lapack
from torch import Tensor

from distrec.baselines.profiles import products, profiles
from distrec.batch import QueryBatch
from distrec.columns import TRAIN
from distrec.dataset import DatasetManifest
from distrec.errors import ConfigError
from distrec.metrics.evaluation import rows_per_block
from distrec.metrics.item_neighbors import user_items

Matrix = npt.NDArray[np.float32]


class EASE:
    """The score of an item is the sum of its weights from the items that the user has had.

    The weights B minimise |X - X B|^2 + l2 |B|^2 with a diagonal of zeros, X the binary user-item
    matrix: with P the inverse of X'X + l2 I, B_ij = -P_ij / P_jj.

    It holds one (M, M) matrix of float32, inverted in place: 4 M^2 bytes and M^3 floating-point
    operations, 3.6 GB and 2.7e13 at 30,000 items. Single precision moves a weight by some 1e-5 (at
    l2 = 1 on MovieLens-1M), so that it decides only between items that are as good as tied.

    Args:
        matrix: float32 zeros and ones, (users, M).
        l2: Weight of the squared weights, above 0.
        use_history: As `profiles` has it.

    Raises:
        ConfigError: The Gram matrix has no inverse in single precision at this l2.

    Source: Steck 2019, arXiv:1905.03375, algorithm 1.
    """

    def __init__(self, matrix: sparse.csr_matrix, l2: float, use_history: bool = False) -> None:
        self.use_history = use_history
        self._weights = _weights(matrix, l2)

    @classmethod
    def fit(
        cls,
        directory: Path,
        manifest: DatasetManifest,
        l2: float,
        splits: Sequence[str] = (TRAIN,),
    ) -> EASE:
        """Learn from a dataset; see `fit.check_baselines` for its limits."""
        matrix = user_items(directory, manifest, splits)
        return cls(matrix, l2, use_history=manifest.has_labels)

    def __call__(self, queries: QueryBatch) -> Iterator[Tensor]:
        """float32, (B, M), in blocks of rows."""
        had = profiles(queries, len(self._weights), self.use_history)
        return products(had, self._weights)


def _weights(matrix: sparse.csr_matrix, l2: float) -> Matrix:
    num_items = matrix.shape[1]
    gram = np.empty((num_items, num_items), np.float32)
    by_item = matrix.T.tocsr()
    for rows in _blocks(num_items):
        gram[rows] = (by_item[rows] @ matrix).toarray()
    diagonal = np.einsum("ii->i", gram)
    diagonal += l2
    # LAPACK counts columns first: the transpose is the same matrix, and nothing is copied
    inverse, fault = lapack.spotrf(gram.T, lower=1, clean=0, overwrite_a=1)
    if not fault:
        inverse, fault = lapack.spotri(inverse, lower=1, overwrite_c=1)
    if fault:
        raise ConfigError(
            "the baseline ease inverts the items' Gram matrix in single precision. Received: "
            f"evaluate.ease_l2 = {l2}, with which it is singular. Raise it."
        )
    gram = inverse.T
    diagonal = np.einsum("ii->i", gram)
    # only the upper triangle, as we count, holds the inverse
    for rows in _blocks(num_items):
        gram[rows, : rows.start] = gram[: rows.start, rows].T
        square = gram[rows, rows]
        square[:] = np.triu(square) + np.triu(square, 1).T
    np.divide(gram, -diagonal.copy(), out=gram)
    diagonal[:] = 0.0
    return gram


def _blocks(num_items: int) -> Iterator[slice]:
    size = rows_per_block(num_items)
    for start in range(0, num_items, size):
        yield slice(start, min(start + size, num_items))
