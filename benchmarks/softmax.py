"""Time of the full softmax, loss and gradients, beside torch's cross-entropy over all scores.

    python benchmarks/softmax.py [--rounds 9] [--quick]

Two shapes: targets of a batch, items and width as MovieLens-1M has them with three towers
(quality/ml1m_whole.py), and a catalogue of 90,000 items. A third side is ours with vectors as wide
as they come, an odd number, in place of a multiple of 8. On one thread, in turns in one process;
the fastest round of each counts. It ends with one line of JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import common
import torch
from torch import Tensor
from torch.nn import functional

from distrec.model import losses

# targets, items, width
SHAPES = {"MovieLens-1M": (3_600, 3_704, 195), "90,000 items": (512, 90_000, 131)}
MULTIPLE = losses._WIDTH_MULTIPLE
BARS = {f"{name}, torch over ours": common.at_least(1.0) for name in SHAPES}


def by_torch(users: Tensor, items: Tensor, positives: Tensor, weights: Tensor) -> Tensor:
    """The same sum from all scores at once."""
    return (weights * functional.cross_entropy(users @ items.T, positives, reduction="none")).sum()


def measure(loss: Callable[..., Tensor], multiple: int, given: tuple[Tensor, ...]) -> float:
    """Seconds of the loss and its gradients."""
    losses._WIDTH_MULTIPLE = multiple
    users, items, *_ = given
    users.grad = items.grad = None
    return common.seconds(lambda: loss(*given).backward())


def sides_of(shape: tuple[int, int, int]) -> dict[str, Callable[[], float]]:
    """What is measured of one shape; they are checked to agree."""
    num_targets, num_items, width = shape
    generator = torch.Generator().manual_seed(1)
    users, items = (
        (0.1 * torch.randn(count, width, generator=generator)).requires_grad_()
        for count in (num_targets, num_items)
    )
    positives = torch.randint(num_items, (num_targets,), generator=generator)
    given = users, items, positives, torch.rand(num_targets, generator=generator)
    gradients = []
    for loss in (losses.softmax_loss_sum, by_torch):
        measure(loss, MULTIPLE, given)
        assert items.grad is not None
        gradients.append(items.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4)
    return {
        "ours": lambda: measure(losses.softmax_loss_sum, MULTIPLE, given),
        "ours, width as it comes": lambda: measure(losses.softmax_loss_sum, 1, given),
        "torch": lambda: measure(by_torch, 1, given),
    }


def main() -> None:
    """Measure and print."""
    parser = common.parser(__doc__, 9, "two rounds")
    arguments = parser.parse_args()
    rounds = 2 if arguments.quick else arguments.rounds
    common.print_header(["torch"])
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"peer": f"torch {torch.__version__}"}
    for name, shape in SHAPES.items():
        times = common.alternate(sides_of(shape), rounds)
        best = {side: min(values) for side, values in times.items()}
        for side, value in best.items():
            print(f"{name:>14} {side:>24} {1e3 * value:8.0f} ms")
        figures[f"{name}, torch over ours"] = round(best["torch"] / best["ours"], 2)
        figures[f"{name}, ours over width as it comes"] = round(
            best["ours"] / best["ours, width as it comes"], 2
        )
    common.print_result("softmax", figures, BARS)


if __name__ == "__main__":
    main()
