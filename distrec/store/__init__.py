"""Outputs on S3-like stores, HDFS or another disk: published whole, fetched whole."""

from distrec.store.current import Current, Version
from distrec.store.outputs import (
    CHECKPOINTS,
    DATASET,
    OUTPUTS,
    SCORES,
    as_stored,
    check_store,
    dataset_files,
    fetch_dataset,
    fetch_version,
    forget,
    get_version,
    is_here,
    open_output,
    publish,
    published_manifests,
)
from distrec.store.store import Store, StoredFile, new_folder

__all__ = [
    "CHECKPOINTS",
    "DATASET",
    "OUTPUTS",
    "SCORES",
    "Current",
    "Store",
    "StoredFile",
    "Version",
    "as_stored",
    "check_store",
    "dataset_files",
    "fetch_dataset",
    "fetch_version",
    "forget",
    "get_version",
    "is_here",
    "new_folder",
    "open_output",
    "publish",
    "published_manifests",
]
