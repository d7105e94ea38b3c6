"""Sections of prepare: where raw rows are, what their columns are, how they are divided."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from distrec import columns
from distrec.config.section import Section
from distrec.config.store_url import refuse_passwords

TaskName = Annotated[str, Field(pattern=columns.TASK_NAME)]
SourcePath = Annotated[str, Field(pattern=r"^[^\x00]+$")]


class Source(Section):
    """Where raw rows are read from."""

    paths: tuple[SourcePath, ...] = Field(min_length=1)
    """Files, directories or glob patterns, on any file system that Spark reads."""
    format: Literal["csv", "json", "parquet"] = "csv"
    """csv (any separator), json (one object a line) or parquet. gzip is told by the ending .gz."""
    separator: str = Field(default=",", min_length=1)
    """csv: between two columns; several characters are allowed, such as "::"."""
    header: bool = True
    """csv: whether the first line of each file names the columns."""
    column_names: tuple[str, ...] = ()
    """csv without header: the names of the columns, left to right."""
    encoding: str = "UTF-8"
    """csv and json: of the text. Bytes that are not of this encoding go to rejects."""
    quote: str = Field(default='"', max_length=1)
    """csv: character around values that hold the separator; "" for none."""

    @model_validator(mode="after")
    def _names(self) -> Source:
        if self.format == "csv" and not self.header and not self.column_names:
            raise ValueError(
                "csv without a header needs column_names. Received: header = false, no "
                "column_names. List the columns from left to right"
            )
        if self.column_names and (self.format != "csv" or self.header):
            raise ValueError(
                "column_names is for csv without a header. Received: "
                f"format = {self.format!r}, header = {str(self.header).lower()}. Remove it"
            )
        return self


# a key that is set for another kind would be ignored in silence
_KINDS_OF_KEYS = {
    "separator": ("multi_categorical", "vector"),
    "min_count": ("categorical", "multi_categorical"),
    "transform": ("number",),
    "clip": ("number",),
    "missing": ("number", "vector"),
    "num_buckets": ("number", "text", "hashed"),
    "num_hashes": ("hashed",),
    "dim": ("vector",),
    "ngrams": ("text",),
    "min_df": ("text",),
    "max_values": ("multi_categorical", "text"),
}


class FeatureConfig(Section):
    """One raw column that becomes a feature."""

    column: str
    """Column of the source."""
    kind: Literal["categorical", "multi_categorical", "number", "vector", "text", "hashed"]
    """categorical: one value. multi_categorical: several, split at `separator` or a list column.
    number: a float. vector: numbers, split at `separator` or a list column. text: words. hashed:
    one value, as categorical, but without a vocabulary: for more values than rows are to be had."""
    name: str = ""
    """Name of the feature; by default the column's."""
    separator: str = "|"
    """multi_categorical, vector: between two values of one cell."""
    min_count: int = Field(default=1, ge=1)
    """categorical: rarer values share the unknown id."""
    transform: Literal["standardize", "log", "none"] = "standardize"
    """number: standardize = (x - mean) / std fitted on train; log = sign(x) log(1 + |x|), then
    standardize."""
    clip: tuple[float, float] | None = None
    """number: lower and upper bound, applied to the raw value."""
    missing: Literal["mean", "zero", "reject"] = "mean"
    """number, vector: what stands for a missing value; mean is zero after standardising."""
    num_buckets: int = Field(default=0, ge=0, le=2**31 - 1)
    """number: if > 1, make it categorical by this many quantile buckets fitted on train.
    text, hashed: number of hash buckets (65,536 when 0)."""
    num_hashes: int = Field(default=2, ge=1, le=8)
    """hashed: buckets of a value, by as many hash functions; two values rarely share all."""
    dim: int = Field(default=0, ge=0, le=65_536)
    """vector: its length; a row with another length is rejected."""
    ngrams: int = Field(default=2, ge=1, le=4)
    """text: longest word n-gram that is hashed."""
    min_df: int = Field(default=5, ge=1)
    """text: n-grams that fewer items (users, events) of train have are left out: they tell apart
    those that have them, and say nothing of new ones."""
    max_values: int = Field(default=32, ge=1, le=1_000_000)
    """multi_categorical, text: values kept of one cell, the first ones."""

    @property
    def feature_name(self) -> str:
        """The name, which is the column's unless it is given."""
        return self.name or self.column

    @model_validator(mode="after")
    def _possible(self) -> FeatureConfig:
        if self.kind == "vector" and self.dim < 1:
            raise ValueError(
                f"a vector needs dim >= 1. Received: dim = {self.dim} (column {self.column!r}). "
                "Set dim to the length of the vectors"
            )
        if self.feature_name in columns.RESERVED_FEATURE_NAMES:
            raise ValueError(
                f"the feature names {sorted(columns.RESERVED_FEATURE_NAMES)} are taken. Received: "
                f"{self.feature_name!r}. Set name to another word"
            )
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.feature_name):
            raise ValueError(
                "the name of a feature becomes that of a column, a file and a table: letters, "
                f"digits, _ and -. Received: {self.feature_name!r}. Set name"
            )
        for key, kinds in _KINDS_OF_KEYS.items():
            default = type(self).model_fields[key].default
            if self.kind not in kinds and getattr(self, key) != default:
                raise ValueError(
                    f"{key} is for {' and '.join(kinds)}. Received: {key} = "
                    f"{getattr(self, key)!r} with kind = {self.kind!r}. Remove it, or change kind"
                )
        if self.clip is not None and self.clip[0] >= self.clip[1]:
            raise ValueError(f"clip is (lower, upper) with lower < upper. Received: {self.clip}")
        return self


