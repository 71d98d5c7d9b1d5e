"""What a module is made of, and whether it still is: the guard at each call, like a compiler's.

A stack of blocks computes what `recurx.reference` says only if nothing else is in it. `Reading`
looks at everything that its code can see: children, parameters, buffers, hooks, plain attributes,
classes, and the functions that their code names. What it saw is kept as live views of the very
dictionaries that hold it, so that looking again is one pass in C.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from recurx.code import OURS, SCALARS, Names, same
from recurx.nets import ATTENTION, Net, NetSpec, by_attributes, plain_linears

_FLOATING = {torch.float32, torch.bfloat16, torch.float16, torch.float64}
HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
_GLOBAL_HOOKS = tuple(getattr(torch_module, f"_global{name}") for name in HOOKS)
_HARMLESS = ("recurx.", "torch.utils.module_tracker", "torch.utils.flop_counter")  # note-takers
INTERNAL = {*vars(nn.Module()), "_compiled_call_impl"}  # every module has these
_CODE = (types.FunctionType, types.BuiltinFunctionType, type, types.ModuleType)
_LINEARS = {
    "self_attn": ("qkv_proj", "o_proj"),
    "mlp_t": ("gate_up_proj", "down_proj"),
    "mlp": ("gate_up_proj", "down_proj"),
}
_DEEPEST = 4  # of containers and configurations in attributes


class Reading:
    """What the survey saw of a module, and the guard that tells whether it is still there."""

    def __init__(self, module: Any, where: str = "") -> None:
        self.differences: list[str] = []  # a clause each, with the path of the layer
        self.plain = isinstance(module, nn.Module)  # whether the guard sees every change
        self.spec: NetSpec | None = None  # from `bind` on, as the shapes
        self.shapes: tuple[torch.Size, ...] = ()
        self.proved: set[bool] = set()  # with and without rotary tables, what a probe showed
        self._modules: list[nn.Module] = []
        self._live: list[Iterable[Any]] = []  # whose contents must stay the same objects
        self._counted: list[Any] = []  # whose lengths must stay
        self._hooks: list[Any] = []
        self._weights: list[dict[str, Any]] = []
        self._absent: list[tuple[dict[str, Any], str]] = []  # parameters that are None
        self._flat: dict[Any, tuple[Any, ...]] = {}
        survey = _Survey(self, where)
        survey.stack(module)
        # Equal ones compute alike with equal weights, while `kept` lives, whose ids are in it.
        self.signature, self.kept = tuple(survey.signature), survey.names.kept
        self._globals = survey.names.held()
        self._types = [type(m) for m in self._modules]
        self._lengths = list(map(len, self._counted))

    def bind(self, net: Net) -> None:
        """Remember the net that was read, if its weights lie where the guard looks."""
        self.spec, self.shapes = net.spec, tuple(weight.shape for weight in net.weights)
        found = [own.get("weight") for own in self._weights]
        self.plain = self.plain and list(map(id, found)) == list(map(id, net.weights))

    def weights(self, module: Any) -> list[Tensor] | None:
        """The weights in the net's order if nothing changed but them; else None."""
        flat = self._flat.get(module.__dict__.get("training"))
        if flat is None or any(self._hooks) or foreign_hooks() or foreign_mode():
            return None
        try:
            if list(map(len, self._counted)) != self._lengths:
                return None
            if not all(map(is_, chain.from_iterable(self._live), flat)):
                return None
            if list(map(type, self._modules)) != self._types:
                return None
            if not same(self._globals):
                return None
            for held, name in self._absent:
                if held[name] is not None:
                    return None
            weights: list[Tensor] = [held["weight"] for held in self._weights]
        except (KeyError, RuntimeError):  # something is gone; another thread changes it just now
            return None
        for weight, shape in zip(weights, self.shapes, strict=True):
            if weight is None or weight.shape != shape or weight.dtype not in _FLOATING:
                return None
            if type(weight) not in (nn.Parameter, Tensor):
                return None
        return weights

    def take(self, module: Any, before: Reading | None) -> None:
        """Take what is there now as what has to stay, for the present mode (training or not)."""
        if before is not None and before.signature == self.signature:
            self._flat.update(before._flat)
        self._flat[module.__dict__.get("training")] = tuple(chain.from_iterable(self._live))


def foreign_hooks() -> bool:
    """Whether somebody registered hooks for all modules, which would no longer run."""
    if not any(_GLOBAL_HOOKS):
        return False
    hooks = chain.from_iterable(hooks.values() for hooks in _GLOBAL_HOOKS)
    return not all(str(getattr(h, "__module__", "")).startswith(_HARMLESS) for h in hooks)


