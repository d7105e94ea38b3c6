"""The dataset's manifest: the contract between prepare, which writes it, and everybody else.

A dataset is a directory with ``manifest.json``, written last; what has no manifest is not a
dataset. Only files named in the manifest belong to it. Columns of each split:

- ``train/ valid/ test/`` (examples, one row an event): user_index, item_index, time int64; label,
  weight float32; num_events int64; history, history_times list<int64>; task_<name> float32 of every
  further task, NaN where it is not known; every user and context feature.
- ``valid_queries/ test_queries/`` (one row a user): user_id string, user_index, time (the cut),
  num_events, history, history_times, seen list<int64>, targets list<int64>, every user feature;
  context features hold those of the user's first withheld event.
- ``items/`` (one row a known item, item_index ascending over the files in manifest order, without a
  gap from FIRST_INDEX): item_id string, item_index int64, title string, count int64, every item
  feature. A free index has item_id "", count FREE_COUNT and no features: it stands for no item.
- ``users/`` (one row a known user): user_id string, user_index (1 when train never saw them),
  num_events, time, history, history_times, seen: over all splits, every user feature; context
  features are padding and zero.
- ``vocab/<name>/``: value string, id int64, count int64; with prepare.evict_after_days also
  last_time int64.
- ``vocab_free/<name>/``: id int64, of no value at present; ``vocab_reused/<name>/``: id int64,
  generation int64 in which it was last given to another value. In extended datasets, and where
  people were forgotten.

Where the manifest has event_types, there is history_types list<int64> beside every history: of each
event its kind, FIRST_INDEX + the kind's place among the event_types, or UNKNOWN_INDEX.

Feature columns: int64 for ``categorical``; list<int64> for ``multi_categorical``, ``text`` and
``hashed``; float32 for ``number``; list<float32> of fixed length for ``vector``. There are no nulls
anywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distrec.columns import MAX_TASKS, TASK_NAME, recent_column
from distrec.errors import DataError
from distrec.untrusted import read_manifest_text

TrainRows = Literal["events", "windows"]
"""What a row of train is: one event with what came before it, or one stretch of a user's events."""

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MAX_ANCESTORS = 100
# a table of more rows is a slip or an attack, and its ids would not fit what they travel in
_MOST_ROWS = 2**48


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class FileEntry(_Part):
    """One Parquet file of a split."""

    path: str
    """Relative to the dataset directory, with forward slashes."""
    num_rows: int = Field(ge=0, lt=2**63)
    num_bytes: int = Field(ge=0, lt=2**63)
    sha256: str
    pages_sha256: str = ""
    """Of all before the footer, which Spark writes in another order in every JVM; older manifests
    do not have it."""


class Split(_Part):
    """One directory of Parquet files."""

    num_rows: int = Field(ge=0)
    files: tuple[FileEntry, ...]


class FeatureSpec(_Part):
    """One encoded feature."""

    name: str
    side: Literal["user", "item", "context"]
    kind: Literal["categorical", "multi_categorical", "text", "hashed", "number", "vector"]
    column: str
    """Dataset column: columns.feature_column(side, name)."""
    num_embeddings: int = Field(default=0, ge=0, lt=_MOST_ROWS)
    """Ids lie in [0, num_embeddings), 0 padding and 1 unknown included; 0 for numbers, vectors."""
    dim: int = Field(default=0, ge=0, le=2**20)
    """Width of a dense feature: 1 for a number, the length of a vector; 0 for ids."""

    @property
    def is_dense(self) -> bool:
        """Whether the feature goes into the dense matrix (else it is ids)."""
        return self.kind in ("number", "vector")

    @property
    def has_several_ids(self) -> bool:
        """Whether a cell is a list of ids."""
        return self.kind in ("multi_categorical", "text", "hashed")


class Vocabulary(_Part):
    """One fitted vocabulary, in ``vocab/<name>/``."""

    name: str
    num_embeddings: int
    """Number of ids, padding and unknown included."""
    sha256: str
    """Of the (value, id) pairs, whatever the files: two datasets with equal ones share ids."""
    files: tuple[FileEntry, ...]
    num_free: int = 0
    """Ids below num_embeddings that no value has; a later extension may give them away."""
    free_files: tuple[FileEntry, ...] = ()
    """Those ids."""
    reused_files: tuple[FileEntry, ...] = ()
    """Ids that changed hands, each with the generation in which it last did."""
    num_admitted: int = 0
    """Values that this extension gave an id."""
    num_evicted: int = 0
    """Values that lost their id in this extension."""
    num_reused: int = 0
    """Of the admitted values, those with an id that another value had."""