class EventsConfig(Source):
    """The events: who did what to which item, when."""

    user: str = "user_id"
    """Column with the user's id; any type, kept as text."""
    item: str = "item_id"
    """Column with the item's id; any type, kept as text."""
    time: str | None = None
    """Column with the time. Without one there are no ordered histories: order is by item id."""
    time_format: str = "unix_seconds"
    """unix_seconds, unix_milliseconds, or a Spark pattern such as yyyy-MM-dd HH:mm:ss (UTC)."""
    rating: str | None = None
    """Column with a number that says how much it was liked."""
    label: str | None = None
    """Column with 0 or 1: then negatives are kept and AUC and log loss are reported."""
    tasks: tuple[TaskName, ...] = Field(default=(), max_length=columns.MAX_TASKS)
    """Columns with 0 or 1 of further tasks beside label, such as purchased and shared, for
    model.multi_task. Where one is empty nobody knows, and its task passes over the event."""
    weight: str | None = None
    """Column with a non-negative weight of the event in the loss."""
    event_type: str | None = None
    """Column with the kind of event: view, cart, buy."""
    split: str | None = None
    """Column with train, valid or test, for split.method = "given"."""
    context: tuple[FeatureConfig, ...] = ()
    """Features of the event itself: device, hour, place."""

    @model_validator(mode="after")
    def _task_names(self) -> EventsConfig:
        # Spark does not tell capitals from small letters
        names = [name.lower() for name in self.tasks]
        if len(set(names)) != len(names) or columns.LABEL in names:
            raise ValueError(
                "tasks names each further task once, and label, the first task, is none of them. "
                f"Received: {list(self.tasks)}. Rename the column"
            )
        return self


class TableConfig(Source):
    """A catalogue: one row an item, or one row a user."""

    id: str
    """Column with the id, as it stands in the events."""
    title: str | None = None
    """Items: column with the text to show to people, in reports."""
    features: tuple[FeatureConfig, ...] = ()
    """Features of the item or user."""
    duplicates: Literal["error", "first"] = "error"
    """What to do when an id stands twice: fail, or keep one row and send the others to rejects."""


_METHOD_OF_KEYS = {
    "valid_time": "temporal",
    "test_time": "temporal",
    "known_share": "held_out_users",
    "valid_paths": "given",
    "test_paths": "given",
}


class SplitConfig(Section):
    """How events are divided into train, valid and test."""

    method: Literal["leave_one_out", "temporal", "random", "held_out_users", "given"] = (
        "leave_one_out"
    )
    """leave_one_out: each user's last event is test, the one before valid (by time; users with
    fewer than 3 events stay in train). temporal: cuts at global times. random: shares of each
    user's events. held_out_users: whole users go to valid and test, part of their events is what is
    known of them, the rest is to be found. given: events.split, or valid_paths and test_paths."""
    valid_share: float = Field(default=0.1, ge=0, lt=1)
    """temporal, random, held_out_users: share of events (random, temporal) or users. 0: no valid,
    for leave_one_out too; training then ends with train.max_epochs, and its last checkpoint is the
    best: a final model, trained for as long as was best with valid."""
    test_share: float = Field(default=0.1, gt=0, lt=1)
    """As valid_share, for test."""
    valid_time: int | None = None
    """temporal: Unix seconds at which valid starts; instead of valid_share."""
    test_time: int | None = None
    """temporal: Unix seconds at which test starts; instead of test_share."""
    known_share: float = Field(default=0.8, gt=0, lt=1)
    """held_out_users: share of a held-out user's events, the earliest, that are known."""
    new_items_share: float = Field(default=0.0, ge=0, lt=1)
    """So many of the items, drawn by lot, lose their events in train, once it is divided. Valid and
    test ask for them among all others: of these a model knows nothing but features, as of items
    that are new in a catalogue. The slice new_items is what it finds of them."""
    valid_paths: tuple[str, ...] = ()
    """given: files with the valid events, of the format of [prepare.events]."""
    test_paths: tuple[str, ...] = ()
    """given: files with the test events, of the format of [prepare.events]."""

    @model_validator(mode="after")
    def _of_method(self) -> SplitConfig:
        for key, method in _METHOD_OF_KEYS.items():
            value = getattr(self, key)
            if value != type(self).model_fields[key].default and self.method != method:
                raise ValueError(
                    f"split.{key} is for method = {method!r}. Received: {key} = {value!r} with "
                    f"method = {self.method!r}. Remove it, or change method"
                )
        if (
            self.valid_time is not None
            and self.test_time is not None
            and self.valid_time > self.test_time
        ):
            raise ValueError(
                "split.valid_time must not lie after split.test_time. Received: "
                f"{self.valid_time} and {self.test_time}. Exchange them"
            )
        return self

    @model_validator(mode="after")
    def _shares(self) -> SplitConfig:
        if self.valid_share + self.test_share >= 1:
            raise ValueError(
                "valid_share + test_share must leave something for train. Received: "
                f"{self.valid_share} + {self.test_share}. Make them smaller"
            )
        return self


