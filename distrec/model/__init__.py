"""The unified model and what it is trained on."""

from distrec.model.objective import LABELLED, RELATIVE, SAMPLED, Objective, resolve_loss_kind
from distrec.model.spec import ModelSpec
from distrec.model.unified import UnifiedModel, vocabulary_of

__all__ = [
    "LABELLED",
    "RELATIVE",
    "SAMPLED",
    "ModelSpec",
    "Objective",
    "UnifiedModel",
    "resolve_loss_kind",
    "vocabulary_of",
]
