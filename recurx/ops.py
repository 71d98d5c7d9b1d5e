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
    name: str, kernel: Callable[..., list[Tensor]], fake: Callable[..., Any], tags: Any = ()
) -> Any:
    """Define an op and return its overload.

    Not `torch.library.custom_op`: that imports torch._dynamo at the first call, 2 s and 150 MB for
    everybody who never compiles. Here the kernel is hidden from Dynamo only where that is loaded.
    """

    @functools.cache
    def hidden() -> Callable[..., list[Tensor]]:
        disabled: Callable[..., list[Tensor]] = torch.compiler.disable(kernel)
        return disabled

    def run(*arguments: Any) -> list[Tensor]:
        compiling = hasattr(sys.modules.get("torch._dynamo"), "disable")
        return (hidden() if compiling else kernel)(*arguments)

    torch.library.define(name, torch.library.infer_schema(kernel, mutates_args=()), tags=tags)
    torch.library.impl(name, "CompositeExplicitAutograd", run)
    torch.library.register_fake(name, fake)
    namespace, _, base = name.partition("::")
    return getattr(getattr(torch.ops, namespace), base).default


def _operands(problem: Problem, x: Tensor, *flat: Any) -> Operands:
    """The tensors of an op. They may have lost their memory since `recurx.recurse` looked: FSDP
    frees weights between forward and backward."""
    operands = Operands.from_flat(x, *flat)
    operands.check_memory(problem.schedule.states, problem.nets)
    return operands


def _recurse(
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    key: str,
    backend: str,
    start: int,
    stop: int,
) -> list[Tensor]:
    """Run calls start..stop-1 on `backend`, which may be "auto"."""
    problem = problem_of(key, x, cos)
    operands = _operands(problem, x, states, weights, cos, sin).contiguous()
    found = trials.settled(problem, Request(backend), operands)
    return backends.get(found.backend).run(problem, operands, Span(start, stop))


def _recurse_fake(x: Tensor, states: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [_fresh(state) for state in states]


def _fresh(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _recurse_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    key: str,
    start: int,
    stop: int,
) -> list[Tensor]:
    """Gradients of x, of each state and of each weight, flat in this order."""
    problem = problem_of(key, x, cos, needs_grad=True)
    operands = _operands(problem, x, states, weights, cos, sin)
    with torch.no_grad():
        return reference_backward.run(problem, operands, Span(start, stop), grads)


def _recurse_backward_fake(
    grads: Sequence[Tensor], x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], *_: Any
) -> list[Tensor]:
    return [_fresh(tensor) for tensor in (x, *states, *weights)]


recurse_op = _register("recurx::recurse", _recurse, _recurse_fake, UNSAFE_IN_GRAPHS)
recurse_backward_op = _register(
    "recurx::recurse_backward", _recurse_backward, _recurse_backward_fake
)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, states, weights, cos, sin, ctx.key, _, ctx.start, ctx.stop = inputs
    ctx.num_states, ctx.rope = len(states), cos is not None
    ctx.save_for_backward(x, *states, *weights, *([cos, sin] if ctx.rope else []))


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    cos, sin = (rest.pop(-2), rest.pop(-1)) if ctx.rope else (None, None)
    states, weights = rest[: ctx.num_states], rest[ctx.num_states :]
    grad_x, *flat = recurse_backward_op(
        grads, x, states, weights, cos, sin, ctx.key, ctx.start, ctx.stop
    )
    grad_states, grad_weights = flat[: ctx.num_states], flat[ctx.num_states :]
    return grad_x, grad_states, grad_weights, None, None, None, None, None, None


torch.library.register_autograd("recurx::recurse", _backward, setup_context=_save_for_backward)

# ---- the window of a backend that has a backward of its own ----------------------------------


def _window(
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    key: str,
    backend: str,
    forward: str,
    start: int,
    stop: int,
    save: str,
) -> list[Tensor]:
    """The states after calls start..stop-1, then what the backward reads.

    `backend` has the window. With save="states" nothing is kept for its backward, so `forward`,
    which may be "auto", runs the calls, if the window does not.
    """
    problem = problem_of(key, x, cos, needs_grad=True)
    window = backends.get(backend).window(problem)
    assert window is not None, "the route names backends that have one"
    if save == "states" and not window.own_forward:
        return _recurse(x, states, weights, cos, sin, key, forward, start, stop)
    operands = _operands(problem, x, states, weights, cos, sin).contiguous()
    outs, kept = window.forward(problem, operands, Span(start, stop), save)
    return [*outs, *kept]


