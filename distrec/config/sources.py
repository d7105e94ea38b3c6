"""Raw data of prepare: where rows are, and what their columns are."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from distrec import columns
from distrec.config.section import Section

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
