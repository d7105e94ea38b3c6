"""Search the keys of [tune.parameters] for the best valid metric, with Optuna.

Every trial trains on the dataset of the run, in a directory of its own in ``tune/``, named by a
hash of its values; nothing is measured on test. What Optuna knows lies in a journal, one line a
change, so that a search that was cut off goes on: a trial that was under way is taken up again,
from its newest checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrec import checkpoint, pipeline
from distrec.config import Config, RangeConfig, dump_config, section_hash
from distrec.dataset import read_manifest
from distrec.errors import ConfigError, TrainingError
from distrec.files import replace_text
from distrec.metrics.names import parse_metric_name
from distrec.variants import changed, derived, link_dataset

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

DIRECTORY = "tune"
JOURNAL = "journal.log"
BEST = "best.toml"
TRIALS = "trials.json"
# what a trial may change: sections of the configuration that only training depends on
_SECTIONS = ("sharding", "model", "loss", "train")
# what says how good a trial is cannot be searched
_FIXED = ("train.metric", "train.warm_start", "train.resume")
_ERROR = "error"

logger = logging.getLogger("distrec.tune")


def run(config: Config) -> tuple[int, Path]:
    """Try configurations until there have been tune.trials of them, and write the best.

    Returns:
        The exit code of what failed, or 0; the directory with best.toml and trials.json.

    Raises:
        ConfigError: Optuna is not installed, a parameter is no key that can be searched, or a value
            at an end of its range is refused.
    """
    if not config.tune.parameters:
        raise ConfigError(
            "a search needs [tune.parameters]. Received: none. Name keys with ranges, such as "
            '"train.learning_rate" = { low = 1e-4, high = 1e-1, log = true }.'
        )
    directory = config.directory / DIRECTORY
    _check(config, directory)
    _require_optuna()
    code, _ = pipeline.run_stages(config, only=["prepare"])
    if code:
        return code, directory
    directory.mkdir(parents=True, exist_ok=True)
    study = _study(config, directory)
    while not code and len(_done(study)) < config.tune.trials:
        code = _try_one(config, study, directory)
        _write(config, study, directory)
    return code, directory


def _require_optuna() -> None:
    try:
        import optuna
    except ImportError:
        raise ConfigError(
            "distrec tune needs Optuna. Received: it is not installed. Install it: "
            "pip install -c constraints.txt 'distrec[tune]'."
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def _own_value(config: Config, key: str) -> Any:
    """What the file says of a key.

    Raises:
        ConfigError: There is no such key, or it cannot be searched.
    """
    section, _, _ = key.partition(".")
    value: Any = config.model_dump(mode="json")
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ConfigError(
                f"tune.parameters names keys of the configuration. Received: {key!r}, which is "
                "none. See docs/configuration.md."
            )
        value = value[part]
    if section not in _SECTIONS or key in _FIXED or isinstance(value, Mapping):
        raise ConfigError(
            f"a search goes over keys of {', '.join(_SECTIONS)}, and not {', '.join(_FIXED)}. "
            f"Received: {key!r}. Take it out of tune.parameters."
        )
    return value


def _check(config: Config, directory: Path) -> None:
    """Refuse what the first trials would stumble over."""
    for key, one in config.tune.parameters.items():
        value = _own_value(config, key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not one.choices and not (is_number or value is None):
            raise ConfigError(
                f"low and high are for numbers. Received: {key} = {value!r}. Give choices."
            )
        if not one.choices and isinstance(value, int):
            ends = (one.low, one.high, one.step or 1)
            if not all(isinstance(end, int) for end in ends):
                raise ConfigError(
                    f"the range of a whole number has whole ends. Received: {key}, low, high and "
                    f"step = {ends}."
                )
        for end in one.choices or (one.low, one.high):
            _trial_config(config, directory, {key: end})


def _trial_config(config: Config, directory: Path, values: Mapping[str, Any]) -> Config:
    name = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
    # two checkpoints are enough to go on from and to score with
    return derived(config, directory / name, {"train.keep_checkpoints": 1, **values})


def _study(config: Config, directory: Path) -> Study:
    """The search so far; a new one when the ranges, the dataset or anything else has changed."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

    dataset = read_manifest(config.dataset_directory).content_hash
    (train,) = [stage for stage in pipeline.STAGES if stage.name == "train"]
    settings = section_hash(config, *train.sections, "tune.parameters")
    name = hashlib.sha256(f"{dataset} {settings}".encode()).hexdigest()[:12]
    metric = parse_metric_name(config.train.metric)
    storage = JournalStorage(JournalFileBackend(str(directory / JOURNAL)))
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        direction="maximize" if metric.higher_is_better else "minimize",
        load_if_exists=True,
    )
    # a sampler that was seeded alike each time would begin with the same draws
    study.sampler = optuna.samplers.TPESampler(seed=config.seed + len(study.trials))
    if not study.trials:
        own = {key: _own_value(config, key) for key in config.tune.parameters}
        if all(_holds(config.tune.parameters[key], value) for key, value in own.items()):
            study.enqueue_trial(
                {key: _encoded(config.tune.parameters[key], value) for key, value in own.items()}
            )
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params)
    return study


