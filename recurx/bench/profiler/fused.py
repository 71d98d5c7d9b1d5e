"""recurx's own fused ops: one operator each, with the CPU engine's own phase clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recurx.errors import BackendUnavailable
from recurx.plan import count
from recurx.problem import Problem, decode
from recurx.route import Request, route

# Each runs calls start..stop-1: on a backend without gradient, its gradient by the reference, and
# both on a backend that has a backward of its own.
OPS = (
    "recurx::recurse", "recurx::recurse_backward", "recurx::window", "recurx::window_backward",
)  # fmt: skip

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
        if name not in OPS:
            return None
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        schedule, nets = decode(given["key"])
        x = given["x"]
        problem = Problem(
            schedule, nets, *x.shape, x.dtype, x.device.type, rope=given.get("cos") is not None
        )
        start, stop = given.get("start", 0), given.get("stop", len(schedule))
        backward = name.endswith("_backward")
        part = (stop - start) / len(schedule) * (2 if backward else 1)
        flops = count.flops(problem) * part
        backend = given.get("backend", "reference")
        if name == "recurx::recurse":  # a window's op names the backend that was chosen
            backend = _resolve(backend, problem)
        elif name == "recurx::window" and given["save"] == "states":
            backend = _resolve(given["forward"], problem)
        split = cls(backend, backward, start, stop, len(schedule), flops, _problem=problem)
        if split.backend == "cpu" and name == "recurx::recurse":
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


def _resolve(backend: str, problem: Problem) -> str:
    """The backend that will run it, for the label."""
    try:
        return route(problem, None, Request(backend)).backend
    except BackendUnavailable:
        return backend
