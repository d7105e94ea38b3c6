"""The baselines on public data, through distrec's own prepare and evaluate, beside known figures.

    python benchmarks/quality/baselines.py DATA_FOLDER [--output runs/quality] [--only toys] [--als]

DATA_FOLDER has a folder for each data set: toys/Toys_and_Games.txt and lastfm/LastFM.txt (the files
of S3-Rec) and ml-1m/ratings.dat.gz. Leave-one-out by time, the whole catalogue without what the
user has had, baselines learnt from train alone with the settings below.
The bars are what the same baselines reach in other programs, less two in the third decimal for
details that they do not state. It ends with one line of JSON.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
from sources import write_events

from distrec import evaluate, pipeline
from distrec.config import parse_config
from distrec.job import configure_logging

BASELINES = ("popularity", "item_knn", "markov", "ease")
# chosen on valid for Toys and LastFM; the one for MovieLens-1M is a guess
SETTINGS = {
    "toys": {"ease_l2": 50.0},
    "lastfm": {"ease_l2": 50.0},
    "ml-1m": {"ease_l2": 250.0},
}
TOLERANCE = 0.002
FLOORS = {"toys ease ndcg@10": 0.0443, "toys markov ndcg@10": 0.0551, "lastfm ease ndcg@10": 0.0487}
SHOWN = ("hr@10", "ndcg@10")


def measure(name: str, data: Path, output: Path, baselines: tuple[str, ...]) -> dict[str, Any]:
    """Prepare one data set unless that is done, measure the baselines on valid and test."""
    directory = output / name
    config = parse_config(
        {
            "name": name,
            "output": str(directory),
            "prepare": {"events": write_events(name, data, directory / "raw")},
            "evaluate": {"ks": [10], "baselines": list(baselines), **SETTINGS[name]},
        },
        "the benchmark",
    )
    code, _ = pipeline.run_stages(config, only=["prepare"])
    if code:
        sys.exit(code)
    return evaluate.measure_baselines(config)


def main() -> None:
    """Measure and print."""
    parser = common.parser(__doc__, 1, "only LastFM")
    parser.add_argument("data", type=Path, help="folder with toys, lastfm and ml-1m")
    parser.add_argument("--output", type=Path, default=Path("runs/quality"))
    parser.add_argument("--only", choices=SETTINGS, action="append", help="one data set")
    parser.add_argument("--als", action="store_true", help="Spark's ALS, too: some minutes more")
    arguments = parser.parse_args()
    configure_logging()
    common.print_header(["numpy", "scipy", "torch", "pyspark"], "all threads")
    figures: dict[str, Any] = {}
    baselines = (*BASELINES, "als") if arguments.als else BASELINES
    names = ["lastfm"] if arguments.quick else arguments.only or SETTINGS
    for name in names:
        started = time.perf_counter()
        splits = measure(name, arguments.data, arguments.output, baselines)
        for split in ("valid", "test"):
            for model, part in splits[split]["models"].items():
                values = [round(part["metrics"][metric], 4) for metric in SHOWN]
                print(f"{name:8} {split:6} {model:11}", *values, flush=True)
                if split == "test":
                    for metric, value in zip(SHOWN, values, strict=True):
                        figures[f"{name} {model} {metric}"] = value
        print(f"{name:8} {time.perf_counter() - started:.0f} s", flush=True)
    bars = {
        key: common.at_least(round(floor - TOLERANCE, 4))
        for key, floor in FLOORS.items()
        if key in figures
    }
    common.print_result("quality/baselines", figures, bars)


if __name__ == "__main__":
    main()
