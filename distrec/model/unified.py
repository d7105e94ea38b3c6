"""The unified model: gated towers side by side, so that one inner product scores everything.

The module holds the dense part only. Embedding rows are asked for by name and handed back by
whoever keeps the tables, so that the same model trains on sharded tables and scores from a memory
map. In training, requests draw the withheld history and encoding draws the withheld ids, so both
are called once a step, in the same mode.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from distrec.batch import Batch, ItemBatch
from distrec.columns import ITEM_ID, LABEL, USER_ID
from distrec.config import ModelConfig
from distrec.config.model import BIAS
from distrec.errors import ConfigError
from distrec.model.adapters import freeze
from distrec.model.autoencoder import VariationalTower
from distrec.model.layers import Gate, PairHead
from distrec.model.multi_task import MultiTaskHead
from distrec.model.ordinal import RatingThresholds, score_of_levels
from distrec.model.positions import Positions, at
from distrec.model.registry import TOWERS, tower_class
from distrec.model.signals import (
    NUM_ITEM_SIGNALS,
    NUM_USER_SIGNALS,
    item_signals,
    recency,
    user_signals,
)
from distrec.model.spec import ModelSpec
from distrec.model.towers import (
    USER_TABLE,
    Tower,
    replace_withheld,
    trained_index,
    with_unknown,
)
from distrec.sharding.lookup import Request
from distrec.sharding.plan import TableSpec

BIAS_TABLE = "item_bias"
USER_BIAS_TABLE = "user_bias"
# the kernels want rows of a multiple of four numbers; the bias is their sum
BIAS_WIDTH = 4
# events: one more says little of an item that had as many
_RECENT_AT_LEAST = 3.0


def vocabulary_of(table: str, spec: ModelSpec) -> str:
    """The vocabulary whose ids are the rows of a table; a text feature's column has none."""
    if table in (USER_TABLE, USER_BIAS_TABLE):
        return USER_ID
    columns = {feature.column for feature in spec.features}
    return table if table in columns else ITEM_ID


