"""Pre-training on events without labels, then fine-tuning on 1, 10 and 100 % of the labels.

    python benchmarks/quality/pretrain.py DATA_FOLDER

DATA_FOLDER has ml-1m/ratings.dat.gz, movies.dat and users.dat. Pre-training learns who rated what,
all ratings alike, by softmax. Fine-tuning learns which ratings are above 3, from so many per cent
of the labels of train; the other events are in the histories alone, from scratch as well. With all
labels, also with towers and items' biases frozen but for low-rank adapters, and with a head of
pairs of few numbers, so that a few per cent are trained. The model is conf/clicks.toml's. AUC on
test; the epochs are chosen on valid. The last line is one line of JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sources import LABELLED, WATCHED, catalogue, write_events
from unified import ROOT, arguments, common, configure_logging, run_stages

from distrec.config import Config, load_config
from distrec.evaluate import MODEL
from distrec.variants import link_dataset

ADAPTED = (
    'model.frozen=["cf", "autoencoder", "deep", "bias"]', "model.adapter_rank=2",
    "model.pair_crosses=1", "model.pair_cross_rank=8", "model.pair_hidden=[32]",
)  # fmt: skip
TOWERS = '["cf", "autoencoder", "deep"]'
BARS = {
    "gain with 1 %": common.at_least(0.0),
    "gain with 10 %": common.at_least(0.0),
    "gain with 100 %": common.at_least(-0.001),
}


def run(
    name: str, directory: Path, given: Any, more: Sequence[str], prepared: Config | None = None
) -> Config:
    """Prepare, train and evaluate, on events of `sources`; or on a dataset that is there."""
    events = write_events(name, given.data, given.output / name / "raw")
    events["paths"] = [str(Path(path).resolve()) for path in events["paths"]]
    inline = ", ".join(f"{key} = {json.dumps(value)}" for key, value in events.items())
    settings = [
        f'name="{name}"', f"output={json.dumps(str(directory))}", f"prepare.events={{{inline}}}",
        'prepare.split.method="given"', *catalogue(given.data),
        f"launch.num_ranks={given.ranks}", f"model.towers={TOWERS}", "model.embedding_dim=32",
        "model.share_item_embedding=false",
    ]  # fmt: skip
    config = load_config(ROOT / "conf" / "clicks.toml", [*settings, *given.settings, *more])
    stages = ["train"] if name == WATCHED else ["train", "evaluate"]
    if prepared is None:
        stages = ["prepare", *stages]
    else:
        link_dataset(prepared, config)
    run_stages(config, stages)
    return config


def auc(config: Config) -> float:
    """On test."""
    model = json.loads(config.metrics_path.read_text())["splits"]["test"]["models"][MODEL]
    return round(model["classification"]["auc"], 4)


def main() -> None:
    """Measure and print."""
    given = arguments(__doc__, "runs/quality")
    configure_logging()
    common.print_header(["torch", "horovod", "pyspark"], f"{given.ranks} ranks of 1 thread")
    output = given.output / "pretrain"
    events = (
        'train.metric="ndcg@10"', "model.pair_crosses=0", "loss.l2=0.0", "train.max_epochs=8",
    )  # fmt: skip
    first = run(WATCHED, output / "pretrained", given, events)
    warm = (
        f"prepare.extend={json.dumps(str(first.dataset_directory))}", "train.max_epochs=4",
        f"train.warm_start={json.dumps(str(first.checkpoint_directory))}",
    )  # fmt: skip
    figures: dict[str, Any] = {}
    for name in LABELLED:
        share = f"{name.rpartition('-')[2]} %"
        from_scratch = run(name, output / f"{name}-scratch", given, warm[:2])
        fine_tuned = run(name, output / f"{name}-tuned", given, warm, from_scratch)
        scratch, tuned = auc(from_scratch), auc(fine_tuned)
        figures[f"scratch, {share}"], figures[f"fine-tuned, {share}"] = scratch, tuned
        figures[f"gain with {share}"] = round(tuned - scratch, 4)
        print(f"{share:>6} of labels: scratch {scratch:.4f}, fine-tuned {tuned:.4f}", flush=True)
    adapted = run(LABELLED[-1], output / "adapted", given, (*warm, *ADAPTED), from_scratch)
    counted = json.loads((adapted.directory / "logs" / "plan.json").read_text())["parameters"]
    figures["adapters, 100 %"] = auc(adapted)
    trained = counted["dense_trained"] + counted["tables_trained"]
    figures["share of parameters trained"] = round(
        trained / (counted["dense"] + counted["tables"]), 5
    )
    common.print_result("quality/pretrain", figures, BARS)


if __name__ == "__main__":
    main()
