"""The content tower: items by their features alone, for users by what they have had."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from distrec.batch import ItemBatch
from distrec.config import ModelConfig
from distrec.errors import ConfigError
from distrec.model.autoencoder import AutoencoderTower
from distrec.model.features import FeatureEncoder
from distrec.model.layers import MultiLayerPerceptron
from distrec.model.spec import ModelSpec
from distrec.sharding.lookup import Request
from distrec.sharding.plan import TableSpec


class ContentTower(AutoencoderTower):
    """An autoencoder whose output rows are made of the items' features: for items never seen.

    What a user has had, by id, is held against what an item is: so users who had the same find the
    same kind of thing, also where nobody has had it yet. Features may be ids, hashed words, or
    vectors of texts and images.

    Source: Volkovs, Yu and Poutanen 2017, "DropoutNet: Addressing Cold Start in Recommender
    Systems"; that ids are withheld in training is model.id_dropout.
    """

    def __init__(self, spec: ModelSpec, config: ModelConfig) -> None:
        super().__init__(spec, config)
        features = spec.features_of("item")
        if not features:
            raise ConfigError(
                "the tower content reads features of items. Received: a dataset without. Name some "
                "in prepare.items.features, or take content out of model.towers."
            )
        self.item_features = FeatureEncoder(features, "item", config.feature_dim)
        self.item_network = MultiLayerPerceptron(
            self.item_features.output_dim, config.deep_hidden, config.embedding_dim, config.dropout
        )

    def table_specs(self) -> tuple[TableSpec, ...]:
        """The input table of the history, and one table a feature of ids."""
        return (self.history_spec(), *self.item_features.table_specs())

    def item_requests(self, items: ItemBatch, with_unknown_row: bool) -> dict[str, Request]:
        """The mean embedding of each item feature."""
        return self.item_features.requests(items.ids)

    def encode_items(
        self, items: ItemBatch, rows: Mapping[str, Tensor], withheld: Tensor | None
    ) -> Tensor:
        """The encoded features."""
        encoded: Tensor = self.item_network(self.item_features(rows, items.dense))
        return encoded
