"""Files of tensors on disk: written so that they survive a crash, read only when they fit.

safetensors files are mapped, not read: a row costs the pages it lies on. Its reader checks the
header against the file; what the tensors are is checked here, before one is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distrec.checkpoint.manifest import FileEntry
from distrec.errors import CheckpointError
from distrec.files import fsync, sha256

# safetensors' names of the types that checkpoints hold
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "I64": torch.int64}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write tensors as safetensors, fsynced.

    Raises:
        CheckpointError: The disk is full, or the directory cannot be written.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(on_cpu, str(path))
        # safetensors keeps files to their owner; jobs of other users read checkpoints too
        path.chmod(path.parent.stat().st_mode & 0o666)
        fsync(path)
        return FileEntry(path=path.name, num_bytes=path.stat().st_size, sha256=sha256(path))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def open_tensors(
    path: Path, expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]] | None
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped into memory.

    Args:
        path: The file.
        expected: Name -> shape and type of everything that must be there, and nothing else; None
            takes what there is of the types in DTYPES.

    Raises:
        CheckpointError: The file is damaged, or does not hold what is expected.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            names = list(file.keys())
            if expected is not None and set(names) != set(expected):
                raise CheckpointError(
                    f"{path} holds {sorted(expected)}. Received: {sorted(names)}. Use another "
                    "checkpoint."
                )
            for name in names:
                part = file.get_slice(name)
                shape, kind = tuple(part.get_shape()), DTYPES.get(part.get_dtype())
                wanted = (shape, kind) if expected is None else expected[name]
                if kind is None or (shape, kind) != wanted:
                    raise CheckpointError(
                        f"{name} of {path} has shape {wanted[0]} and type {wanted[1]}. Received: "
                        f"{shape}, {part.get_dtype()}. Use another checkpoint."
                    )
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged: {error}. Use another checkpoint, or copy this one again."
        ) from error
