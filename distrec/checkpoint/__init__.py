"""State on disk: sharded checkpoints that appear whole or not at all and load on any ranks."""

from distrec.checkpoint.dense import load_dense, load_model
from distrec.checkpoint.find import (
    checkpoint_name,
    committed,
    find,
    mark_best,
    prune,
    read_best,
    verify,
)
from distrec.checkpoint.load import load_tables
from distrec.checkpoint.manifest import (
    CheckpointManifest,
    PrivacyEntry,
    read_checkpoint_manifest,
)
from distrec.checkpoint.published import (
    checkpoint_files,
    fetch_all,
    fetch_one,
    fetch_what_differs,
    newest_published,
    publish_checkpoints,
)
from distrec.checkpoint.save import Identity, Parts, Position, save
from distrec.checkpoint.series import Series
from distrec.checkpoint.tables import MappedTables, read_rows
from distrec.checkpoint.warm import (
    OldRows,
    load_dense_where_it_fits,
    load_old_rows,
    old_rows,
    start_rows_anew,
)

__all__ = [
    "CheckpointManifest",
    "Identity",
    "MappedTables",
    "OldRows",
    "Parts",
    "Position",
    "PrivacyEntry",
    "Series",
    "checkpoint_files",
    "checkpoint_name",
    "committed",
    "fetch_all",
    "fetch_one",
    "fetch_what_differs",
    "find",
    "load_dense",
    "load_dense_where_it_fits",
    "load_model",
    "load_old_rows",
    "load_tables",
    "mark_best",
    "newest_published",
    "old_rows",
    "prune",
    "publish_checkpoints",
    "read_best",
    "read_checkpoint_manifest",
    "read_rows",
    "save",
    "start_rows_anew",
    "verify",
]
