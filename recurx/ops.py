"""The recursion as `torch.library` custom ops, so that it traces, fakes and differentiates.

`torch.ops.recurx.recurse` runs calls start..stop-1 and is differentiable in x, states and weights
over exactly those calls; `recurx.recurse` composes it into windows with a detached carry. The
backward keeps nothing but the states that entered and recomputes call by call.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recurx import backends, reference_backward
from recurx.errors import RecurxError
from recurx.problem import Problem, decode


def problem_of(key: str, x: Tensor, cos: Tensor | None, needs_grad: bool = False) -> Problem:
    """The problem that an encoded schedule and a tensor x [B, T, D] make."""
    schedule, nets = decode(key)
    return Problem(
        schedule, nets, *x.shape, x.dtype, x.device.type, rope=cos is not None,
        needs_grad=needs_grad,
    )  # fmt: skip


def _register(name: str, kernel: Callable[..., list[Tensor]], fake: Callable[..., Any]) -> Any:
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

    torch.library.define(name, torch.library.infer_schema(kernel, mutates_args=()))
    torch.library.impl(name, "CompositeExplicitAutograd", run)
    torch.library.register_fake(name, fake)
    namespace, _, base = name.partition("::")
    return getattr(getattr(torch.ops, namespace), base).default


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
    """Run calls start..stop-1 on `backend`; the arguments are those of `Backend.run`."""
    problem = problem_of(key, x, cos)
    chosen = backends.select(backend, problem)
    return chosen.run(
        problem,
        x.contiguous(),
        [state.contiguous() for state in states],
        list(weights),
        cos,
        sin,
        start,
        stop,
    )


def _recurse_fake(x: Tensor, states: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(state, memory_format=torch.contiguous_format) for state in states]


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
    cos_sin = None if cos is None or sin is None else (cos, sin)
    with torch.no_grad():
        return reference_backward.run(
            problem, x, list(states), list(weights), cos_sin, list(grads), start, stop
        )


def _recurse_backward_fake(
    grads: Sequence[Tensor], x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], *_: Any
) -> list[Tensor]:
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (x, *states, *weights)
    ]


recurse_op = _register("recurx::recurse", _recurse, _recurse_fake)
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

DOUBLE_BACKWARD = (
    "recurx.recurse: double backward (create_graph=True) is not supported: the recursion is "
    "differentiable once. For higher derivatives call recurx.reference.run, which is plain PyTorch."
)


def _no_double_backward(ctx: Any, *_: Any) -> None:
    raise RecurxError(DOUBLE_BACKWARD)


torch.library.register_autograd("recurx::recurse_backward", _no_double_backward)
