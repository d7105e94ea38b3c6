"""The training loop, from the dataset to committed checkpoints."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from distrec import checkpoint
from distrec.batch import Batch
from distrec.checkpoint.together import together
from distrec.config import Config
from distrec.errors import DataError, StoppedError
from distrec.sharding.collectives import Collectives
from distrec.store import fetch_dataset
from distrec.trainer import setup
from distrec.trainer.early_stopping import EarlyStopping
from distrec.trainer.private import make_private
from distrec.trainer.progress import Progress
from distrec.trainer.result import TrainResult
from distrec.trainer.setup import Run
from distrec.trainer.start import find_start, load
from distrec.trainer.step import PreparedBatch, check_state, prepare_batch, train_step
from distrec.trainer.warm_start import find_warm_start, load_warm_start

Beat = Callable[[str], None]

logger = logging.getLogger("distrec.train")


def train(
    config: Config,
    collectives: Collectives,
    beat: Beat = lambda phase: None,
    stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train until the last step or until patience ends; go on from a checkpoint of the same run.

    A run that has none yet begins with the weights of train.warm_start, if that is set.

    Collective: every rank of the job calls it.

    Args:
        config: Of the run, the same on every rank.
        collectives: Of the job.
        beat: Told what comes next, each time something was done; for a watchdog.
        stop: Asked once a step; when it is true on any rank, all of them save after that step.

    Raises:
        StoppedError: On every rank, after a checkpoint, when one was told to stop.
        DistrecError: On every rank, unless a rank's data is damaged in mid-epoch: then that rank
            raises and the others fail in the next collective.
    """
    world = collectives.world
    beat("fetching the dataset")
    together("train.fetch", lambda: fetch_dataset(config) if world.is_first else None, collectives)
    beat("reading the dataset")
    inputs = together(
        "train.inputs", lambda: setup.read_inputs(config, world.world_size), collectives
    )
    setup.check_agreement(inputs, collectives)
    setup.check_dataset(inputs, collectives)
    inputs = setup.choose_hot_rows(inputs, collectives)
    beat("looking for a checkpoint")
    start = find_start(inputs, collectives)
    saved = together(
        "train.saved",
        lambda: None if start is None else checkpoint.read_checkpoint_manifest(start),
        collectives,
    )
    older = find_warm_start(inputs, collectives) if start is None else None
    beat("building the model")
    run = together(
        "train.build",
        lambda: setup.build(inputs, collectives, None if saved is None else saved.lanes),
        collectives,
    )
    if config.privacy is not None:
        beat("preparing private training")
        run = make_private(run, saved)
    collectives.broadcast_parameters(run.model.state_dict())
    if start is not None:
        beat(f"loading {start.name}")
        load(run, start)
    elif older is not None:
        beat(f"taking over {older}")
        load_warm_start(run, older)
    if run.average is not None and start is None:
        run.average.restart()
    if world.is_first:
        setup.write_plan(run, world.world_size)
    return _Loop(run, saved, beat, stop).run_to_end()