class UnifiedModel(nn.Module):
    """Encodes users and items as vectors whose inner product is the score.

    Args:
        spec: Sizes and features of the dataset.
        config: Section [model].

    Attributes:
        tower_names: In the order in which their vectors stand side by side.
        tower_weights: float32, (T + 1,). Outside training each tower's part of a score counts so
            much, and in the end the item's bias. Where scores are more than an order: all once.
        new_item_bias: float32 scalar. Outside training it is added to the scores of items without
            a row of their own. Where scores are more than an order: nothing is.
        recent_weight: float32 scalar. Outside training so often the logarithm of an item's recent
            events is added. Where scores are more than an order: nothing is.
        vector_width: T * D + 3. After the towers comes 1 for a user and the bias for an item; then
            `new_item_bias` for a user and for an item whether it has no row; then `recent_weight`
            and the logarithm. Where scores are more than an order T * D + 2: after the item's bias
            comes the user's, and 1.
        tasks: What is predicted of an example beside its label; none without model.multi_task.

    Source: a gate over towers as in Ma et al. 2018, "Modeling Task Relationships in Multi-task
    Learning with Multi-gate Mixture-of-Experts", on each side apart so that the score factorises.
    """

    def __init__(self, spec: ModelSpec, config: ModelConfig) -> None:
        super().__init__()
        self.spec = spec
        self.config = config
        self.tower_names = tuple(name for name in TOWERS if name in config.towers)
        self.towers = nn.ModuleDict(
            {name: tower_class(name, config)(spec, config) for name in self.tower_names}
        )
        for name in self._frozen_towers:
            freeze(self.towers[name], config.adapter_rank)
        num_towers = len(self.tower_names)
        self.user_gate = Gate(NUM_USER_SIGNALS, num_towers, config.gate_hidden, sees_recency=True)
        self.item_gate = Gate(NUM_ITEM_SIGNALS, num_towers, config.gate_hidden)
        # without effect in a softmax; the base rate of probabilities, the mean of ratings
        self.global_bias = nn.Parameter(torch.zeros(()))
        self._towers_width = num_towers * config.embedding_dim
        self.vector_width = self._towers_width + (2 if spec.is_absolute else 3)
        self.tower_weights: Tensor
        self.new_item_bias: Tensor
        self.recent_weight: Tensor
        given = self.given_weights()
        self.register_buffer("tower_weights", given[:-2].clone())
        self.register_buffer("new_item_bias", given[-2].clone())
        self.register_buffer("recent_weight", given[-1].clone())
        self.thresholds = RatingThresholds(config.rating_levels) if config.rating_levels else None
        self.pair_head = None
        if config.pair_crosses:
            hidden = config.deep_hidden if config.pair_hidden is None else config.pair_hidden
            self.pair_head = PairHead(
                self.vector_width, config.pair_crosses, config.pair_cross_rank, hidden,
                config.dropout,
            )  # fmt: skip
        self.tasks: tuple[str, ...] = ()
        self.task_head = None
        if config.multi_task != "none":
            self.tasks = _several_tasks(spec, config)
            self.task_head = MultiTaskHead(self.vector_width, (LABEL, *self.tasks), config)

    def given_weights(self) -> Tensor:
        """What the configuration says of `tower_weights` (T + 1), `new_item_bias` and
        `recent_weight`: (T + 3,)."""
        given = self.config.tower_weights
        weights = [given.get(name, 1.0) for name in (*self.tower_names, BIAS)]
        return torch.tensor([*weights, self.config.new_item_bias, self.config.recent_weight])

    def weigh(self, weights: Tensor) -> None:
        """Set the weights, as `given_weights` gives them."""
        self.tower_weights.copy_(weights[:-2])
        self.new_item_bias.copy_(weights[-2])
        self.recent_weight.copy_(weights[-1])

    def named_weights(self) -> dict[str, float]:
        """The weights in use: of each tower and the bias, `new_item_bias` and `recent_weight`."""
        names = (*self.tower_names, BIAS, "new_item_bias", "recent_weight")
        used = [*self.tower_weights.tolist(), float(self.new_item_bias), float(self.recent_weight)]
        return dict(zip(names, used, strict=True))

    def _towers(self) -> list[Tower]:
        return [tower for tower in self.towers.values() if isinstance(tower, Tower)]

    def history_towers(self) -> list[Tower]:
        """The towers whose user vectors are made of the history alone."""
        return [tower for tower in self._towers() if tower.reads_history]

    def history_row_names(self) -> frozenset[str]:
        """Names of requests that may have a row an event of the history."""
        return frozenset(name for tower in self._towers() for name in tower.history_rows)

    @property
    def _withholds_ids(self) -> bool:
        return self.training and self.config.id_dropout > 0

    def _withheld(self, count: int, device: torch.device) -> Tensor | None:
        if not self._withholds_ids:
            return None
        return torch.rand(count, device=device) < self.config.id_dropout

    def table_specs(self) -> tuple[TableSpec, ...]:
        """The embedding tables that the towers switched on need, each once."""
        specs = {
            BIAS_TABLE: TableSpec(BIAS_TABLE, self.spec.num_trained_items, BIAS_WIDTH),
        }
        if self.spec.is_absolute:
            specs[USER_BIAS_TABLE] = TableSpec(USER_BIAS_TABLE, self.spec.num_users, BIAS_WIDTH)
        for tower in self._towers():
            specs.update({table.name: table for table in tower.table_specs()})
        return tuple(specs[name] for name in sorted(specs))

    @property
    def frozen_tables(self) -> frozenset[str]:
        """The tables that a frozen tower reads; whoever reads them beside it trains them not."""
        towers = (self.towers[name] for name in self._frozen_towers)
        tables = frozenset(
            table.name
            for tower in towers
            if isinstance(tower, Tower)
            for table in tower.table_specs()
        )
        return tables | {BIAS_TABLE} if BIAS in self.config.frozen else tables

    @property
    def _frozen_towers(self) -> tuple[str, ...]:
        return tuple(name for name in self.config.frozen if name != BIAS)

    def user_requests(self, batch: Batch, positions: Positions | None = None) -> dict[str, Request]:
        """Rows that `encode_users` needs; every name starts with ``user.``."""
        requests: dict[str, Request] = {}
        if self.spec.is_absolute:
            bags = with_unknown(batch.user_index, self._withholds_ids)
            requests["user.bias"] = Request(USER_BIAS_TABLE, bags, "none")
        for tower in self._towers():
            requests.update(tower.user_requests(batch, self._withholds_ids, positions))
        return requests

    def item_requests(self, items: ItemBatch) -> dict[str, Request]:
        """Rows that `encode_items` needs; every name starts with ``item.``.

        Items that train never saw look up the unknown row.
        """
        index = trained_index(items.item_index, self.spec.num_trained_items)
        bags = with_unknown(index, self._withholds_ids)
        requests = {"item.bias": Request(BIAS_TABLE, bags, "none")}
        for tower in self._towers():
            requests.update(tower.item_requests(items, self._withholds_ids))
        return requests

    def encode_users(
        self,
        batch: Batch,
        rows: Mapping[str, Tensor],
        positions: Positions | None = None,
        alone: list[Tensor] | None = None,
    ) -> Tensor:
        """User vectors.

        Args:
            batch: B examples or queries; zero rows are allowed.
            rows: What the look-up gave for `user_requests(batch, positions)`, perhaps among others.
            positions: Where in the histories the users are; by default at their ends.
            alone: Gets what each tower would give by itself, in training: (B or P, D + 3).

        Returns:
            float32, (B, vector_width), or (P, vector_width) with positions; connected to every
            requested row and every parameter of the user side, whatever B.
        """
        withheld = self._withheld(batch.batch_size, batch.user_index.device)
        weights = self.user_gate(
            user_signals(batch, withheld, positions), recency(batch, positions)
        )
        encoded = self._stacked(
            [tower.encode_users(batch, rows, withheld, positions) for tower in self._towers()]
        )
        vectors = _gated(encoded, weights)
        parts, ones = [vectors / self.config.temperature], _ones(vectors)
        if self.spec.is_absolute:
            bias = replace_withheld(rows["user.bias"], withheld).sum(dim=1, keepdim=True)
            parts += [ones, at(positions, bias)]
        elif self.training:
            parts += [ones, 0 * ones, 0 * ones]
        else:
            towers = self.tower_weights[:-1].repeat_interleave(self.config.embedding_dim)
            parts[0] = parts[0] * towers
            weights = (self.tower_weights[-1], self.new_item_bias, self.recent_weight)
            parts += [ones * weight for weight in weights]
        if alone is not None:
            alone += _alone(encoded / self.config.temperature, parts[1:])
        return torch.cat(parts, dim=1)

    def encode_items(
        self, items: ItemBatch, rows: Mapping[str, Tensor], alone: list[Tensor] | None = None
    ) -> Tensor:
        """Item vectors.

        Args:
            items: M items; none is allowed.
            rows: What the look-up gave for `item_requests(items)`, perhaps among others.
            alone: As for `encode_users`: (M, D + 3) of each tower.

        Returns:
            float32, (M, vector_width); connected to every requested row and every parameter of the
            item side, whatever M.
        """
        withheld = self._withheld(len(items.item_index), items.item_index.device)
        weights = self.item_gate(item_signals(items, withheld, self.spec.num_trained_items))
        encoded = self._stacked(
            [tower.encode_items(items, rows, withheld) for tower in self._towers()]
        )
        vectors = _gated(encoded, weights)
        bias = replace_withheld(rows["item.bias"], withheld).sum(dim=1, keepdim=True)
        ones = _ones(vectors)
        parts = [vectors, bias + self.global_bias]
        if self.spec.is_absolute:
            parts.append(ones)
        else:
            has_no_row = items.item_index >= self.spec.num_trained_items
            recent = (items.recent + _RECENT_AT_LEAST).log()
            parts += [ones * of_item.unsqueeze(1) for of_item in (has_no_row, recent)]
        if alone is not None:
            alone += _alone(encoded, parts[1:])
        return torch.cat(parts, dim=1)

    def take_divergence(self) -> Tensor | None:
        """Of the variational autoencoder, for the users encoded last in training; see there."""
        tower = self.towers["autoencoder"] if "autoencoder" in self.tower_names else None
        return tower.take_divergence() if isinstance(tower, VariationalTower) else None

    def pair_scores(self, users: Tensor, items: Tensor) -> Tensor:
        """Scores of B pairs: inner products, and with model.pair_crosses what the head adds.

        Args:
            users: float32, (B, vector_width), as `encode_users` gives them.
            items: float32, (B, vector_width), as `encode_items` gives them.

        Returns:
            float32, (B,).
        """
        scores = (users * items).sum(dim=1)
        return scores if self.pair_head is None else scores + self.pair_head(users, items)

    def example_scores(self, users: Tensor, items: Tensor) -> Tensor:
        """As `pair_scores`; with model.rating_levels what `rating_of_score` takes for ratings."""
        scores = self.pair_scores(users, items)
        return scores if self.thresholds is None else score_of_levels(scores, self.thresholds())

    def part_scores(self, users: Tensor, items: Tensor) -> Tensor:
        """Each tower's share of the scores of all pairs, and in the end those of the biases.

        Args:
            users: float32, (B, vector_width), as `encode_users` gives them.
            items: float32, (M, vector_width), as `encode_items` gives them.

        Returns:
            float32, (T + 3, B, M), the last three of the last three numbers, or (T + 2, B, M)
            where scores are more than an order. They sum to the scores.
        """
        biases = [1] * (self.vector_width - self._towers_width)
        widths = [*[self.config.embedding_dim] * len(self.tower_names), *biases]
        pairs = zip(users.split(widths, dim=1), items.split(widths, dim=1), strict=True)
        return torch.stack([user @ item.T for user, item in pairs])

    def task_scores(self, users: Tensor, items: Tensor) -> Tensor:
        """Scores of B pairs for the label and for each of `tasks`: float32, (B, 1 + K).

        The first is `example_scores` and what the head of several tasks adds; the others are log
        odds of theirs.
        """
        scores = self.example_scores(users, items)
        if self.task_head is None:
            return scores.unsqueeze(1)
        outputs: Tensor = self.task_head(users, items, scores)
        return outputs

    @property
    def num_pair_activations(self) -> int:
        """Numbers that `task_scores` takes for a pair, about."""
        layers = [] if self.task_head is None else self.task_head.modules()
        return 3 * self.vector_width + sum(
            layer.out_features for layer in layers if isinstance(layer, nn.Linear)
        )

    def tower_scores(self, users: Tensor, items: Tensor) -> Tensor:
        """Each tower's share of the scores, for explanations.

        Args:
            users: (..., vector_width), as `encode_users` gives them.
            items: (..., vector_width), of a shape that broadcasts with users: (B, 1, W) and
                (1, M, W) for all pairs, (B, W) twice for B pairs.

        Returns:
            (..., T + 1): the towers in the order of `tower_names`, then the biases. They sum to the
            score.
        """
        products = users * items
        towers, biases = products.split_with_sizes(
            [self._towers_width, self.vector_width - self._towers_width], dim=-1
        )
        towers = towers.unflatten(-1, (len(self.tower_names), -1)).sum(dim=-1)
        return torch.cat([towers, biases.sum(dim=-1, keepdim=True)], dim=-1)

    def _stacked(self, vectors: list[Tensor]) -> Tensor:
        stacked = torch.stack(vectors, dim=1)  # (B, T, D)
        return functional.normalize(stacked, dim=-1) if self.config.normalize else stacked


def _several_tasks(spec: ModelSpec, config: ModelConfig) -> tuple[str, ...]:
    if not spec.tasks or not spec.has_labels:
        raise ConfigError(
            "model.multi_task needs a dataset with labels of several tasks. Received: "
            f"{config.multi_task!r} with {list(spec.tasks)}. Prepare it with prepare.events.tasks."
        )
    return spec.tasks


def _gated(stacked: Tensor, weights: Tensor) -> Tensor:
    return (stacked * weights.unsqueeze(-1)).flatten(1)


def _alone(stacked: Tensor, biases: list[Tensor]) -> list[Tensor]:
    return [torch.cat([tower, *biases], dim=1) for tower in stacked.unbind(1)]


def _ones(vectors: Tensor) -> Tensor:
    return torch.ones(len(vectors), 1, dtype=vectors.dtype, device=vectors.device)
