"""What the shape of the model depends on besides its configuration; stored in every checkpoint."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from distrec.columns import FIRST_INDEX
from distrec.dataset import DatasetManifest, FeatureSpec


class ModelSpec(BaseModel):
    """Sizes of the vocabularies and the features of one dataset.

    ``ModelSpec.model_validate_json(spec.model_dump_json())`` gives an equal object.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    features: tuple[FeatureSpec, ...]
    """Of users, items and context, in the manifest's order, which is that of the dense matrices."""
    num_users: int = Field(ge=FIRST_INDEX)
    """Rows of a user table."""
    num_trained_items: int = Field(ge=FIRST_INDEX)
    """Rows of an item table; item indexes at or above it are cold."""
    num_items: int = Field(ge=FIRST_INDEX)
    """Rows of the item matrix, cold items included."""
    history_length: int = Field(ge=1)
    """L."""
    has_labels: bool
    """Whether labels tell positives from negatives."""
    rating_scale: tuple[float, float] | None = None
    """The lowest and the highest rating, where labels are ratings."""
    tasks: tuple[str, ...] = ()
    """Further tasks that have labels, in the order of their columns in a batch."""
    event_types: tuple[str, ...] = ()
    """Kinds of event that histories tell apart, if they do."""

    @classmethod
    def from_manifest(cls, manifest: DatasetManifest) -> ModelSpec:
        """The part of a dataset's manifest that the model depends on."""
        return cls(
            features=manifest.features,
            num_users=manifest.num_users,
            num_trained_items=manifest.num_trained_items,
            num_items=manifest.num_items,
            history_length=manifest.history_length,
            has_labels=manifest.has_labels,
            rating_scale=manifest.rating_scale,
            tasks=manifest.tasks,
            event_types=manifest.event_types,
        )

    @property
    def is_absolute(self) -> bool:
        """Whether a score stands for a probability or a rating, more than for an order."""
        return self.has_labels or self.rating_scale is not None

    def features_of(self, *sides: str) -> tuple[FeatureSpec, ...]:
        """The features of the given sides, in the manifest's order."""
        return tuple(feature for feature in self.features if feature.side in sides)

    def num_dense(self, *sides: str) -> int:
        """Width of the dense matrix of the given sides."""
        return sum(feature.dim for feature in self.features_of(*sides))