class PrepareConfig(Section):
    """Raw data to a dataset, with Spark."""

    events: EventsConfig
    """The events."""
    items: TableConfig | None = None
    """The catalogue of items, if there is one."""
    users: TableConfig | None = None
    """The table of users, if there is one."""
    split: SplitConfig = SplitConfig()
    """How the events are divided."""
    min_rating: float | None = None
    """Implicit feedback from ratings: events rated lower are dropped. With label_from_rating they
    become negatives instead."""
    label_from_rating: bool = False
    """Label = rating >= min_rating, and negatives are kept."""
    predict_ratings: bool = False
    """Label = rating, for the losses squared and ordinal and the metrics rmse and mae. Every rating
    is an event; those of 0 or less are in no history and no target of a ranking."""
    event_types: tuple[str, ...] = ()
    """Kinds of event that are kept; all when empty. With two or more of them and events.time,
    histories say of which kind each event was, which the tower sequence reads. The number of a kind
    is its place here: a dataset that extends another (prepare.extend) keeps the order, and adds
    kinds at the end."""
    hash_users: bool = False
    """Replace users' ids by keyed hashes (HMAC-SHA256, 128 bits) before anything is written, and
    leave their column out of rejected rows. The key, 16 bytes or more, is the text of the
    environment variable DISTREC_USER_KEY; score needs it for score.users, which has raw ids, and so
    does distrec forget."""
    user_key_file: str | None = None
    """File with the key, in place of the environment variable."""
    exclude_users: str | None = None
    """Parquet or CSV file with the user column, or a raw user a line: their events and rows are
    dropped, rejected ones too, as if they were not in the data; counts has how many events."""
    duplicates: Literal["keep_last", "keep_first", "keep_all"] = "keep_last"
    """Of several events of one user with one item, which one to keep. Equal rows are always one."""
    user_k_core: int = Field(default=1, ge=1)
    """Users with fewer events are dropped, again and again until nothing changes."""
    item_k_core: int = Field(default=1, ge=1)
    """Items with fewer events are dropped, again and again until nothing changes, out of the
    catalogue, too: they are recommended to nobody. Items without any event stay, as new ones."""
    min_user_count: int = Field(default=1, ge=1)
    """Users with fewer train events share the unknown id."""
    min_item_count: int = Field(default=1, ge=1)
    """Items with fewer train events get no row of their own in the embedding tables; they stand on
    their features."""
    history_length: int = Field(default=50, ge=1, le=1_000_000)
    """L: positive events kept of a user's past."""
    recent_days: int = Field(default=28, ge=1, le=36_500)
    """Days before valid, test and the users' lists over which an item's positive events are counted
    for model.recent_weight; without effect where events have no times."""
    train_rows: Literal["events", "windows"] = "events"
    """events: an example an event, each with its history. windows: an example a stretch of
    history_length events of a user, of which training predicts every one from those before it: for
    the sequence tower as much is learned at a fraction of the cost. Every event counts as positive,
    and is without context."""
    max_reject_share: float = Field(default=0.01, ge=0, le=1)
    """The job fails when a larger share of the rows of a source breaks the contract."""
    extend: str | None = Field(default=None, min_length=1)
    """Directory of an earlier dataset of the same features: every value that has an id there keeps
    it, new values get the next ones, and what was fitted there (means, buckets) is taken over.
    min_user_count, min_item_count and min_count then hold for new values only."""
    evict_after_days: int | None = Field(default=None, ge=1)
    """Values without an event in this many days before the newest event have no id. With extend,
    values that had one lose it, and the next extension may give it to a new value."""
    latest_time: int | None = None
    """Unix seconds; a later event is rejected as lying in the future. By default: now."""
    num_files: int = Field(default=0, ge=0, le=1_000_000)
    """Parquet files of train; 0: enough that each holds at most rows_per_file, a multiple of 12."""
    rows_per_file: int = Field(default=1_000_000, ge=1)
    """Upper bound of rows a file when num_files is 0."""

    @model_validator(mode="after")
    def _possible(self) -> PrepareConfig:
        events, split = self.events, self.split
        if self.user_key_file is not None and not self.hash_users:
            raise ValueError(
                "user_key_file is for hash_users. Received: user_key_file = "
                f"{self.user_key_file!r}, hash_users = false. Remove it, or set hash_users"
            )
        if self.min_rating is not None and events.rating is None:
            raise ValueError(
                "min_rating needs events.rating. Received: min_rating = "
                f"{self.min_rating}, no rating column. Name the column"
            )
        if self.label_from_rating and (self.min_rating is None or events.label is not None):
            raise ValueError(
                "label_from_rating needs min_rating, and no events.label. Received: min_rating = "
                f"{self.min_rating}, events.label = {events.label!r}"
            )
        if self.predict_ratings and (
            events.rating is None or events.label is not None or self.label_from_rating
        ):
            raise ValueError(
                "predict_ratings needs events.rating, and no other label. Received: events.rating "
                f"= {events.rating!r}, events.label = {events.label!r}, label_from_rating = "
                f"{self.label_from_rating}"
            )
        if events.tasks and events.label is None and not self.label_from_rating:
            raise ValueError(
                "events.tasks stand beside a label. Received: tasks = "
                f"{list(events.tasks)}, neither events.label nor label_from_rating. Name the label"
            )
        if split.new_items_share and (self.items is None or self.extend is not None):
            raise ValueError(
                "split.new_items_share needs a catalogue, [prepare.items], and no prepare.extend, "
                f"whose items have rows already. Received: {split.new_items_share} with items = "
                f"{'none' if self.items is None else 'set'}, extend = {self.extend!r}"
            )
        if self.evict_after_days is not None and events.time is None:
            raise ValueError(
                "evict_after_days needs events.time. Received: evict_after_days = "
                f"{self.evict_after_days}, no time column. Name the column"
            )
        if self.event_types and events.event_type is None:
            raise ValueError(
                f"event_types needs events.event_type. Received: {list(self.event_types)}, no "
                "column. Name the column"
            )
        if len(set(self.event_types)) < len(self.event_types):
            raise ValueError(
                f"event_types names each kind once. Received: {list(self.event_types)}. Remove the "
                "others"
            )
        if self.train_rows == "windows":
            others = {
                "events.time missing": events.time is None,
                "events.label": events.label is not None,
                "events.weight": events.weight is not None,
                "events.context": bool(events.context),
                "label_from_rating": self.label_from_rating,
                "predict_ratings": self.predict_ratings,
            }
            wrong = [name for name, is_wrong in others.items() if is_wrong]
            if wrong:
                raise ValueError(
                    'train_rows = "windows" is for positive events in order of time. Received: '
                    f'{", ".join(wrong)}. Use train_rows = "events"'
                )
        if split.method in ("leave_one_out", "temporal") and events.time is None:
            raise ValueError(
                f"split.method = {split.method!r} needs events.time. Received: no time column. "
                'Name it, or use split.method = "random"'
            )
        if split.method == "given" and (events.split is None) == (not split.test_paths):
            raise ValueError(
                'split.method = "given" needs either events.split or split.test_paths. Received: '
                f"events.split = {events.split!r}, test_paths = {list(split.test_paths)}"
            )
        if split.method != "given" and events.split is not None:
            raise ValueError(
                f'events.split is for split.method = "given". Received: events.split = '
                f"{events.split!r} with method = {split.method!r}. Remove it, or change method"
            )
        refuse_passwords(self.model_dump_json())
        for side, features in self.features_by_side():
            # Spark does not tell capitals from small letters
            names = [feature.feature_name.lower() for feature in features]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(
                    f"feature names of one side differ. Received twice: {twice} ({side}). Set name"
                )
        return self

    @property
    def told_event_types(self) -> tuple[str, ...]:
        """The kinds of event that histories tell apart; none where there is one, or no time."""
        is_told = len(self.event_types) > 1 and self.events.time is not None
        return self.event_types if is_told else ()

    def features_by_side(self) -> Iterable[tuple[str, tuple[FeatureConfig, ...]]]:
        """The features of users, items and context."""
        yield "user", self.users.features if self.users else ()
        yield "item", self.items.features if self.items else ()
        yield "context", self.events.context
