"""Whether a backend gives right answers here: one net call, and the gradients of one, against fp64.

The user's own tensors are compared: a few milliseconds, once. recurx/trials.py says why.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from recurx import backends, fp8, reference
from recurx.backends import Backend
from recurx.noise import DRAWN
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


def right(half: str, backend: Backend, problem: Problem, operands: Operands) -> bool | None:
    """Whether one call, or the gradients of one, come out as PyTorch says; warns if not.

    None where nothing can be said: too little memory, or inputs that are not finite.

    Args:
        half: "calls" for the first call of the schedule, else the gradients of the window's first
            call, of x, states and weights.
    """
    # Int8 activations have the error that their owner accepted, and say nothing of other weights.
    weights = (w.detach() if fp8.have_codes([w], fp8.INT8) else w for w in operands.weights)
    operands = operands._replace(weights=tuple(weights))
    compare, what = _compare_window, "the gradients of one call"
    if half == "calls":
        compare, what = _compare_call, "one call"
    try:
        errors = compare(backend, problem, operands)
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


def _compare_call(backend: Backend, problem: Problem, operands: Operands) -> list[Error] | None:
    written = problem.schedule.states.index(problem.schedule.steps[0].write)
    out = backend.run(problem, operands, Span(0, 1))[written]
    chosen = _samples(problem, out.device)
    some, eager = only(operands, chosen), backends.get("eager")
    exact, plain = (
        eager.run(problem, _states_in(dtype, some), Span(0, 1))[written]
        for dtype in (torch.float64, problem.dtype)
    )
    return _errors([out[chosen]], [exact], [plain])


def _compare_window(backend: Backend, problem: Problem, operands: Operands) -> list[Error] | None:
    some = only(operands, _samples(problem, operands.x.device))
    part = dataclasses.replace(problem, batch=len(some.x), needs_grad=True)
    first = part.schedule.grad_from
    span, wrote = Span(first, first + 1), part.schedule.steps[first].write
    # Another slope at every value, and the same in every process.
    slope = torch.linspace(-1, 1, some.x.numel(), device=some.x.device)
    slope = slope.view_as(some.x).to(part.dtype)
    d_outs = [slope if name == wrote else None for name in part.schedule.states]
    ours = gradients(backend, part, some, span, "all", d_outs)
    plain = gradients_by_autograd(part, some, span, d_outs)
    wide = _states_in(torch.float64, some)
    wide = wide._replace(weights=tuple(weight.double() for weight in some.weights))
    d_wide = [None if d is None else d.double() for d in d_outs]
    return _errors(ours, gradients_by_autograd(part, wide, span, d_wide), plain)


def gradients(
    backend: Backend, problem: Problem, operands: Operands, span: Span, save: str,
    d_outs: Sequence[Tensor | None], forward: str = "",
) -> list[Tensor]:  # fmt: skip
    """Forward and backward on a backend's window: the gradients of x, each state and each weight.

    Args:
        d_outs: gradients of the states that leave, None for zero.
        forward: the backend that runs the calls with save="states" if the window does not.
    """
    window = backend.window(problem)
    assert window is not None, "route.windows_for names backends that have one"
    wants = [True] * (1 + len(operands.states) + len(operands.weights))
    outs: list[Tensor] = []
    kept: list[Tensor] = []
    with torch.no_grad():
        if save == "states" and not window.own_forward:
            backends.get(forward).run(problem, operands, span)
        else:
            outs, kept = window.forward(problem, operands, span, save)
        given = problem, operands, span, save, outs, kept, d_outs, wants
        return [grad for grad in window.backward(*given) if grad is not None]


def gradients_by_autograd(
    problem: Problem, operands: Operands, span: Span, d_outs: Sequence[Tensor | None],
    run: Callable[..., dict[str, Tensor]] = reference.run,
) -> list[Tensor]:  # fmt: skip
    """The same on PyTorch; `run` is `reference.run`, or `recompute.run`."""
    names = problem.schedule.states
    tensors = (operands.x, *operands.states, *operands.weights)
    x, *leaves = leaf = [tensor.detach().requires_grad_() for tensor in tensors]
    carry = dict(zip(names, leaves[: len(names)], strict=True))
    nets = problem.bind(leaves[len(names) :])
    with torch.enable_grad():
        out = run(problem.schedule, nets, x, carry, operands.rope, *span, *operands[4:])
    pairs = [(out[n], d) for n, d in zip(names, d_outs, strict=True) if d is not None]
    ends, slopes = zip(*pairs, strict=True)
    return list(torch.autograd.grad(ends, leaf, slopes, materialize_grads=True))


def _states_in(dtype: torch.dtype, operands: Operands) -> Operands:
    states = tuple(state.to(dtype) for state in operands.states)
    return operands._replace(x=operands.x.to(dtype), states=states)


def _samples(problem: Problem, device: torch.device) -> Tensor:
    """Samples do not mix, so the first and last few tell; fp64 is slow on most devices."""
    count = SAMPLES.get(device.type, 1)
    every = torch.arange(problem.batch, device=device)
    numbered = {"noise", *DRAWN} & {*problem.changed}  # draws go by the number of the sample
    last = every[:0] if numbered else every[count:][-count:]
    return torch.cat((every[:count], last))


def only(operands: Operands, samples: Tensor) -> Operands:
    states = tuple(state.detach()[samples] for state in operands.states)
    mask = None if operands.key_mask is None else operands.key_mask[samples]
    return operands._replace(x=operands.x.detach()[samples], states=states, key_mask=mask)


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
