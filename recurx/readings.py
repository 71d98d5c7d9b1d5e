"""Nets read from modules, remembered: reading one anew at every call takes longer than a kernel.

What is remembered of a module is its structure: the types on the way to each weight and the
settings (heads, eps), but no module and no tensor. A walk over plain dictionaries then collects the
weights that are there now, so that replaced modules, parameters and settings are seen. Whatever is
not plain (a property, a parametrised weight, a list of layers) is read in full at every call.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recurx.nets import ATTENTION, Net, NetSpec, as_net

_MISSING = object()
_PLAIN = (int, float, bool, type(None))  # of a setting: compared by identity, none can change
_FLOATING = {torch.float32, torch.bfloat16, torch.float16, torch.float64}


class _Part(NamedTuple):
    """What one module on the way to a weight must be like."""

    parent: int  # its place in the list of parts
    name: str  # under the parent
    kind: type
    weight: bool  # whether its parameter `weight` is the next weight of the net
    settings: tuple[tuple[str, Any], ...] = ()
    children: int = -1  # how many it must have; -1: any number


class _Reading(NamedTuple):
    spec: NetSpec
    shapes: tuple[torch.Size, ...]
    parts: tuple[_Part, ...]  # parents before children; the first is the module itself


class _NotPlain(Exception):
    """The module is not made of plain attributes."""


_readings: weakref.WeakKeyDictionary[nn.Module, _Reading | None] = weakref.WeakKeyDictionary()


def read(module: Any) -> tuple[NetSpec, Sequence[Tensor]] | None:
    """Spec and weights of a `Net` or of a module read before; None: `as_net` has to read it."""
    if type(module) is Net:
        return module.spec, module.weights
    if not isinstance(module, nn.Module) or type(module).__hash__ is None:
        return None
    reading = _readings.get(module)
    if reading is None:
        return None
    weights: list[Tensor] = []
    if not _walk(module, reading.parts, weights):
        _readings.pop(module, None)
        return None
    for weight, shape in zip(weights, reading.shapes, strict=True):
        if weight.shape != shape or weight.dtype not in _FLOATING:
            _readings.pop(module, None)
            return None
    return reading.spec, weights


def as_remembered_net(module: Any, where: str) -> Any:
    """`as_net`, and keep what it made of a module, if that is plain enough to be read quickly."""
    net = as_net(module, where)
    if not isinstance(net, Net) or not isinstance(module, nn.Module):
        return net
    if type(module).__hash__ is not None and module not in _readings:
        _readings[module] = None
        with contextlib.suppress(_NotPlain):
            parts, found = _stack(module, net.spec), list[Tensor]()
            if _walk(module, parts, found) and list(map(id, found)) == list(map(id, net.weights)):
                shapes = tuple(weight.shape for weight in net.weights)
                _readings[module] = _Reading(net.spec, shapes, parts)
    return net


def _walk(module: Any, parts: tuple[_Part, ...], weights: list[Tensor]) -> bool:
    """Collect the weights in the net's order; False where a module is not like its part."""
    inside: list[dict[str, Any]] = []  # the attributes of each part so far
    for parent, name, kind, weight, settings, children in parts:
        if parent >= 0:
            module = inside[parent]["_modules"].get(name)
            if name in inside[parent]:  # an attribute of the instance hides the module
                return False
        if type(module) is not kind:
            return False
        own = module.__dict__
        inside.append(own)
        if weight:
            found = own["_parameters"].get("weight")
            if found is None:
                return False
            weights.append(found)
            continue
        for setting, value in settings:
            found = own.get(setting, _MISSING)
            if found is _MISSING:
                if setting in own["_buffers"] or setting in own["_parameters"]:
                    return False
                found = getattr(kind, setting, _MISSING)
            if found is not value:
                return False
        if children >= 0 and len(own["_modules"]) != children:
            return False
    return True


# ---- the parts of a stack of blocks, as recurx.nets reads it -------------------------------------


def _stack(module: nn.Module, spec: NetSpec) -> tuple[_Part, ...]:
    parts = [_Part(-1, "", type(module), False)]

    def add(parent: int, within: Any, name: str, settings: tuple[str, ...] = ()) -> Any:
        """A child that attribute access finds among the modules and nowhere else."""
        found = getattr(within, name)
        if not isinstance(within, nn.Module) or within._modules.get(name) is not found:
            raise _NotPlain
        if type(within).__getattr__ is not nn.Module.__getattr__:
            raise _NotPlain
        parts.append(_Part(parent, name, type(found), False, _settings(found, settings)))
        return found

    def add_linears(within: nn.Module, *names: str) -> None:
        parent = len(parts) - 1
        for name in names:
            linear = add(parent, within, name)
            if linear._parameters.get("weight") is not getattr(linear, "weight", None):
                raise _NotPlain
            parts[-1] = parts[-1]._replace(weight=True)

    layers = add(0, module, "layers")
    if type(layers) not in (nn.ModuleList, nn.Sequential):
        raise _NotPlain
    parts[-1] = parts[-1]._replace(children=len(layers))
    for name, block in zip(layers._modules, spec.blocks, strict=True):
        of_layer = ("norm_eps",) if block.kind == ATTENTION else ("norm_eps", "self_attn")
        parts.append(_Part(1, name, type(layers._modules[name]), False))
        layer, place = layers._modules[name], len(parts) - 1
        parts[-1] = parts[-1]._replace(settings=_settings(layer, of_layer))
        if block.kind == ATTENTION:
            names = ("num_heads", "num_key_value_heads", "causal")
            add_linears(add(place, layer, "self_attn", names), "qkv_proj", "o_proj")
        else:
            if layer._modules.get("self_attn") is not None:
                raise _NotPlain
            add_linears(add(place, layer, "mlp_t"), "gate_up_proj", "down_proj")
            parts[place] = parts[place]._replace(children=len(layer._modules))
        add_linears(add(place, layer, "mlp"), "gate_up_proj", "down_proj")
    return tuple(parts)


def _settings(module: nn.Module, names: tuple[str, ...]) -> tuple[tuple[str, Any], ...]:
    """Plain attributes of the instance or its class, or their absence."""
    of_class = {name: getattr(type(module), name, _MISSING) for name in names}
    if any(hasattr(value, "__get__") for value in of_class.values()):
        raise _NotPlain  # a property: who knows what it says the next time
    found = {name: vars(module).get(name, of_class[name]) for name in names}
    for name, value in found.items():
        # A tensor may change in place; what only `__getattr__` finds is not looked for again.
        plain = not hasattr(module, name) if value is _MISSING else type(value) in _PLAIN
        if not plain:
            raise _NotPlain
    return tuple(found.items())
