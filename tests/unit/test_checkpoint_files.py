"""Files of tensors: what safetensors itself would write, piece by piece and in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from distrec.checkpoint import files
from distrec.checkpoint.files import StoredRows, whole, write_tensors
from distrec.errors import CheckpointError


def make_tensors() -> dict[str, Tensor]:
    """Every type that is stored, none, one and many numbers, names of any characters."""
    generator = torch.Generator().manual_seed(1)
    return {
        "weights": torch.randn(1000, 12, generator=generator),
        "state": torch.empty(1000, 0),
        "z half": torch.randn(7, 3, generator=generator).half(),
        "a/ä": torch.randn(5, generator=generator).double(),
        "steps": torch.tensor(3),
        "row_ids": torch.arange(50),
        "one": torch.tensor(1.5),
    }


@pytest.mark.parametrize("chunk_bytes", [1, 100, 2**22])
def test_the_bytes_are_those_of_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", chunk_bytes)
    tensors = make_tensors()
    entry = write_tensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs")
    content = (tmp_path / "ours").read_bytes()
    assert content == (tmp_path / "theirs").read_bytes()
    assert (entry.num_bytes, entry.sha256) == (len(content), sha256(content).hexdigest())


def test_views_and_parts_are_written_as_one_tensor(tmp_path: Path) -> None:
    table = torch.randn(100, 8)
    parts = [table[1:30:3], table[40:], table[:0]]
    write_tensors(tmp_path / "file", {"x": whole(parts), "t": table.T})
    found = load_file(tmp_path / "file")
    assert torch.equal(found["x"], torch.cat(parts))
    assert torch.equal(found["t"], table.T)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 200), st.booleans())
def test_stored_rows_are_read_into_any_view(
    tmp_path: Path, start: int, count: int, chunk_bytes: int, strided: bool
) -> None:
    table = torch.arange(80 * 4, dtype=torch.float32).view(80, 4)
    save_file({"other": torch.ones(3), "x": table}, tmp_path / "file")
    target = torch.zeros(2 * count, 4)
    view = target[::2] if strided else target[:count]
    original, files.CHUNK_BYTES = files.CHUNK_BYTES, chunk_bytes
    try:
        stored = StoredRows(tmp_path / "file", "x")
        stored.copy_into(start, view)
    finally:
        files.CHUNK_BYTES = original
    assert torch.equal(view, table[start : start + count])
    assert stored.bytes_read == count * 16
    assert torch.equal(stored.read(start, start + count), table[start : start + count])


def test_a_file_that_ends_too_early_is_damaged(tmp_path: Path) -> None:
    save_file({"x": torch.ones(100, 4)}, tmp_path / "file")
    stored = StoredRows(tmp_path / "file", "x")
    os.truncate(tmp_path / "file", 500)
    with pytest.raises(CheckpointError, match="is damaged: the file ends too early"):
        stored.read(0, 100)


_MEASURE = """
import json, sys
from pathlib import Path
import torch
from distrec import checkpoint
from distrec.checkpoint.export import export_table
from distrec.config import ShardingConfig
from distrec.dataset import DatasetManifest
from distrec.model import ModelSpec
from distrec.sharding.collectives import OneProcess
from distrec.sharding.plan import TableSpec, plan_tables
from distrec.sharding.tables import EmbeddingTables

def peak(function):
    Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    before = int(lines["VmRSS"].split()[0])
    function()
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return (int(lines["VmHWM"].split()[0]) - before) / 1024

sharding = ShardingConfig(optimizer="adagrad")
plans = plan_tables([TableSpec("big", 2**20, 32)], sharding, 1)
one = OneProcess(torch.device("cpu"))
tables = EmbeddingTables(plans, one, sharding, 1, one.device)
tables.track_touched_rows()
# state's pages are made once they are written
tables.local_rows("big")[2].fill_(1.0)
model = torch.nn.Linear(2, 2)
parts = checkpoint.Parts(model, torch.optim.AdamW(model.parameters()), tables, plans, sharding)
spec = ModelSpec(features=(), num_users=3, num_trained_items=3, num_items=3, history_length=3,
                 has_labels=False)
identity = checkpoint.Identity(1, {}, "c", "d", {}, spec)
dataset = DatasetManifest.model_construct(vocabularies={})
series = checkpoint.Series(Path(sys.argv[1]), 2, parts, one)
def save(step):
    return series.save(identity, checkpoint.Position(step, 0, step, 1))
save(1)  # what is loaded only once is not of this
found = {"full": 0.0}
tables.mark_touched("big", torch.arange(2**19))
found["delta"] = peak(lambda: save(2))
found["full"] = peak(lambda: save(3))
for name, step in (("load full", 1), ("load delta", 2)):
    path = Path(sys.argv[1]) / checkpoint.checkpoint_name(step)
    found[name] = peak(lambda: checkpoint.load_tables(path, tables, plans, sharding, one.world))
    # the first one's libraries are not of this
    for name, stop in (("first of", 10), ("export", None)):
        found[f"{name} {path.name}"] = peak(lambda: export_table(
            path, "big", Path(sys.argv[1]) / "rows.parquet", path, dataset, stop=stop))
print(json.dumps(found))
"""


def test_a_table_of_256_mib_is_saved_loaded_and_exported_in_a_few(tmp_path: Path) -> None:
    """128 MiB of weights and as much of state."""
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    exports = {found.pop(name) for name in list(found) if name.startswith("export")}
    assert len(exports) == 2
    # some row groups are compressed at a time; of a delta only row numbers are mapped
    assert max(exports) < 90, exports
    assert {"full", "delta", "load full", "load delta"} < set(found)
    assert max(found.values()) < 64, found
