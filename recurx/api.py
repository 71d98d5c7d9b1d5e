"""`recurx.recurse`: the op that users and models call. Checks, windows, and the hand-over.

Data flows one way: api -> op (or the reference under autograd) -> backend -> kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from recurx import backends, ops, recompute, reference
from recurx.errors import RecurxError, bad_argument
from recurx.nets import ATTENTION, TOKEN_MLP, Net, NetSpec, as_net
from recurx.problem import encode
from recurx.schedule import Schedule

SAVE = ("all", "block", "states")  # from most to least memory


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
    schedule: Schedule,
    nets: Mapping[str, Any],
    x: Tensor,
    carry: Mapping[str, Tensor],
    *,
    backend: str = "auto",
    cos_sin: tuple[Tensor, Tensor] | None = None,
    start_from: int = 0,
    stop_after: int | None = None,
    save: str = "all",
) -> dict[str, Tensor]:
    """Run one recursion (all net calls of `schedule`) and return the new carry.

    Detached-carry semantics: the states that enter are detached, calls before
    `schedule.grad_from` run without gradient, and the states that leave carry the gradient of
    the window for the loss; pass them on as they are, the next call detaches them.

    Args:
        schedule: which net is called on which states; see `Schedule.trm` and its siblings.
        nets: {name: net} with each name of `schedule.nets`: a `recurx.Net`, a module of TRM/HRM
            blocks under the official attribute names, or (eager backend only) any callable
            [B, T, D] -> [B, T, D]. Weights are masters of any floating dtype; they are used
            rounded to the dtype of the states.
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

    Returns:
        {name: [B, T, D]} with every state. Under autocast the recursion runs in autocast's dtype
        and the states come back in the dtype they came in.

    Raises:
        InvalidArgument: wrong or mixed shapes, dtypes, devices; unknown or missing names.
        BackendUnavailable: an explicit backend cannot run here, or cannot run this problem.
        RecurxError: in the backward, under create_graph=True.

    Source: HRM (arXiv 2506.21734) section 2; TRM (arXiv 2510.04871) section 4.
    """
    bound = _check_nets(schedule, nets)
    start, stop = _check_range(schedule, start_from, stop_after)
    _check_states(schedule, x, carry)
    _check_fit(bound, x, cos_sin)
    if backend not in backends.NAMES:
        backends.get(backend)  # raises, with the known names
    if save not in SAVE:
        raise bad_argument("recurse", "save", f"one of {SAVE}", repr(save))

    states = {name: carry[name] for name in schedule.states}
    if schedule.detach_carry:
        states = {name: state.detach() for name, state in states.items()}
    # A plain callable is somebody's own PyTorch: autocast stays as they set it.
    foreign = any(not isinstance(net, Net) for net in bound.values())
    with contextlib.nullcontext() if foreign else _autocast_off(x) as dtype:
        if dtype is not None:
            x, states = x.to(dtype), {name: state.to(dtype) for name, state in states.items()}
        out = _run(schedule, bound, x, states, backend, cos_sin, start, stop, save)
    return {name: state.to(carry[name].dtype) for name, state in out.items()}


def _run(
    schedule: Schedule,
    nets: dict[str, Net | Callable[[Tensor], Tensor]],
    x: Tensor,
    states: dict[str, Tensor],
    backend: str,
    cos_sin: tuple[Tensor, Tensor] | None,
    start: int,
    stop: int,
    save: str,
) -> dict[str, Tensor]:
    """Calls before the window without gradient on `backend`, the window differentiably."""
    opaque = [name for name, net in nets.items() if not isinstance(net, Net)]
    if opaque and (backend not in ("auto", "eager") or save != "all"):
        raise bad_argument(
            "recurse",
            f"nets[{opaque[0]!r}]",
            f"a net of TRM/HRM blocks for backend={backend!r}, save={save!r}",
            "a plain callable",
            'Use backend="eager" and save="all": recurx cannot look inside.',
        )
    plain = bool(opaque) or backend == "eager"
    plain = plain or (backend == "auto" and not backends.has_fused(x.device.type))

    weights = [w for net in nets.values() if isinstance(net, Net) for w in net.weights]
    wants_grad = bool(opaque) or any(t.requires_grad for t in (x, *states.values(), *weights))
    wants_grad = wants_grad and torch.is_grad_enabled()
    split = min(max(start, schedule.grad_from), stop) if wants_grad else stop

    key = encode(schedule, [(n, net.spec) for n, net in nets.items() if isinstance(net, Net)])
    cos, sin = (None, None) if cos_sin is None else cos_sin

    def fused(values: dict[str, Tensor], begin: int, end: int) -> dict[str, Tensor]:
        out = ops.recurse_op(x, list(values.values()), weights, cos, sin, key, backend, begin, end)
        return dict(zip(values, out, strict=True))

    if split > start:
        with torch.no_grad():
            if plain:
                states = reference.run(schedule, nets, x, states, cos_sin, start, split)
            else:
                states = fused(states, start, split)
    if split == stop:
        return states

    compiling = torch.compiler.is_compiling()
    if not plain:
        # Sizes may be symbolic while compiling; a wrong guess is refused when the op runs.
        tokens = 0 if compiling else x.shape[1]
        rope = cos_sin is not None
        chosen = backends.window_backend(backend, key, x.dtype, x.device.type, rope, tokens)
        if chosen is not None:
            tensors = list(states.values()), weights, cos, sin
            out = ops.window_op(x, *tensors, key, chosen, split, stop, save)
            return dict(zip(states, out, strict=False))  # what follows the states is kept
    if save == "states":
        return fused(states, split, stop)
    if save == "block" and not compiling:
        return _once(recompute.run(schedule, nets, x, states, cos_sin, split, stop))
    states = reference.run(schedule, nets, x, states, cos_sin, split, stop)
    return states if compiling else _once(states)


def _once(states: dict[str, Tensor]) -> dict[str, Tensor]:
    with_grad = [name for name, state in states.items() if state.requires_grad]
    if not with_grad:
        return states
    guarded = _DifferentiableOnce.apply(*[states[name] for name in with_grad])
    return {**states, **dict(zip(with_grad, guarded, strict=True))}


@contextlib.contextmanager
def _autocast_off(x: Tensor):  # type: ignore[no-untyped-def]
    """Yield autocast's dtype for the device of x (None if off) with autocast switched off."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        yield None
        return
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        yield dtype