def foreign_mode() -> str | None:
    """The class of a mode that sees, and may change, every operator or function; not PyTorch's."""
    if not torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack():
        return None
    modes = *_get_current_dispatch_mode_stack(), *_get_current_function_mode_stack()
    kinds = (kind for kind in map(type, modes) if not kind.__module__.startswith(OURS))
    return next((kind.__name__ for kind in kinds), None)


class _Survey:
    """The walk that fills a `Reading`."""

    def __init__(self, reading: Reading, where: str) -> None:
        self.reading, self.where = reading, where
        self.signature: list[Any] = []
        self.names = Names()
        self.id = self.names.id
        self._classes: dict[type, Any] = {}
        self._bases: dict[type, Any] = {}
        self._values: dict[int, Any] = {}

    def differs(self, path: str, what: str) -> None:
        path = f"{self.where}.{path}".strip(".")
        self.reading.differences.append(f"`{path}` {what}")

    def stack(self, module: Any) -> None:
        known, layers = by_attributes(module), module.layers
        self.signature.append(known)
        if isinstance(module, nn.Module):
            self.module("", module, ("layers",))
            if module._modules.get("layers") is not layers:
                self.reading.plain = False
        self.signature += self.names.look(vars(nn.Module), ("__call__", "_call_impl"), {})
        if foreign_hooks():
            self.differs("", "is called under global module hooks, which would no longer run")
        if not known and (mode := foreign_mode()):
            self.differs("", f"is called under a {mode}, which would not see its operators")
        if isinstance(layers, nn.Module):
            if type(layers) not in (nn.ModuleList, nn.Sequential):
                self.differs("layers", f"is a {type(layers).__name__}, no plain list of layers")
            self.module("layers", layers, tuple(layers._modules))
        for number, layer in enumerate(layers):
            self.layer(f"layers.{number}", layer, known)

    def layer(self, path: str, layer: Any, known: bool) -> None:
        mixer = "mlp_t" if getattr(layer, "self_attn", None) is None else "self_attn"
        if not self.module(path, layer, (mixer, "mlp"), buffers=("norm_eps",)):
            return
        if isinstance(getattr(layer, "norm_eps", None), Tensor):
            self.reading.plain = False  # it may change in place
        for name in (mixer, "mlp"):
            part, names = self.child(layer, name), _LINEARS[name]
            if name == "self_attn" and not known:
                self.attention(f"{path}.{name}", part)
            if not self.module(f"{path}.{name}", part, names):
                continue
            for linear_name in names:
                where, linear = f"{path}.{name}.{linear_name}", self.child(part, linear_name)
                if not isinstance(linear, nn.Module):
                    self.differs(where, "is no torch module")
                    continue
                parametrized = known and "parametrizations" in linear._modules
                children = ("parametrizations",) if parametrized else ()
                self.module(where, linear, children, parameters=("weight",))
                if known and type(linear).forward not in plain_linears:
                    self.differs(where, f"is a {type(linear).__name__}, no plain linear layer")
                if (weight := linear._parameters.get("weight")) is not None:
                    self.reading._weights.append(linear._parameters)
                    if not f"{type(weight).__module__}.".startswith(OURS):
                        what = "whose operators may do anything"
                        self.differs(
                            where, f"has a weight of class {type(weight).__name__}, {what}"
                        )
                elif not parametrized:
                    self.differs(where, "has no plain parameter `weight`")
                else:
                    self.reading.plain = False

    def attention(self, path: str, module: Any) -> None:
        heads, kv_heads = (getattr(module, n, 0) for n in ("num_heads", "num_key_value_heads"))
        if getattr(module, "causal", False):
            self.differs(path, "is causal")
        if heads != kv_heads:
            self.differs(path, f"has {kv_heads} K/V heads for {heads} heads")

    def child(self, module: Any, name: str) -> Any:
        """What attribute access finds; the guard sees only registered children."""
        found = getattr(module, name, None)
        if module._modules.get(name) is not found:
            self.reading.plain = False
        if type(module).__getattr__ is not nn.Module.__getattr__:
            self.reading.plain = False
        return found

    def module(
        self,
        path: str,
        module: Any,
        children: tuple[str, ...],
        parameters: tuple[str, ...] = (),
        buffers: tuple[str, ...] = (),
    ) -> bool:
        """One module: it may hold what is named, and plain attributes. False: it is none."""
        if not isinstance(module, nn.Module):
            self.differs(path, "is no torch module")
            return False
        reading, own = self.reading, vars(module)
        for kind, held, read in (
            ("child", module._modules, children),
            ("parameter", module._parameters, parameters),
            ("buffer", module._buffers, buffers),
        ):
            for name, value in held.items():
                if name not in read and value is not None:
                    self.differs(path, f"has a {kind} `{name}` ({type(value).__name__})")
                elif kind == "parameter" and value is None:
                    reading._absent.append((held, name))
            reading._counted.append(held)
            if kind != "parameter":
                reading._live.append(held.values())
        if module._buffers:
            reading.plain = False
        if any(own[name] for name in HOOKS):
            self.differs(path, "has hooks, which would no longer run")
        if "forward" in own:
            self.differs(path, "has a `forward` of its own in the instance")
        reading._hooks += [own[name] for name in HOOKS]
        reading._live.append(own.values())
        reading._counted.append(own)
        if path:
            reading._modules.append(module)
        settings = []
        for name, value in own.items():
            if name in INTERNAL or name in children or name == "norm_eps":
                continue
            if isinstance(value, (Tensor, nn.Module)):
                self.differs(path, f"holds a {type(value).__name__} `{name}` beside its parameters")
            settings.append((name, self.value(value)))
        self.signature.append((path, self.code(type(module)), tuple(settings)))
        return True

    def value(self, value: Any, depth: int = 0) -> Any:
        """The signature of an attribute; what can change in place is watched."""
        kind = type(value)
        if kind in SCALARS:
            return kind, repr(value)
        if isinstance(value, (*_CODE, Tensor, nn.Module)):
            return self.id(value)
        inside: Any = None
        if isinstance(value, dict):
            inside = value
        elif not isinstance(value, (tuple, list, set, frozenset)):
            inside = getattr(value, "__dict__", None)
            if inside is None:
                return self.id(value)
        if id(value) in self._values:  # a configuration that all layers share, or a cycle
            return self._values[id(value)]
        self._values[id(value)] = kind, self.id(value)
        if depth < _DEEPEST:
            items = value if inside is None else inside.values()
            self.reading._live.append(items)
            self.reading._counted.append(items)
            names = () if inside is None else tuple(map(repr, inside))
            contents = [self.value(item, depth + 1) for item in items]
            self._values[id(value)] = kind, names, tuple(contents)
        return self._values[id(value)]

    def code(self, cls: type) -> Any:
        """A class's functions and settings, and what they name in their files."""
        if cls not in self._classes:
            bases = [base for base in cls.__mro__ if base not in (nn.Module, object)]
            self._classes[cls] = tuple(self.own_code(base) for base in bases)
        return self._classes[cls]

    def own_code(self, cls: type) -> Any:
        if cls in self._bases:
            return self._bases[cls]
        values = vars(cls).values()
        self.reading._live.append(values)
        self.reading._counted.append(values)
        found: list[Any] = [self.id(cls), *map(self.id, values)]
        if not cls.__module__.startswith(OURS):
            found += [self.names.of(value) for value in values]
        self._bases[cls] = tuple(found)
        return self._bases[cls]


