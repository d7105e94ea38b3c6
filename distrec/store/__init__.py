"""Outputs on S3-like stores, HDFS or another disk: published whole, fetched whole."""

from distrec.store.current import Current, Version
from distrec.store.outputs import (
    CHECKPOINTS,
    DATASET,
    OUTPUTS,
    SCORES,
    check_store,
    fetch_dataset,
    forget,
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
    "check_store",
    "fetch_dataset",
    "forget",
    "is_here",
    "new_folder",
    "open_output",
    "publish",
    "published_manifests",
]
