"""Ranges around functions that no module hook sees: `recurx.reference`, and attention kernels of
other packages.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from recurx import reference
from recurx.bench.profiler.records import Position, Where
from recurx.nets import WEIGHT_NAMES, Net
from recurx.patching.handle import PatchHandle

# Functions that official code imports by name into the file of its attention.
ATTENTION_FUNCTIONS = ("flash_attn_func", "scaled_dot_product_attention")


@contextlib.contextmanager
def wrapped_reference(at: Position) -> Iterator[None]:
    """Ranges around the functions of `recurx.reference`, which name the stages themselves."""
    parts: dict[int, tuple[str, int]] = {}  # id of a weight -> (stage, block)
    block, net_name = 0, ""

    def inside(part: str) -> Where:
        return at.inside(part, net_name, block)

    def of_weight(weight: Any, otherwise: str) -> Where:
        part, number = parts.get(id(weight), (otherwise, block))
        return at.inside(part, net_name, number)

    # Where each function runs, by its arguments, from the outside to the inside.

    def call_input(step: Any, *_: Any) -> Where:
        nonlocal net_name
        at.call, net_name = at.call + 1, step.net
        return at.inside("inject", net_name)

    def call(h: Any, net: Any, *_: Any) -> Where:
        nonlocal block
        block = -1
        if not isinstance(net, Net):
            return at.inside("foreign", net_name)
        weights = iter(net.weights)
        for number, spec in enumerate(net.spec.blocks):
            parts.update((id(next(weights)), (stage, number)) for stage in WEIGHT_NAMES[spec.kind])
        return at.inside("net", net_name)

    def next_block(*_: Any) -> Where:
        nonlocal block
        block += 1
        return inside("block")

    def swiglu(x: Any, gate_up: Any, down: Any) -> Where:
        where = of_weight(gate_up, "gate_up")
        return where._replace(part="t_swiglu" if where.part.startswith("t_") else "swiglu")

    places: dict[str, Callable[..., Where]] = {
        "call_input": call_input,
        "call": call,
        "block": next_block,
        "linear": lambda x, weight: of_weight(weight, "block"),
        "attention": lambda *_: inside("self_attn"),
        "rope_rotate": lambda *_: inside("rope"),
        "swiglu": swiglu,
    }
    original = {name: getattr(reference, name) for name in ("run", *places)}

    def run(schedule: Any, *args: Any, **kwargs: Any) -> Any:
        start = kwargs.get("start", args[4] if len(args) > 4 else 0)
        if start == 0 or at.recursion < 0:
            if at.where.part != "inner":  # a model's own `inner` opened it already
                at.begin_recursion(0)
            at.cycles[at.recursion] = _period(schedule.steps)
        at.call = start - 1
        return original["run"](schedule, *args, **kwargs)

    def ranged(name: str) -> Callable[..., Any]:
        @functools.wraps(original[name])
        def function(*args: Any, **kwargs: Any) -> Any:
            with at.range(places[name](*args, **kwargs)):
                return original[name](*args, **kwargs)

        return function

    with PatchHandle() as handle:
        for name, function in {"run": run, **{name: ranged(name) for name in places}}.items():
            handle.put(reference, name, function)
        yield


def _period(steps: Sequence[Any]) -> int:
    """Calls of one cycle: the shortest prefix whose repetition gives all steps."""
    total = len(steps)
    return next(
        n for n in range(1, total + 1)
        if total % n == 0 and tuple(steps[:n]) * (total // n) == tuple(steps)
    )  # fmt: skip


@contextlib.contextmanager
def wrapped_attention(
    at: Position, attentions: Sequence[nn.Module], opaque: Callable[..., Any]
) -> Iterator[None]:
    """The attention function of the model's own file becomes one operator, by `Tracer.opaque`:
    flash-attn may be a plain extension, whose kernels no dispatcher sees."""
    scopes = [getattr(type(module).forward, "__globals__", {}) for module in attentions]
    with contextlib.ExitStack() as undo:
        for scope in {id(scope): scope for scope in scopes}.values():
            for name in ATTENTION_FUNCTIONS:
                if callable(scope.get(name)):
                    undo.callback(scope.__setitem__, name, scope[name])
                    scope[name] = _ranged(at, opaque, name, scope[name])
        yield


def _ranged(at: Position, opaque: Callable[..., Any], name: str, function: Any) -> Any:
    def ranged(*args: Any, **kwargs: Any) -> Any:
        if at.where.part != "self_attn":
            return function(*args, **kwargs)
        where = at.where._replace(part="attention")
        return opaque(name, where, lambda: function(*args, **kwargs))

    ranged.__wrapped__ = function  # type: ignore[attr-defined]
    return ranged
