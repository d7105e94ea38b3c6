"""How much each tower counts, items that train has not, and what is recent, fitted on valid.

The gate learns how well each tower explains train. A tower with a row a user explains it by heart,
and so is trusted with more than it can say of what comes next: on MovieLens-1M towers that train
alone weighs are worse together than the best of them (docs/experiments.md). The weights are few:
valid gives them, and hardly suffers.

Of a user with several targets they maximise the likelihood that an item drawn from the softmax is
any of these. That of every single one would be decided by those that nobody could foresee, and
lists are about the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distrec import pulse
from distrec.batch import Jagged, QueryBatch
from distrec.metrics.evaluation import ModelScorer
from distrec.metrics.ranking import catalogue_positions, slice_bags, without_seen
from distrec.model import UnifiedModel
from distrec.sharding.collectives import Collectives

# scores of all chosen queries; but so many queries in any case, enough for a handful of numbers
_MOST_SCORES = 1 << 25
_LEAST_QUERIES = 512
# of all parts at once, 8 MiB: memory that is mapped anew for each block costs as much as the sums
_SCORES_PER_BLOCK = 1 << 21
_MOST_STEPS = 30
_TOLERANCE = 1e-3
# as so many queries would that are sure of a weight of 1, where a score's part has a variance of 1
_PRIOR = 1.0


@dataclass(frozen=True)
class HeldOut:
    """Queries that weights are fitted on.

    Args:
        users: float32, (B, vector_width): vectors with all weights, and the new_item_bias, 1.
        seen: Items to mask, B bags; None masks nothing.
        targets: Withheld items, B bags.
    """

    users: Tensor
    seen: Jagged | None
    targets: Jagged


@dataclass
class _Sums:
    """Log-likelihood of queries, its gradient (P,), and a bound of how it curves down (P, P)."""

    value: Tensor
    gradient: Tensor
    curvature: Tensor

    @classmethod
    def of_nothing(cls, width: int) -> _Sums:
        zeros = torch.zeros(1 + width + width * width, dtype=torch.float64)
        return cls.from_vector(zeros, width)

    @classmethod
    def from_vector(cls, vector: Tensor, width: int) -> _Sums:
        value, gradient, curvature = vector.split([1, width, width * width])
        return cls(value, gradient, curvature.view(width, width))

    def vector(self) -> Tensor:
        return torch.cat([self.value, self.gradient, self.curvature.flatten()])


def fit_tower_weights(
    model: UnifiedModel,
    held_out: Sequence[HeldOut],
    items: Tensor,
    is_free: Tensor,
    collectives: Collectives,
) -> Tensor:
    """The weights of the parts of a score that make the targets likeliest, in a softmax over items.

    Newton's method on a bound, in which a user's target counts as much as the weights before the
    step find it among the user's (Dempster et al. 1977, the EM algorithm). A weight of a tower or
    of the bias that would be below 0 is 0. Collective.

    Args:
        model: Whose `part_scores` are weighed.
        held_out: This rank's queries.
        items: float32, (M, vector_width): the catalogue.
        is_free: bool, (M,): whether the place stands for no item.
        collectives: Of the job.

    Returns:
        float32, (T + 3,), on the CPU, the same on every rank, as `UnifiedModel.weigh` takes them;
        1, and the last two 0, where there are no targets.
    """
    width = len(model.given_weights())
    usual = torch.ones(width, dtype=torch.float64)
    usual[-2:] = 0.0
    least = torch.zeros(width, dtype=torch.float64)
    least[-2:] = -torch.inf
    weights = best = usual
    best_value = -torch.inf
    for _ in range(_MOST_STEPS):
        sums = _Sums.of_nothing(width).vector()
        for part in held_out:
            sums += _sums(model, part, items, is_free, weights).vector()
        found = _Sums.from_vector(collectives.allreduce(sums, "valid.tower_weights"), width)
        away = weights - usual
        value = float(found.value) - 0.5 * _PRIOR * float(away @ away)
        if value < best_value:
            # the step was too long
            weights = (weights + best) / 2
        else:
            best, best_value = weights, value
            curvature = found.curvature + _PRIOR * torch.eye(width, dtype=torch.float64)
            step = torch.linalg.solve(curvature, found.gradient - _PRIOR * away)
            weights = (best + step).maximum(least)
        if float((weights - best).abs().max()) < _TOLERANCE:
            break
    return best.to(torch.float32)


def _sums(
    model: UnifiedModel, part: HeldOut, items: Tensor, is_free: Tensor, weights: Tensor
) -> _Sums:
    width = len(weights)
    rows = max(1, _SCORES_PER_BLOCK // max(1, len(items) * width))
    total = _Sums.of_nothing(width)
    for start in range(0, len(part.users), rows):
        pulse.beat()
        stop = min(start + rows, len(part.users))
        parts = model.part_scores(part.users[start:stop], items)  # (P, B, M)
        targets = slice_bags(part.targets, start, stop)
        seen = None if part.seen is None else slice_bags(part.seen, start, stop)
        scores = torch.einsum("p,pbm->bm", weights.to(parts), parts)
        scores = scores.masked_fill(is_free.to(scores.device), -torch.inf)
        log_shares = torch.log_softmax(without_seen(scores, seen, targets), dim=1)
        place = catalogue_positions(targets.to(items.device), stop - start, len(items), "targets")
        place = torch.stack(place).unique(dim=1).unbind()
        # each user with targets counts once
        wanted = torch.full_like(log_shares, -torch.inf)
        wanted[place] = log_shares[place]
        chances = torch.logsumexp(wanted, dim=1)
        is_asked = ~chances.isneginf()
        share = (wanted[place] - chances[place[0]]).exp()
        shares = log_shares.exp() * is_asked.unsqueeze(1)
        by_user = parts.transpose(0, 1)
        weighed = by_user * shares.unsqueeze(1)
        # of each user by itself, then in float64: ranks cut the queries into other blocks, and
        # weights are to be the same
        mean = weighed.sum(2).double()
        square = (weighed @ by_user.mT).double()
        total.value += chances[is_asked].double().sum().cpu()
        found = (parts[:, *place] * share).double().sum(1)
        total.gradient += (found - mean.sum(0)).cpu()
        total.curvature += (square.sum(0) - mean.T @ mean).cpu()
    return total


def choose_held_out(
    model: UnifiedModel,
    scorer: ModelScorer,
    queries: Iterable[QueryBatch],
    num_queries: int,
    exclude_seen: bool,
) -> list[HeldOut]:
    """Encode the queries to fit on; collective, as looking up rows is.

    Of many queries some are taken, by what they are about and so the same on any number of ranks.

    Args:
        model: All of whose weights, new_item_bias among them, are 1 from then on.
        scorer: Encodes users with it.
        queries: This rank's.
        num_queries: Of all ranks.
        exclude_seen: Whether lists leave out what was seen.
    """
    most = max(_LEAST_QUERIES, _MOST_SCORES // max(1, len(scorer.item_vectors)))
    every = -(-num_queries // most)
    chosen = []
    model.weigh(torch.ones_like(model.given_weights()))
    for batch in queries:
        users = scorer.encode_users(batch.batch)
        about = batch.batch.user_index.cpu() + _bag_sums(batch.targets) + _bag_sums(batch.seen)
        rows = (about % every == 0).nonzero().squeeze(1)
        seen = batch.seen.select(rows) if exclude_seen else None
        chosen.append(HeldOut(users[rows.to(users.device)], seen, batch.targets.select(rows)))
    return chosen


def _bag_sums(bags: Jagged) -> Tensor:
    return torch.zeros(bags.batch_size, dtype=torch.int64).index_add(
        0, bags.bag_of_value, bags.values
    )
