"""Every column name of a dataset and of the scored output, spelled once.

Raw ids are strings, as the user wrote them. An index is a vocabulary id: 0 is padding, 1 is
unknown, 2 is the most frequent value in train (of the first dataset, where one extends another: ids
of later values are in the order of their coming). Catalogue items never seen in train follow the
trained ones (index >= num_trained_items): they have features and a place in the item matrix, and
look up the unknown row in every table keyed by item.
"""

from __future__ import annotations

PADDING_INDEX = 0
UNKNOWN_INDEX = 1
FIRST_INDEX = 2

USER_ID = "user_id"
ITEM_ID = "item_id"
USER_INDEX = "user_index"
ITEM_INDEX = "item_index"
TIME = "time"
RATING = "rating"
LABEL = "label"
WEIGHT = "weight"
EVENT_TYPE = "event_type"
SPLIT = "split"
TITLE = "title"
COUNT = "count"
# items, of a dataset with times: events of the last prepare.recent_days before a split
RECENT = "recent"
# vocabularies with eviction: Unix seconds of the last event in which the value was seen
LAST_TIME = "last_time"
# generation of the dataset in which an id was given to another value
GENERATION = "generation"
# in the place of a count: the index stands for no item, for its id was taken from one
FREE_COUNT = -1

# item indexes of the user's last L positive events before the example, oldest first, their times
HISTORY = "history"
HISTORY_TIMES = "history_times"
# where a dataset tells kinds of event apart, the kind of each: FIRST_INDEX + its place among the
# manifest's event_types, or UNKNOWN_INDEX
HISTORY_TYPES = "history_types"
# number of the user's positive events before the example, not cut at L
NUM_EVENTS = "num_events"
# queries and users only: everything the user has touched before the cut, not cut at L
SEEN = "seen"
# queries only: the withheld positive items
TARGETS = "targets"

REASON = "reason"
RAW_ROW = "raw_row"
SOURCE = "source"

VALUE = "value"
ID = "id"

RANK = "rank"
SCORE = "score"
REASONS = "reasons"
# of a model of several tasks only
PROBABILITIES = "probabilities"
MODEL_VERSION = "model_version"

# splits of a dataset, each a directory of Parquet files named in the manifest
TRAIN = "train"
VALID = "valid"
TEST = "test"
VALID_QUERIES = "valid_queries"
TEST_QUERIES = "test_queries"
ITEMS = "items"
USERS = "users"
REJECTS = "rejects"

# whose events may be recent when each of them comes
RECENT_POOLS = {VALID: (TRAIN,), TEST: (TRAIN, VALID), USERS: (TRAIN, VALID, TEST)}

SIDES = ("user", "item", "context")


def recent_column(split: str) -> str:
    """Items' column of what was recent when valid, test or users came: ``recent_test``."""
    return f"{RECENT}_{split}"


def feature_column(side: str, name: str) -> str:
    """Dataset column of a feature: ``user_age``, ``item_genres``, ``context_device``."""
    return f"{side}_{name}"


# a further task of an event is a column of 0 and 1, NaN where nobody knows
TASK_NAME = r"^[A-Za-z0-9_-]{1,64}$"
MAX_TASKS = 16


def task_column(name: str) -> str:
    """Dataset column of the labels of a further task: ``task_purchased``."""
    return f"task_{name}"


# the last three would name a feature's table as one of the model's own: item_history, item_bias ...
RESERVED_FEATURE_NAMES = frozenset({"id", "index", "history", "bias", "output"})
