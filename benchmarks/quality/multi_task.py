"""Two tasks on MovieLens-1M, each alone and both by one model: shared bottom, MMoE, PLE.

    python benchmarks/quality/multi_task.py DATA_FOLDER

DATA_FOLDER has ml-1m/ratings.dat.gz, movies.dat and users.dat. The first task is that of
ml1m_clicks.py, a rating above 3, the second whether it is 5. All variants train conf/clicks.toml on
one dataset for EPOCHS epochs; "second alone" is a head with a weight of 0 for the first task. AUC
of both on test, at the epoch that is best on valid, by the first task where that is trained. The
last line is one line of JSON.
"""

from __future__ import annotations

import json
from typing import Any

from sources import FIVE_STARS, TASKS, catalogue, write_events
from unified import ROOT, arguments, common, configure_logging, run_stages

from distrec.config import Config, load_config
from distrec.evaluate import MODEL
from distrec.variants import derived, link_dataset

EPOCHS = 4
OF_SECOND = f"auc:{FIVE_STARS}"
HEADS = ("shared_bottom", "mmoe", "ple")
VARIANTS: dict[str, dict[str, Any]] = {
    "first alone": {},
    "second alone": {
        "model.multi_task": "shared_bottom", "loss.task_weights": {"label": 0.0},
        "train.metric": OF_SECOND,
    },
    **{head: {"model.multi_task": head} for head in HEADS},
}  # fmt: skip


def prepared(given: Any) -> Config:
    """The configuration of all, with its dataset."""
    events = write_events(TASKS, given.data, given.output / TASKS / "raw")
    inline = ", ".join(f"{key} = {json.dumps(value)}" for key, value in events.items())
    settings = [
        f'name="{TASKS}"', f"output={json.dumps(str(given.output / TASKS))}",
        f"prepare.events={{{inline}}}", 'prepare.split.method="given"', *catalogue(given.data),
        f"launch.num_ranks={given.ranks}", f"train.max_epochs={EPOCHS}", "evaluate.baselines=[]",
    ]  # fmt: skip
    config = load_config(ROOT / "conf" / "clicks.toml", [*settings, *given.settings])
    run_stages(config, ["prepare"])
    return config


def main() -> None:
    """Measure and print."""
    given = arguments(__doc__, "runs/quality")
    configure_logging()
    common.print_header(["torch", "horovod", "pyspark"], f"{given.ranks} ranks of 1 thread")
    whole = prepared(given)
    figures: dict[str, float] = {}
    for name, changes in VARIANTS.items():
        config = derived(whole, whole.directory / name.replace(" ", "-"), changes)
        link_dataset(whole, config)
        run_stages(config, ["train", "evaluate"])
        test = json.loads(config.metrics_path.read_text())["splits"]["test"]["models"][MODEL]
        trained = {"first alone": ("auc",), "second alone": (OF_SECOND,)}
        for metric in trained.get(name, ("auc", OF_SECOND)):
            figures[f"{name} {metric}"] = round(test["classification"][metric], 4)
        print({key: value for key, value in figures.items() if key.startswith(name)}, flush=True)
    common.print_result("quality/multi_task", figures, {})


if __name__ == "__main__":
    main()
