"""`recurx.recurse`: the op that users and models call. Checks, windows, and the hand-over.

Data flows one way: api -> route (who runs it) -> backend -> kernel; where gradient is wanted, or
somebody watches or transforms operators, through the ops of recurx/ops.py.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd import profiler as torch_profiler

from recurx import backends, ops, recompute, reference, trials
from recurx import route as routes
from recurx.checks import PLAIN_TENSORS, SAVE, Call, Given, checked
from recurx.errors import BackendUnavailable, RecurxError, bad_argument
from recurx.operands import CosSin, Span
from recurx.problem import encode
from recurx.route import EAGER, Request, Route
from recurx.schedule import Schedule

__all__ = ["SAVE", "recurse"]


class _DifferentiableOnce(torch.autograd.Function):
    """Identity whose backward refuses create_graph=True, so that every backend answers alike."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled():  # only so under create_graph=True
            raise RecurxError(ops.DOUBLE_BACKWARD)
        return grads


def recurse(
    schedule: Schedule, nets: Mapping[str, Any], x: Tensor, carry: Mapping[str, Tensor], *,
    backend: str = "auto", cos_sin: CosSin | None = None, start_from: int = 0,
    stop_after: int | None = None, save: str = "all", seed: int | Tensor | None = None,
    key_mask: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Run one recursion (all net calls of `schedule`) and return the new carry.

    Detached-carry semantics: the states that enter are detached, calls before
    `schedule.grad_from` run without gradient, and the states that leave carry the gradient of
    the window for the loss; pass them on as they are, the next call detaches them.

    Args:
        schedule: which net is called on which states; see `Schedule.trm` and its siblings.
        nets: {name: net} with each name of `schedule.nets`: a `recurx.Net`, a module of TRM/HRM
            blocks under the official attribute names, or (eager backend only) any callable
            [B, T, D] -> [B, T, D]. Blocks are fused only if they are proved to be what their
            weights tell (`recurx.proof`); else "auto" and "eager" run their own code. Weights are
            masters of any floating dtype; they are used rounded to the dtype of the states. Beside
            the nets lie learned factors of steps: floating tensors, 0-d or [D].
        x: [B, T, D] embedded input, of the states' dtype; any strides; B may be 0.
        carry: {name: [B, T, D]} with each name of `schedule.states`; never modified.
        backend: "auto", or one of `recurx.backends.NAMES`; an explicit one never falls back.
        cos_sin: rotary tables, two [T, head_dim] fp32 tensors (`recurx.rope_tables`), or None.
        start_from: index of the first call to run, `carry` being the states before it.
        stop_after: number of the calls (counted from call 0) after which to stop; None for all.
        save: what the window keeps for the backward, from fast to small: "all" (whatever spares
            work; on PyTorch its own graph), "block" (each block's input; the rest is computed
            again) or "states" (only what enters; every call is run again). On PyTorch under
            torch.compile "block" is "all": the compiler itself chooses what to keep.
        seed: of noise and dropout (`Step.noise`, `BlockSpec.dropout`, `.drop_path`), below 2^63, or
            an int64 tensor on the states' device, 0-d, or [2]: the seed and the number of the first
            sample (0), by which parts of a batch draw what all of it would. None draws a seed from
            PyTorch's default generator.
        key_mask: bool [B, T], True for keys that no token may see, as those of padding; for nets of
            blocks with `BlockSpec.key_padding`, which want one.

    Returns:
        {name: [B, T, D]} with every state. Under autocast the recursion runs in autocast's dtype
        and the states come back in the dtype they came in, those of no call as they were.

    Raises:
        InvalidArgument: wrong or mixed shapes, dtypes, devices; unknown or missing names; a tensor
            whose memory was freed.
        BackendUnavailable: an explicit backend cannot run here, or cannot run this problem.
        UnsupportedModel: a module is not what its weights tell and has no code that could run.
        RecurxError: in the backward, under create_graph=True.

    Source: HRM (arXiv 2506.21734) section 2; TRM (arXiv 2510.04871) section 4.
    """
    how = backend, cos_sin, start_from, stop_after, save, seed, key_mask
    call = checked(Given(schedule, nets, x, carry, *how))
    if call.schedule.detach_carry:
        call = call._replace(states={name: s.detach() for name, s in call.states.items()})
    tensors = (call.x, *call.states.values(), *call.weights, *(call.rope or ()))
    traced = torch.compiler.is_compiling() or _transformed(tensors)  # only operators see inside
    if not traced and torch._C._functorch.peek_interpreter_stack() is None:
        call.operands(call.states).check_memory(call.schedule.states, call.specs)
    device = x.device.type
    # A plain callable is somebody's own PyTorch: autocast stays as they set it.
    if call.opaque or not torch.is_autocast_enabled(device):
        return _run(call, traced)
    dtype = torch.get_autocast_dtype(device)
    if dtype is torch.float16 and call.backend == "auto" and not traced:
        _tell_of_float16(device)
    cast = {name: state.to(dtype) for name, state in call.states.items()}
    with torch.autocast(device, enabled=False):
        out = _run(call._replace(x=x.to(dtype), states=cast, checked=None), traced)
    written = {step.write for step in call.schedule.steps[call.start : call.stop]}
    return {n: s.to(x.dtype) if n in written else call.states[n] for n, s in out.items()}


@functools.cache
def _tell_of_float16(device: str) -> None:
    """Warn once: it is the default of CUDA's autocast, and seldom meant."""
    warnings.warn(
        f"recurx.recurse: autocast on {device} is in float16, which no fused backend runs; `auto` "
        f'runs PyTorch. Use torch.autocast("{device}", dtype=torch.bfloat16).',
        stacklevel=3,
    )


class _Way(NamedTuple):
    """What `Route` says of the same names."""

    split: int
    backend: str
    backward: str
    forward: str


def _run(call: Call, traced: bool) -> dict[str, Tensor]:
    """Calls before the window without gradient, the window differentiably."""
    tensors = (call.x, *call.states.values(), *call.weights, *(call.rope or ()))
    grad = torch.is_grad_enabled()
    grad = grad and (bool(call.opaque) or any(t.requires_grad for t in tensors))
    if not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None
        or (
            forward_ad._current_level >= 0
            and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
        )
    ):
        return _by_operators(call)
    direct = False
    if traced or call.opaque:
        way = _traced_way(call, grad)
    else:
        watched = _watched()
        way = _routed_way(call, grad, watched)
        direct = not watched
    states = call.states
    if way.split > call.start:
        if torch.is_grad_enabled():
            with torch.no_grad():
                states = _before_window(call, way, direct)
        else:
            states = _before_window(call, way, direct)
    if way.split == call.stop:
        return states
    if way.backward != "autograd" and any(table.requires_grad for table in call.rope or ()):
        hint = 'Pass .detach() of them, or backend="eager" with save="all".'
        raise bad_argument("recurse", "cos_sin", "tables without gradient", "learned ones", hint)
    if way.backward == "reference":
        return _through_op(call, states, way.forward, way.split, call.stop)
    span = way.split, call.stop
    if way.backward == "recompute":
        net = call.bound()
        fixed = call.schedule, net, call.x, states, call.rope
        return _once(recompute.run(*fixed, *span, call.seed, call.key_mask))  # type: ignore[arg-type]
    if way.backward == "autograd":
        states = _by_reference(call, states, *span)
        return states if torch.compiler.is_compiling() else _once(states)
    key, operands = encode(call.schedule, call.specs), call.operands(states)
    out = ops.window_op(*operands.flat(), key, way.backward, way.forward, *span, call.save)
    return dict(zip(states, out, strict=False))  # what follows the states is kept


