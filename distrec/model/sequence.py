"""The sequence tower: a causal transformer over the history, item by item.

The linear maps work on the events as they lie, one after the other; only attention pads them to a
matrix of one row a history. A history starts at the left, so that padding lies in the future of
every event and is never seen: no mask but the causal one is needed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from distrec.batch import Batch, Jagged
from distrec.columns import FIRST_INDEX, UNKNOWN_INDEX
from distrec.config import ModelConfig
from distrec.model.positions import Positions, padded_places
from distrec.model.spec import ModelSpec
from distrec.model.towers import ITEM_TABLE, ItemRowTower, trained_index
from distrec.sharding.lookup import Request
from distrec.sharding.plan import TableSpec

ITEM_SEQUENCE_TABLE = "item_sequence"
SEQUENCE_ROWS = "user.sequence"
# intervals of up to 2^31 seconds by their binary logarithm
_NUM_TIME_BUCKETS = 32
_HIDDEN_FACTOR = 4
# of all heads, held at once: 4 MiB, which a processor's cache holds; a GPU wants few, large kernels
_ATTENTION_WEIGHTS = {"cpu": 1 << 20, "cuda": 1 << 26}
_INIT_STD = 0.02


class HistoryBias(nn.Module):
    """What attention between two events gets for their distance in events and in time.

    Time counts up to what is to be predicted: what is next in a sitting is not what is next after a
    month. Learned once for all layers. The start of a history is at no distance: it has a bias of
    its own.

    Args:
        num_positions: Distances told apart; larger ones count as the largest.
        num_heads: H.

    Source: Raffel et al. 2020, arXiv:1910.10683, section 2.1; with time, Zhai et al. 2024,
    arXiv:2402.17152, section 3.2.
    """

    def __init__(self, num_positions: int, num_heads: int) -> None:
        super().__init__()
        self.by_distance = nn.Parameter(torch.zeros(num_heads, num_positions))
        self.by_interval = nn.Parameter(torch.zeros(num_heads, _NUM_TIME_BUCKETS))
        self.of_start = nn.Parameter(torch.zeros(num_heads))

    def forward(self, times: Tensor, following: Tensor) -> Tensor:
        """int64 times (B, S), of which the first column is the start, to (B, H, S, S).

        Entry (i, j) is for event i that looks at event j, at the time following[:, i] of what comes
        after i. Only j <= i means anything.
        """
        num_events = times.shape[1] - 1
        places = torch.arange(num_events, device=times.device)
        distances = (places[:, None] - places).clamp(0, self.by_distance.shape[1] - 1)
        intervals = (following[:, 1:, None] - times[:, None, 1:]).abs_().to(torch.float32)
        # the exponent, from 1, is that of the power of two next above the seconds
        buckets = torch.frexp(intervals.add_(1.0)).exponent - 1
        buckets = buckets.clamp_(max=_NUM_TIME_BUCKETS - 1).to(torch.int64).flatten()
        # the gradient of gather is far cheaper on CPU than that of an embedding
        bias = torch.stack([head.gather(0, buckets) for head in self.by_interval])
        bias = bias.view(len(self.by_interval), *intervals.shape)
        bias = functional.pad(bias + self.by_distance[:, None, distances], (0, 0, 1, 0))
        start = self.of_start[:, None, None, None].expand(-1, len(times), num_events + 1, 1)
        return torch.cat([start, bias], dim=3).transpose(0, 1)


class SoftmaxBlock(nn.Module):
    """Pre-norm attention, then a hidden layer, each added to what came in.

    Args:
        width: D.
        num_heads: H, which divides D.
        dropout: Of what is added.

    Source: Kang and McAuley 2018, arXiv:1808.09781 (SASRec).
    """

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.projections = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.hidden_norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, _HIDDEN_FACTOR * width)
        self.hidden_output = nn.Linear(_HIDDEN_FACTOR * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, events: Tensor, bias: Tensor, padding: Padding) -> Tensor:
        """(n, D) to (n, D); bias (B, H, S, S), minus infinity where nothing may be seen."""
        queries, keys, values = (
            padding.heads(part, self.num_heads)
            for part in self.projections(self.attention_norm(events)).chunk(3, dim=1)
        )
        scores = (queries * queries.shape[-1] ** -0.5) @ keys.mT
        weights = torch.softmax(scores + bias, dim=-1)
        events = events + self.dropout(self.output(padding.without(weights @ values)))
        hidden = functional.gelu(self.hidden(self.hidden_norm(events)))
        return events + self.dropout(self.hidden_output(hidden))


class PointwiseBlock(nn.Module):
    """Gated attention without a softmax: weights do not compete, so that their sum says how much.

    Args:
        width: D.
        num_heads: H, which divides D.
        dropout: Of what is added.
        length: Longest history, by which the sums are divided.

    Source: Zhai et al. 2024, arXiv:2402.17152 (HSTU), section 3.
    """

    def __init__(self, width: int, num_heads: int, dropout: float, length: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.length = length
        self.norm = nn.LayerNorm(width)
        self.projections = nn.Linear(width, 4 * width)
        self.output_norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, events: Tensor, bias: Tensor, padding: Padding) -> Tensor:
        """As `SoftmaxBlock.forward`, but bias is finite; what is later is not seen anyway."""
        projected = functional.silu(self.projections(self.norm(events)))
        gate, *parts = projected.chunk(4, dim=1)
        queries, keys, values = (padding.heads(part, self.num_heads) for part in parts)
        weights = functional.silu(queries @ keys.mT + bias).tril()
        # divided afterwards: there are fewer sums than weights
        seen = self.output_norm(padding.without(weights @ values) / self.length)
        added: Tensor = self.dropout(self.output(seen * gate))
        return events + added


class Padding:
    """Between events as they lie, (n, D), and one row a history, (B, S, D).

    Args:
        places: int64, (n,): of each event in the B * S places.
        num_rows: B.
        stride: S.
    """

    def __init__(self, places: Tensor, num_rows: int, stride: int) -> None:
        self.places, self.num_rows, self.stride = places, num_rows, stride

    def rows(self, events: Tensor) -> Tensor:
        """(n, ...) to (B, S, ...), zero where no event is."""
        padded = events.new_zeros(self.num_rows * self.stride, *events.shape[1:])
        padded = padded.index_copy(0, self.places, events)
        return padded.view(self.num_rows, self.stride, *events.shape[1:])

    def heads(self, events: Tensor, num_heads: int) -> Tensor:
        """(n, D) to (B, H, S, D / H)."""
        return self.rows(events).unflatten(2, (num_heads, -1)).transpose(1, 2)

    def without(self, heads: Tensor) -> Tensor:
        """(B, H, S, D / H) to (n, D)."""
        return heads.transpose(1, 2).flatten(2).flatten(0, 1)[self.places]


class SequenceTower(ItemRowTower):
    """The state of a causal transformer after the last event, against a row an item.

    Every history begins with a learned start, whose state stands for a user of whom nothing is
    known. Where histories tell kinds of event apart, a learned row of its kind is added to each
    event's. Items share one table on both sides, as in SASRec; with share_item_embedding it is the
    collaborative tower's.
    """

    history_rows = (SEQUENCE_ROWS,)
    reads_history = True

    def __init__(self, spec: ModelSpec, config: ModelConfig) -> None:
        table = ITEM_TABLE if config.share_item_embedding else ITEM_SEQUENCE_TABLE
        super().__init__(spec.num_trained_items, table)
        self.spec = spec
        width, heads = config.embedding_dim, config.sequence_heads
        self.width = width
        self.num_heads = heads
        self.mask = config.sequence_mask
        self.start = nn.Parameter(torch.randn(1, width) * _INIT_STD)
        num_kinds = FIRST_INDEX + len(spec.event_types)
        self.kinds = nn.Parameter(torch.zeros(num_kinds, width)) if spec.event_types else None
        self.bias = HistoryBias(spec.history_length, heads)
        self.dropout = nn.Dropout(config.dropout)
        self.is_softmax = config.sequence_attention == "softmax"
        blocks: list[nn.Module] = [
            SoftmaxBlock(width, heads, config.dropout)
            if self.is_softmax
            else PointwiseBlock(width, heads, config.dropout, spec.history_length + 1)
            for _ in range(config.sequence_layers)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        for name, parameter in self.blocks.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                nn.init.normal_(parameter, std=_INIT_STD)

    def table_specs(self) -> tuple[TableSpec, ...]:
        """The table of items."""
        return (TableSpec(self.item_table, self.spec.num_trained_items, self.width),)

    def user_requests(
        self, batch: Batch, with_unknown_row: bool, positions: Positions | None
    ) -> dict[str, Request]:
        """A row an event of the history; in training some are the unknown item's."""
        index = trained_index(batch.history.values, self.spec.num_trained_items)
        if self.training and self.mask > 0:
            index = index.masked_fill(
                torch.rand(len(index), device=index.device) < self.mask, UNKNOWN_INDEX
            )
        return {
            SEQUENCE_ROWS: Request(self.item_table, Jagged(index, batch.history.offsets), "none")
        }

    def encode_users(
        self,
        batch: Batch,
        rows: Mapping[str, Tensor],
        withheld: Tensor | None,
        positions: Positions | None,
    ) -> Tensor:
        """The states after the last event, or after as many as are seen at each position."""
        if positions is None:
            positions = Positions.ends(batch)
        states, starts = self._states(batch, rows[SEQUENCE_ROWS])
        return states[starts[positions.example] + positions.length]

    def _states(self, batch: Batch, rows: Tensor) -> tuple[Tensor, Tensor]:
        """States after each event, (n, D); and where each example's begin, with its start's.

        Histories of about one length are padded together, as many as attention can hold at once.
        """
        history, size = batch.history, batch.batch_size
        events = Jagged(
            torch.arange(len(history.values), device=history.offsets.device), history.offsets
        )
        order = torch.argsort(history.lengths, descending=True, stable=True)
        longest = history.lengths[order].tolist()
        states: list[Tensor] = []
        begins = torch.empty_like(history.lengths)
        first = num_states = 0
        while first < size or not states:
            stride = 1 + (longest[first] if size else 0)
            weights = _ATTENTION_WEIGHTS[history.offsets.device.type]
            rows_at_once = max(1, weights // (self.num_heads * stride**2))
            part = order[first : first + rows_at_once]
            begins[part] = num_states + stride * torch.arange(len(part), device=part.device)
            states.append(self._padded_states(batch, rows, part, events.select(part), stride))
            num_states += len(states[-1])
            first += len(part) or 1
        return torch.cat(states), begins

    def _padded_states(
        self, batch: Batch, rows: Tensor, part: Tensor, events: Jagged, stride: int
    ) -> Tensor:
        """States (b * S, D) of b examples, the start's first in each S = stride."""
        device = part.device
        starts = torch.arange(len(part), device=device) * stride
        places = torch.cat([starts, padded_places(events, stride, shift=1)])
        padding = Padding(places, len(part), stride)
        event_times = batch.history_times.values[events.values]
        times = padding.rows(torch.cat([batch.time[part], event_times]))
        # of what comes next: the event after it, and after the last one the example itself
        following = torch.zeros_like(times).flatten()
        following[places[len(part) :] - 1] = event_times
        following[starts + events.lengths] = batch.time[part]
        bias = self.bias(times, following.view_as(times))
        if self.is_softmax:
            future = torch.ones(stride, stride, dtype=torch.bool, device=device).triu(1)
            bias = bias.masked_fill(future, -torch.inf)
        # rows are small: brought to the size of what the blocks add
        states = torch.cat([self.start.expand(len(part), -1), rows[events.values]])
        states = states * self.width**0.5
        if self.kinds is not None:
            kinds = _kind_rows(self.kinds, batch, events.values)
            states = states + functional.pad(kinds, (0, 0, len(part), 0))
        states = self.dropout(states)
        for block in self.blocks:
            states = block(states, bias, padding)
        return padding.rows(self.norm(states)).flatten(0, 1)


def _kind_rows(kinds: Tensor, batch: Batch, events: Tensor) -> Tensor:
    """The row of the kind of each of n events of all histories, int64 (n,): (n, D)."""
    assert batch.history_types is not None
    # on CPU its gradient costs a quarter of that of an embedding
    return kinds.index_select(0, batch.history_types.values[events])
