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
from sources import FINAL, NAMES, write_events

from distrec import pipeline
from distrec.checkpoint import load_model
from distrec.columns import TRAIN
from distrec.config import Config, load_config
from distrec.config.model import BIAS
from distrec.dataset import read_manifest
from distrec.evaluate import MODEL
from distrec.job import configure_logging

ROOT = Path(__file__).parents[2]
METRICS = ("hr@10", "ndcg@10")
_OTHER_WEIGHTS = ("new_item_bias", "recent_weight")
STAGES = ("prepare", "train", "evaluate")


def arguments(doc: str, default_output: str) -> argparse.Namespace:
    """Of every benchmark of quality."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    add_arguments(parser, default_output)
    parser.add_argument("--seeds", type=int, default=1, help="runs, with seeds from 1")
    return parser.parse_args()


def add_arguments(parser: argparse.ArgumentParser, default_output: str) -> None:
    """All but the number of seeds."""
    parser.add_argument("data", type=Path, help="folder with a folder for each data set")
    parser.add_argument("--output", type=Path, default=Path(default_output))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")


def run_stages(config: Config, stages: Sequence[str]) -> None:
    """Run stages, or end with their exit code."""
    code, _ = pipeline.run_stages(config, only=list(stages))
    if code:
        sys.exit(code)


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean of runs, under `name`, and how far they are apart."""
    return {
        name: round(statistics.mean(values), 4),
        f"{name} spread": round(max(values) - min(values), 4),
    }


def fitted_weights(path: Path) -> tuple[str, ...]:
    """Those of a checkpoint, as key=value of [model]."""
    model = load_model(path)
    pairs = zip((*model.tower_names, BIAS), model.tower_weights.tolist(), strict=True)
    inline = ", ".join(f"{tower} = {weight!r}" for tower, weight in pairs)
    others = (f"model.{name}={float(getattr(model, name))}" for name in _OTHER_WEIGHTS)
    return (f"model.tower_weights={{{inline}}}", *others)


def configured(
    name: str,
    source: str,
    config_name: str,
    given: argparse.Namespace,
    seed: int,
    output: Path,
    changes: Sequence[str],
) -> Config:
    """A shipped configuration for the events of a data set, which are written.

    Args:
        name: Of the run.
        source: Of the data set, as in `sources`.
        config_name: File in conf/.
        given: From `arguments`.
        seed: Of the run.
        output: Directory of the run.
        changes: key=value in place of the configuration's.
    """
    events = write_events(source, given.data, given.output / source / "raw")
    events["paths"] = [str(Path(path).resolve()) for path in events["paths"]]
    inline = ", ".join(f"{key} = {json.dumps(value)}" for key, value in events.items())
    settings = {
        "name": json.dumps(name),
        "seed": seed,
        "prepare.events": f"{{{inline}}}",
        "launch.num_ranks": given.ranks,
        "output": json.dumps(str(output)),
    }
    own = [f"{key}={value}" for key, value in settings.items()]
    return load_config(ROOT / "conf" / config_name, [*own, *changes])


def measure(
    name: str,
    config_name: str,
    given: argparse.Namespace,
    seed: int,
    chosen: Sequence[str],
    refits: bool,
    metrics: Sequence[str] = METRICS,
) -> dict[str, dict[str, float]]:
    """One run, which goes on where it was stopped.

    Args:
        name: Of the data set, as in `sources`.
        config_name: File in conf/.
        given: From `arguments`.
        seed: Of the run.
        chosen: key=value of this data set, in place of the configuration's.
        refits: Whether the model of test is trained anew on train and valid, for as many epochs as
            the best on valid had.
        metrics: What is measured.

    Returns:
        Metrics by split, "valid" and "test".
    """
    directory = given.output / name / f"seed-{seed}"

    def run(source: str, output: Path, *more: str) -> tuple[Config, dict[str, dict[str, float]]]:
        changes = [*chosen, *given.settings, *more]
        config = configured(name, source, config_name, given, seed, output, changes)
        started = time.monotonic()
        run_stages(config, STAGES)
        splits = json.loads(config.metrics_path.read_text())["splits"]
        found = {}
        for split, part in splits.items():
            model = part["models"][MODEL]
            values = model["metrics"] | (model["classification"] or {})
            found[split] = {metric: values[metric] for metric in metrics}
        for split, values in found.items():
            print(f"{output} {split:6}", {k: round(v, 4) for k, v in values.items()})
        print(f"{output} {time.monotonic() - started:.0f} s", flush=True)
        return config, found

    config, found = run(name, directory)
    if refits:
        best = json.loads((config.checkpoint_directory / "best.json").read_text())
        rows = read_manifest(config.dataset_directory).splits[TRAIN].num_rows
        epochs = round(best["global_step"] * config.train.global_batch_size / rows)
        # there is no valid then to weigh the towers by
        weights = fitted_weights(config.checkpoint_directory / best["checkpoint"])
        source = name + FINAL
        more = [f"train.max_epochs={epochs}", *weights]
        if source not in NAMES:
            source, more = name, [*more, "prepare.split.valid_share=0.0"]
        found["test"] = run(source, directory / "refit", *more)[1]["test"]
    return found


def report(
    benchmark: str,
    name: str,
    config_name: str,
    given: argparse.Namespace,
    bars: Mapping[str, Mapping[str, float]],
    chosen: Sequence[str] = (),
    refits: bool = False,
    metrics: Sequence[str] = METRICS,
) -> None:
    """Run every seed and print the means on test, their spread, and the last line."""
    configure_logging()
    common.print_header(["torch", "horovod", "pyspark"], f"{given.ranks} ranks of 1 thread")
    seeds = range(1, given.seeds + 1)
    runs = [measure(name, config_name, given, seed, chosen, refits, metrics) for seed in seeds]
    figures: dict[str, Any] = {"seeds": given.seeds}
    for metric in metrics:
        values = [run["test"][metric] for run in runs]
        figures |= spread(metric, values)
        figures[f"valid {metric}"] = round(statistics.mean(r["valid"][metric] for r in runs), 4)
    common.print_result(benchmark, figures, bars)
