"""The autoencoder tower: a denoised bag of the history, so that a user needs no row."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distrec.batch import Batch, Jagged
from distrec.config import ModelConfig
from distrec.model.features import keep_values
from distrec.model.layers import MultiLayerPerceptron
from distrec.model.positions import Positions, sums_before
from distrec.model.spec import ModelSpec
from distrec.model.towers import ITEM_TABLE, ItemRowTower, trained_history
from distrec.sharding.lookup import Request
from distrec.sharding.plan import TableSpec

ITEM_OUTPUT_TABLE = "item_output"
ITEM_HISTORY_TABLE = "item_history"
HISTORY_ROWS = "user.history_rows"


class AutoencoderTower(ItemRowTower):
    """Denoising autoencoder: the bag of the history through an MLP, against an output row an item.

    The bag is the sum of the input rows over the root of the history's length; in training a share
    of the items is withheld and the rest scaled up, as dropout does. The MLP adds to the bag, so
    that the linear item-to-item model is there from the first step.

    Source: Liang et al. 2018, arXiv:1802.05814 (Mult-DAE), section 2; with a sum of rows in place
    of the first layer, which is the same product.
    """

    history_rows = (HISTORY_ROWS,)
    reads_history = True

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
        history = trained_history(batch, self.spec.num_trained_items)
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
        return self._encode(bag / scale.unsqueeze(1))

    def _encode(self, bag: Tensor) -> Tensor:
        """Scaled bags, (B, D), to user vectors."""
        encoded: Tensor = bag + self.network(bag)
        return encoded

    def _bags_before(self, history: Jagged, rows: Tensor, positions: Positions) -> Tensor:
        """The sum of the rows that each position sees, some of them withheld: (P, D)."""
        if self.training and self.input_dropout > 0:
            draws = torch.rand(len(rows), 1, device=rows.device)
            rows = rows * (draws >= self.input_dropout)
        return sums_before(history, rows, positions)


class VariationalTower(AutoencoderTower):
    """An autoencoder whose user vector is drawn from a normal distribution in training.

    The MLP gives its mean, beside the bag, and the logarithm of its variance. What the distribution
    costs against the standard one is kept until `take_divergence`. Outside training the vector is
    the mean.

    Source: Liang et al. 2018, arXiv:1802.05814 (Mult-VAE), section 2.
    """

    def __init__(self, spec: ModelSpec, config: ModelConfig) -> None:
        super().__init__(spec, config)
        self.network = MultiLayerPerceptron(
            self.embedding_dim, config.autoencoder_hidden, 2 * self.embedding_dim, config.dropout
        )
        self._divergence: Tensor | None = None

    def _encode(self, bag: Tensor) -> Tensor:
        shift, log_variance = self.network(bag).chunk(2, dim=1)
        mean: Tensor = bag + shift
        if not self.training:
            return mean
        variance = log_variance.exp()
        self._divergence = 0.5 * (mean.square() + variance - log_variance - 1.0).sum(dim=1)
        return mean + variance.sqrt() * torch.randn_like(mean)

    def take_divergence(self) -> Tensor:
        """Kullback-Leibler divergence of each vector that was encoded last: float32, (B,) or (P,).

        In training, once after each time.
        """
        assert self._divergence is not None
        divergence, self._divergence = self._divergence, None
        return divergence
