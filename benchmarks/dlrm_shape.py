"""The DLRM of the benchmarks: shape, data, dense part. For both sides, so of torch and NumPy only.

Tables are those of MLPerf's DLRMv2 (Criteo 1TB), capped. Ids are Zipf-like, a fixed permutation of
popularity; labels come from a planted model, so that a loss can be told from noise.

Source: Naumov et al. 2019, "Deep learning recommendation model for personalization and
recommendation systems", arXiv:1906.00091.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

CRITEO_ROWS = (
    40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10, 2209,
    11938, 155, 4, 976, 14, 40000000, 40000000, 40000000, 590152, 12973, 108, 36,
)  # fmt: skip
NUM_TABLES = len(CRITEO_ROWS)
NUM_NUMBERS = 13
BOTTOM, TOP = (512, 256), (512, 512, 256, 1)
LEARNING_RATE, EPS, INIT_SCALE, SEED = 0.01, 1e-8, 0.05, 1
# plain SGD: Adagrad's first steps are of the size of the rate, and two trainings drift apart
DENSE_LEARNING_RATE = 0.1


@dataclass(frozen=True)
class Shape:
    """What is trained.

    Args:
        embedding_dim: D, of every table.
        max_rows: Cap of a table's rows.
        batch_size_per_rank: Rows a rank and step.
        alpha: p(rank r) falls like r ** -alpha.
        num_batches: Different batches of each rank, used in a circle.
    """

    embedding_dim: int
    max_rows: int = 1_000_000
    batch_size_per_rank: int = 2048
    alpha: float = 1.05
    num_batches: int = 16

    @property
    def table_rows(self) -> tuple[int, ...]:
        """Rows of each table; beside them stands row 0, padding, which no id is."""
        return tuple(min(rows, self.max_rows) for rows in CRITEO_ROWS)

    def to_json(self) -> dict[str, Any]:
        """For a rank's arguments."""
        return asdict(self)


def table_name(number: int) -> str:
    """Of a table, on both sides."""
    return f"c{number:02d}"


def write_data(folder: Path, shape: Shape, num_ranks: int) -> None:
    """Write the batches of every rank: ids (num_batches, 26, B), numbers, labels.

    The tables' permutations and the planted model are the same for all ranks.
    """
    fixed = np.random.default_rng(SEED)
    orders = [fixed.permutation(rows) + 1 for rows in shape.table_rows]
    effects = [fixed.normal(size=rows + 1).astype(np.float32) for rows in shape.table_rows]
    weights = fixed.normal(size=NUM_NUMBERS).astype(np.float32)
    shares = [_cumulated(rows, shape.alpha) for rows in shape.table_rows]
    size = (shape.num_batches, shape.batch_size_per_rank)
    for rank in range(num_ranks):
        random = np.random.default_rng((SEED, rank))
        ids = np.empty((shape.num_batches, NUM_TABLES, shape.batch_size_per_rank), np.int64)
        numbers = random.normal(size=(*size, NUM_NUMBERS)).astype(np.float32)
        logits = numbers @ weights
        for table in range(NUM_TABLES):
            ids[:, table] = orders[table][np.searchsorted(shares[table], random.random(size))]
            logits += effects[table][ids[:, table]]
        # of 13 + 26 terms of variance 1; twice as much is a model with an AUC near .80
        chance = 1 / (1 + np.exp(-1.6 * logits / np.sqrt(NUM_NUMBERS + NUM_TABLES)))
        labels = (random.random(size) < chance).astype(np.float32)
        for name, array in (("ids", ids), ("numbers", numbers), ("labels", labels)):
            np.save(folder / f"{name}-{rank}.npy", array)


def read_data(folder: Path, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (num_batches, 26, B), numbers (num_batches, B, 13), labels (num_batches, B)."""
    ids, numbers, labels = (
        torch.from_numpy(np.load(folder / f"{name}-{rank}.npy"))
        for name in ("ids", "numbers", "labels")
    )
    return ids, numbers, labels


def _cumulated(rows: int, alpha: float) -> NDArray[np.float64]:
    shares = np.cumsum(np.arange(1, rows + 1, dtype=np.float64) ** -alpha)
    return shares / shares[-1]


class Dense(nn.Module):
    """Everything but the tables: bottom MLP, products of all pairs, top MLP.

    Args:
        embedding_dim: D.
        pairs: Which pairs of the 27 vectors, in order; from `pair_index`.
    """

    def __init__(self, embedding_dim: int, pairs: Tensor) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.bottom = _layers(NUM_NUMBERS, (*BOTTOM, embedding_dim), last=True)
        self.top = _layers(embedding_dim + pairs.shape[1], TOP, last=False)
        self.register_buffer("pairs", pairs[0] * (NUM_TABLES + 1) + pairs[1])

    def forward(self, own: Tensor, rows: Tensor) -> Tensor:
        """Logits, (B,), of own, (B, D), as `bottom` makes it of numbers, and rows, (B, 26, D)."""
        vectors = torch.cat([own.unsqueeze(1), rows], dim=1)
        products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
        chosen = products.index_select(1, self.pairs)
        return self.top(torch.cat([own, chosen], dim=1)).squeeze(1)


def pair_index(tables: list[str]) -> Tensor:
    """Pairs of vectors for `Dense`, whatever order a side's tables come in: (2, 351).

    Args:
        tables: Names in that order; vector 0 is the bottom MLP's.
    """
    place = {name: 1 + number for number, name in enumerate(tables)}
    order = torch.tensor([0, *(place[table_name(number)] for number in range(NUM_TABLES))])
    return order[torch.tril_indices(NUM_TABLES + 1, NUM_TABLES + 1, offset=-1)]


def _layers(width: int, widths: tuple[int, ...], last: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number, following in enumerate(widths):
        layers.append(nn.Linear(width, following))
        if last or number < len(widths) - 1:
            layers.append(nn.ReLU())
        width = following
    return nn.Sequential(*layers)