class VocabularyState(_Part):
    """What is known of a vocabulary of an earlier dataset."""

    num_embeddings: int
    sha256: str


class Ancestor(_Part):
    """A dataset that this one extends, directly or through others."""

    content_hash: str
    """DatasetManifest.content_hash."""
    vocabularies: dict[str, VocabularyState]


class Extension(_Part):
    """What a dataset extends: every value of its vocabularies kept its id, or lost it."""

    generation: int = Field(ge=1)
    """Extensions that led here from a dataset that extends none."""
    ancestors: tuple[Ancestor, ...] = Field(min_length=1)
    """The extended dataset, the one that it extends and so on, at most MAX_ANCESTORS."""


class Forgetting(_Part):
    """That people were taken out of a dataset; who they were is kept nowhere."""

    content_hash: str
    """Of the dataset before."""
    num_users: int = Field(ge=0)
    """Of them."""


class DatasetManifest(_Part):
    """What a dataset directory holds."""

    format_version: int = FORMAT_VERSION
    distrec_version: str
    created_at: str
    """UTC, ISO 8601."""
    config_hash: str
    """Hash of the configuration sections that prepare depends on."""
    config: dict[str, Any]
    """The resolved configuration of prepare."""
    schemas: dict[str, dict[str, str]]
    """Split -> column -> Arrow type as pyarrow prints it: int64, float, string, list<int64> ..."""
    splits: dict[str, Split]
    """train, valid, test, valid_queries, test_queries, items, users, rejects."""
    features: tuple[FeatureSpec, ...]
    vocabularies: dict[str, Vocabulary]
    """user_id, item_id and one a categorical feature, by feature column."""
    num_users: int = Field(ge=0, lt=_MOST_ROWS)
    """Rows of a user table: users in train + 2."""
    num_trained_items: int = Field(ge=0, lt=_MOST_ROWS)
    """Rows of an item table: items in train + 2. Ids at or above it are cold."""
    num_items: int = Field(ge=0, lt=_MOST_ROWS)
    """Rows of the item matrix: every known item + 2."""
    history_length: int = Field(ge=1, le=1_000_000)
    """L."""
    train_rows: TrainRows = "events"
    """Windows: the item is the window's last event, the history those before it, of which the first
    is the last of the window before."""
    has_time: bool
    event_types: tuple[str, ...] = ()
    """Kinds of event, where histories say of which kind each event was; else none."""
    has_labels: bool
    """Whether label tells positives from negatives (else every row is a positive)."""
    rating_scale: tuple[float, float] | None = None
    """The lowest and the highest rating in train, where label is a rating; has_labels is False."""
    tasks: tuple[Annotated[str, Field(pattern=TASK_NAME)], ...] = Field(
        default=(), max_length=MAX_TASKS
    )
    """Further tasks beside label, each with a column of its own in train, valid and test."""
    counts: dict[str, int]
    """Rows at each stage: read, rejected, duplicates, filtered, k_core, kept ... in order."""
    rejects: dict[str, int]
    """Rejected rows by reason."""
    statistics: dict[str, dict[str, float]]
    """Fitted numbers, by feature column: mean, std, min, max, missing."""
    recent_after: dict[str, int] = {}
    """valid, test, users -> Unix seconds: positive events of train, for test also of valid, for
    users of all three, that are later are counted in items, column recent_valid and so on. Empty:
    there are no such columns."""
    extends: Extension | None = None
    """The previous dataset, when this one was made with prepare.extend."""
    user_key_digest: str = ""
    """Of the key with which users' ids are hashed (distrec.user_key); "" where they are not."""
    forgotten: tuple[Forgetting, ...] = ()
    """Each time that `distrec forget` took people out of it, in order."""

    def features_of(self, *sides: str) -> tuple[FeatureSpec, ...]:
        """The features of the given sides, in the manifest's order."""
        return tuple(feature for feature in self.features if feature.side in sides)

    def num_dense(self, *sides: str) -> int:
        """Width of the dense matrix of the given sides."""
        return sum(feature.dim for feature in self.features_of(*sides))

    def recent_column(self, split: str) -> str | None:
        """Items' column of what was recent when valid, test or users came, if there is one."""
        return recent_column(split) if split in self.recent_after else None

    @property
    def generation(self) -> int:
        """Number of extensions that led here."""
        return 0 if self.extends is None else self.extends.generation

    def as_ancestor(self) -> Ancestor:
        """What a dataset that extends this one records of it."""
        return Ancestor(
            content_hash=self.content_hash,
            vocabularies={
                name: VocabularyState(num_embeddings=one.num_embeddings, sha256=one.sha256)
                for name, one in self.vocabularies.items()
            },
        )

    def all_files(self) -> Iterator[FileEntry]:
        """Every file that belongs to the dataset."""
        for split in self.splits.values():
            yield from split.files
        for one in self.vocabularies.values():
            yield from (*one.files, *one.free_files, *one.reused_files)

    @property
    def content_hash(self) -> str:
        """Hash of the data itself: the files of every split, by name and checksum.

        Where pages have a checksum of their own, equal data has an equal hash whoever wrote it;
        the names and types of columns, which stand in the footers, are then hashed beside them.
        """
        files = [
            (name, entry) for name, split in sorted(self.splits.items()) for entry in split.files
        ]
        has_pages = all(entry.pages_sha256 for _, entry in files)
        names: list[Any] = [
            (name, entry.path, entry.pages_sha256 if has_pages else entry.sha256)
            for name, entry in files
        ]
        if has_pages:
            names += [(name, list(schema.items())) for name, schema in sorted(self.schemas.items())]
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def read_manifest(directory: str | Path) -> DatasetManifest:
    """Read and check the manifest of a dataset directory.

    Raises:
        DataError: There is no manifest, it is damaged, or of another format version.
    """
    path = Path(directory) / MANIFEST
    if not os.path.lexists(path):
        raise DataError(
            f"a dataset has a {MANIFEST}, written last. Received: {directory}, which has none. "
            "Run prepare first; a directory without a manifest is the rest of a job that failed."
        )
    text = read_manifest_text(path, DataError)
    try:
        version = json.loads(text).get("format_version")
        if version != FORMAT_VERSION:
            raise DataError(
                f"this distrec reads datasets of format {FORMAT_VERSION}. Received: format "
                f"{version} ({path}). Run prepare again."
            )
        manifest = DatasetManifest.model_validate_json(text)
    except (ValidationError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is not a dataset manifest: {error}. Run prepare again.") from error
    _check_paths(manifest, path)
    _check_counts(manifest, path)
    return manifest


def _check_paths(manifest: DatasetManifest, path: Path) -> None:
    """Every file is one of its own, inside the dataset."""
    seen = set()
    for entry in manifest.all_files():
        parts = entry.path.split("/")
        if any(part in ("", ".", "..") for part in parts) or set(entry.path) & {"\\", "\0"}:
            raise DataError(
                f"a manifest names files inside its dataset. Received: {entry.path!r} ({path}). "
                "Run prepare again."
            )
        if entry.path in seen:
            raise DataError(
                f"a manifest names each file once. Received twice: {entry.path!r} ({path}). Run "
                "prepare again."
            )
        seen.add(entry.path)


def _check_counts(manifest: DatasetManifest, path: Path) -> None:
    """Numbers from which sizes of tables and positions of rows follow, and what is named once."""
    for name, split in manifest.splits.items():
        held = sum(entry.num_rows for entry in split.files)
        if held != split.num_rows:
            raise DataError(
                f"the files of a split have its rows. Received: {held} rows in files of {name}, "
                f"which has {split.num_rows} ({path}). Run prepare again."
            )
    if manifest.num_trained_items > manifest.num_items:
        raise DataError(
            f"items that train saw are items. Received: num_trained_items = "
            f"{manifest.num_trained_items}, num_items = {manifest.num_items} ({path}). Run prepare "
            "again."
        )
    if len(set(manifest.tasks)) != len(manifest.tasks):
        raise DataError(
            f"a manifest names each task once. Received: {list(manifest.tasks)} ({path}). Run "
            "prepare again."
        )
    for column, numbers in manifest.statistics.items():
        if not all(math.isfinite(number) for number in numbers.values()):
            raise DataError(
                f"fitted numbers are finite. Received: {numbers} for column {column!r} ({path}). "
                "Run prepare again."
            )
