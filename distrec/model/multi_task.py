"""Several tasks at once on one pair of vectors: experts, a gate and a tower for each task.

Shared bottom, MMoE and PLE are one network: layers of experts, shared by all tasks or a task's own.
A shared bottom has one layer of one shared expert, MMoE one of several with a gate a task, PLE
several layers in which each task has experts of its own beside the shared ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from distrec.columns import task_column
from distrec.config import ModelConfig
from distrec.model.layers import MultiLayerPerceptron


def _experts(count: int, width: int, hidden_dims: Sequence[int], dropout: float) -> nn.ModuleList:
    experts = nn.ModuleList()
    for _ in range(count):
        layers: list[nn.Module] = []
        for left, right in zip((width, *hidden_dims), hidden_dims, strict=False):
            layers += [nn.Linear(left, right), nn.GELU(), nn.Dropout(dropout)]
        experts.append(nn.Sequential(*layers))
    return experts


class ExpertGate(nn.Module):
    """A mean of experts, weighed for each example.

    Args:
        width: Of what is looked at.
        num_experts: E; with one there is nothing to learn.
    """

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.weights = nn.Linear(width, num_experts) if num_experts > 1 else None

    def forward(self, inputs: Tensor, experts: Sequence[Tensor]) -> Tensor:
        """float32 (B, width) and E of (B, H) to (B, H)."""
        if self.weights is None:
            return experts[0]
        weights = torch.softmax(self.weights(inputs), dim=1)
        return (torch.stack([*experts], dim=1) * weights.unsqueeze(2)).sum(dim=1)


class ExpertLayer(nn.Module):
    """Shared experts and each task's own; a gate a task over both.

    Args:
        tasks: Keys of the tasks.
        width: Of the input.
        hidden_dims: Widths of an expert's layers, each with its activation; the last is H.
        num_shared: Experts that all tasks share.
        num_own: Experts of each task.
        dropout: Of activations.
        goes_on: Whether another layer follows: then a gate over all experts makes what its shared
            ones see.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        width: int,
        hidden_dims: Sequence[int],
        num_shared: int,
        num_own: int,
        dropout: float,
        goes_on: bool,
    ) -> None:
        super().__init__()
        self.shared = _experts(num_shared, width, hidden_dims, dropout)
        self.own = nn.ModuleDict(
            {task: _experts(num_own, width, hidden_dims, dropout) for task in tasks}
        )
        self.gates = nn.ModuleDict(
            {task: ExpertGate(width, num_own + num_shared) for task in tasks}
        )
        every = num_shared + num_own * len(tasks)
        self.shared_gate = ExpertGate(width, every) if goes_on else None

    def forward(
        self, inputs: Mapping[str, Tensor], shared: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """From what experts of each task and the shared ones see, to the same of the next layer.

        float32, (B, width) to (B, H); `shared` comes back as it is where no layer follows.
        """
        common = [expert(shared) for expert in self.shared]
        own = {
            task: [expert(inputs[task]) for expert in experts]  # type: ignore[attr-defined]
            for task, experts in self.own.items()
        }
        outputs = {
            task: gate(inputs[task], [*own[task], *common]) for task, gate in self.gates.items()
        }
        if self.shared_gate is None:
            return outputs, shared
        every = [output for outputs_of_task in own.values() for output in outputs_of_task]
        return outputs, self.shared_gate(shared, [*every, *common])


class MultiTaskHead(nn.Module):
    """Log odds of every task for pairs of a user and an item.

    Each task's tower adds to the pair's score, which further tasks scale by a number that is
    learned. Its input is both vectors side by side and their product, whose sum is the score.

    Args:
        vector_width: W, of each of the two vectors.
        tasks: Names of the T tasks, the first of which is that of the score.
        config: Section [model].

    Source: Caruana 1997, "Multitask Learning" (shared bottom); Ma et al. 2018, "Modeling Task
    Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts"; Tang et al. 2020,
    "Progressive Layered Extraction (PLE): A Novel Multi-Task Learning (MTL) Model for Personalized
    Recommendations".
    """

    def __init__(self, vector_width: int, tasks: Sequence[str], config: ModelConfig) -> None:
        super().__init__()
        # names of parameters have the task's in them: a warm start finds it, whatever its place
        keys = [task_column(task) for task in tasks]
        hidden, dropout = config.expert_hidden, config.dropout
        num_layers = config.expert_layers if config.multi_task == "ple" else 1
        num_shared = 1 if config.multi_task == "shared_bottom" else config.experts
        num_own = config.experts if config.multi_task == "ple" else 0
        widths = [3 * vector_width, *[hidden[-1]] * (num_layers - 1)]
        self.layers = nn.ModuleList(
            ExpertLayer(keys, width, hidden, num_shared, num_own, dropout, place + 1 < num_layers)
            for place, width in enumerate(widths)
        )
        self.towers = nn.ModuleDict(
            {key: MultiLayerPerceptron(hidden[-1], hidden[-1:], 1, dropout) for key in keys}
        )
        self.scales = nn.ParameterDict({key: torch.ones(()) for key in keys[1:]})

    def forward(self, users: Tensor, items: Tensor, scores: Tensor) -> Tensor:
        """float32 (B, W) twice and their scores (B,) to (B, T)."""
        shared = torch.cat([users, items, users * items], dim=1)
        outputs = dict.fromkeys(self.towers, shared)
        for layer in self.layers:
            outputs, shared = layer(outputs, shared)
        logits = []
        for key, tower in self.towers.items():
            own = scores * self.scales[key] if key in self.scales else scores
            logits.append(own + tower(outputs[key]).squeeze(1))
        return torch.stack(logits, dim=1)
