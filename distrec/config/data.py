"""Section of prepare: what of the raw data counts, and how it is divided."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field, model_validator

from distrec.config.section import Section
from distrec.config.sources import EventsConfig, FeatureConfig, TableConfig
from distrec.config.store_url import refuse_passwords

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
    def _columns_are_named(self) -> PrepareConfig:
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
        return self

    @model_validator(mode="after")
    def _windows_are_possible(self) -> PrepareConfig:
        events = self.events
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
        return self

    @model_validator(mode="after")
    def _split_is_possible(self) -> PrepareConfig:
        events, split = self.events, self.split
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
        return self

    @model_validator(mode="after")
    def _names_are_plain(self) -> PrepareConfig:
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
