"""Vocabularies fitted on train: ids by descending frequency, so that an id is a popularity rank.

In a dataset that extends another, old values keep their ids and only the new ones are ranked; an id
whose value was not seen for long goes to a new value in the next extension, not in the same one, so
that no model ever has to take one id for two values at once.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from distrec import columns as c
from distrec.prepare.extend import Continuation, OldVocabulary
from distrec.prepare.rank import with_rank
from distrec.prepare.workspace import Workspace

# 15 hexadecimal digits fit into a signed 64-bit integer
_DIGITS = 15
_RANK = "__rank"
_SLOT = "__slot"

NEW = Continuation()


@dataclass(frozen=True)
class Growth:
    """How a vocabulary differs from the one that it extends.

    Args:
        free: id int64: of no value.
        num_free: Rows of free.
        reused: id int64, generation int64: when an id last changed hands.
        num_changed_hands: Rows of reused.
        num_admitted: New values.
        num_evicted: Old values without an id from now on.
        num_reused: New values with an id that another value had.
    """

    free: DataFrame
    num_free: int
    reused: DataFrame
    num_changed_hands: int
    num_admitted: int
    num_evicted: int
    num_reused: int


@dataclass(frozen=True)
class FittedVocabulary:
    """Values with an id of their own.

    Args:
        name: Dataset column: user_id, item_id or a feature column.
        frame: value string, id int64 from FIRST_INDEX on without a gap but for free ones, count
            int64; last_time int64 where values are evicted.
        num_values: Rows of the frame.
        growth: Of a vocabulary that extends another.
    """

    name: str
    frame: DataFrame
    num_values: int
    growth: Growth | None = None

    @property
    def num_free(self) -> int:
        """Ids that no value has."""
        return 0 if self.growth is None else self.growth.num_free

    @property
    def num_embeddings(self) -> int:
        """Number of ids: padding, unknown and free ones included."""
        return self.num_values + self.num_free + c.FIRST_INDEX


def fit_vocabulary(
    counts: DataFrame,
    name: str,
    min_count: int,
    workspace: Workspace,
    continuation: Continuation = NEW,
) -> FittedVocabulary:
    """Number the values by descending count; values of one count are in ascending order.

    Args:
        counts: value string, count int64: one row a value that occurs in train; with
            continuation.tracks_time also last_time int64, and values with count 0.
        name: Dataset column.
        min_count: Rarer values get no id, and so are UNKNOWN_INDEX; old values keep theirs.
        continuation: What is extended, and what is too old.
    """
    columns = [c.VALUE, c.COUNT, *([c.LAST_TIME] if continuation.tracks_time else [])]
    counts = counts.select(*columns)
    old = continuation.vocabulary(name, workspace.spark)
    if old is not None:
        return _extend(counts, old, name, min_count, workspace, continuation)
    admitted = counts.filter(_admissible(min_count, continuation))
    frequent = workspace.materialize(admitted, f"counts-{name}")
    num_values = frequent.count()
    numbered = _numbered(frequent, num_values, c.FIRST_INDEX, None, workspace)
    return FittedVocabulary(name, workspace.materialize(numbered, f"vocab-{name}"), num_values)


def _admissible(min_count: int, continuation: Continuation) -> Column:
    enough = F.col(c.COUNT) >= min_count
    if continuation.oldest is None:
        return enough
    return enough & (F.col(c.LAST_TIME) >= continuation.oldest)


def _numbered(
    values: DataFrame, num_values: int, first: int, slots: DataFrame | None, workspace: Workspace
) -> DataFrame:
    """value, id, count and the rest; ids of slots (rank, slot) first, then from `first` on."""
    order = [F.desc(c.COUNT), F.asc(c.VALUE)]
    ranked = with_rank(values, order, c.ID, num_values, workspace)
    number = F.col(c.ID) + first
    if slots is not None:
        ranked = ranked.join(slots, F.col(c.ID) == F.col(_RANK), "left")
        number = F.coalesce(_SLOT, number)
    rest = [c.LAST_TIME] if c.LAST_TIME in values.columns else []
    return ranked.select(
        c.VALUE, number.alias(c.ID), F.col(c.COUNT).cast("long").alias(c.COUNT), *rest
    )


def _extend(
    counts: DataFrame,
    old: OldVocabulary,
    name: str,
    min_count: int,
    workspace: Workspace,
    continuation: Continuation,
) -> FittedVocabulary:
    counts = workspace.materialize(counts, f"counts-{name}")
    kept, evicted = _kept_and_evicted(counts, old, name, workspace, continuation)
    new = counts.filter(_admissible(min_count, continuation))
    new = workspace.materialize(new.join(old.frame, c.VALUE, "left_anti"), f"new-{name}")
    num_new, num_evicted = new.count(), evicted.count()
    num_reused = min(num_new, old.num_free)
    slots = with_rank(old.free, [F.asc(c.ID)], _RANK, old.num_free, workspace)
    slots = workspace.materialize(slots.withColumnRenamed(c.ID, _SLOT), f"free-{name}")
    # ranks behind the slots go on where the ids of the previous dataset end
    first = old.num_embeddings - num_reused
    numbered = _numbered(new, num_new, first, slots, workspace)
    frame = workspace.materialize(kept.unionByName(numbered), f"vocab-{name}")

    taken = slots.filter(F.col(_RANK) < num_new).select(F.col(_SLOT).alias(c.ID))
    still_free = slots.filter(F.col(_RANK) >= num_new).select(F.col(_SLOT).alias(c.ID))
    now = F.lit(continuation.generation).cast("long").alias(c.GENERATION)
    before = old.reused.join(taken, c.ID, "left_anti")
    reused = workspace.materialize(before.unionByName(taken.select(c.ID, now)), f"reused-{name}")
    growth = Growth(
        free=workspace.materialize(still_free.unionByName(evicted), f"free-{name}"),
        num_free=old.num_free - num_reused + num_evicted,
        reused=reused,
        num_changed_hands=reused.count(),
        num_admitted=num_new,
        num_evicted=num_evicted,
        num_reused=num_reused,
    )
    num_values = old.num_values - num_evicted + num_new
    return FittedVocabulary(name, frame, num_values, growth)


def _kept_and_evicted(
    counts: DataFrame,
    old: OldVocabulary,
    name: str,
    workspace: Workspace,
    continuation: Continuation,
) -> tuple[DataFrame, DataFrame]:
    """Old values with their ids and new counts, and the ids of those that are too old."""
    current = counts.withColumnRenamed(c.LAST_TIME, "__last")
    count = F.coalesce(c.COUNT, F.lit(0)).cast("long").alias(c.COUNT)
    joined = old.frame.join(current, c.VALUE, "left")
    if continuation.oldest is None:
        merged = workspace.materialize(joined.select(c.VALUE, c.ID, count), f"old-{name}")
        return merged, merged.filter(F.lit(False)).select(c.ID)
    last = F.greatest(c.LAST_TIME, "__last").alias(c.LAST_TIME)
    merged = workspace.materialize(joined.select(c.VALUE, c.ID, count, last), f"old-{name}")
    is_seen = F.col(c.LAST_TIME) >= continuation.oldest
    return merged.filter(is_seen), merged.filter(~is_seen).select(c.ID)


def vocabulary_hash(vocabulary: FittedVocabulary) -> str:
    """SHA-256 that depends on the (value, id) pairs and not on files or partitions.

    Each pair is hashed; the hashes, 240 bits of each, are combined by exclusive or, which the
    executors do in any order.
    """
    digest = F.sha2(F.concat_ws("\t", F.col(c.ID), F.col(c.VALUE)), 256)
    words = [
        F.bit_xor(F.conv(F.substring(digest, 1 + _DIGITS * k, _DIGITS), 16, 10).cast("long")).alias(
            f"word{k}"
        )
        for k in range(4)
    ]
    row = vocabulary.frame.agg(*words).collect()[0]
    text = ",".join([str(vocabulary.num_values), *(str(word or 0) for word in row)])
    return hashlib.sha256(text.encode()).hexdigest()
