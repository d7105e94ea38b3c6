"""All embedding tables of a model, spread over the ranks, as one `Lookup` that trains itself."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from distrec.config import ShardingConfig
from distrec.errors import CheckpointError, ConfigError
from distrec.sharding.collectives import Collectives
from distrec.sharding.exchange import Exchange, FetchRows
from distrec.sharding.initial import initial_rows
from distrec.sharding.kernels import FusedTable
from distrec.sharding.lookup import Request, gather_and_pool_all
from distrec.sharding.plan import TablePlan, state_width
from distrec.sharding.routing import Layout

# numbers made at once while filling a table: 16 MiB of float32
_CHUNK_NUMBERS = 2**22


class EmbeddingTables(nn.Module):
    """Embedding tables over ranks; the backward pass of what they give updates them.

    Rows are updated by the fused optimizer of [sharding], once per row and look-up, with the sum of
    its gradients over all ranks: nothing is divided by N, so the loss must be normalised over the
    global batch. One look-up a step: two would be two updates. A look-up without gradients changes
    nothing. There are no parameters(): no other optimizer may touch the rows.

    Args:
        plans: From `plan.plan_tables`, the same on every rank.
        collectives: The ranks.
        config: Section [sharding].
        seed: Of the first values, which do not depend on the number of ranks.
        device: Where to compute.

    Attributes:
        table_plans: By name.
    """

    def __init__(
        self,
        plans: Sequence[TablePlan],
        collectives: Collectives,
        config: ShardingConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.table_plans = {plan.name: plan for plan in plans}
        self.device = device
        self._config = config
        self._world = collectives.world
        layout = Layout(plans, collectives.world)
        kernels = [
            FusedTable(group.num_rows, group.embedding_dim, config, device, group.replicated)
            for group in layout.groups
        ]
        self._exchange = Exchange(layout, kernels, collectives)
        self._anchor = torch.empty(0, device=device, requires_grad=True)
        for plan in plans:
            self._fill(plan, seed)

    @property
    def exchanged_bytes(self) -> int:
        """Bytes that this rank has sent to the others for look-ups and their gradients so far."""
        return self._exchange.sent_bytes

    def forward(self, requests: Mapping[str, Request]) -> dict[str, Tensor]:
        """Look rows up and pool them.

        Collective: every rank calls this once a step, in the same mode; its requests may hold no
        ids. Where gradients are enabled, the backward pass is collective too: the loss must be
        connected to at least one of the results on every rank.

        Args:
            requests: By any key; tables may be asked for several times.

        Returns:
            By the same key: float32, (B, D), or (nnz, D) for pooling "none".

        Raises:
            DataError: On every rank, when an id of any rank is outside its table.
            ConfigError: There is no such table.
        """
        for request in requests.values():
            self._check_table(request.table)
        layout = self._exchange.layout
        if not layout.groups:
            return {}
        route = layout.route(requests, self.device)
        fetched = FetchRows.apply(self._anchor, self._exchange, route, torch.is_grad_enabled())
        results: dict[str, Tensor] = {}
        for group, rows in enumerate(fetched):
            keys = [k for k, r in requests.items() if layout.places[r.table].group == group]
            if keys:
                pooled = gather_and_pool_all(
                    rows,
                    [route.places[key] for key in keys],
                    [requests[key].ids for key in keys],
                    [requests[key].pooling for key in keys],
                )
                results.update(zip(keys, pooled, strict=True))
        return results

    def set_learning_rate(self, learning_rate: float) -> None:
        """Of all tables, from the next update on."""
        for kernel in self._exchange.kernels:
            kernel.set_learning_rate(learning_rate)

    def local_rows(self, table: str) -> tuple[Tensor, Tensor, Tensor]:
        """What this rank holds of a table; all of it where the table is replicated.

        Args:
            table: Its name.

        Returns:
            Row ids, int64 (n,), ascending, on the CPU; weights (n, D), float32 or float16;
            optimizer state (n, S), float32. Weights and state are views: copy what must not change.
        """
        self._check_table(table)
        kernel = self._kernel(table)
        rows = self._exchange.layout.local_slice(table)
        ids = self._held(self.table_plans[table])
        row_ids = torch.arange(ids.start, ids.stop, ids.step)
        return row_ids, kernel.weights()[rows], kernel.state()[rows]

    def load_rows(self, table: str, row_ids: Tensor, weights: Tensor, state: Tensor) -> None:
        """Overwrite some rows that this rank holds.

        Args:
            table: Its name.
            row_ids: int64, (n,), any of `plan.local_rows` of this rank.
            weights: (n, D); rounded where the table is float16.
            state: float32, (n, S).

        Raises:
            CheckpointError: A row is not of this rank, or a shape is wrong.
        """
        self._check_table(table)
        self._check_rows(table, row_ids, weights, state)
        kernel = self._kernel(table)
        places = self._exchange.layout.local_index(table, row_ids.to(self.device))
        kernel.weights()[places] = weights.to(self.device, kernel.weights().dtype)
        kernel.state()[places] = state.to(self.device, torch.float32)
        kernel.rows_were_written()

    def _kernel(self, table: str) -> FusedTable:
        return self._exchange.kernels[self._exchange.layout.places[table].group]

    def _held(self, plan: TablePlan) -> range:
        return plan.local_rows(self._world.rank, self._world.world_size)

    def _fill(self, plan: TablePlan, seed: int) -> None:
        """First values, chunk by chunk, so that no second copy of the table is made."""
        held = self._held(plan)
        target = self._kernel(plan.name).weights()[self._exchange.layout.local_slice(plan.name)]
        chunk = max(_CHUNK_NUMBERS // plan.embedding_dim, 1)
        for start in range(0, len(held), chunk):
            part = held[start : start + chunk]
            ids = np.arange(part.start, part.stop, part.step, dtype=np.int64)
            scale = self._config.init_scale
            values = initial_rows(plan.name, ids, plan.embedding_dim, seed, scale)
            target[start : start + len(part)] = torch.from_numpy(values)
        self._kernel(plan.name).rows_were_written()

    def _check_table(self, table: str) -> None:
        if table not in self.table_plans:
            near = difflib.get_close_matches(table, self.table_plans, n=1)
            known = ", ".join(sorted(self.table_plans))
            hint = f"Did you mean {near[0]!r}?" if near else f"Tables: {known}."
            raise ConfigError(f"there is no embedding table {table!r}. {hint}")

    def _check_rows(self, table: str, row_ids: Tensor, weights: Tensor, state: Tensor) -> None:
        plan = self.table_plans[table]
        width = state_width(self._config.optimizer, plan.embedding_dim)
        expected = [(len(row_ids), plan.embedding_dim), (len(row_ids), width)]
        if [tuple(weights.shape), tuple(state.shape)] != expected:
            raise CheckpointError(
                f"rows of table {table!r} have weights {expected[0]} and optimizer state "
                f"{expected[1]}. Received: {tuple(weights.shape)} and {tuple(state.shape)}. Use "
                "the checkpoint with the configuration that it was written with."
            )
        held = self._held(plan)
        foreign = (row_ids < held.start) | (row_ids >= plan.num_embeddings)
        foreign |= (row_ids - held.start) % held.step != 0
        if bool(foreign.any()):
            raise CheckpointError(
                f"rank {self._world.rank} of {self._world.world_size} holds rows {held} of table "
                f"{table!r}. Received: row {int(row_ids[foreign][0])}. Load it on its own rank."
            )
