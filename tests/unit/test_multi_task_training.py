"""A run of several tasks in one process: what is divided by what, resumed, validated, evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from distrec import checkpoint, columns, evaluate
from distrec.config import Config, parse_config
from distrec.errors import ConfigError, DataError
from distrec.sharding.collectives import start
from distrec.trainer import setup, train
from distrec.trainer.identity import resume_hash
from distrec.trainer.step import train_step
from tests.training import losses, make_config

OFF = {"multi_task": "none", "experts": 7, "expert_hidden": [9], "expert_layers": 3}


def task_config(directory: Path, **sections: dict[str, Any]) -> Config:
    model = {"multi_task": "ple", "experts": 2, "expert_hidden": [8], "dropout": 0.2}
    given = {
        "model": model | sections.pop("model", {}),
        "train": {"max_steps": 8, "metric": "auc:like", "checkpoint_every_steps": 4,
                  "keep_checkpoints": 9, **sections.pop("train", {})},
        **sections,
    }  # fmt: skip
    return make_config(directory, given, labels=True, tasks=True)


def run(config: Config) -> Any:
    return train(config, start(config.launch, distributed=False))


def test_a_task_is_divided_by_the_weights_of_its_own_labels(tmp_path: Path) -> None:
    config = task_config(
        tmp_path,
        loss={"task_weights": {"label": 0.0, "like": 0.5}, "l2": 0.0},
        train={"gradient_clip": 0.0, "weight_decay": 0.0},
    )
    collectives = start(config.launch, distributed=False)
    built = setup.build(setup.read_inputs(config, 1), collectives, None)
    batch = next(iter(built.reader.batches(epoch=0)))
    labels = batch.labels[:, 1]
    known = labels[~labels.isnan()]
    assert 10 < len(known) < 0.4 * len(labels)
    result = train_step(built, batch, 0, "here")
    # scores begin near zero
    assert result.loss / result.weight == pytest.approx(0.5 * 0.693, abs=0.02)
    assert result.weight == 120
    bias = built.model.task_head.towers["task_like"].layers[-1].bias
    assert float(bias.grad) == pytest.approx(0.5 * (0.5 - float(known.mean())), abs=0.01)
    assert not any(
        part.grad.any() for part in built.model.task_head.towers["task_label"].parameters()
    )


def test_a_run_goes_on_and_is_evaluated_by_task(tmp_path: Path) -> None:
    evaluated = {"baselines": ["popularity"]}
    config = task_config(tmp_path, train={"max_epochs": 8, "max_steps": 48}, evaluate=evaluated)
    assert run(config).metric == "auc:like"
    curve = losses(config)
    assert curve[-1] < curve[0] - 0.2
    directory = config.checkpoint_directory
    whole = checkpoint.read_checkpoint_manifest(directory / "step-00000048")
    assert whole.metrics["auc:like"] > 0.7
    assert whole.model_spec.tasks == ("like",)
    for path in checkpoint.committed(directory):
        if path.name > "step-00000044":
            shutil.rmtree(path)
    run(config)
    again = checkpoint.read_checkpoint_manifest(directory / "step-00000048")
    assert dict(checkpoint.manifest.files_of(again)) == dict(checkpoint.manifest.files_of(whole))
    evaluate.run(config)
    measured = json.loads(config.metrics_path.read_text())["splits"]["valid"]["models"]
    of_model = measured["distrec"]["classification"]
    best = checkpoint.read_checkpoint_manifest(checkpoint.find(directory)).metrics
    for name in ("log_loss:like", "calibration:like", "log_loss"):
        assert of_model[name] == pytest.approx(best[name], rel=1e-5)
    assert of_model["auc:like"] == pytest.approx(best["auc:like"], abs=2e-3)
    assert measured["popularity"]["classification"] is None


def test_a_task_that_is_not_predicted_is_no_metric(tmp_path: Path) -> None:
    for changes in ({"train": {"metric": "auc:bought"}}, {"model": {"multi_task": "none"}}):
        config = task_config(tmp_path, **changes)
        with pytest.raises(ConfigError, match=r"is of a task that is predicted: .*'auc:(bought|l)"):
            setup.read_inputs(config, 1)
    # valid has positives only of the label
    with pytest.raises(DataError, match="positives and negatives"):
        setup.read_inputs(task_config(tmp_path, train={"metric": "auc"}), 1)
    setup.read_inputs(task_config(tmp_path), 1)


def test_a_run_of_one_task_is_what_it_was_before_there_were_several(tmp_path: Path) -> None:
    plain = make_config(tmp_path, labels=True, tasks=True)
    off = make_config(tmp_path, {"model": OFF})
    assert resume_hash(plain) == resume_hash(off)
    on = {**OFF, "multi_task": "mmoe"}
    weighted = {"model": on, "loss": {"task_weights": {"like": 2.0}}}
    assert len({resume_hash(make_config(tmp_path, {"model": OFF})),
                resume_hash(make_config(tmp_path, {"model": on})),
                resume_hash(make_config(tmp_path, weighted))}) == 3  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["a", "A"], "label": "y"}, r"names each further task once.*\['a', 'A'\]"),
        ({"tasks": ["label"], "label": "y"}, "label, the first task, is none of them"),
        ({"tasks": ["a b"], "label": "y"}, "should match pattern"),
        ({"tasks": [f"t{k}" for k in range(17)], "label": "y"}, "at most 16 items"),
        ({"tasks": ["a"]}, "stand beside a label"),
        ({"label": "y", "model": {"multi_task": "mmoe"}}, "needs prepare.events.tasks"),
        (
            {"tasks": ["a"], "label": "y", "model": {"multi_task": "mmoe"},
             "loss": {"kind": "softmax"}},
            "is for the loss of labels, binary",
        ),
        (
            {"tasks": ["a"], "label": "y", "loss": {"task_weights": {"a": 1.0}}},
            r"trained: \[\]. Received: \['a'\], with model.multi_task = 'none'",
        ),
        (
            {"tasks": ["a"], "label": "y", "model": {"multi_task": "ple"},
             "loss": {"task_weights": {"a": 0.0, "label": 0.0}}},
            "one of loss.task_weights is above 0",
        ),
        (
            {"tasks": ["a"], "label": "y", "model": {"multi_task": "ple"},
             "privacy": {"target_epsilon": 1.0}},
            'model.multi_task = "ple": set "none"',
        ),
    ],
)  # fmt: skip
def test_configurations_that_are_refused(changes: dict[str, Any], message: str) -> None:
    events = {key: changes.pop(key) for key in ("tasks", "label") if key in changes}
    events |= {"paths": ["x"], "time": "t"}
    with pytest.raises(ConfigError, match=message):
        parse_config({"name": "x", "prepare": {"events": events}, **changes}, "the test")


def test_manifests_name_each_task_once(tmp_path: Path) -> None:
    config = task_config(tmp_path)
    path = config.dataset_directory / "manifest.json"
    document = json.loads(path.read_text())
    assert document["tasks"] == ["like"]
    for tasks in (["like", "like"], ["../like"], [f"t{k}" for k in range(17)]):
        path.write_text(json.dumps(document | {"tasks": tasks}))
        with pytest.raises(DataError, match="Run prepare again"):
            setup.read_inputs(config, 1)
    # a task without a column
    path.write_text(json.dumps(document | {"tasks": ["other"]}))
    with pytest.raises(DataError, match=columns.task_column("other")):
        setup.build(setup.read_inputs(task_config(tmp_path, train={"metric": "ndcg@10"}), 1),
                    start(config.launch, distributed=False), None)  # fmt: skip
