"""The towers: each asks for embedding rows and turns them into a user and an item vector.

A tower's part of a score is the inner product of its two vectors. A new tower is a class with the
methods of `Tower` and a line in `registry.TOWERS`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distrec.batch import Batch, ItemBatch, Jagged
from distrec.columns import UNKNOWN_INDEX
from distrec.config import ModelConfig
from distrec.model.features import FeatureEncoder
from distrec.model.layers import CrossNetwork, MultiLayerPerceptron
from distrec.model.positions import Positions, at, sums_before
from distrec.model.spec import ModelSpec
from distrec.sharding.lookup import Request
from distrec.sharding.plan import TableSpec

USER_TABLE = "user"
ITEM_TABLE = "item"
NEIGHBOR_ROWS = "user.neighbor_rows"


def trained_index(item_index: Tensor, num_trained_items: int) -> Tensor:
    """Item indexes with those that train never saw replaced by the unknown one."""
    return item_index.masked_fill(item_index >= num_trained_items, UNKNOWN_INDEX)


def trained_history(batch: Batch, num_trained_items: int) -> Jagged:
    """The history, with items that train never saw replaced by the unknown one."""
    history = batch.history
    return Jagged(trained_index(history.values, num_trained_items), history.offsets)


def with_unknown(index: Tensor, appended: bool) -> Jagged:
    """One id an example; with `appended`, the unknown id as one more, for `replace_withheld`."""
    if appended:
        index = torch.cat([index, index.new_full((1,), UNKNOWN_INDEX)])
    return Jagged.singles(index)


def replace_withheld(rows: Tensor, withheld: Tensor | None) -> Tensor:
    """Put the unknown row, the last one, where an id is withheld.

    Args:
        rows: (B + 1, D), or (B, D) when nothing is withheld.
        withheld: bool, (B,), or None.

    Returns:
        (B, D), connected to every requested row.
    """
    if withheld is None:
        return rows
    return torch.where(withheld.unsqueeze(1), rows[-1:], rows[:-1])


class Tower(nn.Module):
    """What every tower has; `withheld` (bool, one an example) says whose ids are dropped out.

    With `positions` the user side is wanted at P places of the histories, without at their ends.

    Attributes:
        history_rows: Names of requests that have a row an event of the history.
        reads_history: Whether the history alone makes its user vectors.
    """

    history_rows: tuple[str, ...] = ()
    reads_history = False

    def table_specs(self) -> tuple[TableSpec, ...]:
        """The tables that the requests read."""
        raise NotImplementedError

    def user_requests(
        self, batch: Batch, with_unknown_row: bool, positions: Positions | None
    ) -> dict[str, Request]:
        """Rows for the user side, by names that start with ``user.``."""
        raise NotImplementedError

    def item_requests(self, items: ItemBatch, with_unknown_row: bool) -> dict[str, Request]:
        """Rows for the item side, by names that start with ``item.``."""
        raise NotImplementedError

    def encode_users(
        self,
        batch: Batch,
        rows: Mapping[str, Tensor],
        withheld: Tensor | None,
        positions: Positions | None,
    ) -> Tensor:
        """User vectors, float32 (B, D), or (P, D) with positions."""
        raise NotImplementedError

    def encode_items(
        self, items: ItemBatch, rows: Mapping[str, Tensor], withheld: Tensor | None
    ) -> Tensor:
        """Item vectors, float32 (M, D)."""
        raise NotImplementedError


class ItemRowTower(Tower):
    """A tower whose item side is the item's row of one table.

    Args:
        num_trained_items: Rows of that table.
        item_table: Its name.
    """

    def __init__(self, num_trained_items: int, item_table: str) -> None:
        super().__init__()
        self.num_trained_items = num_trained_items
        self.item_table = item_table

    def item_requests(self, items: ItemBatch, with_unknown_row: bool) -> dict[str, Request]:
        """The item's row."""
        index = trained_index(items.item_index, self.num_trained_items)
        bags = with_unknown(index, with_unknown_row)
        return {f"item.{self.item_table}": Request(self.item_table, bags, "none")}

    def encode_items(
        self, items: ItemBatch, rows: Mapping[str, Tensor], withheld: Tensor | None
    ) -> Tensor:
        """The item's row."""
        return replace_withheld(rows[f"item.{self.item_table}"], withheld)


