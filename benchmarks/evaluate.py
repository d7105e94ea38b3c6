"""Users a second of RankingMetrics beside torchmetrics' retrieval metrics, on the same scores.

    python benchmarks/evaluate.py [--users 512] [--items 2000] [--k 10] [--rounds 3] [--quick]

Both compute hit rate, recall, precision, NDCG, MRR and MAP at K, on one thread, in turns in one
process; the fastest round of each counts. torchmetrics takes one row a (user, item) pair and does
not mask seen items, so nothing is masked. It ends with one line of JSON.
"""

from __future__ import annotations

import common
import torch
import torchmetrics
from torchmetrics import retrieval

from distrec.batch import Batch, Jagged, QueryBatch
from distrec.columns import FIRST_INDEX
from distrec.metrics.ranking import RankingMetrics

PEERS = {
    "hr": retrieval.RetrievalHitRate,
    "recall": retrieval.RetrievalRecall,
    "precision": retrieval.RetrievalPrecision,
    "ndcg": retrieval.RetrievalNormalizedDCG,
    "mrr": retrieval.RetrievalMRR,
}


def make_queries(targets: torch.Tensor) -> QueryBatch:
    """Queries with the given target items, (B, T), and nothing else."""
    size, num_targets = targets.shape
    zeros = torch.zeros(size, dtype=torch.int64)
    none = Jagged.from_lengths(zeros[:0], zeros)
    batch = Batch(
        user_index=zeros,
        item_index=zeros,
        time=zeros,
        labels=torch.zeros(size, 1),
        weights=torch.ones(size),
        num_events=zeros,
        history=none,
        history_times=none,
        ids={},
        dense=torch.zeros(size, 0),
    )
    lengths = torch.full((size,), num_targets)
    return QueryBatch(batch, none, Jagged.from_lengths(targets.flatten(), lengths))


def measure_ours(scores: torch.Tensor, targets: torch.Tensor, k: int) -> dict[str, float]:
    """The accuracy metrics by distrec."""
    counts = torch.zeros(scores.shape[1], dtype=torch.int64)
    metrics = RankingMetrics([k], scores.shape[1] + FIRST_INDEX, counts, beyond_accuracy=False)
    metrics.update(scores, make_queries(targets))
    return metrics.compute()


def measure_peer(scores: torch.Tensor, targets: torch.Tensor, k: int) -> dict[str, float]:
    """The same by torchmetrics; MAP too, whose convention differs and which is not compared."""
    wanted = torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, targets - FIRST_INDEX, True)
    indexes = torch.arange(len(scores)).repeat_interleave(scores.shape[1])
    values = {}
    for name, metric_class in {**PEERS, "map": retrieval.RetrievalMAP}.items():
        metric = metric_class(top_k=k)
        metric.update(scores.flatten(), wanted.flatten(), indexes=indexes)
        values[f"{name}@{k}"] = float(metric.compute())
    return values


def main() -> None:
    """Measure and print."""
    parser = common.parser(__doc__, 3, "128 users, one round")
    parser.add_argument("--users", type=int, default=512)
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--targets", type=int, default=3)
    parser.add_argument("--k", type=int, default=10)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.users, arguments.rounds = 128, 1
    common.print_header(("torch", "torchmetrics"))
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(arguments.users, arguments.items, generator=generator)
    order = torch.rand(arguments.users, arguments.items, generator=generator).argsort(dim=1)
    targets = order[:, : arguments.targets] + FIRST_INDEX
    ours = measure_ours(scores, targets, arguments.k)
    peer = measure_peer(scores, targets, arguments.k)
    for name in PEERS:
        key = f"{name}@{arguments.k}"
        difference = abs(ours[key] - peer[key])
        if difference > 1e-5:
            raise SystemExit(f"{key} differs: distrec {ours[key]}, torchmetrics {peer[key]}")
    sides = {
        "distrec": lambda: common.seconds(lambda: measure_ours(scores, targets, arguments.k)),
        "torchmetrics": lambda: common.seconds(lambda: measure_peer(scores, targets, arguments.k)),
    }
    times = common.alternate(sides, arguments.rounds)
    rates = {name: arguments.users / min(values) for name, values in times.items()}
    ratio = rates["distrec"] / rates["torchmetrics"]
    for name, rate in rates.items():
        print(f"{name:>14} {rate:12,.0f} users/s")
    print(f"{'ratio':>14} {ratio:12.1f}")
    figures = {
        "peer": f"torchmetrics {torchmetrics.__version__}",
        "ratio": round(ratio, 2),
        "users_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "users": arguments.users,
        "items": arguments.items,
        "k": arguments.k,
    }
    common.print_result("evaluate", figures, {})


if __name__ == "__main__":
    main()
