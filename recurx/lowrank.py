"""Linear layers that are more than a weight: low-rank adapters (LoRA) and parametrizations.

    W = base + scaling B A        formed once a recursion, with gradient to whatever made it

A layer with a `base_layer`, `lora_A` and `lora_B` (as peft has them), or with a parametrization of
its weight, is run as a plain layer of the weight W. It is compared with its own forward first, on
other values than its own: B begins at zero and would hide a fault. What draws random numbers
(dropout), changes with each use, or is no linear map of the weight W is not merged.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurx.probing import random_state
from recurx.survey import HOOKS, INTERNAL

_CHILDREN = {"base_layer", "parametrizations"}
_ALLOWED = 1e-3  # of the norm; half precision comes in where a layer casts its input itself
_compared: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


class _NotPlain(Exception):
    """Which layer cannot be merged, and why."""


def merged(net: Any, where: str = "") -> Any:
    """A net whose linear layers are plain: `net` itself, a twin of it, or why there is none (str).

    The twin has the net's own classes and attributes; merged weights are no parameters of it.
    """
    if not isinstance(net, nn.Module) or not _wrapped(net):
        return net
    try:
        if torch.compiler.is_compiling():
            return "its adapters are not merged while torch.compile traces"
        return _merged(net, where)
    except _NotPlain as why:
        return str(why)


def _wrapped(module: nn.Module) -> bool:
    """Whether a layer in there is wrapped. NOTE: `modules()` wants hashes, which not all have."""
    children = module._modules
    return bool(_CHILDREN & children.keys()) or any(
        child is not None and _wrapped(child) for child in children.values()
    )


def _merged(module: nn.Module, path: str) -> Any:
    if _CHILDREN & module._modules.keys():
        return _plain(module, path)
    found = {n: m and _merged(m, f"{path}.{n}".strip(".")) for n, m in module._modules.items()}
    if all(found[name] is child for name, child in module._modules.items()):
        return module
    return twin(module, type(module), found, module._parameters)


def twin(
    module: nn.Module,
    cls: type,
    children: Mapping[str, nn.Module | None],
    parameters: Mapping[str, Tensor | None],
) -> Any:
    """A module of class `cls` with the attributes of `module`, and these children and weights."""
    made = cls.__new__(cls)
    own = {"_modules": dict(children), "_parameters": dict(parameters)}
    made.__dict__.update({**vars(module), **own})
    return made


def _plain(module: Any, path: str) -> Any:
    """The plain layer that a wrapped one is."""
    lora = "base_layer" in module._modules
    inner = module.base_layer if lora else module
    try:
        why = _difference(module, lora)
        weight = None if why else effective(module)
    except Exception as error:  # the code of somebody else
        raise _NotPlain(f"`{path}` cannot be merged: {type(error).__name__}: {error}") from error
    if why is not None:
        raise _NotPlain(f"`{path}` {why}")
    cls = type(inner) if lora else type(inner).__mro__[1]  # without torch's class in front
    children = {n: m for n, m in inner._modules.items() if n != "parametrizations"}
    return twin(inner, cls, children, {**inner._parameters, "weight": weight})


def effective(module: Any) -> Tensor:
    """The weight [out, in] of a wrapped layer, with gradient to what it is made of."""
    if "base_layer" not in module._modules:
        return module.weight  # by the parametrization's own code
    weight: Tensor = module.base_layer.weight
    if getattr(module, "disable_adapters", False) or getattr(module, "merged", False):
        return weight
    a, b, scaling = module.lora_A, module.lora_B, getattr(module, "scaling", 1.0)
    many = isinstance(a, (nn.ModuleDict, nn.ParameterDict))
    for name in getattr(module, "active_adapters", list(a)) if many else [None]:
        if not many or name in a:
            one, other = (x[name] if many else x for x in (a, b))
            one, other = (getattr(x, "weight", x) for x in (one, other))
            scale = scaling[name] if isinstance(scaling, Mapping) else scaling
            weight = weight + scale * (other @ one)
    return weight


class _Both(nn.Module):
    """The layer's own forward, twice, and the merged one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        merged = F.linear(x, effective(self.module).to(x.dtype))
        return self.module.forward(x), self.module.forward(x), merged


def _difference(module: nn.Module, lora: bool) -> str | None:
    """What keeps a wrapped layer from being its effective weight; remembered while it stays so."""
    parts = list(module.modules())
    if any(vars(part)[name] for part in parts for name in HOOKS):
        return "has hooks, which would no longer run"
    state = [(type(part), type(part).forward, part.training, _settings(part)) for part in parts]
    if _compared.get(module) == state:
        return None
    values, device = {}, next(module.parameters()).device
    for number, (name, p) in enumerate(module.named_parameters()):
        steps = torch.arange(p.numel(), dtype=torch.float32, device=device)
        filled = torch.cos(1.7 * steps + number).view(p.shape) / math.sqrt(p.shape[-1] or 1)
        values[f"module.{name}"] = filled if lora else p.detach().float()
    buffers = [buffer.clone() for buffer in module.buffers()]
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        drawn = random_state(device)
        width = effective(module).shape[1]
        x = torch.cos(torch.arange(3.0 * width, device=device)).view(3, width)
        one, two, want = torch.func.functional_call(_Both(module), values, (x,))
        draws = random_state(device) != drawn
    if draws:
        return "draws random numbers (dropout)"
    if not torch.equal(one, two) or not all(map(torch.equal, buffers, module.buffers())):
        for buffer, before in zip(module.buffers(), buffers, strict=True):
            buffer.detach().copy_(before)
        return "changes with each use"
    error = float((one.float() - want).norm() / want.norm())
    if not error <= _ALLOWED:
        return f"is no linear layer of its merged weight: off by {error:.2g}"
    _compared[module] = state
    return None


def _settings(module: nn.Module) -> str:
    """Plain attributes, in a form that compares."""
    kinds = (int, float, str, list, tuple, set, dict, type(None))
    own = vars(module).items()
    return repr([(n, v) for n, v in own if n not in INTERNAL and isinstance(v, kinds)])
