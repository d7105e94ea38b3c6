"""What differential privacy costs in quality on MovieLens-100K: 943 people.

    python benchmarks/quality/privacy.py [--seeds 1] [--set KEY=VALUE]

The tower cf alone, of conf/movielens-100k.toml, without noise and with noise for epsilon 8, 3 and
1 at delta 1e-5, whole users protected; below them popularity, which is exact. Means over seeds of
NDCG@10 on the whole catalogue; noise never follows from a seed, so two runs with one seed differ.
The last line is one line of JSON.
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
FLOOR = "popularity"
CF: dict[str, Any] = {
    "model.towers": ["cf"],
    "model.id_dropout": 0.0,
    "loss.kind": "softmax",
    "evaluate.baselines": [FLOOR],
    "train.warmup_steps": 0,
}
# by hand, after some runs at epsilon 8 on valid
PRIVATE: dict[str, Any] = {
    "model.embedding_dim": 16,
    "train.max_epochs": 20,
    "train.early_stopping_patience": 0,
    "train.evaluate_every_steps": 1_000_000,
}
PRIVACY = {"sample_rate": 0.2, "clip_norm": 0.1}
SIDES: dict[str, dict[str, Any]] = {
    "without": {},
    "epsilon 8": {**PRIVATE, "privacy": {**PRIVACY, "target_epsilon": 8.0}},
    "epsilon 3": {**PRIVATE, "privacy": {**PRIVACY, "target_epsilon": 3.0}},
    "epsilon 1": {**PRIVATE, "privacy": {**PRIVACY, "target_epsilon": 1.0}},
}


def measure(config: Config, side: str, seed: int) -> dict[str, dict[str, float]]:
    """METRIC by split, of the side and of the floor; and what was spent."""
    directory = config.directory / f"{side.replace(' ', '-')}-seed-{seed}"
    own = derived(config, directory, {**CF, **SIDES[side], "seed": seed})
    link_dataset(config, own)
    run_stages(own, ["train", "evaluate"])
    document = json.loads(own.metrics_path.read_text())
    found = {
        name: {
            split: part["models"][name]["metrics"][METRIC]
            for split, part in document["splits"].items()
        }
        for name in (MODEL, FLOOR)
    }
    if "privacy" in document:
        found["spent"] = {"epsilon": document["privacy"]["epsilon"]}
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/quality/privacy"))
    parser.add_argument("--seeds", type=int, default=1, help="runs a side, with seeds from 1")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    given = parser.parse_args()
    configure_logging()
    common.print_header(["torch", "opacus"])
    settings = [f"output={json.dumps(str(given.output))}", "launch.num_ranks=1", *given.settings]
    config = load_config(ROOT / "conf" / "movielens-100k.toml", settings)
    fetch("movielens-100k", Path("data") / "movielens-100k")
    run_stages(config, ["prepare"])
    figures: dict[str, Any] = {"seeds": given.seeds}
    for side in SIDES:
        found = [measure(config, side, seed) for seed in range(1, given.seeds + 1)]
        own: dict[str, float] = {}
        for split in found[0][MODEL]:
            values = [one[MODEL][split] for one in found]
            own |= spread(f"{split} {METRIC}", values)
        if "spent" in found[0]:
            own["spent"] = round(found[0]["spent"]["epsilon"], 3)
        figures[side] = own
        figures[FLOOR] = {
            f"{split} {METRIC}": round(value, 4) for split, value in found[0][FLOOR].items()
        }
        print(f"{side:>12}", own, flush=True)
    common.print_result("quality/privacy", figures, {})


if __name__ == "__main__":
    main()
