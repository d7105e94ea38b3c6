"""The unified model beside each of its towers alone, on items that train saw and on new ones.

    python benchmarks/quality/towers.py [--config unified] [--seeds 3] [--ranks 2]

conf/unified.toml on MovieLens-100K, leave-one-out; with --config complete-journey that one, the
last weeks. The whole catalogue; the train events of 15 % of the items are taken out
(prepare.split.new_items_share), so that these stand on their features. The unified model is to be
no worse than the best tower alone and than every baseline, and on new items far above the
collaborative towers: in lists of the whole catalogue, of 10, where few of them are found by
anybody, and of 100, and in lists of new items alone. Means over seeds, on test; the last line is
one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from unified import common, run_stages

from distrec.baselines.fit import MAX_ITEMS
from distrec.config import Config, load_config
from distrec.data import fetch
from distrec.dataset import read_manifest
from distrec.evaluate import MODEL
from distrec.job import configure_logging
from distrec.variants import derived, link_dataset

ROOT = Path(__file__).parents[2]
METRIC = "ndcg@10"
NEW = {
    "new_items": ("new_items", METRIC),
    "new_items_hr@100": ("new_items", "hr@100"),
    "among_new_items": ("among_new_items", METRIC),
}
"""Figure -> slice and metric."""
UNIFIED = "all"
COLLABORATIVE = ("cf", "autoencoder", "sequence")


def measure(config: Config, name: str, towers: list[str], seed: int) -> dict[str, Any]:
    """What evaluate finds on valid and test of a model with some towers, by model.

    With all of them, the baselines are measured beside it.
    """
    changes: dict[str, Any] = {"model.towers": towers, "seed": seed}
    baselines = ["popularity", "item_knn", "markov"]
    if read_manifest(config.dataset_directory).num_items <= MAX_ITEMS["ease"]:
        baselines.append("ease")
    changes["evaluate.baselines"] = baselines if name == UNIFIED and seed == 1 else []
    own = derived(config, config.directory / f"{name}-seed-{seed}", changes)
    link_dataset(config, own)
    run_stages(own, ["train", "evaluate"])
    splits = json.loads(own.metrics_path.read_text())["splits"]
    return {split: part["models"] for split, part in splits.items()}


def summary(found: list[dict[str, Any]]) -> dict[str, float]:
    """Means over seeds of the model, and the spread of what seeds change on test."""

    def whole(split: str) -> list[float]:
        return [one[split][MODEL]["metrics"][METRIC] for one in found]

    test = whole("test")
    new = [new_figures(one["test"][MODEL]) for one in found]
    return {
        "valid": round(statistics.mean(whole("valid")), 4),
        "test": round(statistics.mean(test), 4),
        "spread": round(max(test) - min(test), 4),
        **{name: round(statistics.mean(one[name] for one in new), 4) for name in NEW},
    }


def new_figures(model: dict[str, Any]) -> dict[str, float]:
    """What a model finds of new items, as NEW has it."""
    slices = model["slices"]
    return {
        name: round(slices[group]["metrics"][metric], 4) for name, (group, metric) in NEW.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/quality/towers"))
    parser.add_argument("--config", choices=("unified", "complete-journey"), default="unified")
    parser.add_argument("--seeds", type=int, default=3, help="runs a model, with seeds from 1")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    given = parser.parse_args()
    configure_logging()
    common.print_header(["torch", "horovod", "pyspark"], f"{given.ranks} ranks of 1 thread")
    settings = {
        "output": json.dumps(str(given.output / given.config)),
        "launch.num_ranks": given.ranks,
        "prepare.split.new_items_share": 0.15,
        "evaluate.ks": "[10, 100]",
        # the model is told what was had in valid just before test
        "evaluate.fit_baselines_on_valid": "true",
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    config = load_config(ROOT / "conf" / f"{given.config}.toml", [*overrides, *given.settings])
    fetch(config.data, Path("data") / config.data)
    run_stages(config, ["prepare"])
    towers = list(config.model.towers)
    figures: dict[str, Any] = {"seeds": given.seeds}
    for name, chosen in {UNIFIED: towers, **{tower: [tower] for tower in towers}}.items():
        found = [measure(config, name, chosen, seed) for seed in range(1, given.seeds + 1)]
        figures[name] = summary(found)
        print(f"{name:>12}", figures[name], flush=True)
        for model, part in found[0]["test"].items():
            if model != MODEL:
                test = round(part["metrics"][METRIC], 4)
                figures[model] = {"test": test, **new_figures(part)}
                print(f"{model:>12}", figures[model], flush=True)
    rivals = [part["test"] for name, part in figures.items() if name not in (UNIFIED, "seeds")]
    figures["over the best other"] = round(figures[UNIFIED]["test"] / max(rivals), 3)
    best = {name: max(figures[tower][name] for tower in COLLABORATIVE) for name in NEW}
    over = {name: round(figures[UNIFIED][name] - best[name], 4) for name in NEW}
    figures["new items over collaborative"] = over["new_items"]
    figures["new items hr@100 over collaborative"] = over["new_items_hr@100"]
    ratio = figures[UNIFIED]["among_new_items"] / max(best["among_new_items"], 1e-4)
    figures["among new items over collaborative"] = round(ratio, 2)
    bars = {
        "over the best other": common.at_least(1.0),
        "new items over collaborative": common.at_least(0.01),
        "new items hr@100 over collaborative": common.at_least(0.05),
        "among new items over collaborative": common.at_least(2.0),
    }
    common.print_result(f"quality/towers {given.config}", figures, bars)


if __name__ == "__main__":
    main()
