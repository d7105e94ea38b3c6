"""Users a second of the blocked top-K of batch scoring beside NumPy, one user after the other.

    python benchmarks/scoring.py [--users 2048] [--items 100000] [--width 193] [--k 20] [--quick]

Both find the k best unseen items of the same users by inner product, on one thread, in turns in one
process; the fastest round of each counts. The peer is what a row-by-row UDF does at its best: one
matrix-vector product, argpartition, a sort of k. It ends with one line of JSON.
"""

from __future__ import annotations

import functools

import common
import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from distrec.batch import Jagged
from distrec.columns import FIRST_INDEX
from distrec.scoring.top_k import blocked_top_k

Vectors = NDArray[np.float32]
SEEN_PER_USER = 50
# the defaults of [score]
USER_BLOCK, ITEM_BLOCK = 1024, 65_536


def ours(users: Vectors, items: Vectors, seen: NDArray[np.int64], k: int) -> Vectors:
    """Scores of the k best by distrec, block by block: (B, k)."""
    matrix = torch.from_numpy(items)
    found = []
    for start in range(0, len(users), USER_BLOCK):
        own = torch.from_numpy(seen[start : start + USER_BLOCK])
        bags = Jagged.from_lengths(own.flatten(), torch.full((len(own),), own.shape[1]))
        block = torch.from_numpy(users[start : start + USER_BLOCK])
        found.append(blocked_top_k(block, matrix, k, ITEM_BLOCK, bags, None).scores.numpy())
    return np.concatenate(found)


def peer(users: Vectors, items: Vectors, seen: NDArray[np.int64], k: int) -> Vectors:
    """Scores of the k best by NumPy, user by user: (B, k)."""
    found = np.empty((len(users), k), dtype=np.float32)
    for row, user in enumerate(users):
        scores = items @ user
        scores[seen[row] - FIRST_INDEX] = -np.inf
        best = np.argpartition(scores, -k)[-k:]
        found[row] = np.sort(scores[best])[::-1]
    return found


def main() -> None:
    """Measure and print."""
    parser = common.parser(__doc__, 3, "256 users, 20,000 items, one round")
    parser.add_argument("--users", type=int, default=2048)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=193, help="three towers of 64 and the bias")
    parser.add_argument("--k", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.users, arguments.items, arguments.rounds = 256, 20_000, 1
    common.print_header(("torch", "numpy"))
    rng = np.random.default_rng(0)
    users = rng.standard_normal((arguments.users, arguments.width), dtype=np.float32)
    items = rng.standard_normal((arguments.items, arguments.width), dtype=np.float32)
    seen = rng.integers(0, arguments.items, (arguments.users, SEEN_PER_USER)) + FIRST_INDEX
    torch.set_num_threads(1)
    sides = {
        name: functools.partial(
            common.seconds, functools.partial(run, users, items, seen, arguments.k)
        )
        for name, run in (("distrec", ours), ("numpy", peer))
    }
    with threadpool_limits(1):
        few = slice(0, 64)
        np.testing.assert_allclose(
            ours(users[few], items, seen[few], arguments.k),
            peer(users[few], items, seen[few], arguments.k),
            rtol=1e-4,
        )
        times = common.alternate(sides, arguments.rounds)
    fastest = {name: arguments.users / min(took) for name, took in times.items()}
    for name, rate in fastest.items():
        print(f"{name:8} {rate:9.0f} users/s")
    figures = {
        "peer": "numpy, one user after the other",
        "users": arguments.users,
        "items": arguments.items,
        "width": arguments.width,
        "k": arguments.k,
        "users_per_second": round(fastest["distrec"], 1),
        "peer_users_per_second": round(fastest["numpy"], 1),
        "ratio": round(fastest["distrec"] / fastest["numpy"], 2),
    }
    common.print_result("scoring", figures, {})


if __name__ == "__main__":
    main()
