"""The dense part as named tensors: parameters, buffers and the optimizer's state, no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from distrec.checkpoint.files import open_tensors
from distrec.checkpoint.manifest import CheckpointManifest, read_checkpoint_manifest
from distrec.config import ModelConfig
from distrec.errors import CheckpointError
from distrec.model.unified import UnifiedModel

_PARAMETER, _BUFFER, _OPTIMIZER = "parameter/", "buffer/", "optimizer/"
_AVERAGE = "average/"
# what checkpoints of older versions do not have: it stays as it is built, which changes nothing
_NEWER = frozenset(
    {
        f"{_BUFFER}tower_weights", f"{_BUFFER}new_item_bias", f"{_BUFFER}recent_weight",
        f"{_PARAMETER}user_gate.recency",
    }
)  # fmt: skip


def dense_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Everything of the dense part under names that say what it is."""
    tensors = model_tensors(model)
    tensors |= {f"{_AVERAGE}{name}": tensor for name, tensor in (average or {}).items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is None:
                continue
            assert isinstance(value, Tensor), (name, key, type(value))
            tensors[f"{_OPTIMIZER}{name}/{key}"] = value
    return tensors


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, and the buffers that are kept."""
    parameters = {name for name, _ in model.named_parameters()}
    return {
        f"{_PARAMETER if name in parameters else _BUFFER}{name}": tensor
        for name, tensor in model.state_dict().items()
    }


def optimizer_settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Kind and settings of each parameter group, as JSON holds them."""
    groups = []
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key != "params"}
        groups.append(
            {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in settings.items()
                if value is None or isinstance(value, bool | int | float | str | tuple)
            }
        )
    return {"kind": type(optimizer).__name__, "groups": groups}


def load_dense(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    average: Mapping[str, Tensor] | None = None,
) -> CheckpointManifest:
    """Fill a model, and its optimizer if given, from a checkpoint.

    Without an optimizer the model gets the weights that are to be scored: their average, where the
    checkpoint has one.

    Args:
        path: The checkpoint's directory.
        model: Of the same specification and configuration.
        optimizer: Over the model's parameters, of the same kind, to go on training.
        average: With an optimizer: parameter -> tensor that is filled with its average.

    Returns:
        The checkpoint's manifest.

    Raises:
        CheckpointError: The checkpoint is damaged or of another model.
    """
    manifest = read_checkpoint_manifest(path)
    file = Path(path) / manifest.dense.path
    tensors = open_tensors(file, None)
    own = model_tensors(model)
    _check_same(file, own, {name: tensors[name] for name in tensors if _is_model(name)})
    with torch.no_grad():
        for name, tensor in own.items():
            if name in tensors or name not in _NEWER:
                tensor.copy_(scored(tensors, name) if optimizer is None else tensors[name])
    if optimizer is not None:
        _load_average(file, average or {}, tensors)
        _load_optimizer(file, model, optimizer, tensors)
    return manifest


def scored(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """What is scored in place of a parameter or a buffer: its average, if there is one."""
    average = f"{_AVERAGE}{name.removeprefix(_PARAMETER)}"
    return tensors[average if average in tensors else name]


def load_model(path: str | Path) -> UnifiedModel:
    """The model of a checkpoint, ready to encode: built from its manifest, in evaluation mode.

    Raises:
        CheckpointError: The checkpoint is damaged.
    """
    manifest = read_checkpoint_manifest(path)
    try:
        # JSON mode: strict about types, yet a list is a tuple
        config = ModelConfig.model_validate_json(json.dumps(manifest.config.get("model")))
    except ValidationError as error:
        raise CheckpointError(
            f"a checkpoint holds the section [model] that it was trained with. Received: {path}: "
            f"{error}. Train again with this version."
        ) from error
    file = Path(path) / manifest.dense.path
    tensors = open_tensors(file, None)
    # a size that the configuration makes up takes no memory: the file would have to be as large
    with torch.device("meta"):
        shapes = model_tensors(UnifiedModel(manifest.model_spec, config))
    _check_same(file, shapes, {name: tensors[name] for name in tensors if _is_model(name)})
    model = UnifiedModel(manifest.model_spec, config)
    load_dense(path, model)
    return model.eval()


def _is_model(name: str) -> bool:
    return name.startswith((_PARAMETER, _BUFFER))


def _check_same(file: Path, own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    wanted = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in own.items()}
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()}
    for name in sorted({*wanted, *found} - (_NEWER - set(found))):
        if wanted.get(name) != found.get(name):
            raise CheckpointError(
                f"a checkpoint fits the model it is loaded into. Received: {name} of {file} is "
                f"{found.get(name, 'not there')}, the model has {wanted.get(name, 'no such')}. "
                "Use the configuration that it was trained with."
            )


def _load_average(file: Path, average: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    own = {f"{_AVERAGE}{name}": tensor for name, tensor in average.items()}
    _check_same(file, own, {name: tensors[name] for name in tensors if name.startswith(_AVERAGE)})
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _load_optimizer(
    file: Path, model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    parameters = dict(model.named_parameters())
    states: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for full_name, tensor in tensors.items():
        if _is_model(full_name) or full_name.startswith(_AVERAGE):
            continue
        name, _, key = full_name.removeprefix(_OPTIMIZER).rpartition("/")
        shapes = ((), tuple(parameters[name].shape)) if name in parameters else ()
        if not full_name.startswith(_OPTIMIZER) or tuple(tensor.shape) not in shapes:
            raise CheckpointError(
                f"optimizer state is a number or has its parameter's shape. Received: "
                f"{full_name} of shape {tuple(tensor.shape)} ({file}). Use another checkpoint."
            )
        # step counters stay on the CPU, where torch's optimizers keep them
        device = parameters[name].device if tensor.dim() else torch.device("cpu")
        states[name][key] = tensor.clone().to(device)
    optimizer.state.clear()
    for name, state in states.items():
        # older versions trained a parameter more
        if state and parameters[name].requires_grad:
            optimizer.state[parameters[name]] = state
