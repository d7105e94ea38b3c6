"""First values of rows that a warm start finds new: what their features predict, beside noise.

    python benchmarks/quality/new_rows.py DATA_FOLDER [--seeds 3] [--every 2]

MovieLens-1M with conf/unified.toml. The first dataset lacks 15 % of the items; a model is trained
on it. The second one extends it by these, of whose events in train it has a fifth, as of items that
came lately. Each side takes over the same checkpoint. How high the target stands for users whose
target is a new item, and for all, on valid and test together, right after the warm start and after
one more epoch. Means over seeds; the last line is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

import torch
from sources import movielens_events, write_catalogue
from torch import Tensor
from unified import common, run_stages

from distrec import checkpoint, columns
from distrec.batch import QueryBatch
from distrec.config import Config, load_config
from distrec.dataset import read_manifest
from distrec.files import replace_text
from distrec.job import configure_logging
from distrec.metrics.evaluation import ModelScorer, encode_catalogue, inference
from distrec.reader import read_queries
from distrec.sharding.collectives import OneProcess
from distrec.trainer import setup, train, warm_start
from distrec.trainer.start import load
from distrec.variants import derived, link_dataset

ROOT = Path(__file__).parents[2]
BATCH_SIZE = 256
NEW_SHARE, KEPT_EVENTS = 0.15, 0.2
# leave-one-out: of these valid and test are made
LAST_EVENTS = 2
SIDES = ("noise", "features")


def write_raw(given: argparse.Namespace, directory: Path, seed: int, first: bool) -> None:
    """Write the events and the catalogue of the first or of the second dataset."""
    draw = random.Random(seed)
    events = movielens_events(given.data / "ml-1m" / "ratings.dat.gz")
    items = sorted({item for rows in events.values() for item, _ in rows})
    new = set(draw.sample(items, round(NEW_SHARE * len(items))))
    lines = ["user_id\titem_id\ttimestamp"]
    for user, rows in events.items():
        if int(user) % given.every:
            continue
        for place, (item, time) in enumerate(rows):
            is_kept = place >= len(rows) - LAST_EVENTS or draw.random() < KEPT_EVENTS
            if item not in new or (is_kept and not first):
                lines.append(f"{user}\t{item}\t{time}")
    directory.mkdir(parents=True, exist_ok=True)
    replace_text(directory / "events.tsv", "\n".join(lines) + "\n")
    write_catalogue(given.data, directory, leave=new if first else ())


def prepared(given: argparse.Namespace, seed: int, first: Config | None) -> Config:
    """The first dataset, or with `first` the one that extends it."""
    directory = given.output / f"seed-{seed}" / ("second" if first else "first")
    raw = (directory / "raw").resolve()
    write_raw(given, raw, seed, first is None)
    settings: dict[str, Any] = {
        "seed": seed,
        "output": str(directory),
        "launch.num_ranks": 1,
        "evaluate.baselines": [],
        "train.max_epochs": given.epochs,
    }
    for name in ("items", "users"):
        settings[f"prepare.{name}.paths"] = [str(raw / f"{name}.tsv")]
    if first is not None:
        settings["prepare.extend"] = str(first.dataset_directory)
    own = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    paths = json.dumps([str(raw / "events.tsv")])
    own.append(f'prepare.events={{paths = {paths}, separator = "\\t", time = "timestamp"}}')
    config = load_config(ROOT / "conf" / "unified.toml", [*own, *given.settings])
    run_stages(config, ["prepare"])
    return config


def measure(config: Config, path: Path | None, num_old: int) -> dict[str, float]:
    """What `summary` says of all users and of those with a new target.

    Args:
        config: Of a run with a warm start.
        path: Of a checkpoint of this run; None: the warm start itself.
        num_old: Items at and above this index are new.
    """
    collectives = OneProcess(torch.device("cpu"))
    inputs = setup.read_inputs(config, 1)
    run = setup.build(inputs, collectives, None)
    if path is None:
        older = warm_start.find_warm_start(inputs, collectives)
        assert older is not None
        warm_start.load_warm_start(run, older)
    else:
        load(run, path)
    found = []
    with inference(run.model):
        vectors = encode_catalogue(
            run.model, run.tables, inputs.items, config.score.item_block, collectives.device
        )
        scorer = ModelScorer(run.model, run.tables, vectors)
        for split in (columns.VALID_QUERIES, columns.TEST_QUERIES):
            for queries in read_queries(
                config.dataset_directory, inputs.manifest, split, collectives.world, BATCH_SIZE
            ):
                found.append(ranks_of(torch.cat(list(scorer(queries))), queries))
    targets, ranks = (torch.cat(part) for part in zip(*found, strict=True))
    return {**summary("", ranks), **summary("new ", ranks[targets >= num_old])}


def ranks_of(scores: Tensor, queries: QueryBatch) -> tuple[Tensor, Tensor]:
    """The target of each of B users, and its rank among what they have not had: int64, (B,)."""
    targets = queries.targets.values
    assert len(targets) == len(scores), "one target a user"
    seen = queries.seen
    of_target = scores.gather(1, targets[:, None] - columns.FIRST_INDEX)
    scores[seen.bag_of_value, seen.values - columns.FIRST_INDEX] = -torch.inf
    return targets, 1 + (scores > of_target).sum(dim=1)


def summary(prefix: str, ranks: Tensor) -> dict[str, float]:
    """NDCG@10, hits among the first 100, and the mean of log(1 + rank): lower is better."""
    hits = torch.where(ranks <= 10, 1 / torch.log2(1.0 + ranks), 0.0)
    return {
        f"{prefix}ndcg@10": float(hits.mean()),
        f"{prefix}hr@100": float((ranks <= 100).float().mean()),
        f"{prefix}rank": float(torch.log(1.0 + ranks).mean()),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder with a folder for each data set")
    parser.add_argument("--output", type=Path, default=Path("runs/quality/new_rows"))
    parser.add_argument("--seeds", type=int, default=1, help="draws of the new items, from 1")
    parser.add_argument("--every", type=int, default=1, help="take every so manieth user")
    parser.add_argument("--epochs", type=int, default=3, help="of the first dataset")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    given = parser.parse_args()
    configure_logging()
    common.print_header(["torch", "pyspark"])
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(1, given.seeds + 1):
        first = prepared(given, seed, None)
        run_stages(first, ["train"])
        second = prepared(given, seed, first)
        num_old = read_manifest(first.dataset_directory).num_trained_items
        for side in SIDES:
            for when, values in measure_side(second, first, side, num_old).items():
                found.setdefault(f"{side}, {when}", []).append(values)
                print(f"seed {seed}, {side}, {when}:", values, flush=True)
    figures: dict[str, Any] = {"seeds": given.seeds}
    for name, values in found.items():
        figures[name] = {
            key: round(statistics.mean(v[key] for v in values), 4) for key in values[0]
        }
    common.print_result("quality/new_rows", figures, {})


def measure_side(second: Config, first: Config, side: str, num_old: int) -> dict[str, Any]:
    """Right after the warm start, and after an epoch."""
    changes = {
        "train.warm_start": str(first.checkpoint_directory),
        "train.predict_new_rows": side == "features",
        "train.max_epochs": 1,
        "train.resume": False,
    }
    own = derived(second, second.directory / side, changes)
    link_dataset(second, own)
    at_start = measure(own, None, num_old)
    train(own, OneProcess(torch.device("cpu")))
    newest = checkpoint.find(own.checkpoint_directory, "newest")
    return {"at the start": at_start, "after an epoch": measure(own, newest, num_old)}


if __name__ == "__main__":
    main()
