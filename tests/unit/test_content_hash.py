"""The hash of a dataset's content: equal for equal data, whoever wrote the files and when."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distrec import files
from distrec.dataset import DatasetManifest, Split
from distrec.files import parquet_sha256
from tests.synthetic import write_dataset


def write(path: Path, numbers: list[int], writer: str) -> Path:
    schema = pa.schema([("number", pa.int64())], metadata={"written by": writer})
    pq.write_table(pa.table({"number": pa.array(numbers)}).cast(schema), path)
    return path


@pytest.mark.parametrize("hashed_bytes", [7, 2**20])
def test_the_footer_is_not_of_the_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed_bytes: int
) -> None:
    monkeypatch.setattr(files, "_HASHED_BYTES", hashed_bytes)
    one = write(tmp_path / "1", [1, 2, 3], "a JVM")
    # another length of the footer, and another number in the pages
    two = write(tmp_path / "2", [1, 2, 3], "another JVM")
    three = write(tmp_path / "3", [1, 2, 4], "a JVM")
    for path in (one, two, three):
        content = path.read_bytes()
        footer = int.from_bytes(content[-8:-4], "little") + 8
        assert parquet_sha256(path) == (
            hashlib.sha256(content[:-footer]).hexdigest(),
            hashlib.sha256(content).hexdigest(),
        )
    pages = [parquet_sha256(path)[0] for path in (one, two, three)]
    assert pages[0] == pages[1] != pages[2]
    assert parquet_sha256(one)[1] != parquet_sha256(two)[1]


def with_pages(manifest: DatasetManifest, whole: str) -> DatasetManifest:
    """As prepare writes it, from another JVM: other checksums of whole files."""
    splits = {
        name: Split(
            num_rows=split.num_rows,
            files=tuple(
                entry.model_copy(
                    update={"sha256": whole + entry.sha256, "pages_sha256": entry.sha256}
                )
                for entry in split.files
            ),
        )
        for name, split in manifest.splits.items()
    }
    return manifest.model_copy(update={"splits": splits})


def test_equal_data_has_one_hash(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path)
    one, two = with_pages(manifest, "a"), with_pages(manifest, "b")
    assert one.content_hash == two.content_hash
    # and other data another one: other rows, another column, rows elsewhere
    other = with_pages(write_dataset(tmp_path / "other", seed=1), "a")
    assert other.content_hash != one.content_hash
    renamed = {**one.schemas, "train": {**one.schemas["train"], "user_size": "float"}}
    assert one.model_copy(update={"schemas": renamed}).content_hash != one.content_hash
    swapped = {**one.splits, "valid": one.splits["test"], "test": one.splits["valid"]}
    assert one.model_copy(update={"splits": swapped}).content_hash != one.content_hash


def test_the_hash_of_an_older_manifest_is_what_it_was(tmp_path: Path) -> None:
    """So that its runs go on."""
    manifest = write_dataset(tmp_path)
    names = [
        [name, entry.path, entry.sha256]
        for name in sorted(manifest.splits)
        for entry in manifest.splits[name].files
    ]
    expected = hashlib.sha256(json.dumps(names).encode()).hexdigest()
    assert manifest.content_hash == expected
