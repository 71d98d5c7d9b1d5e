"""The recursion as `torch.library` custom ops, so that it traces, fakes and differentiates.

`torch.ops.recurx.recurse` runs calls start..stop-1 on any backend and is differentiable in x,
states and weights over exactly those calls; its backward is the reference's, written out: it keeps
nothing but the states that entered and recomputes call by call. `torch.ops.recurx.window` does the
same on a backend that has a backward of its own (`recurx.backends.Window`) and returns, after the
states, what its backward will read. `recurx.recurse` composes both with a detached carry.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recurx import backends, reference_backward, trials
from recurx.backends import Window
from recurx.backends.graphs import UNSAFE_IN_GRAPHS
from recurx.errors import RecurxError
from recurx.operands import Operands, Span
from recurx.problem import Problem, decode
from recurx.recompute import DOUBLE_BACKWARD
from recurx.route import Request


def problem_of(key: str, x: Tensor, cos: Tensor | None, needs_grad: bool = False) -> Problem:
    """The problem that an encoded schedule and a tensor x [B, T, D] make; one value for good."""
    return _problem(key, x.shape, x.dtype, x.device.type, cos is not None, needs_grad)


@functools.lru_cache(maxsize=1024)
def _problem(
    key: str, shape: torch.Size, dtype: torch.dtype, device_type: str, rope: bool, needs_grad: bool
) -> Problem:
    return Problem(*decode(key), *shape, dtype, device_type, rope, needs_grad)


def _register(
    name: str, kernel: Callable[..., Any], fake: Callable[..., Any], tags: Any = (), spec: str = ""
) -> Any:
    """Define an op and return its overload.

    Not `torch.library.custom_op`: that imports torch._dynamo at the first call, 2 s and 150 MB for
    everybody who never compiles. Here the kernel is hidden from Dynamo only where that is loaded.

    Args:
        spec: schema of its arguments and results; "" for what the annotations of `kernel` say.
    """

    @functools.cache
    def hidden() -> Callable[..., Any]:
        disabled: Callable[..., Any] = torch.compiler.disable(kernel)
        return disabled

    def run(*arguments: Any) -> Any:
        compiling = hasattr(sys.modules.get("torch._dynamo"), "disable")
        return (hidden() if compiling else kernel)(*arguments)

    spec = spec or torch.library.infer_schema(kernel, mutates_args=())
    torch.library.define(name, spec, tags=tags)
    torch.library.impl(name, "CompositeExplicitAutograd", run)
    torch.library.register_fake(name, fake)
    namespace, _, base = name.partition("::")
    return getattr(getattr(torch.ops, namespace), base).default


# What ops begin with: the tensors of a recursion (`Operands.flat`), schedule and nets (`encode`).
_GIVEN = (
    "Tensor x, Tensor[] states, Tensor[] weights, Tensor? cos, Tensor? sin, Tensor? seed, "
    "Tensor? key_mask, str key"
)


def _read(flat: Sequence[Any], key: str, needs_grad: bool) -> tuple[Problem, Operands]:
    """The problem and the tensors of an op. These may have lost their memory since `recurx.recurse`
    looked: FSDP frees weights between forward and backward."""
    operands = Operands.from_flat(*flat)
    problem = problem_of(key, operands.x, flat[3], needs_grad)
    operands.check_memory(problem.schedule.states, problem.nets)
    return problem, operands


def _recurse(*given: Any) -> list[Tensor]:
    """Run calls start..stop-1 on `backend`, which may be "auto"."""
    *flat, key, backend, start, stop = given
    problem, operands = _read(flat, key, False)
    operands = operands.contiguous()
    found = trials.settled(problem, Request(backend), operands)
    return backends.get(found.backend).run(problem, operands, Span(start, stop))


def _recurse_fake(x: Tensor, states: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [_fresh(state) for state in states]


def _fresh(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _recurse_backward(grads: Sequence[Tensor], *given: Any) -> list[Tensor]:
    """Gradients of x, of each state and of each weight, flat in this order."""
    *flat, key, start, stop = given
    problem, operands = _read(flat, key, True)
    with torch.no_grad():
        return reference_backward.run(problem, operands, Span(start, stop), grads)


def _recurse_backward_fake(
    grads: Sequence[Tensor], x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], *_: Any
) -> list[Tensor]:
    return [_fresh(tensor) for tensor in (x, *states, *weights)]


recurse_op = _register(
    "recurx::recurse", _recurse, _recurse_fake, UNSAFE_IN_GRAPHS,
    f"({_GIVEN}, str backend, SymInt start, SymInt stop) -> Tensor[]",
)  # fmt: skip
recurse_backward_op = _register(
    "recurx::recurse_backward", _recurse_backward, _recurse_backward_fake,
    spec=f"(Tensor[] grads, {_GIVEN}, SymInt start, SymInt stop) -> Tensor[]",
)  # fmt: skip


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, states, weights, *beside, ctx.key, _, ctx.start, ctx.stop = inputs
    ctx.num_states = len(states)
    ctx.save_for_backward(x, *beside, *states, *weights)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    beside, rest = rest[:4], rest[4:]
    states, weights = rest[: ctx.num_states], rest[ctx.num_states :]
    grad_x, *flat = recurse_backward_op(
        grads, x, states, weights, *beside, ctx.key, ctx.start, ctx.stop
    )
    grad_states, grad_weights = flat[: ctx.num_states], flat[ctx.num_states :]
    return grad_x, grad_states, grad_weights, *[None] * 8


torch.library.register_autograd("recurx::recurse", _backward, setup_context=_save_for_backward)

# ---- the window of a backend that has a backward of its own ----------------------------------


def _window(*given: Any) -> list[Tensor]:
    """The states after calls start..stop-1, then what the backward reads.

    `backend` has the window. With save="states" nothing is kept for its backward, so `forward`,
    which may be "auto", runs the calls, if the window does not.
    """
    *flat, key, backend, forward, start, stop, save = given
    problem, operands = _read(flat, key, True)
    window = _window_of(backend, problem)
    if save == "states" and not window.own_forward:
        return _recurse(*flat, key, forward, start, stop)
    outs, kept = window.forward(problem, operands.contiguous(), Span(start, stop), save)
    return [*outs, *kept]


def _window_of(backend: str, problem: Problem) -> Window:
    window = backends.get(backend).window(problem)
    assert window is not None, "the route names backends that have one"
    return window


def _window_fake(x: Tensor, states: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    _, cos, _, _, _, key, backend, _, start, stop, save = rest
    # While torch.compile traces with dynamic shapes, sizes are symbols, which no cache takes, and
    # plain integers may come as symbols too.
    problem = _problem.__wrapped__(key, x.shape, x.dtype, x.device.type, cos is not None, True)
    kept = _window_of(backend, problem).kept(problem, Span(int(start), int(stop)), save)
    return [*_recurse_fake(x, states), *(x.new_empty(shape, dtype=dtype) for shape, dtype in kept)]


def _window_backward(
    grads: Sequence[Tensor], outs: Sequence[Tensor], kept: Sequence[Tensor], *given: Any
) -> list[Tensor]:
    """The gradients that `wants` asks for, of x, each state and each weight, in this order.

    `grads` are those of the states for which `there` says so.
    """
    *flat, key, backend, start, stop, save, there, wants = given
    problem, operands = _read(flat, key, True)
    rest = iter(grads)
    d_outs = [next(rest).contiguous() if flows else None for flows in there]
    with torch.no_grad():
        results = _window_of(backend, problem).backward(
            problem, operands.contiguous(), Span(start, stop), save, outs, kept, d_outs, wants
        )
    return [result for result in results if result is not None]


def _window_backward_fake(grads: Any, outs: Any, kept: Any, *given: Any) -> list[Tensor]:
    both = zip(_recurse_backward_fake(grads, *given), given[-1], strict=True)
    return [tensor for tensor, wanted in both if wanted]


_SPAN = "SymInt start, SymInt stop, str save"
window_op = _register(
    "recurx::window", _window, _window_fake, UNSAFE_IN_GRAPHS,
    f"({_GIVEN}, str backend, str forward, {_SPAN}) -> Tensor[]",
)  # fmt: skip
window_backward_op = _register(
    "recurx::window_backward", _window_backward, _window_backward_fake, UNSAFE_IN_GRAPHS,
    f"(Tensor[] grads, Tensor[] outs, Tensor[] kept, {_GIVEN}, str backend, {_SPAN}, "
    "bool[] there, bool[] wants) -> Tensor[]",
)  # fmt: skip


def _save_window(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, states, weights, *beside, ctx.key, ctx.backend, _, ctx.start, ctx.stop, ctx.save = inputs
    outs, kept = output[: len(states)], output[len(states) :]
    # What is kept has no gradient; without the next line autograd would make zeros for all of it.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*kept)
    ctx.num_states, ctx.num_weights = len(states), len(weights)
    ctx.num_outs = 0 if ctx.save == "states" else len(outs)
    ctx.save_for_backward(x, *beside, *states, *outs[: ctx.num_outs], *weights, *kept)


def _differentiate_window(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    rest = iter(ctx.saved_tensors)
    x, *beside = itertools.islice(rest, 5)
    sizes = ctx.num_states, ctx.num_outs, ctx.num_weights
    states, outs, weights = (list(itertools.islice(rest, size)) for size in sizes)
    grads = grads[: ctx.num_states]
    there = [grad is not None for grad in grads]
    x_wanted, states_wanted, weights_wanted, *_ = ctx.needs_input_grad
    wants = [bool(x_wanted), *_each(states_wanted), *_each(weights_wanted)]
    results = window_backward_op(
        [grad for grad in grads if grad is not None], outs, list(rest), x, states, weights,
        *beside, ctx.key, ctx.backend, ctx.start, ctx.stop, ctx.save, there, wants,
    )  # fmt: skip
    flow = iter(results)
    d_x, *flat = [next(flow) if wanted else None for wanted in wants]
    d_states, d_weights = flat[: ctx.num_states], flat[ctx.num_states :]
    return d_x, d_states, d_weights, *[None] * 10


def _each(needs: Any) -> list[bool]:
    """needs_input_grad of a list argument: a list of flags, or one False for an empty list."""
    return [bool(flag) for flag in needs] if isinstance(needs, (list, tuple)) else []


torch.library.register_autograd("recurx::window", _differentiate_window, setup_context=_save_window)


def _no_double_backward(ctx: Any, *_: Any) -> None:
    raise RecurxError(DOUBLE_BACKWARD)


torch.library.register_autograd("recurx::recurse_backward", _no_double_backward)
torch.library.register_autograd("recurx::window_backward", _no_double_backward)
