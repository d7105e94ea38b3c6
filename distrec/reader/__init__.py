"""Parquet to batches: which rows when (pure), reading through petastorm, decoding from Arrow."""

from distrec.reader.decode import decode_queries
from distrec.reader.examples import ExampleReader
from distrec.reader.files import check_files
from distrec.reader.labels import has_both_labels
from distrec.reader.plan import resolve_lanes
from distrec.reader.queries import read_items, read_queries

__all__ = [
    "ExampleReader",
    "check_files",
    "decode_queries",
    "has_both_labels",
    "read_items",
    "read_queries",
    "resolve_lanes",
]
