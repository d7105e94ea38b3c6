"""The towers: each asks for embedding rows and turns them into a user and an item vector.

A tower's part of a score is the inner product of its two vectors. A new tower is a class with the
methods of `Tower` and a line in `unified.TOWERS`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distrec.batch import Batch, ItemBatch, Jagged
from distrec.columns import UNKNOWN_INDEX
from distrec.config import ModelConfig
from distrec.model.features import FeatureEncoder, keep_values
from distrec.model.layers import CrossNetwork, MultiLayerPerceptron
from distrec.model.positions import Positions, at, padded_places
from distrec.model.spec import ModelSpec
from distrec.sharding.lookup import Request
from distrec.sharding.plan import TableSpec

USER_TABLE = "user"
ITEM_TABLE = "item"
ITEM_OUTPUT_TABLE = "item_output"
ITEM_HISTORY_TABLE = "item_history"
HISTORY_ROWS = "user.history_rows"


def trained_index(item_index: Tensor, num_trained_items: int) -> Tensor:
    """Item indexes with those that train never saw replaced by the unknown one."""
    return item_index.masked_fill(item_index >= num_trained_items, UNKNOWN_INDEX)


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
    """

    history_rows: tuple[str, ...] = ()

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

    Source: Koren, Bell and Volinsky 2009, "Matrix Factorization Techniques for Recommender
    Systems".
    """

    def __init__(self, spec: ModelSpec, config: ModelConfig) -> None:
        super().__init__(spec.num_trained_items, ITEM_TABLE)
        self.spec = spec
        self.embedding_dim = config.embedding_dim

    def table_specs(self) -> tuple[TableSpec, ...]:
        """The user and the item table."""
        return (
            TableSpec(USER_TABLE, self.spec.num_users, self.embedding_dim),
            TableSpec(ITEM_TABLE, self.spec.num_trained_items, self.embedding_dim),
        )

    def user_requests(
        self, batch: Batch, with_unknown_row: bool, positions: Positions | None
    ) -> dict[str, Request]:
        """The user's row."""
        bags = with_unknown(batch.user_index, with_unknown_row)
        return {"user.id": Request(USER_TABLE, bags, "none")}

    def encode_users(
        self,
        batch: Batch,
        rows: Mapping[str, Tensor],
        withheld: Tensor | None,
        positions: Positions | None,
    ) -> Tensor:
        """The user's row."""
        return at(positions, replace_withheld(rows["user.id"], withheld))


class AutoencoderTower(ItemRowTower):
    """Denoising autoencoder: the bag of the history through an MLP, against an output row an item.

    The bag is the sum of the input rows over the root of the history's length; in training a share
    of the items is withheld and the rest scaled up, as dropout does. The MLP adds to the bag, so
    that the linear item-to-item model is there from the first step.

    Source: Liang et al. 2018, arXiv:1802.05814 (Mult-DAE), section 2; with a sum of rows in place
    of the first layer, which is the same product.
    """

    history_rows = (HISTORY_ROWS,)

    def __init__(self, spec: ModelSpec, config: ModelConfig) -> None:
        output = ITEM_TABLE if config.share_item_embedding else ITEM_OUTPUT_TABLE
        super().__init__(spec.num_trained_items, output)
        self.spec = spec
        self.embedding_dim = config.embedding_dim
        self.input_dropout = config.input_dropout
        self.network = MultiLayerPerceptron(
            self.embedding_dim, config.autoencoder_hidden, self.embedding_dim, config.dropout
        )

    def table_specs(self) -> tuple[TableSpec, ...]:
        """The input table and the output table, which may be the collaborative tower's."""
        output = TableSpec(self.item_table, self.spec.num_trained_items, self.embedding_dim)
        return (self.history_spec(), output)

    def history_spec(self) -> TableSpec:
        """The input table."""
        return TableSpec(ITEM_HISTORY_TABLE, self.spec.num_trained_items, self.embedding_dim)

    def user_requests(
        self, batch: Batch, with_unknown_row: bool, positions: Positions | None
    ) -> dict[str, Request]:
        """The sum over the history; withheld items are not asked for, so no row travels.

        With positions, a row an event: each position has a sum of its own.
        """
        history = Jagged(
            trained_index(batch.history.values, self.spec.num_trained_items), batch.history.offsets
        )
        if positions is not None:
            return {HISTORY_ROWS: Request(ITEM_HISTORY_TABLE, history, "none")}
        if self.training and self.input_dropout > 0:
            draws = torch.rand(len(history.values), device=history.values.device)
            history = keep_values(history, draws >= self.input_dropout)
        return {"user.history": Request(ITEM_HISTORY_TABLE, history, "sum")}

    def encode_users(
        self,
        batch: Batch,
        rows: Mapping[str, Tensor],
        withheld: Tensor | None,
        positions: Positions | None,
    ) -> Tensor:
        """The encoded history; an empty one gives what the MLP makes of zeros."""
        lengths = batch.history.lengths if positions is None else positions.length
        if positions is None:
            bag = rows["user.history"]
        else:
            bag = self._bags_before(batch.history, rows[HISTORY_ROWS], positions)
        kept_share = 1.0 - self.input_dropout if self.training else 1.0
        scale = lengths.clamp(min=1).to(torch.float32).sqrt() * kept_share
        bag = bag / scale.unsqueeze(1)
        encoded: Tensor = bag + self.network(bag)
        return encoded

    def _bags_before(self, history: Jagged, rows: Tensor, positions: Positions) -> Tensor:
        """The sum of the rows that each position sees, some of them withheld: (P, D)."""
        if self.training and self.input_dropout > 0:
            draws = torch.rand(len(rows), 1, device=rows.device)
            rows = rows * (draws >= self.input_dropout)
        size = history.batch_size
        stride = 1 + (int(history.lengths.max()) if size else 0)
        padded = rows.new_zeros(size * stride, rows.shape[1])
        padded = padded.index_copy(0, padded_places(history, stride, shift=1), rows)
        sums = padded.view(size, stride, rows.shape[1]).cumsum(1).flatten(0, 1)
        return sums[positions.example * stride + positions.length]


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
