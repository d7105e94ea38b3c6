"""The manifest of a dataset: checksums by the executors, then one file, written last."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from distrec.dataset import MANIFEST, DatasetManifest, FileEntry, Split
from distrec.files import describe_files, replace_text
from distrec.prepare.workspace import Workspace
from distrec.prepare.write import Written


def entries(
    workspace: Workspace, written: Mapping[str, Written]
) -> dict[str, tuple[FileEntry, ...]]:
    """The files of every directory; their row counts are checked against the Parquet footers."""
    names = [path for one in written.values() for path in one.paths]
    described = dict(
        zip(names, describe_files(workspace.spark, workspace.root, names), strict=True)
    )
    found = {}
    for name, one in written.items():
        found[name] = tuple(described[path] for path in one.paths)
        in_files = [entry.num_rows for entry in found[name]]
        assert in_files == one.num_rows, (name, in_files, one.num_rows)
    return found


def as_split(files: tuple[FileEntry, ...]) -> Split:
    """A directory's files with their sum."""
    return Split(num_rows=sum(file.num_rows for file in files), files=files)


def write_manifest(manifest: DatasetManifest, root: Path) -> None:
    """Write it under another name first: a manifest that is there is whole."""
    replace_text(root / MANIFEST, json.dumps(manifest.model_dump(mode="json"), indent=1))