def _ends(one: RangeConfig) -> tuple[float, float]:
    assert one.low is not None
    assert one.high is not None
    return one.low, one.high


def _holds(one: RangeConfig, value: Any) -> bool:
    """Whether a value is one that the search could come to."""
    if one.choices:
        return json.dumps(value) in map(json.dumps, one.choices)
    low, high = _ends(one)
    if value is None or not low <= value <= high:
        return False
    steps = 0.0 if one.step is None else (value - low) / one.step
    return math.isclose(steps, round(steps), abs_tol=1e-6)


def _encoded(one: RangeConfig, value: Any) -> Any:
    """As Optuna keeps it: choices are text, for it takes no lists."""
    return json.dumps(value) if one.choices else value


def _suggested(trial: Trial, key: str, one: RangeConfig, own: Any) -> Any:
    if one.choices:
        return json.loads(trial.suggest_categorical(key, [*map(json.dumps, one.choices)]))
    low, high = _ends(one)
    is_whole = isinstance(own, int) or (own is None and isinstance(low, int))
    if is_whole:
        return trial.suggest_int(key, int(low), int(high), step=int(one.step or 1), log=one.log)
    return trial.suggest_float(key, low, high, step=one.step, log=one.log)


def _try_one(config: Config, study: Study, directory: Path) -> int:
    """Train one configuration; the exit code of what must end the search, or 0."""
    from optuna.trial import TrialState

    trial = study.ask()
    values = {
        key: _suggested(trial, key, one, _own_value(config, key))
        for key, one in config.tune.parameters.items()
    }
    logger.info(
        "trial %d of %d: %s",
        len(_done(study)) + 1, config.tune.trials,
        ", ".join(f"{key} = {_shown(value)}" for key, value in values.items()),
    )  # fmt: skip
    try:
        one = _trial_config(config, directory, values)
        link_dataset(config, one)
        code, _ = pipeline.run_stages(one, only=["train"])
    except ConfigError as error:
        code = error.exit_code
        logger.warning("%s", error)
    else:
        trial.set_user_attr("directory", one.directory.name)
    if code in (ConfigError.exit_code, TrainingError.exit_code):
        # these values are no good; others may be
        trial.set_user_attr(_ERROR, code)
        study.tell(trial, state=TrialState.FAIL)
        return 0
    if code:
        return code
    best = checkpoint.find(one.checkpoint_directory, "best")
    value = checkpoint.read_checkpoint_manifest(best).metrics[config.train.metric]
    study.tell(trial, value)
    logger.info("%s %.4f, the best so far %.4f", config.train.metric, value, study.best_value)
    _keep_best(config, study, directory)
    return 0


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _keep_best(config: Config, study: Study, directory: Path) -> None:
    """Remove the checkpoints of finished trials, but for the best one's."""
    best = study.best_trial.user_attrs["directory"]
    for trial in _done(study):
        name = trial.user_attrs.get("directory", best)
        if name != best:
            shutil.rmtree(directory / name / config.checkpoint_directory.name, ignore_errors=True)


def _done(study: Study) -> list[FrozenTrial]:
    """Trials with a value, and those whose values are no good; not those that were cut off."""
    from optuna.trial import TrialState

    trials = study.get_trials(states=(TrialState.COMPLETE, TrialState.FAIL))
    return [trial for trial in trials if trial.value is not None or _ERROR in trial.user_attrs]


def _write(config: Config, study: Study, directory: Path) -> None:
    """trials.json, best first, and best.toml: the run's own file with the best values."""
    higher = parse_metric_name(config.train.metric).higher_is_better
    done = sorted(
        _done(study),
        key=lambda trial: (
            trial.value is None, (trial.value or 0.0) * (-1 if higher else 1), trial.number,
        ),
    )  # fmt: skip
    rows = [
        {
            "value": trial.value,
            "values": _values(config, trial),
            "directory": trial.user_attrs.get("directory"),
        }
        for trial in done
    ]
    document = {"metric": config.train.metric, "trials": rows}
    replace_text(directory / TRIALS, json.dumps(document, indent=1) + "\n")
    if done and done[0].value is not None:
        replace_text(directory / BEST, dump_config(changed(config, _values(config, done[0]))))


def _values(config: Config, trial: FrozenTrial) -> dict[str, Any]:
    parameters = config.tune.parameters
    return {
        key: json.loads(value) if parameters[key].choices else value
        for key, value in trial.params.items()
    }