class _Loop:
    """The position in the run, and what happens between steps.

    Args:
        run: What trains.
        saved: Manifest of the checkpoint that the run goes on from.
        beat: Told what comes next.
        stop: Whether this rank was told to stop.
    """

    def __init__(
        self,
        run: Run,
        saved: checkpoint.CheckpointManifest | None,
        beat: Beat,
        stop: Callable[[], bool],
    ) -> None:
        self.run = run
        self.beat = beat
        self.stop = stop
        self.is_stopped = False
        self.train_config = run.config.train
        self.directory = run.config.checkpoint_directory
        self.is_first = run.collectives.world.is_first
        self._ahead: tuple[PreparedBatch, float] | None = None
        self.global_step = 0 if saved is None else saved.global_step
        self.num_skipped = 0 if saved is None else saved.skipped_steps
        metric = run.validator.metric
        self.stopping = EarlyStopping(
            self.train_config.early_stopping_patience, metric.higher_is_better,
            newest_is_best=run.spending is not None,
        )  # fmt: skip
        self.series = checkpoint.Series(
            self.directory, self.train_config.full_checkpoint_every, run.parts, run.collectives
        )
        if saved is not None:
            name = checkpoint.checkpoint_name(saved.global_step)
            self.series.resume(self.directory / name, saved)
            self.stopping.load_state(saved.early_stopping)
            self._repair_best()
            # what the attempt before could not send
            checkpoint.publish_checkpoints(run.config, run.collectives)
            logger.info("going on from step %d of %d", self.global_step, run.total_steps)
        if self.is_first and self.train_config.warmup_steps >= run.total_steps:
            logger.warning(
                "the learning rate rises to the last of %d steps: lower train.warmup_steps (%d) or "
                "train.global_batch_size (%d)",
                run.total_steps,
                self.train_config.warmup_steps,
                self.train_config.global_batch_size,
            )
        if not run.validator.has_data:
            logger.warning(
                "the valid split has nothing to measure %s on: every step is done, and the newest "
                "checkpoint counts as the best",
                metric,
            )
        self.progress = Progress(run.config, self.is_first, run.total_steps, self.global_step)

    @property
    def steps_per_epoch(self) -> int:
        """Of every rank."""
        return self.run.reader.steps_per_epoch

    @property
    def is_done(self) -> bool:
        """Whether no step is left to do."""
        return self.global_step >= self.run.total_steps or self.stopping.should_stop

    @property
    def _may_skip(self) -> bool:
        """Whether a step with a bad loss is left out."""
        config = self.train_config
        return config.on_bad_loss == "skip" and self.num_skipped < config.max_skipped_steps

    def run_to_end(self) -> TrainResult:
        """All that is left to do."""
        try:
            while not (self.is_done or self.is_stopped):
                self._run_epoch()
            self._drop_ahead()
        finally:
            self.progress.close(self.is_done)
        if not self.is_done:
            raise StoppedError(
                f"training was told to stop after step {self.global_step} of "
                f"{self.run.total_steps}, which is saved. The next train goes on from there."
            )
        return self._result()

    def _run_epoch(self) -> None:
        """From the present step to the end of its epoch, or of the run."""
        epoch, first = divmod(self.global_step, self.steps_per_epoch)
        batches = self.run.reader.batches(epoch, first)
        rows = 0
        try:
            for step_in_epoch in range(first, self.steps_per_epoch):
                place = (
                    f"step {self.global_step + 1} (epoch {epoch + 1}, batch {step_in_epoch + 1} of "
                    f"{self.steps_per_epoch})"
                )
                is_epoch_end = step_in_epoch + 1 == self.steps_per_epoch
                rows += self._step(batches, epoch, place, is_epoch_end)
                self._after_step(place, is_epoch_end)
                if (self.is_done or self.is_stopped) and not is_epoch_end:
                    break
            else:
                # the reader counts this rank's rows once it is asked for more
                next(batches, None)
                self._check_rows(epoch, first, rows)
        finally:
            if isinstance(batches, Iterator) and hasattr(batches, "close"):
                batches.close()

    def _step(self, batches: Iterator[Batch], epoch: int, place: str, is_epoch_end: bool) -> int:
        if self._ahead is None:
            self._ahead = self._prepare(batches, self.global_step, place)
        prepared, waited = self._ahead
        self._ahead = None

        def prepare_next() -> None:
            next_place = f"{place}, next"
            self._ahead = self._prepare(
                batches, self.global_step + 1, next_place, ahead=True, with_rows=with_rows
            )
            self.beat(place)

        self.beat(place)
        is_last = is_epoch_end or self.global_step + 1 == self.run.total_steps
        sharding = self.run.config.sharding
        prefetches = (sharding.prefetch_ids or sharding.prefetch_rows) and not is_last
        # what is saved goes on with the rows that are saved, resumed or not
        with_rows = sharding.prefetch_rows and not any(
            self._due(self.global_step + 1, is_epoch_end)
        )
        result = train_step(
            self.run, prepared, self.global_step, place,
            prepare_next if prefetches else lambda: None, self.stop(), self._may_skip,
        )  # fmt: skip
        self.global_step += 1
        self.is_stopped = result.is_stopped
        if result.skipped:
            self.num_skipped += 1
            self.progress.skipped(self.global_step, result.skipped)
        self.progress.step_done(self.global_step, epoch, result, waited)
        return result.num_rows

    def _prepare(
        self,
        batches: Iterator[Batch],
        global_step: int,
        place: str,
        ahead: bool = False,
        with_rows: bool = False,
    ) -> tuple[PreparedBatch, float]:
        """A step's batch, and how long it was waited for."""
        self.beat(f"{place}: waiting for its batch")
        started = time.monotonic()
        batch = next(batches)
        waited = time.monotonic() - started
        return prepare_batch(self.run, batch, global_step, ahead, with_rows), waited

    def _drop_ahead(self) -> None:
        """Take up what was sent ahead for a step that is not made, on every rank."""
        if self._ahead is not None and self._ahead[0].asked is not None:
            with contextlib.suppress(DataError):
                self._ahead[0].asked.wait()
        self._ahead = None

    def _check_rows(self, epoch: int, first: int, rows: int) -> None:
        """Every row of the dataset was read once, over all ranks."""
        expected = self.run.reader.rows_planned(first)
        if rows != expected:
            raise DataError(
                f"an epoch reads every row of train once. Received: {rows} rows over all ranks in "
                f"epoch {epoch + 1}, expected {expected}. Run prepare again."
            )

    def _after_step(self, place: str, is_epoch_end: bool) -> None:
        """Validate and save where it is due."""
        due, save_due = self._due(self.global_step, is_epoch_end)
        if not (due or save_due or self.is_stopped):
            return
        check_state(self.run, place)
        metrics: dict[str, float] = {}
        # without validation data the newest checkpoint stands for the best
        is_best = due
        if due and self.run.validator.has_data:
            metrics, is_best = self._validate(place)
        if (spent := self._spent()) is not None:
            self.progress.spent(self.global_step, spent.epsilon, spent.delta)
        if save_due or is_best or self.stopping.should_stop or self.is_stopped:
            self._save(metrics, is_best)
        self.progress.restart_clock()

    def _due(self, step: int, is_epoch_end: bool) -> tuple[bool, bool]:
        """Whether a validation follows a step, and whether a checkpoint does anyway."""
        config = self.train_config
        is_last = step == self.run.total_steps
        every, often = config.evaluate_every_steps, config.checkpoint_every_steps
        due = is_last or (step % every == 0 if every else is_epoch_end)
        return due, is_last or (step % often == 0 if often else due)

    def _validate(self, place: str) -> tuple[dict[str, float], bool]:
        phase = f"validation after {place}"
        self.beat(phase)
        model, validator = self.run.model, self.run.validator
        with self.run.averaged():
            metrics = validator.measure(model, self.run.tables, lambda: self.beat(phase))
        name = str(validator.metric)
        if name not in metrics:
            raise DataError(
                f"train.metric can be measured on valid. Received: {name} is not defined there: "
                "its examples are of one label only, or have no targets in the catalogue. Use "
                "another metric, or a larger valid split."
            )
        is_best = self.stopping.update(self.global_step, metrics[name])
        weights = model.named_weights() if validator.fits_weights(model) else {}
        self.progress.validated(self.global_step, metrics, name, is_best, weights)
        return metrics, is_best

    def _save(self, metrics: dict[str, float], is_best: bool) -> None:
        self.beat(f"saving step {self.global_step}")
        epoch, step_in_epoch = divmod(self.global_step, self.steps_per_epoch)
        position = checkpoint.Position(
            global_step=self.global_step,
            epoch=epoch,
            step_in_epoch=step_in_epoch,
            lanes=self.run.reader.lanes,
            metrics=metrics,
            early_stopping=self.stopping.state(),
            skipped_steps=self.num_skipped,
            privacy=self._spent(),
        )
        path = self.series.save(self.run.inputs.identity, position)
        together("checkpoint.after", lambda: self._after_save(path, is_best), self.run.collectives)
        self.beat(f"publishing step {self.global_step}")
        checkpoint.publish_checkpoints(self.run.config, self.run.collectives)
        self.beat(f"step {self.global_step} is saved")

    def _spent(self) -> checkpoint.PrivacyEntry | None:
        spending, steps = self.run.spending, self.global_step
        if spending is None:
            return None
        return checkpoint.PrivacyEntry(
            **asdict(spending), num_steps=steps, epsilon=spending.epsilon(steps)
        )

    def _after_save(self, path: Path, is_best: bool) -> None:
        if not self.is_first:
            return
        if is_best:
            value = self.stopping.best_value
            checkpoint.mark_best(path, str(self.run.validator.metric), value)
        checkpoint.prune(self.directory, self.train_config.keep_checkpoints)
        logger.info("saved %s%s", path.name, " (best)" if is_best else "")

    def _repair_best(self) -> None:
        """Point best.json where the resumed state says: a crash may have come between the two."""
        if not self.is_first or self.stopping.best_value is None:
            return
        path = self.directory / checkpoint.checkpoint_name(self.stopping.best_step)
        record = checkpoint.read_best(self.directory)
        if path.is_dir() and (record is None or record["checkpoint"] != path.name):
            metric = str(self.run.validator.metric)
            checkpoint.mark_best(path, metric, self.stopping.best_value)

    def _result(self) -> TrainResult:
        spent = self._spent()
        # best.json is written by rank 0 before an exchange that all ranks have passed
        record = checkpoint.read_best(self.directory)
        name = (
            checkpoint.checkpoint_name(self.global_step) if record is None else record["checkpoint"]
        )
        return TrainResult(
            checkpoint=self.directory / str(name),
            metric=str(self.run.validator.metric),
            value=self.stopping.best_value,
            steps=self.global_step,
            epochs=self.global_step // self.steps_per_epoch,
            examples_per_second=self.progress.examples_per_second,
            seconds=self.progress.seconds,
            stopped_early=self.stopping.should_stop,
            num_ranks=self.run.collectives.world.world_size,
            epsilon=None if spent is None else spent.epsilon,
        )
