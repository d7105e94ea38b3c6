"""The unified model on one data set: prepared, trained by a shipped configuration and measured."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
from sources import write_events

from distrec import pipeline
from distrec.config import load_config
from distrec.evaluate import MODEL
from distrec.job import configure_logging

ROOT = Path(__file__).parents[2]
METRICS = ("hr@10", "ndcg@10")
STAGES = ("prepare", "train", "evaluate")


def arguments(doc: str, default_output: str) -> argparse.Namespace:
    """Of every benchmark of quality."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder with a folder for each data set")
    parser.add_argument("--output", type=Path, default=Path(default_output))
    parser.add_argument("--seeds", type=int, default=1, help="runs, with seeds from 1")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    return parser.parse_args()


def measure(
    name: str, config_name: str, given: argparse.Namespace, seed: int, chosen: Sequence[str]
) -> dict[str, dict[str, float]]:
    """One run, which goes on where it was stopped.

    Args:
        name: Of the data set, as in `sources`.
        config_name: File in conf/.
        given: From `arguments`.
        seed: Of the run.
        chosen: key=value of this data set, in place of the configuration's.

    Returns:
        METRICS by split: "valid" and "test".
    """
    directory = given.output / name / f"seed-{seed}"
    events = write_events(name, given.data, given.output / name / "raw")
    events["paths"] = [str(Path(path).resolve()) for path in events["paths"]]
    inline = ", ".join(f"{key} = {json.dumps(value)}" for key, value in events.items())
    settings = {
        "name": json.dumps(name),
        "output": json.dumps(str(directory)),
        "seed": seed,
        "prepare.events": f"{{{inline}}}",
        "launch.num_ranks": given.ranks,
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    overrides += [*chosen, *given.settings]
    config = load_config(ROOT / "conf" / config_name, overrides)
    started = time.monotonic()
    code, _ = pipeline.run_stages(config, only=list(STAGES))
    if code:
        sys.exit(code)
    seconds = time.monotonic() - started
    splits = json.loads(config.metrics_path.read_text())["splits"]
    found = {
        split: {metric: part["models"][MODEL]["metrics"][metric] for metric in METRICS}
        for split, part in splits.items()
    }
    for split, values in found.items():
        print(f"{name} seed {seed} {split:6}", {k: round(v, 4) for k, v in values.items()})
    print(f"{name} seed {seed} {seconds:.0f} s", flush=True)
    return found


def report(
    benchmark: str,
    name: str,
    config_name: str,
    given: argparse.Namespace,
    bars: Mapping[str, Mapping[str, float]],
    chosen: Sequence[str] = (),
) -> None:
    """Run every seed and print the means on test, their spread, and the last line."""
    configure_logging()
    common.print_header(["torch", "horovod", "pyspark"], f"{given.ranks} ranks of 1 thread")
    runs = [measure(name, config_name, given, seed, chosen) for seed in range(1, given.seeds + 1)]
    figures: dict[str, Any] = {"seeds": given.seeds}
    for metric in METRICS:
        values = [run["test"][metric] for run in runs]
        figures[metric] = round(statistics.mean(values), 4)
        figures[f"{metric} spread"] = round(max(values) - min(values), 4)
        figures[f"valid {metric}"] = round(statistics.mean(r["valid"][metric] for r in runs), 4)
    common.print_result(benchmark, figures, bars)
