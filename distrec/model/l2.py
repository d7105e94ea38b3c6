"""L2 of embedding rows: the squared norms of the rows that an example uses, weighed by table."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distrec.batch import Batch, ItemBatch
from distrec.config import LossConfig
from distrec.model.autoencoder import ITEM_HISTORY_TABLE, ITEM_OUTPUT_TABLE
from distrec.model.sequence import ITEM_SEQUENCE_TABLE
from distrec.model.towers import ITEM_TABLE, USER_TABLE
from distrec.model.unified import BIAS_TABLE, USER_BIAS_TABLE, UnifiedModel
from distrec.sharding.lookup import Request
from distrec.sharding.plan import check_known

_OF_IDS = (
    USER_TABLE, ITEM_TABLE, ITEM_OUTPUT_TABLE, ITEM_HISTORY_TABLE, ITEM_SEQUENCE_TABLE, BIAS_TABLE,
    USER_BIAS_TABLE,
)  # fmt: skip


class SquaredNorms:
    """Of looked-up rows, each times the weight of its table: loss.table_l2, or else loss.l2.

    A table may be named that this choice of towers does not read, so that one configuration serves
    them all.

    Args:
        model: Whose rows they are.
        config: Section [loss].

    Raises:
        ConfigError: loss.table_l2 names what is no table on this dataset.
    """

    def __init__(self, model: UnifiedModel, config: LossConfig) -> None:
        columns = [feature.column for feature in model.spec.features if not feature.is_dense]
        check_known(config.table_l2, [*_OF_IDS, *columns], "loss.table_l2")
        self._of_events = model.history_row_names()
        self._l2 = config.l2
        self._table_l2 = config.table_l2
        self._weights: dict[str, float] = {}

    def note(self, requests: Mapping[str, Request]) -> None:
        """Remember which table each request reads, before `of_users` and `of_items`."""
        self._weights = {
            name: self._table_l2.get(request.table, self._l2) for name, request in requests.items()
        }

    def of_users(self, batch: Batch, rows: Mapping[str, Tensor]) -> Tensor:
        """Of the rows that each example uses on the user side: float32, (B,).

        A pooled bag counts as one row, and so does a history of one row an event: as their mean. A
        withheld id still counts.

        Args:
            batch: Whose user side the noted requests are.
            rows: What the look-up gave for them, perhaps among others.
        """
        total = torch.zeros(batch.batch_size, device=batch.user_index.device)
        for name, weight in self._weighed("user."):
            squares = rows[name].square().sum(dim=1)
            if name in self._of_events:
                sums = torch.zeros_like(total).index_add(0, batch.history.bag_of_value, squares)
                squares = sums / batch.history.lengths.clamp(min=1)
            # without the unknown row, which is no example's
            total = total + weight * squares[: len(total)]
        return total

    def of_items(self, items: ItemBatch, rows: Mapping[str, Tensor]) -> Tensor:
        """Of the rows that each item uses: float32, (M,).

        Args:
            items: Whose item side the noted requests are.
            rows: As for `of_users`.
        """
        total = torch.zeros(len(items.item_index), device=items.item_index.device)
        for name, weight in self._weighed("item."):
            squares = rows[name].square().sum(dim=1)
            total = total + weight * squares[: len(total)]
        return total

    def _weighed(self, prefix: str) -> list[tuple[str, float]]:
        pairs = sorted(self._weights.items())
        return [(name, weight) for name, weight in pairs if name.startswith(prefix) and weight > 0]
