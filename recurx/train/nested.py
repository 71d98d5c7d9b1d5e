"""Tensors in nested dataclasses, mappings and sequences, as carries are and states."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in nested dataclasses, mappings (by name: dicts of the same states may have them
    in any order) and sequences."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        return [t for f in dataclasses.fields(value) for t in tensors_of(getattr(value, f.name))]
    if isinstance(value, Mapping):
        return [t for key in sorted(value, key=str) for t in tensors_of(value[key])]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in tensors_of(item)]
    return []


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with `function` of each tensor that `tensors_of` finds in it."""
    if isinstance(value, Tensor):
        return function(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: mapped(function, getattr(value, f.name)) for f in dataclasses.fields(value)
        }
        return dataclasses.replace(value, **fields)
    if isinstance(value, Mapping):
        return {key: mapped(function, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(function, item) for item in value)
    return value


def finite(value: Any) -> bool:
    """Whether all floating-point numbers in it are; waits for the device."""
    floats = [t for t in tensors_of(value) if t.is_floating_point() and t.numel()]
    norms = [norm.double() for norm in torch._foreach_norm(floats, float("inf"))]
    return bool(torch.stack(norms).isfinite().all())


def put_(into: Any, values: Any) -> None:
    """Copy each tensor of `values` into that of `into`; ValueError where their shapes differ."""
    for old, new in zip(tensors_of(into), tensors_of(values), strict=True):
        if old.shape != new.shape:
            raise ValueError(f"expected a tensor of shape {list(old.shape)}, got {list(new.shape)}")
        old.copy_(new)
