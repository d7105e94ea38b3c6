"""Features of one side as one row of numbers: pooled embeddings of the ids, then the dense part."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distrec.batch import Jagged
from distrec.columns import PADDING_INDEX
from distrec.dataset import FeatureSpec
from distrec.sharding.lookup import Request
from distrec.sharding.plan import TableSpec


def keep_values(bags: Jagged, kept: Tensor) -> Jagged:
    """The values for which `kept` (bool, (nnz,)) holds, in the same bags."""
    kept_before = torch.zeros(len(kept) + 1, dtype=torch.int64, device=kept.device)
    torch.cumsum(kept, 0, out=kept_before[1:])
    return Jagged(bags.values[kept], kept_before[bags.offsets])


def has_features(ids: Mapping[str, Jagged], dense: Tensor) -> Tensor:
    """1 where any feature has a value, else 0: float32, (B, 1)."""
    known = (dense != 0).any(dim=1)
    for bags in ids.values():
        known = known | (keep_values(bags, bags.values != PADDING_INDEX).lengths > 0)
    return known.to(torch.float32).unsqueeze(1)


class FeatureEncoder(nn.Module):
    """Requests and concatenates the features of a side.

    A side without features has a learned constant instead. Context is withheld from a share of the
    training examples, because batch scoring knows none.

    Args:
        features: Of this side, in the manifest's order.
        prefix: Of the request names: ``user`` or ``item``.
        feature_dim: Width of each embedding.
        context_dropout: Share of examples without context in training.
    """

    constant: nn.Parameter
    _is_context: Tensor

    def __init__(
        self,
        features: tuple[FeatureSpec, ...],
        prefix: str,
        feature_dim: int,
        context_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.features = features
        self.prefix = prefix
        self.feature_dim = feature_dim
        self.context_dropout = context_dropout
        self._id_features = tuple(feature for feature in features if not feature.is_dense)
        num_dense = sum(feature.dim for feature in features)
        self.output_dim = feature_dim * len(self._id_features) + num_dense
        is_context = [feature.side == "context" for feature in self._id_features]
        columns = [flag for flag in is_context for _ in range(feature_dim)]
        columns += [feature.side == "context" for feature in features for _ in range(feature.dim)]
        self.register_buffer("_is_context", torch.tensor(columns, dtype=torch.bool), False)
        self._has_context = any(columns)
        if self.output_dim == 0:
            self.output_dim = feature_dim
            self.constant = nn.Parameter(torch.randn(1, feature_dim))

    def table_specs(self) -> tuple[TableSpec, ...]:
        """One table a feature of ids, named by its dataset column."""
        return tuple(
            TableSpec(feature.column, feature.num_embeddings, self.feature_dim)
            for feature in self._id_features
        )

    def _name(self, feature: FeatureSpec) -> str:
        return f"{self.prefix}.feature.{feature.column}"

    def requests(self, ids: Mapping[str, Jagged]) -> dict[str, Request]:
        """The mean of each example's ids; padding counts as no id."""
        return {
            self._name(feature): Request(feature.column, ids[feature.column], "mean")
            for feature in self._id_features
        }

    def forward(self, rows: Mapping[str, Tensor], dense: Tensor) -> Tensor:
        """Looked-up rows and dense numbers (B, num_dense) to float32 (B, output_dim)."""
        if not self.features:
            return self.constant.expand(len(dense), -1)
        pooled = [rows[self._name(feature)] for feature in self._id_features]
        encoded = torch.cat([*pooled, dense], dim=1)
        if self.training and self.context_dropout > 0 and self._has_context:
            withheld = torch.rand(len(dense), 1, device=dense.device) < self.context_dropout
            encoded = encoded.masked_fill(withheld & self._is_context, 0.0)
        return encoded
