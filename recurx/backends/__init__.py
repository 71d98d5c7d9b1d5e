"""The registry of backends: one file each.

A backend is asked three questions: can it run on this machine, can it run this problem, and run
it. Who is asked to run what is decided in recurx/route.py.

A backend that has a backward offers a `Window`; without one the gradient window runs on PyTorch.
One that has several kinds of plan is asked as a whole, "triton", or about one: "triton/library".
"""

from __future__ import annotations

import abc
import copy
import functools
import importlib
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from recurx.errors import bad_argument
from recurx.operands import Operands, Span
from recurx.problem import Problem
from recurx.schedule import FACTORS, LEARNED
from recurx.specs import VARIANT

EVERY_FIELD = frozenset((*VARIANT, *FACTORS, LEARNED, "kind"))  # of blocks and steps


class Backend(abc.ABC):
    """What each backend implements. Tensors come checked, contiguous and on one device."""

    name: str
    device_types: tuple[str, ...]  # devices that `auto` uses it on; () means any
    window_of: str = ""  # the backend whose window serves when this one is asked for by name
    kinds: tuple[str, ...] = ()  # of plan, each a way of its own that `auto` may choose
    kind: str = ""  # the one that it is restricted to
    # Fields of blocks (`BlockSpec.changed`) and factors of steps (`Step.changed`) that it runs.
    fields: frozenset[str] = frozenset()

    def runs_on(self, device_type: str) -> bool:
        """Whether it takes tensors on this type of device when it is asked for by name."""
        return not self.device_types or device_type in self.device_types

    def restricted(self, kind: str) -> Backend:
        """The same backend, caches and all, with one of its kinds of plan alone."""
        alone = copy.copy(self)
        alone.kind, alone.name = kind, f"{self.name}/{kind}"
        return alone

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

    def free(self) -> None:  # noqa: B027 (most keep nothing)
        """Let go of GPU memory that is kept for the next call; that one fills it anew."""

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

    # Whether `forward` runs save="states" too: where `Backend.run` rounds in other places, the
    # gradient would be of other values than those that left.
    own_forward = False

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
        self, problem: Problem, operands: Operands, span: Span, save: str, outs: Sequence[Tensor],
        kept: Sequence[Tensor], d_outs: Sequence[Tensor | None], wants: Sequence[bool],
    ) -> list[Tensor | None]:  # fmt: skip
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


# The order in which backends are considered where nothing else tells one from another.
ORDER = ("cuda", "cpu", "triton", "eager")
NAMES = ("auto", *ORDER)


@functools.cache
def get(name: str) -> Backend:
    """The backend called `name`, or "name/kind", with that kind of plan alone; an unknown one lists
    the known ones."""
    base, _, kind = name.partition("/")
    if base not in ORDER:
        raise bad_argument("recurse", "backend", f"one of {', '.join(NAMES)}", repr(name))
    backend: Backend = importlib.import_module(f"recurx.backends.{base}").BACKEND
    if base == name:
        return backend
    if kind not in backend.kinds:
        known = ", ".join((base, *entrants(base)))
        raise bad_argument("recurse", "backend", f"one of {known}", repr(name))
    return backend.restricted(kind)


def entrants(name: str) -> tuple[str, ...]:
    """What `auto` may choose of a backend: each of its kinds of plan, or itself."""
    kinds = get(name).kinds
    return tuple(f"{name}/{kind}" for kind in kinds) if kinds else (name,)


_version = 0


def version() -> int:
    """Grows with every `changed`: what was decided before may be decided otherwise now."""
    return _version


def changed() -> None:
    """Say that a backend can run something else than before, or was put in another's place."""
    global _version
    _version += 1
    get.cache_clear()


def free() -> None:
    """`Backend.free` of all that have been used."""
    for name in ORDER:
        if f"recurx.backends.{name}" in sys.modules:
            get(name).free()


def why_not(name: str, problem: Problem) -> str | None:
    """None if backend `name` runs `problem` on this machine, else the reason in one sentence."""
    backend = get(name)
    device = problem.device_type
    if problem.tokens == 0 and name != "eager":
        return "needs at least one token, got T=0"
    if not backend.runs_on(device):
        return f"runs on {', '.join(backend.device_types)} tensors, these are on {device}"
    found = backend.why_unavailable() or unknown_fields(backend, problem)
    return found or backend.why_unsupported(problem)


def unknown_fields(backend: Backend, problem: Problem) -> str | None:
    """Which fields of blocks and steps a backend does not run, in a sentence; None if none."""
    if problem.opaque and backend.name != "eager":
        return f"cannot look inside the plain callable {problem.opaque[0]!r}"
    return problem.unknown(backend.fields)


def auto_may_take(name: str, device_type: str) -> bool:
    """Whether `auto` considers backend `name` for tensors on this type of device."""
    return not get(name).device_types or device_type in get(name).device_types
