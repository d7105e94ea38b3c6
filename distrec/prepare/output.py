"""The files of a dataset: which frames are written where, in which columns, and the manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from distrec import __version__
from distrec import columns as c
from distrec.config import Config, section_hash
from distrec.dataset import DatasetManifest, FileEntry, Vocabulary
from distrec.prepare.clean import Audit
from distrec.prepare.entities import Entities
from distrec.prepare.examples import Examples
from distrec.prepare.extend import Continuation
from distrec.prepare.features import TRAIN_COUNT, FittedFeature, encode
from distrec.prepare.manifest import as_split, entries
from distrec.prepare.rank import with_rank
from distrec.prepare.vocabulary import FittedVocabulary, vocabulary_hash
from distrec.prepare.workspace import Workspace, concurrently, stage
from distrec.prepare.write import POSITION, Written, num_train_files, shuffled, write_files

CONFIG_SECTIONS = ("prepare", "seed")
"""Sections of the configuration that a dataset depends on: those of config_hash."""


@dataclass
class Output:
    """Writes a dataset into the workspace; write() first, then manifest().

    Args:
        config: Of the run.
        workspace: Where it grows.
        examples: Events, ready for histories.
        users: Known users.
        items: Known items.
        features: Fitted, in the manifest's order.
        audit: What was rejected.
        counts: Rows by step; train, valid and test among them.
        times: min and max of the events' times.
        continuation: What is extended.
        rating_scale: The lowest and the highest label of train, where they are ratings.
        recent_after: For the manifest.
    """

    config: Config
    workspace: Workspace
    examples: Examples
    users: Entities
    items: Entities
    features: Sequence[FittedFeature]
    audit: Audit
    counts: dict[str, int]
    times: dict[str, float]
    continuation: Continuation
    rating_scale: tuple[float, float] | None
    recent_after: Mapping[str, int]
    written: dict[str, Written] = field(default_factory=dict)

    @property
    def vocabularies(self) -> list[FittedVocabulary]:
        """user_id, item_id and one a categorical feature."""
        of_features = [feature.vocabulary for feature in self.features]
        found = [vocabulary for vocabulary in of_features if vocabulary is not None]
        return [self.users.vocabulary, self.items.vocabulary, *found]

    def write(self) -> None:
        """Write every file but the manifest."""
        functions: list[Callable[[], Any]] = [
            self._write_train,
            partial(self._write_held, c.TEST, c.TEST_QUERIES),
            partial(self._write_held, c.VALID, c.VALID_QUERIES),
            self._write_users,
            self._write_items,
            self._write_rejects,
        ]
        functions += [partial(self._write_vocabulary, one) for one in self.vocabularies]
        concurrently(*functions)

    def _num_files(self, num_rows: int) -> int:
        return max(1, -(-num_rows // self.config.prepare.rows_per_file))

    def _write_train(self) -> None:
        rows, prepare = self.counts[c.TRAIN], self.config.prepare
        examples = self.examples
        if prepare.train_rows == "windows":
            windows = self.workspace.materialize(examples.windows(), "windows")
            rows = windows.count()
            train = shuffled(windows, self._keys, self.config.seed, rows)
        else:
            # numbered while the rows are still thin
            train = shuffled(examples.of(c.TRAIN), self._keys, self.config.seed, rows)
            train = examples.with_histories(train, c.TRAIN)
        train = examples.with_user_features(train)
        files = num_train_files(rows, prepare.num_files, prepare.rows_per_file)
        with stage("write train"):
            self.written[c.TRAIN] = write_files(
                train, c.TRAIN, examples.example_columns, rows, files, self.workspace
            )

    @property
    def _keys(self) -> list[str]:
        return [column for column in self.examples.events.columns if column != c.SPLIT]

    def _write_shuffled(
        self, frame: DataFrame, name: str, columns: list[str], keys: list[str], num_rows: int
    ) -> None:
        placed = shuffled(frame, keys, self.config.seed, num_rows)
        files = self._num_files(num_rows)
        with stage(f"write {name}"):
            self.written[name] = write_files(placed, name, columns, num_rows, files, self.workspace)

    def _write_held(self, split: str, queries: str) -> None:
        """The examples of valid or test, and the queries made of them."""
        examples = self.examples
        held = examples.with_histories(examples.of(split), split)
        held = self.workspace.materialize(held, split)
        described = examples.with_user_features(held)
        columns = examples.example_columns
        self._write_shuffled(described, split, columns, self._keys, self.counts[split])
        asked = self.workspace.materialize(examples.queries(held, split), queries)
        described = examples.with_user_features(asked)
        columns = examples.query_columns
        self._write_shuffled(described, queries, columns, [c.USER_ID], asked.count())

    def _write_users(self) -> None:
        now = self.examples.users_now(self.users.frame, int(self.times["max"]))
        columns = self.examples.user_columns
        self._write_shuffled(now, c.USERS, columns, [c.USER_ID], self.users.num_rows)

    def _write_items(self) -> None:
        features = [feature for feature in self.features if feature.spec.side == "item"]
        encoded = encode(self.items.frame, features).withColumnRenamed(TRAIN_COUNT, c.COUNT)
        columns = [c.ITEM_ID, c.ITEM_INDEX, c.TITLE, c.COUNT]
        columns += map(c.recent_column, self.recent_after)
        columns += [feature.spec.column for feature in features]
        self._write_ordered(encoded, c.ITEM_INDEX, c.ITEMS, columns, self.items.num_rows)

    def _write_vocabulary(self, vocabulary: FittedVocabulary) -> None:
        name, rows = f"vocab/{vocabulary.name}", vocabulary.num_values
        times = [c.LAST_TIME] if c.LAST_TIME in vocabulary.frame.columns else []
        columns = [c.VALUE, c.ID, c.COUNT, *times]
        growth = vocabulary.growth
        if growth is None:
            self._write_ordered(vocabulary.frame, c.ID, name, columns, rows)
            return
        self._write_ids(vocabulary.frame, name, columns, rows)
        free, reused = _growth_directories(vocabulary.name)
        self._write_ids(growth.free, free, [c.ID], growth.num_free)
        columns = [c.ID, c.GENERATION]
        self._write_ids(growth.reused, reused, columns, growth.num_changed_hands)

    def _write_ids(self, frame: DataFrame, name: str, columns: list[str], num_rows: int) -> None:
        """In order of the ids, which may have gaps."""
        placed = with_rank(frame, [F.asc(c.ID)], POSITION, num_rows, self.workspace)
        self.written[name] = write_files(
            placed, name, columns, num_rows, self._num_files(num_rows), self.workspace,
            contiguous=True,
        )  # fmt: skip

    def _write_ordered(
        self, frame: DataFrame, index: str, name: str, columns: list[str], num_rows: int
    ) -> None:
        placed = frame.withColumn(POSITION, F.col(index) - c.FIRST_INDEX)
        files = self._num_files(num_rows)
        self.written[name] = write_files(
            placed, name, columns, num_rows, files, self.workspace, contiguous=True
        )

    def _write_rejects(self) -> None:
        columns = [c.SOURCE, c.REASON, c.RAW_ROW]
        if not self.audit.rejected:
            self.written[c.REJECTS] = Written(dict.fromkeys(columns, "string"))
            return
        whole = self.audit.rejected[0]
        for more in self.audit.rejected[1:]:
            whole = whole.unionByName(more)
        rows = sum(self.audit.reasons.values())
        self._write_shuffled(whole, c.REJECTS, columns, columns, rows)

    def manifest(self) -> DatasetManifest:
        """What is written, with checksums."""
        splits = [name for name in sorted(self.written) if not name.startswith("vocab")]
        files = entries(self.workspace, self.written)
        prepare = self.config.prepare
        statistics = {one.spec.column: one.statistics for one in self.features if one.statistics}
        if self.examples.has_time:
            statistics[c.TIME] = self.times
        sections = self.config.model_dump(mode="json")
        return DatasetManifest(
            distrec_version=__version__,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            config_hash=section_hash(self.config, *CONFIG_SECTIONS),
            config={name: sections[name] for name in CONFIG_SECTIONS},
            schemas={name: self.written[name].schema for name in splits},
            splits={name: as_split(files[name]) for name in splits},
            features=tuple(feature.spec for feature in self.features),
            vocabularies={one.name: _entry(one, files) for one in self.vocabularies},
            num_users=self.users.vocabulary.num_embeddings,
            num_trained_items=self.items.vocabulary.num_embeddings,
            num_items=self.items.num_rows + c.FIRST_INDEX,
            history_length=prepare.history_length,
            train_rows=prepare.train_rows,
            has_time=self.examples.has_time,
            event_types=prepare.told_event_types,
            has_labels=prepare.events.label is not None or prepare.label_from_rating,
            rating_scale=self.rating_scale,
            tasks=prepare.events.tasks,
            counts=self.counts,
            rejects=dict(sorted(self.audit.reasons.items())),
            statistics=statistics,
            recent_after=dict(self.recent_after),
            extends=self.continuation.extension(),
        )


def _growth_directories(name: str) -> tuple[str, str]:
    """Of the free ids and of the reused ones of a vocabulary."""
    return f"vocab_free/{name}", f"vocab_reused/{name}"


def _entry(vocabulary: FittedVocabulary, files: Mapping[str, tuple[FileEntry, ...]]) -> Vocabulary:
    """The manifest's entry of a vocabulary that is written."""
    entry = Vocabulary(
        name=vocabulary.name,
        num_embeddings=vocabulary.num_embeddings,
        sha256=vocabulary_hash(vocabulary),
        files=files[f"vocab/{vocabulary.name}"],
    )
    growth = vocabulary.growth
    if growth is None:
        return entry
    free, reused = _growth_directories(vocabulary.name)
    return entry.model_copy(
        update={
            "num_free": growth.num_free,
            "free_files": files[free],
            "reused_files": files[reused],
            "num_admitted": growth.num_admitted,
            "num_evicted": growth.num_evicted,
            "num_reused": growth.num_reused,
        }
    )
