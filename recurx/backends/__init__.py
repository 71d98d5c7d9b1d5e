"""The registry of backends: one file each, chosen by name or by `auto`.

A backend is asked three questions: can it run on this machine, can it run this problem, and run
it. An explicit backend never falls back. `auto` takes the best of those that answer yes to both
(`ranked`), so its choice is deterministic and `recurx.explain` can retell it; on a GPU each kind of
plan is compared with the reference before its first use (`first_use.py`).

A backend that has a backward offers a `Window`; without one the gradient window runs on PyTorch.
"""

from __future__ import annotations

import abc
import functools
import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from recurx.errors import BackendUnavailable, bad_argument
from recurx.operands import Operands, Span
from recurx.problem import Problem, decode


class Backend(abc.ABC):
    """What each backend implements. Tensors come checked, contiguous and on one device."""

    name: str
    device_types: tuple[str, ...]  # devices that `auto` uses it on; () means any

    def runs_on(self, device_type: str) -> bool:
        """Whether it takes tensors on this type of device when it is asked for by name."""
        return not self.device_types or device_type in self.device_types

    @abc.abstractmethod
    def why_unavailable(self) -> str | None:
        """None if this machine can run the backend, else one sentence saying what is missing."""

    @abc.abstractmethod
    def why_unsupported(self, problem: Problem) -> str | None:
        """None if it can run `problem`, else one sentence saying which property it refuses."""

    @abc.abstractmethod
    def run(self, problem: Problem, operands: Operands, span: Span) -> list[Tensor]:
        """Run the calls of `span` without gradient; no operand is modified.

        Returns:
            All states in the same order, in fresh contiguous tensors that alias no input.
        """

    def window(self, problem: Problem) -> Window | None:
        """Its differentiable window for `problem`, or None: then PyTorch runs the window.

        May not depend on B, which torch.compile may have made symbolic.
        """
        return None


class Window(abc.ABC):
    """Optional: a forward that keeps what its backward reads, and that backward.

    `save` is the knob of `recurx.recurse`: "all" keeps whatever spares work, "block" each block's
    input, "states" nothing (the entering states are always there), so that of the bytes kept
    states < block < all. Tensors come checked, contiguous and on one device, as for `Backend.run`.
    """

    @abc.abstractmethod
    def kept(
        self, problem: Problem, span: Span, save: str
    ) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor that `forward` keeps; the sizes may be symbolic."""

    @abc.abstractmethod
    def forward(
        self, problem: Problem, operands: Operands, span: Span, save: str
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The states after the calls of `span` as `Backend.run` returns them, and what is kept.

        All in fresh tensors that alias no input and not each other.
        """

    @abc.abstractmethod
    def backward(
        self,
        problem: Problem,
        operands: Operands,
        span: Span,
        save: str,
        outs: Sequence[Tensor],
        kept: Sequence[Tensor],
        d_outs: Sequence[Tensor | None],
        wants: Sequence[bool],
    ) -> list[Tensor | None]:
        """Gradients of x, each state and each weight, flat in this order; None where not wanted.

        Args:
            operands: what entered.
            outs: what left; empty for save="states".
            kept: what `forward` kept; not modified, it may be asked twice.
            d_outs: gradients of `outs`, None for zero; not modified.
            wants: for each gradient in the order of the result, whether it is wanted.

        Returns:
            Fresh tensors that alias nothing; weight gradients, summed in fp32 over all calls, in
            the dtype of the masters.
        """


# `auto` walks this list; see `ranked`. Kept in one place: no other file ranks backends.
ORDER = (
    "cuda",
    "cpu",
    "triton",
    "eager",
)
NAMES = ("auto", *ORDER)


@functools.cache
def get(name: str) -> Backend:
    """The backend called `name`; an unknown name lists the known ones."""
    if name not in ORDER:
        raise bad_argument("recurse", "backend", f"one of {', '.join(NAMES)}", repr(name))
    module = importlib.import_module(f"recurx.backends.{name}")
    return module.BACKEND


def why_not(name: str, problem: Problem) -> str | None:
    """None if backend `name` runs `problem` on this machine, else the reason in one sentence."""
    backend = get(name)
    device = problem.device_type
    if not backend.runs_on(device):
        return f"runs on {', '.join(backend.device_types)} tensors, these are on {device}"
    return backend.why_unavailable() or backend.why_unsupported(problem)


def select(name: str, problem: Problem) -> Backend:
    """The backend that runs `problem` under the requested `name`.

    Raises:
        BackendUnavailable: an explicit backend cannot; the message says what is missing.
    """
    if name == "auto":
        return get(ranked(problem)[0])
    reason = why_not(name, problem)
    if reason is not None:
        raise BackendUnavailable(
            f"recurx.recurse: backend {name!r} {reason}. "
            f'Use backend="auto" to let recurx choose, or see recurx.explain(...).'
        )
    return get(name)


def ranked(problem: Problem) -> list[str]:
    """The backends that `auto` may take for `problem`, best first; never empty.

    In the order of `ORDER`; but where several have plans for the device of a problem with samples,
    the predicted time of their plans decides (`LaunchPlan.pick`).
    """
    names = [
        name
        for name in ORDER
        if auto_may_take(name, problem.device_type) and why_not(name, problem) is None
    ]
    if len(names) <= 2 or problem.batch == 0:  # one fused backend and eager: nothing to compare
        return names
    fused = [name for name in names if name != "eager"]
    return [*sorted(fused, key=lambda name: _predicted(name, problem)), "eager"]


@functools.lru_cache(maxsize=1024)
def _predicted(name: str, problem: Problem) -> float:
    """Seconds that the best plan of a backend is predicted to take; inf if it makes no plans."""
    from recurx.plan import Device
    from recurx.plan.launch import all_candidates

    device = Device.of(problem.device_type)
    plans = all_candidates(problem, device, name)
    return min((plan.seconds(device) for plan in plans), default=float("inf"))


def auto_may_take(name: str, device_type: str) -> bool:
    """Whether `auto` considers backend `name` for tensors on this type of device."""
    return not get(name).device_types or device_type in get(name).device_types


def has_fused(device_type: str) -> bool:
    """Whether `auto` has anything beyond the reference for this type of device.

    A constant of the process, so torch.compile does not trace the look-up.
    """
    return any(
        auto_may_take(name, device_type) and get(name).why_unavailable() is None
        for name in ORDER
        if name != "eager"
    )


def window_backend(
    name: str, key: str, dtype: torch.dtype, device_type: str, rope: bool, tokens: int
) -> str | None:
    """Name of the backend whose `Window` serves a problem under the requested `name`, or None.

    `key` is the encoded schedule and nets, `tokens` is T, or 0 while torch.compile traces and T may
    be symbolic. For "auto" it is the first that `auto` may take and that has a window; an explicit
    backend without one has PyTorch's.
    """
    schedule, nets = decode(key)
    tokens = tokens or max([block.tokens for _, spec in nets for block in spec.blocks] + [1])
    hidden = nets[0][1].hidden
    problem = Problem(schedule, nets, 1, tokens, hidden, dtype, device_type, rope, needs_grad=True)
    for candidate in ORDER if name == "auto" else (name,):
        if candidate == "eager" or (name == "auto" and not auto_may_take(candidate, device_type)):
            continue
        if why_not(candidate, problem) is None and get(candidate).window(problem) is not None:
            return candidate
    return None


# What torch.compiler.assume_constant_result sets; calling that would import torch._dynamo, which
# takes seconds, for everybody who never compiles.
has_fused._dynamo_marked_constant = True  # type: ignore[attr-defined]
window_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]