def _by_operators(call: Call) -> dict[str, Tensor]:
    """For torch.func (vmap, grad, jvp, hessian, ...) and dual tensors: operators of PyTorch alone,
    which it batches and differentiates, as often as one likes."""
    if call.backend not in ("auto", EAGER):
        raise RecurxError(
            f"recurx.recurse: backend {call.backend!r} knows no torch.func transform (vmap, grad, "
            'jvp, ...) and no forward-mode derivative; use backend="eager", which is plain PyTorch.'
        )
    from torch.nn.attention import SDPBackend, sdpa_kernel

    states, first = call.states, min(max(call.start, call.schedule.grad_from), call.stop)
    with sdpa_kernel(SDPBackend.MATH):  # the fused ones are differentiated but once
        if first > call.start:
            states = _by_reference(call, states, call.start, first)
            states = {name: state.detach() for name, state in states.items()}
        return _by_reference(call, states, first, call.stop)


def _by_reference(
    call: Call, states: Mapping[str, Tensor], start: int, stop: int
) -> dict[str, Tensor]:
    fixed = call.schedule, call.bound(), call.x, states, call.rope
    return reference.run(*fixed, start, stop, call.seed, call.key_mask)


def _before_window(call: Call, way: _Way | Route, direct: bool) -> dict[str, Tensor]:
    states, span = call.states, Span(call.start, way.split)
    if way.backend == EAGER:
        return _by_reference(call, states, *span)
    if not direct:
        return _through_op(call, states, way.backend, *span)
    operands = call.operands(states).contiguous()
    out = backends.get(way.backend).run(call.problem(), operands, span)
    return dict(zip(states, out, strict=True))


