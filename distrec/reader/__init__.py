"""Parquet to batches: which rows when (pure), reading through petastorm, decoding from Arrow."""

from distrec.reader.decode import decode_queries
from distrec.reader.examples import ExampleReader
from distrec.reader.plan import resolve_lanes
from distrec.reader.queries import read_items, read_queries

__all__ = ["ExampleReader", "decode_queries", "read_items", "read_queries", "resolve_lanes"]
