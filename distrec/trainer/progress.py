"""What rank 0 shows and keeps of a run: console lines, train.jsonl, TensorBoard, MLflow."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter

from distrec.config import Config
from distrec.errors import DataError
from distrec.trainer.step import StepResult
from distrec.trainer.tracking import MlflowRun

TRAIN_LOG = "train.jsonl"
TENSORBOARD = "tensorboard"

logger = logging.getLogger("distrec.train")


class Progress:
    """Collects steps and reports every so many; on ranks other than 0 it only counts.

    Args:
        config: Of the run.
        is_first: Whether this is rank 0.
        total_steps: Of the run.
        start_step: Steps that were done before, by the run that this one resumes.
    """

    def __init__(self, config: Config, is_first: bool, total_steps: int, start_step: int) -> None:
        self.total_steps = total_steps
        self.max_epochs = config.train.max_epochs
        self.log_every_steps = config.train.log_every_steps
        self.start_step = start_step
        self.num_examples = 0
        self._started = time.monotonic()
        self._window: list[StepResult] = []
        self._window_started = self._started
        self._input_seconds = 0.0
        self._stream: TextIO | None = None
        self._board: SummaryWriter | None = None
        self._mlflow: MlflowRun | None = None
        if is_first:
            self._open(config.logs_directory)
            if config.report.mlflow_uri is not None:
                self._mlflow = MlflowRun(config, start_step)

    def _open(self, directory: Path) -> None:
        with _writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            board = directory / TENSORBOARD
            if self.start_step == 0:
                shutil.rmtree(board, ignore_errors=True)
            self._stream = (directory / TRAIN_LOG).open(
                "a" if self.start_step else "w", encoding="utf-8"
            )
            self._board = SummaryWriter(str(board), purge_step=self.start_step + 1)

    @property
    def seconds(self) -> float:
        """Since the first step of this process."""
        return time.monotonic() - self._started

    @property
    def examples_per_second(self) -> float:
        """Over all ranks and the whole time, validation and saving included."""
        return self.num_examples / max(self.seconds, 1e-9)

    def step_done(
        self, global_step: int, epoch: int, result: StepResult, input_seconds: float
    ) -> None:
        """Add a step; `input_seconds` were spent waiting for its batch."""
        self.num_examples += result.num_rows
        self._window.append(result)
        self._input_seconds += input_seconds
        if global_step % self.log_every_steps == 0 or global_step == self.total_steps:
            self._report(global_step, epoch)

    def _report(self, global_step: int, epoch: int) -> None:
        steps = self._window
        seconds = max(time.monotonic() - self._window_started, 1e-9)
        weight = sum(step.weight for step in steps) or 1.0
        values = {
            "loss": sum(step.loss for step in steps) / weight,
            "l2": sum(step.l2 for step in steps) / weight,
            "learning_rate": steps[-1].learning_rate,
            "gradient_norm": steps[-1].gradient_norm,
            "examples_per_second": sum(step.num_rows for step in steps) / seconds,
            "input_wait_share": min(1.0, self._input_seconds / seconds),
        }
        entry = {
            "kind": "step",
            "step": global_step,
            "total_steps": self.total_steps,
            "epoch": epoch,
            **values,
        }
        self._write({**entry, "seconds": round(self.seconds, 3)})
        self._scalars("train", global_step, values)
        logger.info(
            "step %d/%d epoch %d/%d loss %.4f %s examples/s waiting for input %.0f%% %s left",
            global_step, self.total_steps, epoch + 1, self.max_epochs, values["loss"],
            f"{values['examples_per_second']:,.0f}", 100 * values["input_wait_share"],
            self._time_left(global_step),
        )  # fmt: skip
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what came before, such as a validation, out of the next rate."""
        self._window = []
        self._window_started = time.monotonic()
        self._input_seconds = 0.0

    def _time_left(self, global_step: int) -> str:
        per_step = self.seconds / max(global_step - self.start_step, 1)
        left = round(per_step * (self.total_steps - global_step))
        minutes, seconds = divmod(left, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

    def validated(
        self,
        global_step: int,
        metrics: Mapping[str, float],
        metric: str,
        is_best: bool,
        weights: Mapping[str, float],
    ) -> None:
        """Report a validation, and the weights that it gave the towers, if it gave any."""
        self._write(
            {
                "kind": "valid",
                "step": global_step,
                "metrics": dict(metrics),
                "best": is_best,
                **({"weights": dict(weights)} if weights else {}),
                "seconds": round(self.seconds, 3),
            }
        )
        self._scalars("valid", global_step, metrics)
        self._scalars("weight", global_step, weights)
        logger.info(
            "step %d/%d validation: %s %.4f%s",
            global_step, self.total_steps, metric, metrics.get(metric, float("nan")),
            ", the best so far" if is_best else "",
        )  # fmt: skip

    def spent(self, global_step: int, epsilon: float, delta: float) -> None:
        """Report what private training has spent so far."""
        self._write({"kind": "privacy", "step": global_step, "epsilon": epsilon, "delta": delta})
        self._scalars("privacy", global_step, {"epsilon": epsilon})
        logger.info(
            "step %d/%d epsilon %.3g at delta %g", global_step, self.total_steps, epsilon, delta
        )

    def skipped(self, global_step: int, reason: str) -> None:
        """Report a step of which nothing was applied."""
        self._write({"kind": "skipped", "step": global_step, "reason": reason})
        if self._stream is not None:
            logger.warning("step %d is left out: %s", global_step, reason)

    def close(self, is_whole: bool) -> None:
        """Finish the files; whether no step is left to do is for MLflow."""
        if self._stream is not None:
            self._stream.close()
        if self._board is not None:
            self._board.close()
        if self._mlflow is not None:
            self._mlflow.close(is_whole)

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self._stream is not None:
            with _writing(Path(self._stream.name).parent):
                self._stream.write(json.dumps(entry) + "\n")
                self._stream.flush()

    def _scalars(self, group: str, global_step: int, values: Mapping[str, float]) -> None:
        if self._board is not None:
            with _writing(Path(self._board.log_dir)):
                for name, value in values.items():
                    tag = f"{group}/{name.replace('@', '_at_')}"
                    self._board.add_scalar(tag, value, global_step)
        if self._mlflow is not None:
            named = {f"{group}/{name}": value for name, value in values.items()}
            self._mlflow.scalars(global_step, named)


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Turn a full disk, or one that may not be written, into an error that is not tried again."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"training writes its logs to {directory}. Received: {error}. Free space, or set "
            "output to another directory."
        ) from error
