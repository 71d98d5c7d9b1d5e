"""What a module is made of, and whether it still is: the guard at each call, like a compiler's.

A stack of blocks computes what `recurx.reference` says only if nothing else is in it. `Reading`
looks at everything that its code can see: children, parameters, buffers, hooks, plain attributes,
classes, and the functions that their code names. What it saw is kept as live views of the very
dictionaries that hold it, so that looking again is one pass in C.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from recurx.code import same
from recurx.nets import ATTENTION, Net, NetSpec
from recurx.survey import Survey, foreign_hooks, foreign_mode

_FLOATING = {torch.float32, torch.bfloat16, torch.float16, torch.float64}


class Reading:
    """What the survey saw of a module, and the guard that tells whether it is still there."""

    def __init__(self, module: Any, where: str = "", walk: Any = Survey.stack) -> None:
        self.differences: list[str] = []  # a clause each, with the path of the layer
        self.plain = isinstance(module, nn.Module)  # whether the guard sees every change
        self.spec: NetSpec | None = None  # from `bind` on, as the shapes
        self.shapes: tuple[torch.Size, ...] = ()
        self.proved: set[bool] = set()  # with and without rotary tables, what a probe showed
        self._modules: list[nn.Module] = []
        self._live: list[Iterable[Any]] = []  # whose contents must stay the same objects
        self._counted: list[Any] = []  # whose lengths must stay
        self._hooks: list[Any] = []
        self._weights: list[tuple[dict[str, Any], str]] = []
        self._dtypes: list[tuple[int, torch.dtype]] = []  # that blocks tell of some weights
        self._flatter: list[tuple[int, int]] = []  # (index of a weight, dimensions of its slot)
        self._absent: list[tuple[dict[str, Any], str]] = []  # parameters that are None
        self._flat: dict[Any, tuple[Any, ...]] = {}
        survey = Survey(self, where)
        walk(survey, module)
        # Equal ones compute alike with equal weights, while `kept` lives, whose ids are in it.
        self.signature, self.kept = tuple(survey.signature), survey.names.kept
        self._globals = survey.names.held()
        self._types = [type(m) for m in self._modules]
        self._lengths = list(map(len, self._counted))

    def bind(self, spec: NetSpec) -> None:
        """Remember the blocks that the layers were proved to be."""
        slots = [shape for block in spec.blocks for _, shape in block.slots]
        weights = [held.get(name) for held, name in self._weights]
        self.spec, self.plain = spec, self.plain and all(w is not None for w in weights)
        self.shapes = tuple(weight.shape for weight in weights if weight is not None)
        typed = [name == "conv" and block.conv_dtype for block in spec.blocks
                 for name, _ in block.slots]  # fmt: skip
        self._dtypes = [(n, getattr(torch, dtype)) for n, dtype in enumerate(typed) if dtype]
        sizes = enumerate(zip(self.shapes, slots, strict=False))
        self._flatter = [(n, len(slot)) for n, (own, slot) in sizes if len(own) != len(slot)]

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
            weights: list[Tensor] = [held[name] for held, name in self._weights]
        except (KeyError, RuntimeError):  # something is gone; another thread changes it just now
            return None
        for weight, shape in zip(weights, self.shapes, strict=True):
            if weight is None or weight.shape != shape or weight.dtype not in _FLOATING:
                return None
            if type(weight) not in (nn.Parameter, Tensor):
                return None
        if any(weights[number].dtype is not dtype for number, dtype in self._dtypes):
            return None
        for number, dimensions in self._flatter:
            weights[number] = weights[number].flatten(0, -dimensions)
        return weights

    def take(self, module: Any, before: Reading | None) -> None:
        """Take what is there now as what has to stay, for the present mode (training or not)."""
        if before is not None and before.signature == self.signature:
            self._flat.update(before._flat)
        self._flat[module.__dict__.get("training")] = tuple(chain.from_iterable(self._live))


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
