"""MovieLens-1M as clicks: the unified model beside a factorisation machine, in the same run.

    python benchmarks/quality/ml1m_clicks.py DATA_FOLDER [--seeds 3]

DATA_FOLDER has ml-1m/ratings.dat.gz, movies.dat and users.dat. A rating above 3 is a click, one
below is none, 3 is left out; a tenth is valid and a tenth test. The configuration is
conf/clicks.toml. The factorisation machine has the same columns (user, item, their features),
D = 16 and Adam; its weight decay and its epochs are chosen on valid, as the model's epochs are.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from sources import CLICKS, catalogue
from torch import Tensor, nn
from unified import arguments, common, configure_logging, measure, spread

from distrec import columns as c
from distrec.dataset import read_manifest
from distrec.metrics.classification import auc

D, BATCH_SIZE, LEARNING_RATE, PATIENCE = 16, 2048, 1e-3, 2
WEIGHT_DECAYS = (0.0, 1e-6, 1e-5)
BARS = {"auc over the machine's": common.at_least(0.0001)}


class FactorizationMachine(nn.Module):
    """Source: Rendle 2010, "Factorization Machines"."""

    def __init__(self, num_values: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))
        self.linear = nn.Embedding(num_values, 1)
        self.factors = nn.Embedding(num_values, D)
        nn.init.zeros_(self.linear.weight)
        nn.init.normal_(self.factors.weight, std=0.01)

    def forward(self, values: Tensor, shares: Tensor) -> Tensor:
        """values (B, F) and their shares (B, F), 0 for padding, to logits (B,)."""
        factors = self.factors(values) * shares.unsqueeze(2)
        pairs = factors.sum(1).square().sum(1) - factors.square().sum((1, 2))
        linear = (self.linear(values).squeeze(2) * shares).sum(1)
        return self.bias + linear + 0.5 * pairs


def read(dataset: Path) -> tuple[dict[str, tuple[Tensor, Tensor, Tensor]], int]:
    """Values, shares and labels by split, and how many values there are.

    Each column has a range of values of its own; of one with several each counts in part.
    """
    manifest = read_manifest(dataset)
    items = pq.read_table(dataset / "items").sort_by(c.ITEM_INDEX)
    of_items = [one.column for one in manifest.features if one.column in items.column_names]
    places = np.full(manifest.num_items, -1)
    places[items[c.ITEM_INDEX].to_numpy()] = np.arange(len(items))
    found, columns, sizes = {}, {}, []
    for split in ("train", "valid", "test"):
        table = pq.read_table(dataset / split)
        own = [one.column for one in manifest.features if one.column in table.column_names]
        rows = items.take(places[table[c.ITEM_INDEX].to_numpy()])
        lists = [table[c.USER_INDEX].to_pylist(), table[c.ITEM_INDEX].to_pylist()]
        lists += [table[name].to_pylist() for name in own]
        lists += [rows[name].to_pylist() for name in of_items]
        columns[split] = lists
        found[split] = torch.from_numpy(table[c.LABEL].to_numpy().astype(np.float32))
    starts = [0]
    for number in range(len(columns["train"])):
        several = itertools.chain.from_iterable(lists[number] for lists in columns.values())
        sizes.append(1 + max(max(_values(value), default=0) for value in several))
        starts.append(starts[-1] + sizes[-1])
    data = {split: (*_encode(lists, starts), found[split]) for split, lists in columns.items()}
    return data, starts[-1]


def _values(value: int | list[int]) -> list[int]:
    return value if isinstance(value, list) else [value]


def _encode(lists: list[list[int | list[int]]], starts: list[int]) -> tuple[Tensor, Tensor]:
    parts = []
    for column, start in zip(lists, starts, strict=False):
        width = max(len(_values(value)) for value in column)
        values = np.zeros((len(column), width), np.int64)
        shares = np.zeros((len(column), width), np.float32)
        for row, value in enumerate(column):
            several = _values(value)
            values[row, : len(several)] = several
            shares[row, : len(several)] = 1 / max(len(several), 1)
        parts.append((values + start, shares))
    values, shares = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
    return torch.from_numpy(values), torch.from_numpy(shares)


def machine_auc(dataset: Path, seed: int) -> dict[str, float]:
    """Train with each weight decay; the AUC on valid and test of what is best on valid."""
    data, num_values = read(dataset)
    best = {"valid": 0.0, "test": 0.0}
    for weight_decay in WEIGHT_DECAYS:
        torch.manual_seed(seed)
        model = FactorizationMachine(num_values)
        optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, weight_decay=weight_decay)
        own, weights, since = 0.0, copy.deepcopy(model.state_dict()), 0
        while since <= PATIENCE:
            values, shares, labels = data["train"]
            for rows in torch.randperm(len(labels)).split(BATCH_SIZE):
                optimizer.zero_grad()
                logits = model(values[rows], shares[rows])
                nn.functional.binary_cross_entropy_with_logits(logits, labels[rows]).backward()
                optimizer.step()
            valid = _auc(model, data["valid"])
            since += 1
            if valid > own:
                own, weights, since = valid, copy.deepcopy(model.state_dict()), 0
        print(f"machine, weight decay {weight_decay}: AUC on valid {own:.4f}", flush=True)
        if own > best["valid"]:
            model.load_state_dict(weights)
            best = {"valid": own, "test": _auc(model, data["test"])}
    return best


@torch.no_grad()
def _auc(model: FactorizationMachine, data: tuple[Tensor, Tensor, Tensor]) -> float:
    values, shares, labels = data
    scores = torch.cat(
        [model(*part) for part in zip(values.split(2**16), shares.split(2**16), strict=True)]
    )
    found = auc(scores.double(), labels.double(), torch.ones(len(labels), dtype=torch.float64))
    assert found is not None
    return found


def main() -> None:
    """Measure and print."""
    given = arguments(__doc__, "runs/quality")
    configure_logging()
    common.print_header(["torch", "horovod", "pyspark"], f"{given.ranks} ranks of 1 thread")
    chosen = ('prepare.split.method="given"', *catalogue(given.data))
    model, machine = [], []
    for seed in range(1, given.seeds + 1):
        found = measure(CLICKS, "clicks.toml", given, seed, chosen, False, ("auc",))
        model.append(found["test"]["auc"])
        rival = machine_auc(given.output / CLICKS / f"seed-{seed}" / "dataset", seed)
        machine.append(rival["test"])
        print(f"seed {seed}: model {model[-1]:.4f}, machine {machine[-1]:.4f}", flush=True)
    figures = {
        "seeds": given.seeds,
        **spread("auc", model),
        "auc of the machine": round(statistics.mean(machine), 4),
        "auc over the machine's": round(statistics.mean(model) - statistics.mean(machine), 4),
    }
    common.print_result("quality/ml1m_clicks", figures, BARS)


if __name__ == "__main__":
    main()
