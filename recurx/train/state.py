"""The trainer's state as one safetensors file: nested dicts of tensors, and JSON beside them.

No pickle, so a state file from elsewhere runs no code. A checksum over all of it, because a disk
that loses a bit would else be resumed from without a word.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from recurx.atomic import save_tensors
from recurx.errors import CheckpointError

SEPARATOR = "/"  # parameter names have dots
VALUES, CHECKSUM = "values", "blake2b"  # keys of the metadata


def write(path: Path, values: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Write `values` (anything JSON holds) and `tensors` (nested dicts of tensors or numbers)."""
    flat, text = _flatten(tensors), json.dumps(values)
    save_tensors(path, flat, {VALUES: text, CHECKSUM: _checksum(text, flat)})


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `write` was given.

    Raises:
        CheckpointError: the file is damaged or no state file.
        OSError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        whole = _checksum(metadata[VALUES], flat) == metadata.get(CHECKSUM)
    except OSError:
        raise
    except Exception as error:  # whatever a damaged header leads to
        raise CheckpointError(
            f"{path}: damaged, or no state of a training run: {error}."
        ) from error
    if not whole:
        why = "its checksum is not that of its contents" if CHECKSUM in metadata else "no checksum"
        raise CheckpointError(f"{path}: damaged, or of an older version of recurx: {why}.")
    return json.loads(metadata[VALUES]), _nest(flat)


def _checksum(text: str, flat: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(flat):
        digest.update(f"\n{name} {flat[name].dtype} {list(flat[name].shape)}\n".encode())
        digest.update(flat[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _flatten(tensors: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{name}{SEPARATOR}")
        else:  # clone: safetensors refuses tensors that share memory, as tied or viewed ones do
            flat[name] = torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()
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