# ---- checks: all before any work, all with what to do ----------------------------------------


def _check_nets(
    schedule: Schedule, nets: Mapping[str, Any]
) -> dict[str, Net | Callable[[Tensor], Tensor]]:
    if not isinstance(schedule, Schedule):
        raise bad_argument(
            "recurse", "schedule", "a recurx.Schedule", type(schedule).__name__,
            "Build one with Schedule.trm(h_cycles, l_cycles) or from Steps.",
        )  # fmt: skip
    if not isinstance(nets, Mapping) or set(nets) != set(schedule.nets):
        got = sorted(nets) if isinstance(nets, Mapping) else type(nets).__name__
        raise bad_argument(
            "recurse", "nets", f"a dict with the nets {sorted(schedule.nets)}", got,
            "The schedule names them in its steps.",
        )  # fmt: skip
    return {name: as_net(nets[name], name) for name in schedule.nets}


def _check_range(schedule: Schedule, start_from: int, stop_after: int | None) -> tuple[int, int]:
    calls = len(schedule.steps)
    stop = calls if stop_after is None else stop_after
    for arg, value in (("start_from", start_from), ("stop_after", stop)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= calls:
            raise bad_argument("recurse", arg, f"0..{calls} (calls of the schedule)", repr(value))
    if stop < start_from:
        raise bad_argument("recurse", "stop_after", f"at least start_from={start_from}", stop)
    return start_from, stop


def _check_states(schedule: Schedule, x: Tensor, carry: Mapping[str, Tensor]) -> None:
    if not isinstance(x, Tensor) or x.ndim != 3 or not x.is_floating_point():
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise bad_argument("recurse", "x", "a floating [B, T, D] tensor", got)
    if not isinstance(carry, Mapping) or set(carry) != set(schedule.states):
        got = sorted(carry) if isinstance(carry, Mapping) else type(carry).__name__
        raise bad_argument(
            "recurse", "carry", f"a dict with the states {sorted(schedule.states)}", got,
            "The schedule names them in its steps.",
        )  # fmt: skip
    for name in schedule.states:
        state = carry[name]
        if not isinstance(state, Tensor):
            raise bad_argument("recurse", f"carry[{name!r}]", "a tensor", type(state).__name__)
        if state.shape != x.shape or state.dtype != x.dtype or state.device != x.device:
            raise bad_argument(
                "recurse",
                f"carry[{name!r}]",
                f"shape, dtype and device of x: {list(x.shape)} {x.dtype} on {x.device}",
                f"{list(state.shape)} {state.dtype} on {state.device}",
                "Nothing is cast or moved silently; use .to(x) yourself.",
            )


def _check_fit(
    nets: dict[str, Net | Callable[[Tensor], Tensor]],
    x: Tensor,
    cos_sin: tuple[Tensor, Tensor] | None,
) -> None:
    for name, net in nets.items():
        if isinstance(net, Net):
            _check_net_fits(name, net.spec, x, cos_sin)
            for index, weight in enumerate(net.weights):
                if weight.device != x.device:
                    raise bad_argument(
                        "recurse", f"nets[{name!r}] weight {index}", f"device {x.device}, as x",
                        str(weight.device), "Move the model with .to(device).",
                    )  # fmt: skip


def _check_net_fits(
    name: str, spec: NetSpec, x: Tensor, cos_sin: tuple[Tensor, Tensor] | None
) -> None:
    _, tokens, hidden = x.shape
    if spec.hidden != hidden:
        raise bad_argument(
            "recurse", "x", f"width D={spec.hidden}, that of nets[{name!r}]", f"D={hidden}"
        )
    for block in spec.blocks:
        if block.kind == TOKEN_MLP and block.tokens != tokens:
            raise bad_argument(
                "recurse", "x", f"T={block.tokens}, that of the token MLP in nets[{name!r}]",
                f"T={tokens}", "A token MLP has a fixed number of tokens.",
            )  # fmt: skip
        if block.kind == ATTENTION and cos_sin is not None:
            shape = (tokens, block.head_dim)
            for table, arg in zip(cos_sin, ("cos", "sin"), strict=True):
                if tuple(table.shape) != shape or table.device != x.device:
                    raise bad_argument(
                        "recurse", f"cos_sin ({arg})",
                        f"[T, head_dim] = {list(shape)} on {x.device}",
                        f"{list(table.shape)} on {table.device}",
                        "Build it with recurx.rope_tables(T, head_dim).",
                    )  # fmt: skip
