"""The learning curve on an MLflow server, where one is configured.

A server that is away or slow costs a run nothing but its curve: the first call that fails is told
once, and no further one is made. `train.jsonl` has everything all the same.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrec.config import Config
from distrec.errors import ConfigError
from distrec.files import replace_text

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

RUN_ID = "mlflow-run-id"
# of MLflow
_MAX_PARAM_CHARACTERS = 6000
_PARAMS_PER_CALL = 100
_SECTIONS = ("prepare", "reader", "sharding", "model", "loss", "train", "privacy", "launch")

_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}

logger = logging.getLogger("distrec.train")


def check_tracking(config: Config) -> None:
    """Refuse a server that cannot be talked to, on every rank.

    Raises:
        ConfigError: MLflow is not installed.
    """
    if config.report.mlflow_uri is not None and importlib.util.find_spec("mlflow") is None:
        raise ConfigError(
            "report.mlflow_uri needs the package mlflow. Received: an environment without. Install "
            "it on every host: pip install -c constraints.txt 'distrec[mlflow]'"
        )


class MlflowRun:
    """One run of an MLflow experiment; a training that goes on goes on with its run.

    Args:
        config: Of the run, with report.mlflow_uri.
        start_step: Steps that were done before.
    """

    def __init__(self, config: Config, start_step: int) -> None:
        from mlflow.tracking import MlflowClient  # an extra: most do without

        # its own patience is that of minutes, in which all ranks would wait for this one
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        self._run_id: str | None = None
        try:
            self._client: MlflowClient = MlflowClient(config.report.mlflow_uri)
            self._run_id = self._open(config, config.logs_directory / RUN_ID, start_step)
        except Exception as error:
            self._give_up(error)

    def _open(self, config: Config, path: Path, start_step: int) -> str:
        if start_step and path.exists():
            run_id = path.read_text().strip()
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        name = config.report.mlflow_experiment
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        run_id = str(self._client.create_run(experiment, run_name=config.name).info.run_id)
        self._log_params(run_id, config)
        replace_text(path, run_id + "\n")
        return run_id

    def _log_params(self, run_id: str, config: Config) -> None:
        from mlflow.entities import Param

        document = config.model_dump(mode="json", exclude_none=True)
        flat = {"seed": str(config.seed)}
        for section in _SECTIONS:
            flat |= _flattened(section, document.get(section, {}))
        params = [Param(key, value[:_MAX_PARAM_CHARACTERS]) for key, value in flat.items()]
        for start in range(0, len(params), _PARAMS_PER_CALL):
            self._client.log_batch(run_id, params=params[start : start + _PARAMS_PER_CALL])

    def scalars(self, global_step: int, values: Mapping[str, float]) -> None:
        """Add values of a step, such as train/loss."""
        if self._run_id is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            # MLflow has no @ in names
            Metric(name.replace("@", "_at_"), value, now, global_step)
            for name, value in values.items()
        ]
        try:
            self._client.log_batch(self._run_id, metrics=metrics)
        except Exception as error:
            self._give_up(error)

    def close(self, is_whole: bool) -> None:
        """End the run: finished, or killed where training did not come to its end."""
        if self._run_id is None:
            return
        try:
            self._client.set_terminated(self._run_id, "FINISHED" if is_whole else "KILLED")
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run_id = None
        first_line = str(error).partition("\n")[0]
        logger.warning("MLflow gets no more of this run: %s", first_line)


def _flattened(prefix: str, value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        return {prefix: str(value)}
    found: dict[str, str] = {}
    for key, inner in value.items():
        found |= _flattened(f"{prefix}.{key}", inner)
    return found
