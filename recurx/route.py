"""Who runs which calls of a recursion: decided here and nowhere else, as a printable value.

`route(problem, device, request)` is asked by all who need to know: `recurx.recurse` executes its
answer, `recurx.explain` prints it, the profiler labels by it. It computes nothing on tensors. Under
`auto` it goes by what is known, in this order:

    compared   a backend that gave a wrong answer here is out (recurx/trials.py compares)
    measured   a verdict on this problem, of this process or from disk (recurx/verdicts.py)
    predicted  the least time by the plans of each backend (recurx/plan/), PyTorch by MARGIN

Where a backend has several kinds of plan, each is one to choose: "triton/library". An explicit
backend never falls back; of its own plans it takes the one that was measured to be the fastest.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from dataclasses import dataclass
from typing import Any

import torch

from recurx import backends, choices
from recurx.choices import EAGER, Choice, Where
from recurx.plan import Device, LaunchPlan
from recurx.problem import Problem, decode
from recurx.verdicts import VERDICTS, Verdict, subject_of

Stamp = tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """What the caller asks for, as in `recurx.recurse`.

    Args:
        backend: "auto" or the name of one.
        save: what the window keeps: "all", "block" or "states".
        grad: whether gradient is wanted.
        start, stop: calls start..stop-1 are run; stop None: all from start.
    """

    backend: str = "auto"
    save: str = "all"
    grad: bool = False
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Considered:
    """What is known of a backend or a kind of its plans: why it cannot, or seconds by model and by
    clock (None: not)."""

    backend: str
    refused: str | None
    predicted: float | None
    measured: float | None


@dataclass(frozen=True)
class Route:
    """Which backend runs which calls.

    Args:
        problem: without gradient; `request.grad` says whether there is a window.
        device: where, a torch device, or a description of one that is not here.
        calls: what runs the calls before the window, or all of them.
        window: whose backward the window has, "eager" for PyTorch's; None without a window.
        split: the first call of the window; one past the last call without one.
        forward: the backend that runs the window's forward; "" without a window.
        backward: a backend's name, or "autograd" (PyTorch's graph), "recompute" (block by block,
            save="block") or "reference" (call by call, save="states"); "" without a window.
    """

    problem: Problem
    device: Where
    request: Request
    calls: Choice
    window: Choice | None
    split: int
    forward: str = ""
    backward: str = ""

    @property
    def backend(self) -> str:
        """What runs the calls before the window, or all of them: a name for `backends.get`."""
        return self.calls.backend

    @property
    def plan(self) -> LaunchPlan:
        """How that backend runs all calls of the schedule."""
        return choices.plan_of(self.backend, self.problem, self.device)

    @property
    def settled(self) -> bool:
        """Whether nothing that it relies on is left to compare or to time."""
        return all(choice.settled for choice in self.halves.values())

    @property
    def halves(self) -> dict[str, Choice]:
        """What is relied on: {half, as verdicts name it: choice}."""
        found = {}
        if self.window is not None:
            found[choices.window_half(self.request.save)] = self.window
        if not found or self.split > self.request.start or self.request.save == "states":
            found[choices.CALLS] = self.calls
        return found

    @property
    def considered(self) -> tuple[Considered, ...]:
        """Every backend for the calls, each kind of plan of it that fits, by `backends.ORDER`."""
        return _considered(self.problem, self.device, stamp())

    def __str__(self) -> str:
        later = "" if self.settled else "; compared and measured at its first use"
        why = f"  backend {self.request.backend!r} -> {self.backend}: {self.calls.why}{later}"
        lines = [f"    {self._line(entry)}" for entry in self.considered]
        return "\n".join([str(self.problem), why, *lines, f"  {self.sentence}"])

    @property
    def sentence(self) -> str:
        """Which calls run where."""
        stop = len(self.problem.schedule) if self.request.stop is None else self.request.stop
        start = self.request.start
        if self.window is None:
            return f"without gradient: calls {_range(start, stop)} on {self.backend}"
        if self.backward == self.forward:
            how = f'{self.forward}, forward and backward (save="all", "block" or "states")'
        elif self.window.backend != EAGER:
            how = f"{self.forward}, backward on {self.backward}"
        elif self.backward == "reference":
            how = f"{self.forward}, backward recomputes call by call"
        else:
            how = "eager under autograd"
            if self.backward == "recompute":
                how += ", block by block"
            elif self.backend != EAGER:
                how += f' (save="states": forward on {self.backend}, backward recomputes call by'
                how += " call)"
        how = f"window {_range(self.split, stop)} on {how}"
        if self.window.why:
            how += f" [{self.window.why}]"
        if self.split == start:
            return f"in training: all calls are in the window; {how}"
        before = f"calls {_range(start, self.split)} on {self.backend} without gradient"
        return f"in training: {before}; {how}"

    def _line(self, entry: Considered) -> str:
        if entry.refused is not None:
            return f"{entry.backend}: refused: {entry.refused}"
        # Of a backend asked for by name the model picks the first kind of plan that is listed.
        ours = (c for c in self.considered if f"{c.backend}/".startswith(f"{self.backend}/"))
        parts = ["chosen" if entry is next(ours, None) else "can run it"]
        if entry.predicted is not None:
            parts.append(f"predicted {_time(entry.predicted)}")
        if entry.measured is not None:
            verdict = choices.known(choices.CALLS, self.problem, self.device)
            calls = verdict.calls if verdict else 0
            parts.append(f"measured {_time(entry.measured)} for {calls} calls")
        return f"{entry.backend}: {', '.join(parts)}"


def refusals(problem: Problem) -> list[str]:
    """Which backends can run a problem here, one line each; of the others, why they cannot."""
    lines = []
    for name in backends.ORDER:
        reason = backends.why_not(name, problem)
        lines.append(f"    {name}: " + (f"refused: {reason}" if reason else "can run it"))
    return lines


def route(problem: Problem, device: Where | None = None, request: Request = Request()) -> Route:
    """The route of a problem; remembered, so that asking again costs a look-up.

    Args:
        problem: what to run; `needs_grad` asks for a window, as `request.grad` does.
        device: None for the device of the problem's type in this machine. A `recurx.plan.Device`
            (`recurx.plan.DEVICES["h100"]`) is taken as if it were here, by the model alone.
        request: backend, what to save, whether with gradient, and which calls.

    Raises:
        BackendUnavailable: the backend asked for by name cannot run it; the message says why.
    """
    return _route(problem, device, request, stamp())


@functools.lru_cache(maxsize=4096)
def _route(problem: Problem, device: Where | None, request: Request, now: Stamp) -> Route:
    return decide(problem, device, request)


def decide(problem: Problem, device: Where | None, request: Request, proven: bool = False) -> Route:
    """`route` without its memory.

    Args:
        proven: whether only backends count that were compared here: what runs when nothing can be
            compared, inside the capture of a CUDA graph.
    """
    where = torch.device(problem.device_type) if device is None else device
    if where == torch.device("cuda") and torch.cuda.is_available():
        where = torch.device("cuda", torch.cuda.current_device())
    grad = request.grad or problem.needs_grad
    kind = where.kind if isinstance(where, Device) else problem.device_type
    problem = dataclasses.replace(problem, needs_grad=False, device_type=kind)
    calls = choices.choose_calls(problem, where, request.backend, proven)
    stop = len(problem.schedule) if request.stop is None else request.stop
    split = min(max(request.start, problem.schedule.grad_from), stop) if grad else stop
    if split == stop:
        return Route(problem, where, request, calls, None, split)
    window = choices.choose_window(problem, where, request.backend, request.save, proven)
    pytorch = {"all": "autograd", "block": "recompute", "states": "reference"}
    backward = pytorch[request.save] if window.backend == EAGER else window.backend
    forward = window.backend
    if request.save == "states":
        own = backends.get(forward).window(problem)
        forward = forward if own is not None and own.own_forward else calls.backend
    return Route(problem, where, request, calls, window, split, forward, backward)


def stored(problem: Problem, device: torch.device, request: Request) -> dict[str, Any]:
    """What `auto` chose, as JSON, for `VERDICTS.pin` in another process; {} if nothing settled."""
    found = route(problem, device, request)
    if request.backend != "auto" or not found.settled:
        return {}
    kept = {}
    for half, choice in found.halves.items():
        verdict = choices.known(half, problem, device) or Verdict(choice.backend, (), 0)
        kept[subject_of(half, problem)] = verdict.json()
    return kept


def forget() -> None:
    """Decide everything anew."""
    _route.cache_clear()
    _considered.cache_clear()
    choices.predicted.cache_clear()
    choices.plan_of.cache_clear()


def stamp() -> Stamp:
    """Changes whenever another route may come out: a backend, a comparison, a verdict, threads,
    RECURX_AUTOTUNE."""
    versions = backends.version(), VERDICTS.version, choices.COMPARED.version
    # Asked at every call: not through a function.
    return *versions, torch.get_num_threads(), os.environ.get("RECURX_AUTOTUNE") != "0"


@functools.lru_cache(maxsize=256)
def _considered(problem: Problem, device: Where, now: Stamp) -> tuple[Considered, ...]:
    verdict = None if problem.opaque else choices.known(choices.CALLS, problem, device)
    measured = dict(verdict.seconds) if verdict else {}
    here = isinstance(device, Device) or device.type == "cpu" or torch.cuda.is_available()
    found = []
    for name in backends.ORDER:
        reason = choices.refusal(name, problem, device)
        if reason is not None:
            found.append(Considered(name, reason, None, None))
            continue
        kinds = [n for n in backends.entrants(name) if choices.refusal(n, problem, device) is None]
        planned = here and not problem.opaque
        times = {n: choices.predicted(n, problem, device) if planned else math.inf for n in kinds}
        for n in sorted(times, key=lambda n: times[n]):
            seconds = times[n] if times[n] < math.inf else None
            found.append(Considered(n, None, seconds, measured.get(n)))
    return tuple(found)


def has_fused(device_type: str) -> bool:
    """Whether `auto` has anything beyond the reference for this type of device.

    A constant of the process, so torch.compile does not trace the look-up.
    """
    fused = (n for n in backends.ORDER if n != EAGER and backends.auto_may_take(n, device_type))
    return any(backends.get(name).why_unavailable() is None for name in fused)


def window_backend(
    name: str, key: str, dtype: torch.dtype, device_type: str, rope: bool, tokens: int = 0,
    save: str = "all",
) -> str | None:  # fmt: skip
    """Name of the backend whose `Window` a traced recursion takes, or None for PyTorch's.

    Args:
        name: the backend asked for.
        key: the encoded schedule and nets.
        tokens: T, or 0 where it is symbolic.
    """
    schedule, nets = decode(key)
    tokens = tokens or max([block.tokens for _, spec in nets for block in spec.blocks] + [1])
    problem = Problem(schedule, nets, 1, tokens, nets[0][1].hidden, dtype, device_type, rope)
    found = choices.choose_window(problem, torch.device(device_type), name, save)
    return None if found.backend == EAGER else found.backend


# What torch.compiler.assume_constant_result sets; calling that would import torch._dynamo, which
# takes seconds, for everybody who never compiles.
has_fused._dynamo_marked_constant = True  # type: ignore[attr-defined]
window_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _range(start: int, stop: int) -> str:
    return f"{start}..{stop - 1}" if stop - start > 1 else f"{start}"
