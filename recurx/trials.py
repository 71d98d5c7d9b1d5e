"""What `auto` relies on: right answers first, then the faster one, found out once on the machine.

Kernels are proven elsewhere (interpreter, emulator, tests), but a driver, a compiler or a chip can
still be the first of its kind, and a fused kernel can be slower than PyTorch. So before `auto` uses
a backend for the first time, on the user's own tensors:

    compared   one net call with the reference in fp64, and of a backend with a window the gradients
               of one call; a wrong one ends in a warning and in the next backend
    timed      the fused backends and PyTorch in turns over the first calls of the schedule, and
               over the window where a backend has one; PyTorch must win by route.MARGIN

A backend with several kinds of plan enters with each of them. The model only leaves out what is
hopeless, and never `SAFE`: so `auto` is at worst as fast as that and as PyTorch, whatever is wrong
with the model. Nothing is tried while a CUDA graph is captured. A backend that is asked for by name
is used as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator

import torch

from recurx import backends, choices, recompute, reference, reference_backward
from recurx import route as routes
from recurx.backends.graphs import captured_outside
from recurx.choices import EAGER
from recurx.comparing import UntrustedKernel, gradients, gradients_by_autograd, only, right
from recurx.measure import seconds_of
from recurx.operands import Operands, Span
from recurx.plan import count
from recurx.problem import Problem
from recurx.route import Request, Route
from recurx.verdicts import VERDICTS, Verdict, machine_of, subject_of

BUDGET = 0.3  # seconds of timing, about; three calls of each are the least in a close race
ROUNDS = 5
HOPELESS = 10  # times slower than a fused backend at its first run: not run again
PRUNE = 2.5  # times slower than a fused backend by one clock or by the model: out without more
SAFE = "triton/library"  # PyTorch's products in a graph, pointwise kernels between them: never out
# FLOPs of one timed call on a CPU: of a larger batch a part is timed, as ratios no longer change.
CPU_FLOPS = 4e9


class MissingEngine(UserWarning):
    """`auto` runs PyTorch because the compiled module is not installed or cannot run."""


_locks: dict[str, threading.Lock] = {}  # by subject
_local = threading.local()
os.register_at_fork(after_in_child=_locks.clear)


@contextlib.contextmanager
def _trying(subject: str) -> Iterator[bool]:
    """Holds a lock, so that two threads never try the same; yields False, without it, inside a
    trial of this thread."""
    if getattr(_local, "inside", False):
        yield False
        return
    with _locks.setdefault(subject, threading.Lock()):
        _local.inside = True
        try:
            yield True
        finally:
            _local.inside = False


def settled(problem: Problem, request: Request, operands: Operands) -> Route:
    """The route of these tensors after comparing and timing whatever it still depends on.

    Raises:
        BackendUnavailable: the backend asked for by name cannot run it.
    """
    device = operands.x.device
    found = routes.route(problem, device, request)
    if found.backend == EAGER and request.backend == "auto" and problem.device_type == "cpu":
        _tell_of_missing_engine()
    if found.settled:
        return found
    if not captured_outside(device):
        with _trying(subject_of(request.save, problem)) as free:
            found = routes.route(problem, device, request)  # another thread may have been faster
            if free and not found.settled:
                found = _try(found, operands.contiguous())
    if found.settled:
        return found
    return routes.decide(problem, device, request, proven=True)


def forget() -> None:
    """Compare and time everything anew (what lies on disk stays there)."""
    choices.COMPARED.forget()
    VERDICTS.forget()
    routes.forget()


def _try(found: Route, operands: Operands) -> Route:
    """Compare and time until the route is settled or memory does not suffice."""
    problem, device, request = found.problem, operands.x.device, found.request
    if not found.calls.settled:
        fused = choices.fused_for(problem, device)
        fused = [
            n for n in fused if choices.COMPARED.get(choices.CALLS, n, problem, device) is not False
        ]
        times = {name: choices.predicted(name, problem, device) for name in fused}
        most = PRUNE * min(times.values(), default=0.0)
        fused = [name for name in fused if times[name] <= most or name == SAFE]
        _settle(choices.CALLS, fused, problem, operands, _run_calls)
        found = routes.route(problem, device, request)
    if found.window is not None and not found.window.settled:
        fused = choices.windows_for(problem, device, "auto")
        run = functools.partial(_run_window, save=request.save, forward=found.backend)
        training = dataclasses.replace(problem, needs_grad=True)
        _settle(choices.window_half(request.save), fused, training, operands, run)
    return routes.route(problem, device, request)


def _settle(
    half: str, fused: list[str], problem: Problem, operands: Operands, run: Callable[..., object]
) -> None:
    """Compare the fused backends of one half, best first; then time those that are right.

    Args:
        run: what is timed, of (backend, problem, operands, number of calls).
    """
    device = operands.x.device
    before = choices.known(half, problem, device)
    timing = choices.autotune() and (before is None or before.chosen not in (*fused, EAGER))
    if before is not None:
        fused = sorted(fused, key=lambda name: name != before.chosen)  # all that is left to compare
    trusted = []
    for name in fused:
        verdict = choices.COMPARED.get(half, name, problem, device)
        if verdict is None:
            verdict = right(half, backends.get(name), problem, operands)
            if verdict is None:
                return  # asked again the next time
            choices.COMPARED.keep(half, name, problem, device, verdict)
        if verdict:
            trusted.append(name)
            if not timing:
                return
    if trusted:
        part = _part(problem, operands)
        most = len(problem.schedule)
        most -= problem.schedule.grad_from if problem.needs_grad else 0
        names = [*trusted, EAGER]
        found = _race(names, lambda name, calls: run(name, *part, calls), most, device)
        for name in trusted:
            backends.get(name).free()  # what only the race needed
        if found is not None:
            machine = machine_of(device, torch.get_num_threads())
            whole = len(found.seconds) == len(names)  # else memory was short, or an engine failed
            VERDICTS.keep(subject_of(half, problem), machine, found, lasting=whole)


Run = Callable[[str, int], object]  # runs so many net calls on a backend


def _race(names: list[str], run: Run, most: int, device: torch.device) -> Verdict | None:
    """Time the backends in turns; PyTorch is the last of them. None: nothing could be timed.

    Args:
        most: the largest number of calls there is.
    """
    one: dict[str, float] = {}
    for name in names:
        with _out_if_it_fails(name, one, device):
            first = _seconds(run, name, 1, device)  # packs weights, compiles, fills caches
            if name == EAGER and first > max(BUDGET, HOPELESS * min(one.values(), default=first)):
                one[name] = first
                continue
            if device.type == "cuda":
                run(name, 1)  # captures a graph
            again = [_seconds(run, name, 1, device)]
            while len(again) < 3 and sum(again) < BUDGET / 10:
                again.append(_seconds(run, name, 1, device))
            one[name] = min(again)
    if not one:
        return None
    fastest, *others = sorted(one, key=lambda name: one[name])
    if fastest != EAGER and all(one[name] > PRUNE * one[fastest] for name in others):
        return Verdict(fastest, tuple(one.items()), 1)
    turn = sum(one.values())
    calls = max(1, min(most, int(BUDGET / (ROUNDS * turn))))
    best = one if calls == 1 else dict.fromkeys(one, float("inf"))
    for name in list(best) if calls > 1 else ():
        with _out_if_it_fails(name, best, device):
            _seconds(run, name, calls, device)  # a graph of so many calls is captured here
    for _ in range(max(2, min(ROUNDS, int(BUDGET / (calls * turn))))):
        for name in list(best):  # in turns: a slow moment of the machine hits all alike
            with _out_if_it_fails(name, best, device):
                best[name] = min(best[name], _seconds(run, name, calls, device))
    if not best:
        return None
    chosen = min(best, key=lambda name: best[name] / (choices.MARGIN if name == EAGER else 1.0))
    return Verdict(chosen, tuple(best.items()), calls)


@contextlib.contextmanager
def _out_if_it_fails(name: str, times: dict[str, float], device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        times.pop(name, None)  # what does not fit is not chosen
    except Exception as failure:  # a launch, or Triton's compiler
        if name == EAGER:
            raise
        times.pop(name, None)
        warnings.warn(
            f"recurx: backend {name!r} failed while it was timed on {device} "
            f"({type(failure).__name__}: {failure}); `auto` goes on without it.",
            UntrustedKernel,
            stacklevel=4,
        )


def _seconds(run: Run, name: str, calls: int, device: torch.device) -> float:
    return max(seconds_of(lambda: run(name, calls), device), 1e-9)


def _part(problem: Problem, operands: Operands) -> tuple[Problem, Operands]:
    """What is timed of a batch: on a CPU so many samples that a call does CPU_FLOPS, and two a
    thread at least, which is how a larger batch is shared."""
    if operands.x.device.type != "cpu" or problem.batch < 2:
        return problem, operands
    sample = count.flops(problem) / len(problem.schedule) / problem.batch
    size = max(2 * torch.get_num_threads(), math.ceil(CPU_FLOPS / max(sample, 1.0)))
    if size >= problem.batch:
        return problem, operands
    part = only(operands, torch.arange(size, device=operands.x.device))
    return dataclasses.replace(problem, batch=size), part


def _run_calls(name: str, problem: Problem, operands: Operands, calls: int) -> object:
    """The first calls of the schedule without gradient."""
    with torch.no_grad():
        return backends.get(name).run(problem, operands, Span(0, calls))


def _run_window(
    name: str, problem: Problem, operands: Operands, calls: int, save: str, forward: str
) -> object:
    """Forward and backward of the window's first calls; PyTorch's as the caller would have it: its
    graph, block by block, or call by call. `forward` runs a window that saves "states"."""
    schedule, first = problem.schedule, problem.schedule.grad_from
    span, slope = Span(first, first + calls), operands.x.detach()
    written = {step.write for step in schedule.steps[first : span.stop]}
    d_outs = [slope if state in written else None for state in schedule.states]
    if name != EAGER:
        return gradients(backends.get(name), problem, operands, span, save, d_outs, forward)
    if save == "states":
        with torch.no_grad():
            backends.get(forward).run(problem, operands, span)
            return reference_backward.run(problem, operands, span, [slope] * len(d_outs))
    run = recompute.run if save == "block" else reference.run
    return gradients_by_autograd(problem, operands, span, d_outs, run)


@functools.cache
def _tell_of_missing_engine() -> None:
    """Warn once where the CPU engine was never compiled, does not load or was given a setting that
    is none."""
    reason = backends.get("cpu").why_unavailable() if "cpu" in backends.ORDER else None
    if reason is not None:
        said = f"recurx: `auto` runs plain PyTorch, because the CPU engine {reason}"
        warnings.warn(said, MissingEngine, stacklevel=2)
