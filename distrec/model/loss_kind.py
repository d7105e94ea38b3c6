"""Which loss a run has, and what sorts of losses there are."""

from __future__ import annotations

from typing import Literal

from distrec.columns import FIRST_INDEX
from distrec.config import LossConfig
from distrec.errors import ConfigError
from distrec.model.spec import ModelSpec

LossKind = Literal[
    "softmax", "sampled_softmax", "sampled_binary", "bpr", "binary", "squared", "ordinal"
]
SAMPLED = ("sampled_softmax", "sampled_binary", "bpr")
# of every example's label
LABELLED = ("binary", "squared", "ordinal")
# a number that is added to every score is not learned from them
RELATIVE = ("softmax", "sampled_softmax", "bpr")


def resolve_loss_kind(spec: ModelSpec, config: LossConfig) -> LossKind:
    """The loss that kind = "auto" stands for.

    Raises:
        ConfigError: A loss of ratings without ratings, or label_smoothing where it has no meaning.
    """
    kind: LossKind
    if config.kind != "auto":
        kind = config.kind
    elif spec.rating_scale is not None:
        kind = "squared"
    elif spec.has_labels:
        kind = "binary"
    elif spec.num_trained_items - FIRST_INDEX <= config.full_softmax_items:
        kind = "softmax"
    else:
        kind = "sampled_softmax"
    if kind in ("squared", "ordinal") and spec.rating_scale is None:
        raise ConfigError(
            f'loss.kind = "{kind}" needs ratings. Received: a dataset without. Prepare it with '
            "prepare.predict_ratings, or use another loss."
        )
    if kind not in ("softmax", "binary") and config.label_smoothing > 0:
        raise ConfigError(
            "label smoothing is for the losses softmax, over all items, and binary. "
            f"Received: loss.label_smoothing = {config.label_smoothing} with {kind}. Set it to 0, "
            "or loss.kind to softmax."
        )
    return kind
