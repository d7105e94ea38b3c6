"""The unified model and what it is trained on."""

from distrec.model.loss_kind import LABELLED, RELATIVE, SAMPLED, resolve_loss_kind
from distrec.model.objective import Objective
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
