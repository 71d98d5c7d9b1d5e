"""What `auto` may rely on: a GPU kernel is compared once with the reference on the device at hand.

Kernels are proven without a GPU (interpreter, emulator), but a driver, a compiler or a chip can
still be the first of its kind. So before `auto` uses a kind of plan for the first time in a
process, one net call on the user's own tensors is compared with plain PyTorch: a few milliseconds
once, and a wrong kernel ends in a warning and the next backend instead of in a wrong answer. A
backend that is asked for by name is used as it is.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from recurx import backends, reference
from recurx.backends import Backend
from recurx.operands import Operands, Span
from recurx.plan import Device, LaunchPlan
from recurx.plan.launch import BACKENDS as PLANNED
from recurx.problem import Problem

# The error of one call against fp64 may be this many times that of plain PyTorch in the same dtype.
# Proofs hold kernels to 1.25; here only a wrong one matters, whose error is a hundred times larger.
ALLOWED = 2.0
SLACK = {torch.float32: 2e-5, torch.bfloat16: 2e-3}  # relative, where PyTorch is exact by luck
SAMPLES = 4  # compared at each end of the batch


class UntrustedKernel(UserWarning):
    """A kernel failed its first comparison on this device; `auto` goes on without it."""


class FirstUse:
    """Verdicts of this process, by kind of plan and shape of one sample."""

    def __init__(self) -> None:
        self._verdicts: dict[tuple[object, ...], bool] = {}
        self._lock = threading.Lock()

    def choose(
        self,
        problem: Problem,
        x: Tensor,
        states: Sequence[Tensor],
        weights: Sequence[Tensor],
        cos: Tensor | None,
        sin: Tensor | None,
    ) -> Backend:
        """The first backend of `auto` for these tensors that has given a right answer here."""
        for name in backends.ranked(problem):
            backend = backends.get(name)
            if name == "eager" or problem.batch == 0:
                return backend
            key = self._key(name, problem, x.device)
            with self._lock:
                if key not in self._verdicts:
                    if _capturing(x):
                        continue  # nothing can be compared inside a CUDA graph
                    verdict = _right(backend, problem, x, states, weights, cos, sin)
                    if verdict is None:
                        continue  # asked again the next time
                    self._verdicts[key] = verdict
                if self._verdicts[key]:
                    return backend
        raise AssertionError("eager runs everything")

    def forget(self) -> None:
        """Compare everything anew."""
        with self._lock:
            self._verdicts.clear()

    @staticmethod
    def _key(name: str, problem: Problem, device: torch.device) -> tuple[object, ...]:
        kind = ""
        if name in PLANNED:
            kind = LaunchPlan.pick(problem, Device.of(device), name).kind
        sample = (problem.tokens, problem.hidden, problem.dtype, problem.nets, problem.rope)
        return (name, kind, device, *sample)


def _capturing(x: Tensor) -> bool:
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _right(
    backend: Backend,
    problem: Problem,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
) -> bool | None:
    """Whether the first call of the schedule comes out as PyTorch says; warns if not.

    None where the memory did not suffice, which says nothing about the kernel.
    """
    names, step = problem.schedule.states, problem.schedule.steps[0]
    error = "it raised"
    try:
        operands = Operands.from_flat(x, states, weights, cos, sin)
        out = backend.run(problem, operands, Span(0, 1))[names.index(step.write)]
        cos_sin = operands.rope
        # Samples do not mix: the first and last few tell, and fp64 is slow on consumer GPUs.
        some = torch.arange(problem.batch, device=x.device)
        some = torch.cat((some[:SAMPLES], some[SAMPLES:][-SAMPLES:]))
        carry = {name: state[some] for name, state in zip(names, states, strict=True)}

        def reference_in(dtype: torch.dtype) -> Tensor:
            values = {name: state.to(dtype) for name, state in carry.items()}
            nets = problem.bind(weights)
            done = reference.run(problem.schedule, nets, x[some].to(dtype), values, cos_sin, 0, 1)
            return done[step.write].double()

        with torch.no_grad():
            true = reference_in(torch.float64)
            plain = reference_in(problem.dtype)
            norm = true.norm().clamp(min=1e-30)
            ours = float((out[some].double() - true).norm() / norm)
            theirs = float((plain - true).norm() / norm)
        if ours <= ALLOWED * theirs + SLACK.get(problem.dtype, 0.0):  # False for NaN
            return True
        error = f"error {ours:.3g} against {theirs:.3g} of plain PyTorch"
    except torch.OutOfMemoryError:
        return None
    except Exception as failure:  # a launch (RuntimeError), or Triton's compiler, which has its own
        error = f"{type(failure).__name__}: {failure}"
    warnings.warn(
        f"recurx: backend {backend.name!r} gave no right answer for one call of {problem} on "
        f"{x.device} ({error}); `auto` goes on without it. Please report this with the output of "
        f"`python -m recurx env`.",
        UntrustedKernel,
        stacklevel=2,
    )
    return False


FIRST_USE = FirstUse()


def choose(
    name: str,
    problem: Problem,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
) -> Backend:
    """The backend for the requested `name`; what `auto` finds on a GPU is compared first."""
    if name != "auto" or x.device.type == "cpu":  # the CPU engine is proven on CPUs by the tests
        return backends.select(name, problem)
    return FIRST_USE.choose(problem, x, states, weights, cos, sin)
