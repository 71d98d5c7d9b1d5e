"""What `auto` relies on: right answers first, then the faster one, found out once on the machine.

Kernels are proven elsewhere (interpreter, emulator, tests), but a driver, a compiler or a chip can
still be the first of its kind, and a fused kernel can be slower than PyTorch. So before `auto` uses
a backend for the first time, on the user's own tensors:

    compared   one net call with the reference in fp64, and of a backend with a window the gradients
               of one call; a wrong one ends in a warning and in the next backend
    timed      the fused backends and PyTorch in turns over the first calls of the schedule, and
               over the window where a backend has one; PyTorch must win by route.MARGIN

Nothing is tried while a CUDA graph is captured. A backend asked for by name is used as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from recurx import backends, recompute, reference, reference_backward
from recurx import route as routes
from recurx.choices import (
    CALLS,
    COMPARED,
    EAGER,
    MARGIN,
    WINDOW,
    autotune,
    fused_for,
    known,
    predicted,
    window_half,
    windows_for,
)
from recurx.comparing import only, right, right_window
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
# FLOPs of one timed call on a CPU: of a larger batch a part is timed, as ratios no longer change.
CPU_FLOPS = 4e9


class MissingEngine(UserWarning):
    """`auto` runs PyTorch because the compiled module is not installed."""


class _Locks:
    """One lock a subject, so that two threads never try the same at the same time."""

    def __init__(self) -> None:
        self._renew()
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[Any, threading.Lock] = {}
        self._local = threading.local()

    @contextlib.contextmanager
    def trying(self, subject: Any) -> Iterator[bool]:
        """Holds the subject's lock; yields False, without it, inside a trial of this thread."""
        if getattr(self._local, "inside", False):
            yield False
            return
        with self._guard:
            lock = self._locks.setdefault(subject, threading.Lock())
        with lock:
            self._local.inside = True
            try:
                yield True
            finally:
                self._local.inside = False


_LOCKS = _Locks()
_told_missing = False


def settled(problem: Problem, request: Request, operands: Operands) -> Route:
    """The route of these tensors after comparing and timing whatever it still depends on.

    Raises:
        BackendUnavailable: the backend asked for by name cannot run it.
    """
    device = operands.x.device
    found = routes.route(problem, device, request)
    if found.backend == EAGER and request.backend == "auto":
        _tell_of_missing_engine(problem)
    if found.settled:
        return found
    if not _capturing(operands.x):
        with _LOCKS.trying(subject_of(request.save, problem)) as free:
            found = routes.route(problem, device, request)  # another thread may have been faster
            if free and not found.settled:
                found = _try(found, operands.contiguous())
    if found.settled:
        return found
    return routes.decide(problem, device, request, proven=True)


def forget() -> None:
    """Compare and time everything anew (what lies on disk stays there)."""
    COMPARED.forget()
    VERDICTS.forget()
    routes.forget()


def _capturing(x: Tensor) -> bool:
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _try(found: Route, operands: Operands) -> Route:
    """Compare and time until the route is settled or memory does not suffice."""
    problem, device, request = found.problem, operands.x.device, found.request
    if not found.calls.settled:
        fused = fused_for(problem, device)
        fused = [n for n in fused if COMPARED.get(CALLS, n, problem, device) is not False]
        times = {name: predicted(name, problem, device) for name in fused}
        fused = [name for name in fused if times[name] <= PRUNE * min(times.values())]
        _settle(
            CALLS, CALLS, fused, problem, operands, lambda names: _runs(names, problem, operands)
        )
        found = routes.route(problem, device, request)
    if found.window is not None and not found.window.settled:
        half, forward = window_half(request.save), found.backend

        def runs(names: list[str]) -> tuple[dict[str, Run], int]:
            return _window_runs(names, problem, operands, request.save, forward)

        _settle(WINDOW, half, windows_for(problem, device, "auto"), problem, operands, runs)
    return routes.route(problem, device, request)


def _settle(
    kind: str,
    half: str,
    fused: list[str],
    problem: Problem,
    operands: Operands,
    runs: Callable[[list[str]], tuple[dict[str, Run], int]],
) -> None:
    """Compare the fused backends of one half, best first; then time those that are right."""
    device, compare = operands.x.device, right if kind == CALLS else right_window
    before = known(half, problem, device)
    timing = autotune() and (before is None or before.chosen not in (*fused, EAGER))
    trusted = []
    for name in fused:
        verdict = COMPARED.get(kind, name, problem, device)
        if verdict is None:
            verdict = compare(backends.get(name), problem, operands)
            if verdict is None:
                return  # asked again the next time
            COMPARED.keep(kind, name, problem, device, verdict)
        if verdict:
            trusted.append(name)
            if not timing:
                return
    if trusted:
        found = _race(*runs(trusted), device)
        if found is not None:
            machine = machine_of(device, torch.get_num_threads())
            VERDICTS.keep(subject_of(half, problem), machine, found)


# ---- faster? -------------------------------------------------------------------------------------

Run = Callable[[int], object]  # runs so many net calls


