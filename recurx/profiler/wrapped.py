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
from recurx.nets import WEIGHT_NAMES, Net
from recurx.profiler.where import Position

# Functions that official code imports by name into the file of its attention.
ATTENTION_FUNCTIONS = ("flash_attn_func", "scaled_dot_product_attention")


@contextlib.contextmanager
def wrapped_reference(at: Position) -> Iterator[None]:
    """Ranges around the functions of `recurx.reference`, which name the stages themselves."""
    parts: dict[int, tuple[str, int]] = {}  # id of a weight -> (stage, block)
    block_number, net_name = 0, ""
    original = {
        name: getattr(reference, name)
        for name in ("run", "call_input", "call", "block", "attention", "linear", "rope_rotate",
                     "swiglu")
    }  # fmt: skip

    def run(schedule: Any, *args: Any, **kwargs: Any) -> Any:
        start = kwargs.get("start", args[4] if len(args) > 4 else 0)
        if start == 0 or at.recursion < 0:
            if at.where.part != "inner":  # a model's own `inner` opened it already
                at.begin_recursion(0)
            at.cycles[at.recursion] = _period(schedule.steps)
        at.call = start - 1
        return original["run"](schedule, *args, **kwargs)

    def call_input(step: Any, values: Any) -> Any:
        nonlocal net_name
        at.call, net_name = at.call + 1, step.net
        with at.range(at.inside("inject", step.net)):
            return original["call_input"](step, values)

    def call(h: Any, net: Any, cos_sin: Any) -> Any:
        nonlocal block_number
        block_number = -1
        if isinstance(net, Net):
            index = 0
            for number, spec in enumerate(net.spec.blocks):
                for stage in WEIGHT_NAMES[spec.kind]:
                    parts[id(net.weights[index])] = stage, number
                    index += 1
        part = "net" if isinstance(net, Net) else "foreign"
        with at.range(at.inside(part, net_name)):
            return original["call"](h, net, cos_sin)

    def in_block(part: str, name: str) -> Any:
        function = original[name]

        @functools.wraps(function)
        def ranged(*args: Any, **kwargs: Any) -> Any:
            with at.range(at.inside(part, net_name, block_number)):
                return function(*args, **kwargs)

        return ranged

    def block(*args: Any, **kwargs: Any) -> Any:
        nonlocal block_number
        block_number += 1
        with at.range(at.inside("block", net_name, block_number)):
            return original["block"](*args, **kwargs)

    def linear(x: Any, weight: Any) -> Any:
        part, number = parts.get(id(weight), ("block", block_number))
        with at.range(at.inside(part, net_name, number)):
            return original["linear"](x, weight)

    def swiglu(x: Any, gate_up: Any, down: Any) -> Any:
        part, number = parts.get(id(gate_up), ("gate_up", block_number))
        part = "t_swiglu" if part.startswith("t_") else "swiglu"
        with at.range(at.inside(part, net_name, number)):
            return original["swiglu"](x, gate_up, down)

    replaced = {
        "run": run, "call_input": call_input, "call": call, "block": block, "linear": linear,
        "swiglu": swiglu, "attention": in_block("self_attn", "attention"),
        "rope_rotate": in_block("rope", "rope_rotate"),
    }  # fmt: skip
    try:
        for name, function in replaced.items():
            setattr(reference, name, function)
        yield
    finally:
        for name, function in original.items():
            setattr(reference, name, function)


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
    undo: list[tuple[dict[str, Any], str, Any]] = []
    for scope in {id(s): s for s in (_globals(m) for m in attentions)}.values():
        for name in ATTENTION_FUNCTIONS:
            if callable(scope.get(name)):
                undo.append((scope, name, scope[name]))
                scope[name] = _ranged(at, opaque, name, scope[name])
    try:
        yield
    finally:
        for scope, name, function in undo:
            scope[name] = function


def _globals(module: nn.Module) -> dict[str, Any]:
    return getattr(type(module).forward, "__globals__", {})


def _ranged(at: Position, opaque: Callable[..., Any], name: str, function: Any) -> Any:
    def ranged(*args: Any, **kwargs: Any) -> Any:
        if at.where.part != "self_attn":
            return function(*args, **kwargs)
        where = at.where._replace(part="attention")
        return opaque(name, where, lambda: function(*args, **kwargs))

    return ranged
