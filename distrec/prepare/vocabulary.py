"""Vocabularies fitted on train: ids by descending frequency, so that an id is a popularity rank."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from distrec import columns as c
from distrec.prepare.rank import with_rank
from distrec.prepare.workspace import Workspace

# 15 hexadecimal digits fit into a signed 64-bit integer
_DIGITS = 15


@dataclass(frozen=True)
class FittedVocabulary:
    """Values with an id of their own.

    Args:
        name: Dataset column: user_id, item_id or a feature column.
        frame: value string, id int64 from FIRST_INDEX on without a gap, count int64.
        num_values: Rows of the frame.
    """

    name: str
    frame: DataFrame
    num_values: int

    @property
    def num_embeddings(self) -> int:
        """Number of ids, padding and unknown included."""
        return self.num_values + c.FIRST_INDEX


def fit_vocabulary(
    counts: DataFrame, name: str, min_count: int, workspace: Workspace
) -> FittedVocabulary:
    """Number the values by descending count; values of one count are in ascending order.

    Args:
        counts: value string, count int64: one row a value that occurs in train.
        name: Dataset column.
        min_count: Rarer values get no id, and so are UNKNOWN_INDEX.
    """
    frequent = counts.filter(F.col(c.COUNT) >= min_count).select(c.VALUE, c.COUNT)
    frequent = workspace.materialize(frequent, f"counts-{name}")
    num_values = frequent.count()
    order = [F.desc(c.COUNT), F.asc(c.VALUE)]
    ranked = with_rank(frequent, order, c.ID, num_values, workspace)
    numbered = ranked.select(
        c.VALUE, (F.col(c.ID) + c.FIRST_INDEX).alias(c.ID), F.col(c.COUNT).cast("long")
    )
    return FittedVocabulary(name, workspace.materialize(numbered, f"vocab-{name}"), num_values)


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
