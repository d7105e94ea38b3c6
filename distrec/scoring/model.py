"""A checkpoint opened for scoring: the dense part in memory, the embedding tables on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distrec.batch import Batch, ItemBatch
from distrec.checkpoint import MappedTables, load_model, read_checkpoint_manifest
from distrec.checkpoint.manifest import MANIFEST, CheckpointManifest
from distrec.dataset import DatasetManifest
from distrec.errors import CheckpointError
from distrec.files import sha256
from distrec.metrics.evaluation import inference
from distrec.model import ModelSpec, UnifiedModel
from distrec.sharding.lookup import Lookup

_VERSION_DIGITS = 8


@dataclass(frozen=True)
class ScoringModel:
    """What encodes users and items; it never changes.

    Args:
        path: Of the checkpoint.
        manifest: Of the checkpoint.
        model: The dense part.
        tables: Memory-mapped: only the rows that are asked for are read.
    """

    path: Path
    manifest: CheckpointManifest
    model: UnifiedModel
    tables: Lookup

    @property
    def version(self) -> str:
        """Such as step-00001200-1a2b3c4d: two checkpoints of one step differ in the digits."""
        return f"{self.path.name}-{sha256(self.path / MANIFEST)[:_VERSION_DIGITS]}"

    def encode_users(self, batch: Batch) -> Tensor:
        """float32, (B, vector_width)."""
        with inference(self.model):
            return self.model.encode_users(batch, self.tables(self.model.user_requests(batch)))

    def encode_items(self, items: ItemBatch) -> Tensor:
        """float32, (M, vector_width)."""
        with inference(self.model):
            return self.model.encode_items(items, self.tables(self.model.item_requests(items)))

    def probabilities(self, users: Tensor, items: Tensor) -> Tensor:
        """Of the label and of each further task, for B pairs of vectors: float32, (B, T)."""
        with inference(self.model):
            return torch.sigmoid(self.model.task_scores(users, items))


def open_model(path: Path) -> ScoringModel:
    """Build the model that a checkpoint stores, whatever the configuration says today.

    Raises:
        CheckpointError: The checkpoint is not whole, or of another version of the model.
    """
    manifest, model = read_checkpoint_manifest(path), load_model(path)
    return ScoringModel(path, manifest, model, MappedTables(path))


def check_same_data(model: ScoringModel, dataset: DatasetManifest, directory: Path) -> None:
    """Refuse a checkpoint whose row numbers or features mean something else in this dataset.

    The catalogue may have gained items that train never saw: they have features, and no rows.

    Raises:
        CheckpointError: With what differs.
    """
    own = {name: vocabulary.sha256 for name, vocabulary in dataset.vocabularies.items()}
    stored = model.manifest.vocabularies
    differing = [
        f"vocabulary {name!r}"
        for name in sorted({*own, *stored})
        if own.get(name) != stored.get(name)
    ]
    wanted, found = ModelSpec.from_manifest(dataset), model.manifest.model_spec
    differing += [
        name
        for name in ("features", "num_users", "num_trained_items", "tasks", "event_types")
        if getattr(wanted, name) != getattr(found, name)
    ]
    if differing:
        raise CheckpointError(
            "a checkpoint scores the dataset that it was trained on. Received: "
            f"{model.path.name} and {directory}, which differ in {', '.join(differing)}. Train on "
            "this dataset, or put back the other one."
        )