class CollaborativeTower(ItemRowTower):
    """Matrix factorisation: a row a user, a row an item.

    With model.cf_history = "mean" a user is the row and the mean of the item rows of the history:
    one step of graph convolution, so that who had the same items is alike. It takes no table of its
    own, and is symmetric: what i says of j, j says of i. The autoencoder's bag is not: its input
    rows are a table of their own, as the y of SVD++.

    Source: Koren, Bell and Volinsky 2009, "Matrix Factorization Techniques for Recommender
    Systems"; the mean: Kabbur, Ning and Karypis 2013, "FISM: Factored Item Similarity Models for
    Top-N Recommender Systems", and He et al. 2020, arXiv:2002.02126 (LightGCN).
    """

    history_rows = (NEIGHBOR_ROWS,)

    def __init__(self, spec: ModelSpec, config: ModelConfig) -> None:
        super().__init__(spec.num_trained_items, ITEM_TABLE)
        self.spec = spec
        self.embedding_dim = config.embedding_dim
        self.adds_history = config.cf_history == "mean"

    def table_specs(self) -> tuple[TableSpec, ...]:
        """The user and the item table."""
        return (
            TableSpec(USER_TABLE, self.spec.num_users, self.embedding_dim),
            TableSpec(ITEM_TABLE, self.spec.num_trained_items, self.embedding_dim),
        )

    def user_requests(
        self, batch: Batch, with_unknown_row: bool, positions: Positions | None
    ) -> dict[str, Request]:
        """The user's row; with cf_history the mean of the history, or a row an event."""
        bags = with_unknown(batch.user_index, with_unknown_row)
        requests = {"user.id": Request(USER_TABLE, bags, "none")}
        if self.adds_history:
            history = trained_history(batch, self.num_trained_items)
            if positions is None:
                requests["user.neighbors"] = Request(ITEM_TABLE, history, "mean")
            else:
                requests[NEIGHBOR_ROWS] = Request(ITEM_TABLE, history, "none")
        return requests

    def encode_users(
        self,
        batch: Batch,
        rows: Mapping[str, Tensor],
        withheld: Tensor | None,
        positions: Positions | None,
    ) -> Tensor:
        """The user's row, and with cf_history the mean of those of the history."""
        users = at(positions, replace_withheld(rows["user.id"], withheld))
        if not self.adds_history:
            return users
        if positions is None:
            return users + rows["user.neighbors"]
        sums = sums_before(batch.history, rows[NEIGHBOR_ROWS], positions)
        return users + sums / positions.length.clamp(min=1).unsqueeze(1)


class DeepTower(Tower):
    """Two MLPs: over the features of user and context, and over those of the item.

    With model.deep_crosses, cross layers of each side's features come before its MLP.

    Source: Covington, Adams and Sargin 2016, "Deep Neural Networks for YouTube Recommendations",
    section 3; with features on the item side too, so that a cold item has a vector.
    """

    def __init__(self, spec: ModelSpec, config: ModelConfig) -> None:
        super().__init__()
        self.user_features = FeatureEncoder(
            spec.features_of("user", "context"), "user", config.feature_dim, config.id_dropout
        )
        self.item_features = FeatureEncoder(spec.features_of("item"), "item", config.feature_dim)
        self.user_crosses = CrossNetwork(self.user_features.output_dim, config.deep_crosses)
        self.item_crosses = CrossNetwork(self.item_features.output_dim, config.deep_crosses)
        self.user_network = MultiLayerPerceptron(
            self.user_features.output_dim, config.deep_hidden, config.embedding_dim, config.dropout
        )
        self.item_network = MultiLayerPerceptron(
            self.item_features.output_dim, config.deep_hidden, config.embedding_dim, config.dropout
        )

    def table_specs(self) -> tuple[TableSpec, ...]:
        """One table a feature of ids."""
        return self.user_features.table_specs() + self.item_features.table_specs()

    def user_requests(
        self, batch: Batch, with_unknown_row: bool, positions: Positions | None
    ) -> dict[str, Request]:
        """The mean embedding of each user and context feature."""
        return self.user_features.requests(batch.ids)

    def item_requests(self, items: ItemBatch, with_unknown_row: bool) -> dict[str, Request]:
        """The mean embedding of each item feature."""
        return self.item_features.requests(items.ids)

    def encode_users(
        self,
        batch: Batch,
        rows: Mapping[str, Tensor],
        withheld: Tensor | None,
        positions: Positions | None,
    ) -> Tensor:
        """The encoded features."""
        crossed = self.user_crosses(self.user_features(rows, batch.dense))
        encoded: Tensor = self.user_network(crossed)
        return at(positions, encoded)

    def encode_items(
        self, items: ItemBatch, rows: Mapping[str, Tensor], withheld: Tensor | None
    ) -> Tensor:
        """The encoded features."""
        crossed = self.item_crosses(self.item_features(rows, items.dense))
        encoded: Tensor = self.item_network(crossed)
        return encoded
