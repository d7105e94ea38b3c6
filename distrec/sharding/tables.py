"""All embedding tables of a model, spread over the ranks, as one `Lookup` that trains itself."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from distrec import pulse
from distrec.config import ShardingConfig
from distrec.errors import CheckpointError, ConfigError
from distrec.sharding.autograd import FetchRows, StartRows, UnderWay
from distrec.sharding.collectives import Collectives
from distrec.sharding.exchange import Asked, Exchange
from distrec.sharding.initial import initial_rows
from distrec.sharding.kernels import make_table
from distrec.sharding.lookup import Request, gather_and_pool_all
from distrec.sharding.plan import TablePlan, state_width
from distrec.sharding.routing import Layout

# numbers made at once while filling a table: hashing them stays in a core's cache, and so takes a
# third of the time that millions at once take
_CHUNK_NUMBERS = 2**16


def _nothing() -> None:
    pass


class Wait(Protocol):
    """Waits for the rows of a look-up and gives them pooled."""

    def __call__(self, meanwhile: Callable[[], None] = ...) -> dict[str, Tensor]:
        """By the key of their request: float32, (B, D), or (nnz, D) for pooling "none".

        Args:
            meanwhile: Called in the backward pass while the rows' gradients travel. Whatever was
                computed after this call has its gradients by then.
        """


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
            make_table(group.num_rows, group.embedding_dim, config, device, group.kind != "spread")
            for group in layout.groups
        ]
        # one rank sends nothing, and has no reason to round
        alone = collectives.world.world_size == 1
        precision = "fp32" if alone else config.exchange_precision
        self._exchange = Exchange(layout, kernels, collectives, precision)
        self._anchor = torch.empty(0, device=device, requires_grad=True)
        for plan in plans:
            self._fill(plan, seed)

    @property
    def exchanged_bytes(self) -> int:
        """Bytes that this rank has sent to the others for look-ups and their gradients so far."""
        return self._exchange.sent_bytes

    def ask(self, requests: Mapping[str, Request], with_rows: bool = False) -> Asked:
        """Send the row numbers of a look-up ahead; `forward` takes the rest of it up.

        Collective, and returns at once. One look-up may be ahead at a time; others may come between
        it and its `forward`, and updates too, for row numbers do not depend on them. A bad id is
        told by `forward`, or by the result's `wait`, which also ends a look-up that is not made.

        Args:
            requests: As for `forward`.
            with_rows: Wait for the row numbers of all ranks, and send the rows ahead, too, as they
                are now: an update before `forward` is not seen by it, but by its own update. Such a
                look-up must be made.

        Raises:
            ConfigError: There is no such table.
            DataError: As `forward`; with rows only.
        """
        asked = self._ask(requests, "row numbers of the next look-up")
        return self._exchange.fetch_ahead(asked) if with_rows else asked

    def _ask(self, requests: Mapping[str, Request], name: str) -> Asked:
        for request in requests.values():
            self._check_table(request.table)
        return self._exchange.ask(self._exchange.layout.route(requests, self.device), name)

    def forward(
        self,
        requests: Mapping[str, Request],
        asked: Asked | None = None,
        meanwhile: Callable[[], None] = _nothing,
    ) -> dict[str, Tensor]:
        """Look rows up and pool them: `start`, and wait at once."""
        return self.start(requests, asked)(meanwhile)

    def start(
        self,
        requests: Mapping[str, Request],
        asked: Asked | None = None,
        meanwhile: Callable[[], None] = _nothing,
    ) -> Wait:
        """Have rows sent; what does not need them can be computed while they travel.

        Collective: every rank calls this once a step, in the same mode; its requests may hold no
        ids. Where gradients are enabled, the backward pass is collective too: the loss must be
        connected to at least one of the results on every rank.

        Args:
            requests: By any key; tables may be asked for several times.
            asked: What `ask` gave for the same requests; None: nothing was sent ahead, and row
                numbers are waited for.
            meanwhile: Called in the backward pass while the rows' gradients travel. Whatever was
                computed after this call has its gradients by then.

        Returns:
            Waits for the rows. Collective.

        Raises:
            DataError: On every rank, when an id of any rank is outside its table.
            ConfigError: There is no such table.
        """
        if not self._exchange.layout.groups:
            return lambda meanwhile=_nothing: {}
        if asked is None:
            asked = self._ask(requests, "row numbers of a look-up")
        look_up = UnderWay(self._exchange, asked, torch.is_grad_enabled())
        started = StartRows.apply(self._anchor, look_up, meanwhile)

        def wait(meanwhile: Callable[[], None] = _nothing) -> dict[str, Tensor]:
            fetched = FetchRows.apply(started, look_up, meanwhile)
            return self._pool(requests, asked, fetched)

        return wait

    def _pool(
        self, requests: Mapping[str, Request], asked: Asked, fetched: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """The rows of each request from those of each width."""
        layout = self._exchange.layout
        results: dict[str, Tensor] = {}
        for width, rows in zip(layout.widths, fetched, strict=True):
            keys = [
                key for key in asked.route.lengths if layout.width(requests[key].table) == width
            ]
            if keys:
                pooled = gather_and_pool_all(
                    rows,
                    asked.route.gathers[width],
                    [requests[key].ids for key in keys],
                    [requests[key].pooling for key in keys],
                    [self.table_plans[requests[key].table].composition for key in keys],
                )
                results.update(zip(keys, pooled, strict=True))
        return results

    def set_learning_rate(self, learning_rate: float) -> None:
        """Of all tables, from the next update on."""
        for kernel in self._exchange.kernels:
            kernel.set_learning_rate(learning_rate)

    def local_rows(self, table: str) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of a table that are this rank's own; all of it where the table is replicated.

        Args:
            table: Its name.

        Returns:
            Row ids, int64 (n,), ascending, on the CPU; weights (n, D), float32 or float16;
            optimizer state (n, S), float32. Weights and state are views, or with a hot tier copies:
            copy what must not change.
        """
        parts = self.local_parts(table)
        row_ids = [torch.arange(ids.start, ids.stop, ids.step) for ids, _, _ in parts]
        if len(parts) == 1:
            return row_ids[0], parts[0][1], parts[0][2]
        return (
            torch.cat(row_ids),
            torch.cat([weights for _, weights, _ in parts]),
            torch.cat([state for _, _, state in parts]),
        )

    def local_parts(self, table: str) -> list[tuple[range, Tensor, Tensor]]:
        """As `local_rows`, without a copy: row ids, weights and state part by part, ascending."""
        self._check_table(table)
        layout = self._exchange.layout
        found = []
        for ids, part, places in layout.held_parts(table):
            kernel = self._exchange.kernels[part.group]
            weights, state = kernel.weights()[places], kernel.state()[places]
            if layout.groups[part.group].kind == "hot":
                # each is on every rank: rank i mod N answers for row i
                rank, world_size = self._world.rank, self._world.world_size
                ids = ids[rank::world_size]
                weights, state = weights[rank::world_size], state[rank::world_size]
            found.append((ids, weights, state))
        return found

    @property
    def collectives(self) -> Collectives:
        """The ranks."""
        return self._exchange.collectives

    def held_parts(self, table: str) -> list[tuple[range, Tensor, Tensor]]:
        """As `local_parts`, with all rows that this rank keeps, hot ones of other ranks too.

        Who writes into weights or state calls `rows_were_written` before the next look-up.
        """
        self._check_table(table)
        found = []
        for ids, part, places in self._exchange.layout.held_parts(table):
            kernel = self._exchange.kernels[part.group]
            found.append((ids, kernel.weights()[places], kernel.state()[places]))
        return found

    def num_shared_rows(self, table: str) -> int:
        """Rows [0, this) of a table are on every rank; each of the others is on one."""
        plan = self.table_plans[table]
        if plan.placement == "replicated":
            return plan.num_embeddings
        return plan.hot_on(self._world.world_size)

    def rows_were_written(self) -> None:
        """Must follow a write into what `held_parts` gave."""
        for kernel in self._exchange.kernels:
            kernel.rows_were_written()

    def track_touched_rows(self) -> None:
        """From now on keep which rows may have changed, a byte a row, for delta checkpoints."""
        for kernel in self._exchange.kernels:
            kernel.track_touched()

    def forget_touched_rows(self) -> None:
        """No row counts as changed any more: a full checkpoint has them all."""
        for kernel in self._exchange.kernels:
            kernel.forget_touched()

    def touched_parts(self, table: str) -> list[Tensor]:
        """Which rows of `local_parts` may have changed: bool, (n,) a part, views.

        Only after `track_touched_rows`.
        """
        self._check_table(table)
        layout, world = self._exchange.layout, self._world
        found = []
        for _, part, places in layout.held_parts(table):
            touched = self._exchange.kernels[part.group].touched
            assert touched is not None, "track_touched_rows comes first"
            is_hot = layout.groups[part.group].kind == "hot"
            own = slice(world.rank, None, world.world_size) if is_hot else slice(None)
            found.append(touched[places][own])
        return found

    def mark_touched(self, table: str, row_ids: Tensor) -> None:
        """Count rows that this rank holds as changed, where that is tracked."""
        row_ids = row_ids.to(self.device)
        layout = self._exchange.layout
        for part in layout.places[table].parts:
            touched = self._exchange.kernels[part.group].touched
            if touched is not None:
                chosen = row_ids[(row_ids >= part.start) & (row_ids < part.stop)]
                touched[layout.local_index(part, chosen).to(touched.device)] = True

    def load_rows(self, table: str, row_ids: Tensor, weights: Tensor, state: Tensor) -> None:
        """Overwrite some rows that this rank holds; hot rows must be loaded on every rank alike.

        Args:
            table: Its name.
            row_ids: int64, (n,), any of `plan.held_rows` of this rank.
            weights: (n, D); rounded where the table is float16.
            state: float32, (n, S).

        Raises:
            CheckpointError: A row is not of this rank, or a shape is wrong.
        """
        self._check_table(table)
        self._check_rows(table, row_ids, weights, state)
        row_ids = row_ids.to(self.device)
        weights, state = weights.to(self.device), state.to(self.device, torch.float32)
        layout = self._exchange.layout
        parts = layout.places[table].parts
        for part in parts:
            chosen: slice | Tensor = slice(None)
            if len(parts) > 1:
                chosen = (row_ids >= part.start) & (row_ids < part.stop)
            kernel = self._exchange.kernels[part.group]
            places = layout.local_index(part, row_ids[chosen])
            kernel.weights()[places] = weights[chosen].to(kernel.weights().dtype)
            kernel.state()[places] = state[chosen]
            kernel.rows_were_written()

    def _fill(self, plan: TablePlan, seed: int) -> None:
        """First values, chunk by chunk, so that no second copy of the table is made."""
        chunk = max(_CHUNK_NUMBERS // plan.embedding_dim, 1)
        for held, place, places in self._exchange.layout.held_parts(plan.name):
            kernel = self._exchange.kernels[place.group]
            target = kernel.weights()[places]
            for start in range(0, len(held), chunk):
                part = held[start : start + chunk]
                ids = np.arange(part.start, part.stop, part.step, dtype=np.int64)
                scale = self._config.init_scale
                values = initial_rows(plan.name, ids, plan.embedding_dim, seed, scale)
                target[start : start + len(part)] = torch.from_numpy(values)
                pulse.beat()
            kernel.rows_were_written()

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
        own = plan.is_held(row_ids, self._world.rank, self._world.world_size)
        if not bool(own.all()):
            held = plan.held_rows(self._world.rank, self._world.world_size)
            raise CheckpointError(
                f"rank {self._world.rank} of {self._world.world_size} holds rows "
                f"{' and '.join(map(str, held))} of table {table!r}. Received: row "
                f"{int(row_ids[~own][0])}. Load it on its own rank."
            )
