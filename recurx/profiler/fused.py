"""What module hooks do not see: `recurx.reference`, attention kernels of other packages, and
recurx's own fused ops, which are one operator each (with the CPU engine's own phase clock).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from recurx import reference
from recurx.nets import WEIGHT_NAMES, Net
from recurx.plan import count
from recurx.problem import Problem, decode

if TYPE_CHECKING:
    from recurx.profiler.tracer import Tracer

# Functions that official code imports by name into the file of its attention.
ATTENTION_FUNCTIONS = ("flash_attn_func", "scaled_dot_product_attention")

# The CPU engine's phases -> the stages whose products they do. Norms, rotary embedding and the
# gate's activation are epilogues of these products.
ENGINE_PHASES = {
    "inject": ("inject",),
    "qkv": ("qkv", "rope"),
    "attention": ("attention",),
    "o": ("o",),
    "gate_up": ("gate_up", "swiglu"),
    "down": ("down",),
    "token_mlp": ("t_gate_up", "t_swiglu", "t_down"),
    "barrier": (),
}


@dataclass
class Split:
    """One of recurx's ops: which calls it ran where, and how its time divides, if known.

    `phases` holds (phase of the CPU engine, share of the op's time, FLOPs); empty if the op is
    opaque.
    """

    backend: str
    backward: bool
    start: int
    stop: int
    calls: int  # of the whole recursion
    flops: float
    phases: list[tuple[str, float, float]] = field(default_factory=list)
    _problem: Problem | None = None
    _engine: Any = None

    @classmethod
    def of(
        cls, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Split | None:
        """For a recursion of recurx, about to run; None for every other operator."""
        if not name.startswith("recurx::recurse"):
            return None
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        schedule, nets = decode(given["key"])
        x = given["x"]
        problem = Problem(
            schedule, nets, *x.shape, x.dtype, x.device.type, rope=given.get("cos") is not None
        )
        start, stop = given.get("start", 0), given.get("stop", len(schedule))
        backward = "backward" in name
        part = (stop - start) / len(schedule) * (2 if backward else 1)
        split = cls(
            _resolve(given.get("backend", "auto"), problem, backward), backward, start, stop,
            len(schedule), count.flops(problem) * part, _problem=problem,
        )  # fmt: skip
        if split.backend == "cpu" and not backward:
            from recurx import _C

            split._engine = _C
            _C.cpu_profile(True)
        return split

    def finish(self) -> None:
        """Read the engine's clock after the op."""
        if self._engine is None or self._problem is None:
            return
        seconds = self._engine.cpu_phase_times()
        self._engine.cpu_profile(False)
        total = sum(seconds.values()) or 1.0
        flops = {stage.name: stage.flops for stage in count.step_stages(self._problem)}
        part = (self.stop - self.start) / self.calls
        self.phases = [
            (phase, seconds[phase] / total, part * sum(flops.get(n, 0.0) for n in stages))
            for phase, stages in ENGINE_PHASES.items()
            if seconds.get(phase, 0.0) > 0
        ]


def _resolve(backend: str, problem: Problem, backward: bool) -> str:
    """The backend that will run it, for the label."""
    from recurx import backends

    if backward:
        return "reference"
    try:
        return backends.select(backend, problem).name
    except RuntimeError:
        return backend


@contextlib.contextmanager
def wrapped_reference(tracer: Tracer) -> Iterator[None]:
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
        if start == 0 or tracer.recursion < 0:
            if tracer.where.part != "inner":  # a model's own `inner` opened it already
                tracer.begin_recursion(0)
            tracer.cycles[tracer.recursion] = _period(schedule.steps)
        tracer.call = start - 1
        return original["run"](schedule, *args, **kwargs)

    def call_input(step: Any, values: Any) -> Any:
        nonlocal net_name
        tracer.call, net_name = tracer.call + 1, step.net
        with tracer.range(tracer.inside("inject", step.net)):
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
        with tracer.range(tracer.inside(part, net_name)):
            return original["call"](h, net, cos_sin)

    def in_block(part: str, name: str) -> Any:
        function = original[name]

        @functools.wraps(function)
        def ranged(*args: Any, **kwargs: Any) -> Any:
            with tracer.range(tracer.inside(part, net_name, block_number)):
                return function(*args, **kwargs)

        return ranged

    def block(*args: Any, **kwargs: Any) -> Any:
        nonlocal block_number
        block_number += 1
        with tracer.range(tracer.inside("block", net_name, block_number)):
            return original["block"](*args, **kwargs)

    def linear(x: Any, weight: Any) -> Any:
        part, number = parts.get(id(weight), ("block", block_number))
        with tracer.range(tracer.inside(part, net_name, number)):
            return original["linear"](x, weight)

    def swiglu(x: Any, gate_up: Any, down: Any) -> Any:
        part, number = parts.get(id(gate_up), ("gate_up", block_number))
        part = "t_swiglu" if part.startswith("t_") else "swiglu"
        with tracer.range(tracer.inside(part, net_name, number)):
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
def wrapped_attention(tracer: Tracer, attentions: Sequence[nn.Module]) -> Iterator[None]:
    """A range around the attention function of the model's own file: flash-attn may be a plain
    extension, whose kernels no dispatcher sees."""
    undo: list[tuple[dict[str, Any], str, Any]] = []
    for scope in {id(s): s for s in (_globals(m) for m in attentions)}.values():
        for name in ATTENTION_FUNCTIONS:
            if callable(scope.get(name)):
                undo.append((scope, name, scope[name]))
                scope[name] = _ranged(tracer, name, scope[name])
    try:
        yield
    finally:
        for scope, name, function in undo:
            scope[name] = function


def _globals(module: nn.Module) -> dict[str, Any]:
    return getattr(type(module).forward, "__globals__", {})


def _ranged(tracer: Tracer, name: str, function: Any) -> Any:
    def ranged(*args: Any, **kwargs: Any) -> Any:
        if tracer.where.part != "self_attn":
            return function(*args, **kwargs)
        where = tracer.where._replace(part="attention")
        return tracer.opaque(name, where, lambda: function(*args, **kwargs))

    return ranged
