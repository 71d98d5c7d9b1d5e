"""Whether a backend gives right answers here: one net call, and the gradients of one, against fp64.

Kernels are proven elsewhere (interpreter, emulator, tests), but a driver, a compiler or a chip can
still be the first of its kind. The user's own tensors are compared: a few milliseconds, once.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from recurx import reference
from recurx.backends import Backend
from recurx.operands import Operands, Span
from recurx.problem import Problem

# The error against fp64 may be this many times that of plain PyTorch in the same dtype. Proofs hold
# kernels to 1.25; here only a wrong one matters, whose error is a hundred times larger.
ALLOWED = 2.0
SLACK = {torch.float32: 2e-5, torch.bfloat16: 2e-3}  # relative, where PyTorch is exact by luck
SAMPLES = {"cuda": 4}  # compared at each end of the batch; else 1: fp64 of one takes 0.1 s on a CPU


class UntrustedKernel(UserWarning):
    """A kernel failed its first comparison on this device; `auto` goes on without it."""


class Error(NamedTuple):
    """Relative errors against fp64: of a backend, and of plain PyTorch in the same dtype."""

    ours: float
    theirs: float

    def beyond(self, dtype: torch.dtype) -> float:
        """How far above what is allowed; inf for NaN."""
        excess = self.ours - (ALLOWED * self.theirs + SLACK.get(dtype, 0.0))
        return excess if excess == excess else float("inf")


def right(backend: Backend, problem: Problem, operands: Operands) -> bool | None:
    """Whether the first call of the schedule comes out as PyTorch says; warns if not.

    None where nothing can be said: too little memory, or inputs that are not finite.
    """

    def compare() -> list[Error] | None:
        step = problem.schedule.steps[0]
        out = backend.run(problem, operands, Span(0, 1))[problem.schedule.states.index(step.write)]
        chosen = _samples(problem, out.device)
        some = only(operands, chosen)

        def reference_in(dtype: torch.dtype) -> Tensor:
            carry = {n: s.to(dtype) for n, s in zip(problem.schedule.states, some.states)}  # noqa: B905
            nets, x = problem.bind(some.weights), some.x.to(dtype)
            done = reference.run(problem.schedule, nets, x, carry, some.rope, 0, 1)
            return done[step.write]

        with torch.no_grad():
            return _errors(
                [out[chosen]], [reference_in(torch.float64)], [reference_in(problem.dtype)]
            )

    return _judged(compare, backend, "one call", problem, operands)


def right_window(backend: Backend, problem: Problem, operands: Operands) -> bool | None:
    """The same of the gradients of the window's first call, of x, states and weights."""

    def compare() -> list[Error] | None:
        some = only(operands, _samples(problem, operands.x.device))
        part = dataclasses.replace(problem, batch=len(some.x), needs_grad=True)
        names, first = part.schedule.states, part.schedule.grad_from
        span, wrote = Span(first, first + 1), part.schedule.steps[first].write
        # Another slope at every value, and the same in every process.
        slope = torch.linspace(-1, 1, some.x.numel(), device=some.x.device)
        slope = slope.view_as(some.x).to(part.dtype)
        window = backend.window(part)
        assert window is not None, "route.windows_for names backends that have one"
        with torch.no_grad():
            outs, kept = window.forward(part, some, span, "all")
            d_outs = [slope if name == wrote else None for name in names]
            wants = [True] * (1 + len(names) + len(some.weights))
            ours = window.backward(part, some, span, "all", outs, kept, d_outs, wants)

        def gradients(dtype: torch.dtype, wide: bool) -> list[Tensor]:
            tensors = [t.to(dtype) for t in (some.x, *some.states)]
            tensors += [w.double() if wide else w for w in some.weights]
            x, *leaves = leaf = [t.detach().clone().requires_grad_() for t in tensors]
            carry = dict(zip(names, leaves[: len(names)], strict=True))
            with torch.enable_grad():
                nets = part.bind(leaves[len(names) :])
                out = reference.run(part.schedule, nets, x, carry, some.rope, *span)[wrote]
            return list(torch.autograd.grad(out, leaf, slope.to(dtype), materialize_grads=True))

        ours_there = [grad for grad in ours if grad is not None]
        return _errors(ours_there, gradients(torch.float64, True), gradients(part.dtype, False))

    return _judged(compare, backend, "the gradients of one call", problem, operands)


def _samples(problem: Problem, device: torch.device) -> Tensor:
    """Samples do not mix, so the first and last few tell; fp64 is slow on most devices."""
    count = SAMPLES.get(device.type, 1)
    every = torch.arange(problem.batch, device=device)
    return torch.cat((every[:count], every[count:][-count:]))


def only(operands: Operands, samples: Tensor) -> Operands:
    states = tuple(state.detach()[samples] for state in operands.states)
    return operands._replace(x=operands.x.detach()[samples], states=states)


def _errors(
    ours: Sequence[Tensor], true: Sequence[Tensor], plain: Sequence[Tensor]
) -> list[Error] | None:
    """One a tensor; None where the truth itself is not finite."""
    found = []
    for got, exact, rounded in zip(ours, true, plain, strict=True):
        if not bool(exact.isfinite().all()):
            return None
        norm = exact.double().norm().clamp(min=1e-30)
        both = ((t.double() - exact).norm() / norm for t in (got, rounded))
        found.append(Error(*(float(error) for error in both)))
    return found


def _judged(
    compare: Callable[[], list[Error] | None],
    backend: Backend,
    what: str,
    problem: Problem,
    operands: Operands,
) -> bool | None:
    try:
        errors = compare()
        if errors is None:
            return None
        worst = max(errors, key=lambda error: error.beyond(problem.dtype))
        if worst.beyond(problem.dtype) <= 0:
            return True
        error = f"error {worst.ours:.3g} against {worst.theirs:.3g} of plain PyTorch"
    except torch.OutOfMemoryError:
        return None
    except Exception as failure:  # a launch (RuntimeError), or Triton's compiler, which has its own
        error = f"{type(failure).__name__}: {failure}"
    warnings.warn(
        f"recurx: backend {backend.name!r} gave no right answer for {what} of {problem} on "
        f"{operands.x.device} ({error}); `auto` goes on without it. Please report this with the "
        "output of `python -m recurx env`.",
        UntrustedKernel,
        stacklevel=2,
    )
    return False
