"""The trainer's state as one safetensors file: nested dicts of tensors, and JSON beside them.

No pickle, so a state file from elsewhere runs no code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from recurx.atomic import save_tensors
from recurx.errors import CheckpointError

SEPARATOR = "/"  # parameter names have dots


def write(path: Path, values: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Write `values` (anything JSON holds) and `tensors` (nested dicts of tensors or numbers)."""
    save_tensors(path, _flatten(tensors), {"values": json.dumps(values)})


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


def each(function: Callable[[Tensor], Tensor], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """`function` of every tensor in nested dicts."""
    return {
        key: each(function, value) if isinstance(value, Mapping) else function(value)
        for key, value in tensors.items()
    }


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
