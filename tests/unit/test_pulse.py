"""Work that may take longer than a watchdog waits says from its loops that it moves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from distrec import checkpoint, pulse
from distrec import files as all_files
from distrec.checkpoint import files
from distrec.config import ShardingConfig
from distrec.sharding import tables
from distrec.sharding.plan import TableSpec
from tests.unit.test_checkpoint import make_parts, save
from tests.unit.test_checkpoint_delta import load, look_up, make_series
from tests.unit.test_checkpoint_delta import save as save_next

# 1000 rows x 8, in chunks of 10 rows
ROWS, CHUNKS = 1000, 100
SPECS = (TableSpec("user", ROWS, 8),)


def beats(work: Callable[[], object]) -> int:
    """How often some work says that it moves."""
    told: list[None] = []
    with pulse.listening(lambda: told.append(None)):
        work()
    return len(told)


def test_filling_saving_verifying_and_loading_tables_beat_with_every_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_CHUNK_NUMBERS", 10 * 8)
    monkeypatch.setattr(files, "CHUNK_BYTES", 10 * 8 * 4)
    monkeypatch.setattr(all_files, "_HASHED_BYTES", 10 * 8 * 4)
    parts = make_parts(ShardingConfig(), specs=SPECS)
    assert beats(lambda: make_parts(ShardingConfig(), specs=SPECS)) >= CHUNKS
    assert beats(lambda: save(tmp_path, parts, 1)) >= CHUNKS
    path = tmp_path / checkpoint.checkpoint_name(1)
    assert beats(lambda: checkpoint.verify(path)) >= CHUNKS
    assert beats(lambda: load(path, parts)) >= CHUNKS


def test_rows_that_travel_beat_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = make_parts(ShardingConfig(), specs=SPECS)
    series = make_series(tmp_path, parts, 2)
    save_next(series, 1)
    look_up(parts, list(range(1, ROWS)))
    delta = save_next(series, 2)
    monkeypatch.setattr(files, "CHUNK_BYTES", 10 * 8 * 4)
    base = beats(lambda: load(delta.with_name("step-00000001"), parts))
    assert beats(lambda: load(delta, parts)) - base >= CHUNKS
