"""The exported ids as text of any length, and what an executor says that does not see the files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from distrec.errors import DataError
from distrec.scoring.export import (
    ITEM_ID_OFFSETS,
    ITEM_IDS,
    ExportManifest,
    _text,
    map_tensor,
    open_item_ids,
)
from distrec.scoring.partition import ScoreTask, _blocked, score_batches


def test_ids_survive_in_blocks(tmp_path: Path) -> None:
    ids = ["a", "", "né", "日本", "x" * 300, "7"]
    offsets = [0]
    with (tmp_path / ITEM_IDS).open("wb") as stream:
        # slices: their buffers hold the strings around them, too
        for part in (pa.array(ids).slice(0, 2), pa.array(ids).slice(2, 3), pa.array(ids).slice(5)):
            text, ends = _text(part)
            stream.write(text)
            offsets += (offsets[-1] + ends).tolist()
    np.save(tmp_path / ITEM_ID_OFFSETS, np.array(offsets, dtype=np.int64))
    opened = open_item_ids(tmp_path)
    assert opened.to_pylist() == ids
    assert opened.take(pa.array([5, 3, 3])).to_pylist() == ["7", "日本", "日本"]


def test_ids_that_are_all_empty(tmp_path: Path) -> None:
    text, ends = _text(pa.array(["", ""]))
    assert (text, ends.tolist()) == (b"", [0, 0])
    (tmp_path / ITEM_IDS).touch()
    np.save(tmp_path / ITEM_ID_OFFSETS, np.zeros(3, dtype=np.int64))
    assert open_item_ids(tmp_path).to_pylist() == ["", ""]


def test_mapped_without_a_copy(tmp_path: Path) -> None:
    np.save(tmp_path / "m.npy", np.arange(6, dtype=np.float32).reshape(2, 3))
    tensor = map_tensor(tmp_path / "m.npy")
    assert tensor.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def make_task(directory: Path, identity: str) -> ScoreTask:
    return ScoreTask(
        checkpoint=str(directory / "step-00000001"), export=str(directory / "export"),
        export_identity=identity, blocked="", model_version="v", k=1, exclude_seen=True,
        user_block=1, item_block=1, has_probabilities=False,
    )  # fmt: skip


def test_indexes_without_an_item_are_blocked(tmp_path: Path) -> None:
    np.save(tmp_path / "blocked.npy", np.array([True, False, False, False]))
    ids = pa.array(["a", "", "b", "c"], pa.large_string())
    task = make_task(tmp_path, "")
    blocked = _blocked(task, ids)
    assert blocked is not None
    assert blocked.tolist() == [False, True, False, False]
    assert _blocked(task, ids.filter(pa.array([True, False, True, True]))) is None
    listed = _blocked(replace(task, blocked=str(tmp_path / "blocked.npy")), ids)
    assert listed is not None
    assert listed.tolist() == [True, True, False, False]


def test_executor_that_does_not_see_the_files(tmp_path: Path) -> None:
    task = make_task(tmp_path, "mine")
    with pytest.raises(DataError, match=r"every executor reads.*no .*step-00000001/manifest\.json"):
        list(score_batches(task, []))
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "manifest.json").touch()
    (tmp_path / "export").mkdir()
    other = ExportManifest(
        identity="another", created_at="", model_version="v", dataset_hash="", num_items=1,
        vector_width=1, num_bytes={},
    )  # fmt: skip
    (tmp_path / "export" / "manifest.json").write_text(other.model_dump_json())
    with pytest.raises(DataError, match=r"another catalogue in .*export on host .*Put output on"):
        list(score_batches(task, []))
