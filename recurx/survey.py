"""The walk through a module that sees everything its code can see, for a proof and its guard."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from recurx.code import OURS, Names
from recurx.errors import InvalidArgument
from recurx.nets import Unreadable, by_attributes, layers_of, plain_linears, read_layer

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
_GLOBAL_HOOKS = tuple(getattr(torch_module, f"_global{name}") for name in HOOKS)
_HARMLESS = ("recurx.", "torch.utils.module_tracker", "torch.utils.flop_counter")  # note-takers
INTERNAL = {*vars(nn.Module()), "_compiled_call_impl"}  # every module has these


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


class Survey:
    """The walk that fills a `recurx.readings.Reading`."""

    def __init__(self, reading: Any, where: str) -> None:
        self.reading, self.where, self.known = reading, where, False
        self.signature: list[Any] = []
        self.names = Names()
        self.id = self.names.id
        self._bases: dict[type, Any] = {}
        self._values: dict[int, Any] = {}

    def differs(self, path: str, what: str) -> None:
        path = f"{self.where}.{path}".strip(".")
        self.reading.differences.append(f"`{path}` {what}")

    def stack(self, module: Any) -> None:
        self.known, layers = by_attributes(module), layers_of(module)
        self.signature.append(self.known)
        if isinstance(module, nn.Module):
            self.module("", module, tuple(layers._modules) if layers is module else ("layers",))
            if layers is not module and module._modules.get("layers") is not layers:
                self.reading.plain = False
        self.signature += self.names.look(vars(nn.Module), ("__call__", "_call_impl"), {})
        if foreign_hooks():
            self.differs("", "is called under global module hooks, which would no longer run")
        if not self.known and (mode := foreign_mode()):
            self.differs("", f"is called under a {mode}, which would not see its operators")
        path = "" if layers is module else "layers"
        if isinstance(layers, nn.Module):
            plain = type(layers) in (nn.ModuleList, nn.Sequential)
            if not plain and (path or type(layers).forward is nn.Module.forward):
                self.differs(path, f"is a {type(layers).__name__}, no plain list of layers")
            if path:
                self.module(path, layers, tuple(layers._modules))
        for number, layer in enumerate(layers):
            self.layer(f"{path}.{number}".strip("."), layer)
        for kind in () if self.known else sorted(self.names.hidden):
            self.differs("", f"reads a {kind}, whose changes nobody sees")

    def layer(self, path: str, layer: Any) -> None:
        if not isinstance(layer, nn.Module):
            return self.differs(path, "is no torch module")
        try:
            paths = read_layer(layer).paths
        except Unreadable as error:
            return self.differs(f"{path}.{error.args[0]}".strip("."), error.args[1])
        except (AttributeError, KeyError, TypeError, ValueError, InvalidArgument) as error:
            if self.known and isinstance(error, InvalidArgument):
                raise  # a model of ours with impossible sizes
            return self.differs(path, f"cannot be read: {type(error).__name__}: {error}")
        if isinstance(getattr(layer, "norm_eps", None), Tensor):
            self.reading.plain = False  # it may change in place
        parts: dict[str, Any] = {"": layer}
        inside: dict[str, tuple[list[str], list[str]]] = {"": ([], [])}  # children, parameters
        for weight in paths:
            names = weight.split(".")
            for depth, name in enumerate(names):
                below = ".".join(names[:depth])
                if below not in parts:
                    parts[below] = self.child(parts[".".join(names[: depth - 1])], names[depth - 1])
                    inside[below] = [], []
                inside[below][depth == len(names) - 1].append(name)
        for below, (children, parameters) in inside.items():
            self.part(f"{path}.{below}".strip("."), parts[below], children, parameters)
        for weight in paths:
            below, _, name = weight.rpartition(".")
            own = parts[below]._parameters if isinstance(parts[below], nn.Module) else {}
            self.reading._weights.append((own, name))

    def part(self, path: str, module: Any, children: list[str], parameters: list[str]) -> None:
        """One module of a layer: what it holds is its parts that hold weights, and weights."""
        parametrized = self.known and "parametrizations" in getattr(module, "_modules", {})
        also = ("parametrizations",) if parametrized else ()
        buffers = ("norm_eps",) if children else ()
        if not self.module(path, module, (*children, *also), tuple(parameters), buffers):
            return
        if parameters and self.known and type(module).forward not in plain_linears:
            self.differs(path, f"is a {type(module).__name__}, no plain linear layer")
        for name in parameters:
            weight = module._parameters.get(name)
            if getattr(module, name, None) is not weight:  # a property, say
                self.reading.plain = False
            if weight is None:
                self.reading.plain = False
                if not parametrized:
                    self.differs(path, f"has no plain parameter `{name}`")
            elif not f"{type(weight).__module__}.".startswith(OURS):
                what = f"has a {name} of class {type(weight).__name__}"
                self.differs(path, f"{what}, whose operators may do anything")

    def child(self, module: Any, name: str) -> Any:
        """What attribute access finds; the guard sees only registered children."""
        found = getattr(module, name, None)
        if module._modules.get(name) is not found:
            self.reading.plain = False
        if type(module).__getattr__ is not nn.Module.__getattr__:
            self.reading.plain = False
        return found

    def module(
        self, path: str, module: Any, children: tuple[str, ...], parameters: tuple[str, ...] = (),
        buffers: tuple[str, ...] = (),
    ) -> bool:  # fmt: skip
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
                if kind == "child" and name not in read and self.stateless(value):
                    self.module(f"{path}.{name}".strip("."), value, ())
                elif name not in read and value is not None:
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
            settings.append((name, self.names.value(value, None, self._values)))
        self.signature.append((path, self.code(type(module)), tuple(settings)))
        return True

    def stateless(self, child: Any) -> bool:
        """Whether a child is code alone, which a probe runs: an activation, a norm, an identity."""
        if self.known or not isinstance(child, nn.Module) or getattr(child, "p", 0):
            return False
        return not (any(p is not None for p in child._parameters.values())
                    or child._buffers or child._modules)  # fmt: skip

    def code(self, cls: type) -> Any:
        """A class's functions and settings, and what they name in their files."""
        bases = [base for base in cls.__mro__ if base not in (nn.Module, object)]
        return tuple(self._bases.get(base) or self.own_code(base) for base in bases)

    def own_code(self, cls: type) -> Any:
        values = vars(cls).values()
        self.reading._live.append(values)
        self.reading._counted.append(values)
        found: list[Any] = [self.id(cls), *map(self.id, values)]
        if not cls.__module__.startswith(OURS):
            found += [self.names.value(value, (), {}) for value in values]
        self._bases[cls] = tuple(found)
        return self._bases[cls]
