"""The trainer's state as one safetensors file: nested dicts of tensors, and JSON beside them.

No pickle, so a state file from elsewhere runs no code. Written beside its name, flushed to the
disk, then renamed: a kill at any moment leaves the old file or the new one.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recurx.errors import CheckpointError

SEPARATOR = "/"  # parameter names have dots


def write(path: Path, values: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Write `values` (anything JSON holds) and `tensors` (nested dicts of tensors or numbers)."""
    flat = _flatten(tensors)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(flat, temporary, metadata={"values": json.dumps(values)})
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `write` was given.

    Raises:
        CheckpointError: the file is damaged or no state file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads((file.metadata() or {})["values"])
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged, or no state of a training run: {error}") from error
    return values, _nest(flat)


def _flatten(tensors: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{name}{SEPARATOR}")
        else:  # clone: safetensors refuses tensors that share memory, as tied or viewed ones do
            flat[name] = torch.as_tensor(value).detach().clone().contiguous()
    return flat


def _nest(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, tensor in flat.items():
        *parents, last = name.split(SEPARATOR)
        into = nested
        for parent in parents:
            into = into.setdefault(parent, {})
        into[last] = tensor
    return nested