def _window_fake(x: Tensor, states: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    _, cos, _, key, backend, _, start, stop, save = rest
    # While torch.compile traces with dynamic shapes, sizes are symbols, which no cache takes, and
    # plain integers may come as symbols too.
    problem = _problem.__wrapped__(key, x.shape, x.dtype, x.device.type, cos is not None, True)
    window = backends.get(backend).window(problem)
    assert window is not None, "the route names backends that have one"
    kept = window.kept(problem, Span(int(start), int(stop)), save)
    return [*_recurse_fake(x, states), *(x.new_empty(shape, dtype=dtype) for shape, dtype in kept)]


def _window_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    states: Sequence[Tensor],
    outs: Sequence[Tensor],
    weights: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    kept: Sequence[Tensor],
    key: str,
    backend: str,
    start: int,
    stop: int,
    save: str,
    given: Sequence[bool],
    wants: Sequence[bool],
) -> list[Tensor]:
    """The gradients that `wants` asks for, of x, each state and each weight, in this order.

    `grads` are those of the states for which `given` says so.
    """
    problem = problem_of(key, x, cos, needs_grad=True)
    window = backends.get(backend).window(problem)
    assert window is not None, "the route names backends that have one"
    rest = iter(grads)
    d_outs = [next(rest).contiguous() if there else None for there in given]
    operands = _operands(problem, x, states, weights, cos, sin).contiguous()
    with torch.no_grad():
        results = window.backward(
            problem, operands, Span(start, stop), save, outs, kept, d_outs, wants
        )
    return [result for result in results if result is not None]


def _window_backward_fake(
    grads: Sequence[Tensor],
    x: Tensor,
    states: Sequence[Tensor],
    outs: Any,
    weights: Any,
    *rest: Any,
) -> list[Tensor]:
    both = zip(_recurse_backward_fake(grads, x, states, weights), rest[-1], strict=True)
    return [tensor for tensor, wanted in both if wanted]


window_op = _register("recurx::window", _window, _window_fake, UNSAFE_IN_GRAPHS)
window_backward_op = _register(
    "recurx::window_backward", _window_backward, _window_backward_fake, UNSAFE_IN_GRAPHS
)


def _save_window(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, states, weights, cos, sin, ctx.key, ctx.backend, _, ctx.start, ctx.stop, ctx.save = inputs
    outs, kept = output[: len(states)], output[len(states) :]
    # What is kept has no gradient; without the next line autograd would make zeros for all of it.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*kept)
    ctx.rope, ctx.num_states, ctx.num_weights = cos is not None, len(states), len(weights)
    ctx.num_outs = 0 if ctx.save == "states" else len(outs)
    tables = [cos, sin] if ctx.rope else []
    ctx.save_for_backward(x, *tables, *states, *outs[: ctx.num_outs], *weights, *kept)


def _differentiate_window(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    rest = iter(ctx.saved_tensors)
    x, *tables = itertools.islice(rest, 3 if ctx.rope else 1)
    cos, sin = tables or (None, None)
    sizes = ctx.num_states, ctx.num_outs, ctx.num_weights
    states, outs, weights = (list(itertools.islice(rest, size)) for size in sizes)
    grads = grads[: ctx.num_states]
    given = [grad is not None for grad in grads]
    x_wanted, states_wanted, weights_wanted, *_ = ctx.needs_input_grad
    wants = [bool(x_wanted), *_each(states_wanted), *_each(weights_wanted)]
    results = window_backward_op(
        [grad for grad in grads if grad is not None], x, states, outs, weights, cos, sin,
        list(rest), ctx.key, ctx.backend, ctx.start, ctx.stop, ctx.save, given, wants,
    )  # fmt: skip
    flow = iter(results)
    d_x, *flat = [next(flow) if wanted else None for wanted in wants]
    d_states, d_weights = flat[: ctx.num_states], flat[ctx.num_states :]
    return d_x, d_states, d_weights, *[None] * 8


def _each(needs: Any) -> list[bool]:
    """needs_input_grad of a list argument: a list of flags, or one False for an empty list."""
    return [bool(flag) for flag in needs] if isinstance(needs, (list, tuple)) else []


torch.library.register_autograd("recurx::window", _differentiate_window, setup_context=_save_window)


def _no_double_backward(ctx: Any, *_: Any) -> None:
    raise RecurxError(DOUBLE_BACKWARD)


torch.library.register_autograd("recurx::recurse_backward", _no_double_backward)
torch.library.register_autograd("recurx::window_backward", _no_double_backward)