def _through_op(
    call: Call, states: dict[str, Tensor], backend: str, start: int, stop: int
) -> dict[str, Tensor]:
    key, operands = encode(call.schedule, call.specs), call.operands(states)
    out = ops.recurse_op(*operands.flat(), key, backend, start, stop)
    return dict(zip(states, out, strict=True))


def _routed_way(call: Call, grad: bool, watched: bool) -> _Way | Route:
    """By the route of these tensors, which may first be compared and timed."""
    before = call.checked
    found = None if before is None else before.route(grad)
    if found is None:
        problem = call.problem()
        request = Request(call.backend, call.save, grad, call.start, call.stop)
        if watched:  # a trial here would be seen, too; the op makes one where nobody looks
            found = routes.route(problem, call.x.device, request)
            if not found.settled and found.backend != EAGER:
                return _Way(found.split, call.backend, found.backward, found.forward)
        else:
            found = trials.settled(problem, request, call.operands(call.states))
            if before is not None and found.settled:
                before.keep(grad, found)
    return found


def _traced_way(call: Call, grad: bool) -> _Way:
    """Where sizes may be symbolic and no tensor holds values: the ops find a route when they run.

    The window must be decided here. A wrong guess is refused when the op runs.
    """
    if call.opaque and (call.backend not in ("auto", EAGER) or call.save != "all"):
        difference = getattr(call.bound()[call.opaque[0]], "difference", None)
        if difference is not None:
            raise BackendUnavailable(
                f"recurx.recurse: backend {call.backend!r} with save={call.save!r} cannot run "
                f"nets[{call.opaque[0]!r}], which is not the net that its weights tell: "
                f'{difference}. backend="eager" or "auto" with save="all" run its own code on '
                "PyTorch, as they run any callable."
            )
        raise bad_argument(
            "recurse", f"nets[{call.opaque[0]!r}]",
            f"a net of TRM/HRM blocks for backend={call.backend!r}, save={call.save!r}",
            "a plain callable", 'Use backend="eager" and save="all": recurx cannot look inside.',
        )  # fmt: skip
    schedule, device = call.schedule, call.x.device.type
    plain = bool(call.opaque) or call.backend == EAGER
    plain = plain or (call.backend == "auto" and not routes.has_fused(device))
    backend = EAGER if plain else call.backend
    split = min(max(call.start, schedule.grad_from), call.stop) if grad else call.stop
    if split < call.stop and not plain:
        key, compiling = encode(schedule, call.specs), torch.compiler.is_compiling()
        tokens = 0 if compiling else call.x.shape[1]
        window = routes.window_backend(
            call.backend, key, call.x.dtype, device, call.rope is not None, tokens, call.save
        )
        if window is not None:
            return _Way(split, backend, window, backend)
    if call.save == "states":
        return _Way(split, backend, "reference", backend)
    if call.save == "block" and not torch.compiler.is_compiling():
        return _Way(split, backend, "recompute", EAGER)
    return _Way(split, backend, "autograd", EAGER)


# ---- who must see operators ----------------------------------------------------------------------


def _watched() -> bool:
    """Whether somebody watches operators: a mode of PyTorch's dispatch, or its profiler."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch_profiler._is_profiler_enabled
    )


def _transformed(tensors: tuple[Tensor, ...]) -> bool:
    """Whether a tensor is more than its memory (a subclass, fake, batched, sparse, negated), or is
    being traced: only operators say what happens to such."""
    for tensor in tensors:  # a plain loop: it runs at every call
        if type(tensor) not in PLAIN_TENSORS:
            return True
        if tensor.layout is not torch.strided or tensor.is_neg() or tensor._is_zerotensor():
            return True
    return torch._C._get_tracing_state() is not None


def _once(states: dict[str, Tensor]) -> dict[str, Tensor]:
    with_grad = [name for name, state in states.items() if state.requires_grad]
    if not with_grad:
        return states
    guarded = _DifferentiableOnce.apply(*[states[name] for name in with_grad])
    return {**states, **dict(zip(with_grad, guarded, strict=True))}
