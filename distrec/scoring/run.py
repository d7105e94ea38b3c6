"""Batch scoring from end to end: checks, encoded catalogue, users, scores, manifest."""

from __future__ import annotations

import logging
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path

from pyspark.sql import SparkSession

from distrec import checkpoint
from distrec import columns as c
from distrec.config import Config
from distrec.dataset import MANIFEST, DatasetManifest, read_manifest
from distrec.errors import DataError
from distrec.files import commit, staging
from distrec.prepare.faults import translated
from distrec.reader.files import check_files, open_split
from distrec.reader.layout import query_layout
from distrec.scoring.export import export_items, read_export_manifest
from distrec.scoring.lists import open_list, read_split, write_block_list
from distrec.scoring.model import ScoringModel, check_same_data, open_model
from distrec.scoring.partition import ScoreTask
from distrec.scoring.users import KEY, ListedUsers, Users, user_columns
from distrec.scoring.write import ScoreManifest, num_partitions, write_scores
from distrec.spark import tasks_ended
from distrec.user_key import key_of_dataset

logger = logging.getLogger("distrec.score")

_WORK = "work"


def run(spark: SparkSession, config: Config) -> ScoreManifest:
    """Write the best items of every user to config.scores_directory, whole or not at all.

    The run's directory lies on a file system that the driver and all executors see under one path.

    Args:
        spark: From distrec.spark.session, or any other.
        config: Of the run; its [score] counts.

    Returns:
        The manifest, as it was written.

    Raises:
        CheckpointError: There is no checkpoint, it is damaged, or of another dataset.
        DataError: The dataset or a list is missing, damaged or empty; an executor cannot read.
    """
    dataset = read_manifest(config.dataset_directory)
    check_files(config.dataset_directory, dataset, config.reader.verify)
    model = open_model(checkpoint.find(config.checkpoint_directory, config.score.checkpoint))
    check_same_data(model, dataset, config.dataset_directory)
    with translated("the scores"):
        return _Scoring(spark, config, dataset, model).run()


class _Scoring:
    """One run, with everything that was checked beforehand."""

    def __init__(
        self, spark: SparkSession, config: Config, dataset: DatasetManifest, model: ScoringModel
    ) -> None:
        self.spark, self.config, self.dataset, self.model = spark, config, dataset, model
        self.score = config.score
        self.directory = config.dataset_directory
        if not dataset.splits[c.USERS].num_rows and self.score.users is None:
            raise DataError(f"there is nobody to score: {self.directory} has no users. Set {KEY}.")
        layout = query_layout(dataset.features, dataset.event_types, targets=False)
        open_split(self.directory, dataset, c.USERS, layout)
        # now, so that a wrong path or column is told before the catalogue is encoded
        self.listed = self.blocked = self.key = None
        if self.score.users is not None:
            self.key = key_of_dataset(dataset.user_key_digest, config.prepare)
            self.listed = open_list(spark, self.score.users, KEY, c.USER_ID)
        if self.score.block_list is not None:
            self.blocked = open_list(spark, self.score.block_list, "score.block_list", c.ITEM_ID)
        self.items = read_split(spark, self.directory, dataset, c.ITEMS).select(
            c.ITEM_ID, c.ITEM_INDEX
        )

    def run(self) -> ScoreManifest:
        config, started = self.config, time.monotonic()
        export = export_items(
            self.model,
            self.directory,
            self.dataset,
            config.directory / "export",
        )
        with staging(config.scores_directory) as root, tasks_ended(self.spark):
            work = root / _WORK
            work.mkdir()
            blocked = self._write_block_list(work)
            users = self._users(work)
            task = self._task(export, blocked)
            self._log_start(users)
            files = write_scores(self.spark, users, task, self.score.num_files, root)
            manifest = ScoreManifest(
                created_at=datetime.now(UTC).isoformat(timespec="seconds"),
                model_version=task.model_version,
                checkpoint=self.model.path.name,
                dataset_hash=self.dataset.content_hash,
                k=self.score.k,
                num_users=users.num_users,
                num_rows=sum(file.num_rows for file in files),
                files=files,
            )
            shutil.rmtree(work)
            (root / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
            commit(root, config.scores_directory)
        seconds = time.monotonic() - started
        logger.info(
            "scored: %d users, %d rows in %d files, %.1f s, %.0f users/s",
            *(users.num_users, manifest.num_rows, len(files), seconds, users.num_users / seconds),
        )
        return manifest

    def _write_block_list(self, work: Path) -> Path | None:
        if self.blocked is None or self.score.block_list is None:
            return None
        num_items = self.dataset.num_items - c.FIRST_INDEX
        path = self.score.block_list
        return write_block_list(self.spark, self.blocked, path, self.items, num_items, work)

    def _users(self, work: Path) -> Users:
        known = read_split(self.spark, self.directory, self.dataset, c.USERS)
        if self.listed is None or self.score.users is None:
            frame = known.select(*user_columns(self.dataset))
            return Users(frame, self.dataset.splits[c.USERS].num_rows)
        maker = ListedUsers(
            self.spark, self.directory, self.dataset, known, self.items, work, self.key
        )
        return maker.users(self.listed, self.score.users)

    def _task(self, export: Path, blocked: Path | None) -> ScoreTask:
        return ScoreTask(
            checkpoint=str(self.model.path.absolute()),
            export=str(export.absolute()),
            export_identity=read_export_manifest(export).identity,
            blocked=str(blocked.absolute()) if blocked else "",
            model_version=self.model.version,
            k=self.score.k,
            exclude_seen=self.score.exclude_seen,
            user_block=self.score.user_block,
            item_block=self.score.item_block,
            has_probabilities=bool(self.model.model.tasks),
        )

    def _log_start(self, users: Users) -> None:
        num_items = self.dataset.num_items - c.FIRST_INDEX
        logger.info(
            "scoring %d users x %d items with %s: %d partitions, blocks of %d users x %d items",
            users.num_users,
            num_items,
            self.model.version,
            num_partitions(
                self.spark, users.num_users, self.score.user_block, self.score.num_files
            ),
            self.score.user_block,
            min(self.score.item_block, num_items),
        )