def _race(runs: dict[str, Run], most: int, device: torch.device) -> Verdict | None:
    """Time the runs in turns; PyTorch's is last in `runs`. None: nothing could be timed.

    Args:
        runs: what each backend does.
        most: the largest number of calls there is.
    """
    one: dict[str, float] = {}
    for name, run in runs.items():
        try:
            first = _seconds(run, 1, device)  # packs weights, compiles, fills caches
            if name == EAGER and first > max(BUDGET, HOPELESS * min(one.values(), default=first)):
                one[name] = first
                continue
            again = [_seconds(run, 1, device)]
            while len(again) < 3 and sum(again) < BUDGET / 10:
                again.append(_seconds(run, 1, device))
            one[name] = min(again)
        except torch.OutOfMemoryError:
            continue  # what does not fit is not chosen
    if not one:
        return None
    fastest, *others = sorted(one, key=lambda name: one[name])
    if fastest != EAGER and all(one[name] > PRUNE * one[fastest] for name in others):
        return Verdict(fastest, tuple(one.items()), 1)
    turn = sum(one.values())
    calls = max(1, min(most, int(BUDGET / (ROUNDS * turn))))
    best = one if calls == 1 else dict.fromkeys(one, float("inf"))
    for name in one if calls > 1 else ():
        _seconds(runs[name], calls, device)  # a graph of so many calls is captured here
    for _ in range(max(2, min(ROUNDS, int(BUDGET / (calls * turn))))):
        for name in one:  # in turns: a slow moment of the machine hits all alike
            best[name] = min(best[name], _seconds(runs[name], calls, device))
    fused = {name: took for name, took in best.items() if name != EAGER}
    chosen = min(fused, key=lambda name: fused[name]) if fused else EAGER
    if EAGER in best and fused and best[EAGER] < MARGIN * fused[chosen]:
        chosen = EAGER
    return Verdict(chosen, tuple(best.items()), calls)


def _seconds(run: Run, calls: int, device: torch.device) -> float:
    return max(seconds_of(lambda: run(calls), device), 1e-9)


def _part(problem: Problem, operands: Operands) -> tuple[Problem, Operands]:
    """What is timed of a batch: on a CPU so many samples that a call does CPU_FLOPS, and two a
    thread at least, which is how a larger batch is shared."""
    if operands.x.device.type != "cpu" or problem.batch < 2:
        return problem, operands
    sample = count.flops(problem) / len(problem.schedule) / problem.batch
    size = max(2 * torch.get_num_threads(), math.ceil(CPU_FLOPS / max(sample, 1.0)))
    if size >= problem.batch:
        return problem, operands
    part = only(operands, torch.arange(size))
    return dataclasses.replace(problem, batch=size), part


def _runs(names: list[str], problem: Problem, operands: Operands) -> tuple[dict[str, Run], int]:
    """The first calls of the schedule without gradient."""
    problem, operands = _part(problem, operands)

    def run_on(name: str) -> Run:
        backend = backends.get(name)

        def run(calls: int) -> object:
            with torch.no_grad():
                return backend.run(problem, operands, Span(0, calls))

        return run

    return {name: run_on(name) for name in (*names, EAGER)}, len(problem.schedule)


def _window_runs(
    names: list[str], problem: Problem, operands: Operands, save: str, forward: str
) -> tuple[dict[str, Run], int]:
    """Forward and backward of the window's first calls, with PyTorch's as the caller would have
    it: its graph, block by block, or call by call. `forward` runs a window that saves "states"."""
    problem, operands = _part(dataclasses.replace(problem, needs_grad=True), operands)
    schedule = problem.schedule
    first, names_of = schedule.grad_from, schedule.states
    slope = torch.ones_like(operands.x)
    wants = [True] * (1 + len(names_of) + len(operands.weights))

    def span_of(calls: int) -> tuple[Span, list[Tensor | None]]:
        written = {step.write for step in schedule.steps[first : first + calls]}
        return Span(first, first + calls), [slope if n in written else None for n in names_of]

    def run_on(name: str) -> Run:
        window = backends.get(name).window(problem)
        assert window is not None, "route.windows_for names backends that have one"

        def run(calls: int) -> object:
            span, d_outs = span_of(calls)
            with torch.no_grad():
                if save == "states":
                    outs = backends.get(forward).run(problem, operands, span)
                    kept: list[Tensor] = []
                else:
                    outs, kept = window.forward(problem, operands, span, save)
                return window.backward(
                    problem, operands, span, save, outs if kept else [], kept, d_outs, wants
                )

        return run

    def on_pytorch(calls: int) -> object:
        span, d_outs = span_of(calls)
        if save == "states":
            with torch.no_grad():
                backends.get(forward).run(problem, operands, span)
                flat = [slope if d is None else d for d in d_outs]
                return reference_backward.run(problem, operands, span, flat)
        leaves = [t.detach().requires_grad_() for t in (operands.x, *operands.states)]
        weights = [w.detach().requires_grad_() for w in operands.weights]
        carry, nets = dict(zip(names_of, leaves[1:], strict=True)), problem.bind(weights)
        how = recompute.run if save == "block" else reference.run
        with torch.enable_grad():
            out = how(schedule, nets, leaves[0], carry, operands.rope, *span)
        pairs = [(out[n], d) for n, d in zip(names_of, d_outs, strict=True) if d is not None]
        return torch.autograd.grad(
            [o for o, _ in pairs], [*leaves, *weights], [d for _, d in pairs], allow_unused=True
        )

    return {**{n: run_on(n) for n in names}, EAGER: on_pytorch}, len(schedule) - first


# ---- what is missing -----------------------------------------------------------------------------


def _tell_of_missing_engine(problem: Problem) -> None:
    """Warn once where the CPU engine would run this, but was never compiled or does not load."""
    global _told_missing
    if _told_missing or problem.device_type != "cpu":
        return
    _told_missing = True
    if importlib.util.find_spec("recurx._C") is not None:
        return
    reason = backends.get("cpu").why_unavailable()
    warnings.warn(
        f"recurx: `auto` runs plain PyTorch, because the CPU engine {reason}",
        MissingEngine,
        stacklevel=2,
    )
