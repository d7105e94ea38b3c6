"""What rounding the exchange, or rows of one update ago, cost in quality on MovieLens-100K.

    python benchmarks/quality/exchange.py [--seeds 3] [--set KEY=VALUE]

conf/movielens-100k.toml on two ranks, with one key of [sharding] changed a side; every table is
spread, so that all rows travel. Means over seeds of NDCG@10 on valid and test; the spread is what
seeds alone change. The last line is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from unified import common, run_stages, spread

from distrec.config import Config, load_config
from distrec.data import fetch
from distrec.evaluate import MODEL
from distrec.job import configure_logging
from distrec.variants import derived, link_dataset

ROOT = Path(__file__).parents[2]
METRIC = "ndcg@10"
EXACT = "fp32"
SIDES: dict[str, dict[str, Any]] = {
    EXACT: {},
    "fp16": {"sharding.exchange_precision": "fp16"},
    "bf16": {"sharding.exchange_precision": "bf16"},
    "rows ahead": {"sharding.prefetch_rows": True},
}


def measure(config: Config, side: str, seed: int) -> dict[str, float]:
    """METRIC by split."""
    changes = {
        **SIDES[side],
        "seed": seed,
        "sharding.replicate_below_mib": 0.0,
        "evaluate.baselines": [],
    }
    directory = config.directory / f"{side.replace(' ', '-')}-seed-{seed}"
    own = derived(config, directory, changes)
    link_dataset(config, own)
    run_stages(own, ["train", "evaluate"])
    splits = json.loads(own.metrics_path.read_text())["splits"]
    return {name: part["models"][MODEL]["metrics"][METRIC] for name, part in splits.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/quality/exchange"))
    parser.add_argument("--seeds", type=int, default=3, help="runs a side, with seeds from 1")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    given = parser.parse_args()
    configure_logging()
    common.print_header(["torch", "horovod"], "2 ranks of 1 thread")
    settings = [f"output={json.dumps(str(given.output))}", "launch.num_ranks=2", *given.settings]
    config = load_config(ROOT / "conf" / "movielens-100k.toml", settings)
    fetch("movielens-100k", Path("data") / "movielens-100k")
    run_stages(config, ["prepare"])
    figures: dict[str, dict[str, float]] = {}
    for side in SIDES:
        found = [measure(config, side, seed) for seed in range(1, given.seeds + 1)]
        figures[side] = {}
        for split in found[0]:
            values = [one[split] for one in found]
            figures[side] |= spread(f"{split} {METRIC}", values)
        print(f"{side:>12}", figures[side], flush=True)
    common.print_result("quality/exchange", {"seeds": given.seeds, **figures}, {})


if __name__ == "__main__":
    main()
