"""Nets read from modules, remembered: reading one anew at every call takes longer than a kernel.

What is remembered of a module is its structure: the types on the way to each weight and the
settings (heads, eps), but no module and no tensor. A walk over plain dictionaries then collects the
weights that are there now, so that replaced modules, parameters and settings are seen. Whatever is
not plain (a property, a parametrised weight, a list of layers) is read in full at every call.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recurx.nets import ATTENTION, Net, NetSpec, as_net

_MISSING = object()
_FLOATING = {torch.float32, torch.bfloat16, torch.float16, torch.float64}


class _Node(NamedTuple):
    """What one module must be like."""

    kind: type
    weight: bool  # whether its parameter `weight` is the next weight of the net
    settings: tuple[tuple[str, Any], ...]
    absent: tuple[str, ...]  # children that it must not have
    count: int  # of its children; -1: any
    children: tuple[tuple[str, _Node], ...]


class _Reading(NamedTuple):
    spec: NetSpec
    shapes: tuple[torch.Size, ...]
    node: _Node


class _NotPlain(Exception):
    """The module is not made of plain attributes."""


_readings: weakref.WeakKeyDictionary[nn.Module, _Reading | None] = weakref.WeakKeyDictionary()


def read(module: Any) -> tuple[NetSpec, Sequence[Tensor]] | None:
    """Spec and weights of a `Net` or of a module read before; None: `as_net` has to read it."""
    if type(module) is Net:
        return module.spec, module.weights
    reading = _readings.get(module) if isinstance(module, nn.Module) else None
    if reading is None:
        return None
    weights: list[Tensor] = []
    if not _walk(module, reading.node, weights):
        _readings.pop(module, None)
        return None
    for weight, shape in zip(weights, reading.shapes, strict=True):
        if weight.shape != shape or weight.dtype not in _FLOATING:
            return None
    return reading.spec, weights


def remember(module: Any, net: Net) -> None:
    """Keep what `as_net` made of a module, if it is plain enough to be read quickly."""
    if not isinstance(module, nn.Module) or module in _readings:
        return
    try:
        node = _stack(module, net.spec)
    except _NotPlain:
        _readings[module] = None
        return
    shapes = tuple(torch.Size(s) for block in net.spec.blocks for s in block.weight_shapes)
    found: list[Tensor] = []
    same = _walk(module, node, found) and len(found) == len(net.weights)
    same = same and all(a is b for a, b in zip(found, net.weights, strict=True))
    _readings[module] = _Reading(net.spec, shapes, node) if same else None


def _walk(module: Any, node: _Node, weights: list[Tensor]) -> bool:
    """Collect the weights in the net's order; False where the module is not like the node."""
    if type(module) is not node.kind:
        return False
    own = module.__dict__
    if node.weight:
        weight = own["_parameters"].get("weight")
        if weight is None:
            return False
        weights.append(weight)
        return True
    for name, value in node.settings:
        found = own.get(name, _MISSING)
        if found is _MISSING:
            found = getattr(node.kind, name, _MISSING)
        if found is not value:
            return False
    children = own["_modules"]
    if node.count >= 0 and len(children) != node.count:
        return False
    for name in node.absent:
        if children.get(name) is not None:
            return False
    return all(_walk(children.get(name), child, weights) for name, child in node.children)


# ---- the nodes of a stack of blocks, as recurx.nets reads it -------------------------------------


def _stack(module: nn.Module, spec: NetSpec) -> _Node:
    layers = _child(module, "layers")
    if type(layers) not in (nn.ModuleList, nn.Sequential):
        raise _NotPlain
    blocks = []
    for (name, layer), block in zip(layers._modules.items(), spec.blocks, strict=True):
        mlp = ("mlp", _swiglu(_child(layer, "mlp")))
        settings = _settings(layer, ("norm_eps",))
        if block.kind == ATTENTION:
            attention = _child(layer, "self_attn")
            parts = (("qkv_proj", _linear(attention, "qkv_proj")),
                     ("o_proj", _linear(attention, "o_proj")))  # fmt: skip
            names = ("num_heads", "num_key_value_heads", "causal")
            mixer = _Node(type(attention), False, _settings(attention, names), (), -1, parts)
            node = _Node(type(layer), False, settings, (), -1, (("self_attn", mixer), mlp))
        else:
            settings += _settings(layer, ("self_attn",))
            mixer = _swiglu(_child(layer, "mlp_t"))
            node = _Node(type(layer), False, settings, ("self_attn",), -1, (("mlp_t", mixer), mlp))
        blocks.append((name, node))
    stack = _Node(type(layers), False, (), (), len(blocks), tuple(blocks))
    return _Node(type(module), False, (), (), -1, (("layers", stack),))


def _swiglu(module: nn.Module) -> _Node:
    parts = tuple((name, _linear(module, name)) for name in ("gate_up_proj", "down_proj"))
    return _Node(type(module), False, (), (), -1, parts)


def _linear(parent: nn.Module, name: str) -> _Node:
    linear = _child(parent, name)
    if linear._parameters.get("weight") is not getattr(linear, "weight", None):
        raise _NotPlain
    return _Node(type(linear), True, (), (), -1, ())


def _child(parent: Any, name: str) -> nn.Module:
    """A child that attribute access finds among the modules and nowhere else."""
    found = getattr(parent, name)
    if not isinstance(parent, nn.Module) or parent._modules.get(name) is not found:
        raise _NotPlain
    if not isinstance(found, nn.Module):
        raise _NotPlain
    return found


def _settings(module: nn.Module, names: tuple[str, ...]) -> tuple[tuple[str, Any], ...]:
    """Plain attributes of the instance or its class, or their absence."""
    of_class = {name: getattr(type(module), name, _MISSING) for name in names}
    if any(hasattr(value, "__get__") for value in of_class.values()):
        raise _NotPlain  # a property: who knows what it says the next time
    return tuple((name, vars(module).get(name, of_class[name])) for name in names)


def as_remembered_net(module: Any, where: str) -> Any:
    """`as_net`, and remember it."""
    net = as_net(module, where)
    if isinstance(net, Net):
        remember(module, net)
    return net