# ---- remembered ----------------------------------------------------------------------------------

_readings: dict[int, tuple[weakref.ref[Any], Reading]] = {}


def remember(module: Any, reading: Reading) -> None:
    """Keep the reading for as long as the module lives, if the guard can watch it."""
    if not reading.plain:
        return
    key = id(module)
    reading.take(module, remembered(module))
    forget: Callable[[Any], object] = lambda _: _readings.pop(key, None)  # noqa: E731
    _readings[key] = weakref.ref(module, forget), reading


def read(module: Any, rope: bool) -> tuple[NetSpec, Sequence[Tensor]] | None:
    """Spec and weights of a `Net`, or of a module that was proved and is as it was; else None."""
    if type(module) is Net:
        return module.spec, module.weights
    found = _readings.get(id(module))
    if found is None or found[0]() is not module or rope not in found[1].proved:
        return None
    weights = found[1].weights(module)
    if weights is None:
        return None
    spec = found[1].spec
    assert spec is not None, "bound before it is remembered"
    return spec, weights


def remembered(module: Any) -> Reading | None:
    """The last reading of a module."""
    found = _readings.get(id(module))
    return found[1] if found is not None and found[0]() is module else None


def attends(spec: NetSpec) -> bool:
    """Whether rotary tables matter to a net."""
    return any(block.kind == ATTENTION for block in spec.blocks)
