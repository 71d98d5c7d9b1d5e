"""The gradient window on Triton kernels: calls that keep what their backward reads.

What is kept from the forward to the backward, beside the entering states and x, in units of D
numbers a row, call and block (D = hidden; one published attention block, T * B rows):

    save="all"      h, mid, qkv (3), mixed and the call's out: 6 and a half; nothing but gate and
                    up is computed again
    save="block"    h and the call's out: 1.5; QKV, attention and O are computed again (30 % of a
                    forward), the MLP only as far as its backward does anyway
    save="states"   nothing; the window runs once more in the backward, keeping each call's out,
                    and then each call but the last once more when its turn comes

Factors of the norms and row sums of exp are a few fp32 numbers a row. A call costs one rms launch,
its blocks (kernels/block_training.py) and an addition for each gradient that is already there;
weight gradients cost one launch a weight and call, and one more a window. Of other blocks than
TRM's "all" and "block" keep the input of each call alone (kernels/sublayers_training.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from recurx import reference
from recurx.backends import Window
from recurx.kernels import block_training, library, sublayers_training
from recurx.kernels.kept_layout import Saved
from recurx.nets import NetSpec
from recurx.operands import Beside, CosSin, Operands, Span
from recurx.packed import PackedNets
from recurx.problem import Problem
from recurx.program import PLAIN, Call, lower

# Of call k: its net's blocks and, as the way has them, its weights.
Nets = Callable[[int, Call], tuple[NetSpec, list[Any]]]


def _on_its_device(method: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be that of the tensors."""

    @functools.wraps(method)
    def guarded(self: Any, problem: Problem, operands: Operands, *rest: Any, **named: Any) -> Any:
        with torch.cuda.device_of(operands.x):
            return method(self, problem, operands, *rest, **named)

    return guarded


class TritonWindow(Window):
    """`rounded` makes the weights in the states' dtype out of the masters; with `products` PyTorch
    multiplies them, which it does for blocks that are not TRM's."""

    # A run without gradient normalises rows in the next product, this forward where it leaves them.
    own_forward = True

    def __init__(
        self, rounded: Callable[[Problem, Sequence[Tensor]], PackedNets], products: bool = False,
        changed: bool = False,
    ) -> None:  # fmt: skip
        self._rounded = rounded
        self._way: ModuleType = library if products else block_training
        if changed:
            self._way = sublayers_training

    def kept(
        self, problem: Problem, span: Span, save: str
    ) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return self._way.kept_shapes(problem, span, save)

    @_on_its_device
    def forward(
        self, problem: Problem, operands: Operands, span: Span, save: str
    ) -> tuple[list[Tensor], list[Tensor]]:
        x, way = operands.x, self._way
        nets, cos_sin = self._nets(problem, operands, span), operands.float_rope()
        kept = [
            torch.empty(shape, dtype=dtype, device=x.device)
            for shape, dtype in way.kept_shapes(problem, span, save)
        ]
        inputs, values = CallInputs(), [x, *operands.states]
        write = _Writes(problem, operands, span)
        for k, call in enumerate(lower(problem.schedule, span).calls):
            spec, own = nets(k, call)
            saved = way.saved_in(kept, problem, span, k) if kept else way.unsaved(x, spec)
            inputs(call, values, saved[0].h)
            write(k, call, values, way.run_net(saved, spec, own, cos_sin, save == "all"))
        return [
            value.clone() if value is state else value
            for value, state in zip(values[1:], operands.states, strict=True)
        ], kept

    @_on_its_device
    def backward(
        self, problem: Problem, operands: Operands, span: Span, save: str, outs: Sequence[Tensor],
        kept: Sequence[Tensor], d_outs: Sequence[Tensor | None], wants: Sequence[bool],
    ) -> list[Tensor | None]:  # fmt: skip
        entered = (operands.x, *operands.states)
        calls = lower(problem.schedule, span).calls
        nets, cos_sin = self._nets(problem, operands, span), operands.float_rope()
        wanted = wants[len(entered) :]
        way = self._way
        grads = way.WeightGrads(operands.weights, wanted)
        first = {name: cut.start for (name, _), cut in zip(problem.nets, problem.cuts, strict=True)}
        if kept:

            def saved_of(k: int) -> list[Saved]:
                return way.saved_in(kept, problem, span, k, outs[calls[k].write - 1])
        else:
            write = _Writes(problem, operands, span)
            saved_of = _Recomputed(way, calls, nets, cos_sin, list(entered), write)

        d_values = _Gradients([None, *d_outs])
        needed = _needed(calls, wants[: len(entered)])
        for k in reversed(range(len(calls))):
            call = calls[k]
            d_out = d_values.take(call.write)
            if d_out is None:
                continue
            factors = call.factors or PLAIN
            if call.damped:
                if call.write in needed[k]:
                    d_values.add(call.write, factors.keep * d_out)
                d_out = factors.damping * d_out
            spec, own = nets(k, call)
            d_h = way.net_backward(saved_of(k), spec, own, cos_sin, d_out, grads, first[call.net])
            d_first = d_h if factors.scale == 1 else factors.scale * d_h
            reads = [(s, d_first) for s in call.state] + [(s, d_h) for s in call.inject]
            for slot, d in reads:
                if slot in needed[k]:
                    d_values.add(slot, d)

        entering = [
            d_values.leave(slot, like) if want else None
            for slot, (like, want) in enumerate(zip(entered, wants, strict=False))
        ]
        return entering + [grads.take(i) if want else None for i, want in enumerate(wanted)]

    def _nets(self, problem: Problem, operands: Operands, span: Span) -> Nets:
        packed, way = self._rounded(problem, operands.weights), self._way
        found = {name: (spec, way.weights_of(packed, name)) for name, spec in problem.nets}

        def of_call(k: int, call: Call) -> tuple[NetSpec, list[Any]]:
            spec, own = found[call.net]
            if way is not sublayers_training:
                return spec, own
            beside = Beside(operands.seed, operands.key_mask, span.start + k)
            return spec, sublayers_training.of_call(own, beside)

        return of_call


class _Writes:
    """`reference.written`: what a call leaves of its net's result, by the factors of its step."""

    def __init__(self, problem: Problem, operands: Operands, span: Span) -> None:
        self._steps, self._first, self._seed = problem.schedule.steps, span.start, operands.seed

    def __call__(self, k: int, call: Call, values: list[Tensor], out: Tensor) -> None:
        if call.factors is not None:
            step, beside = self._steps[self._first + k], Beside(self._seed, call=self._first + k)
            out = reference.written(step, values[call.write], out, beside, {})
        values[call.write] = out


class _Gradients:
    """Gradients of the values, by slot, added up in their dtype; a tensor is written to only if it
    is ours alone, for one d_h goes to every value that a call read."""

    def __init__(self, given: Sequence[Tensor | None]) -> None:
        self._of = {slot: d.contiguous() for slot, d in enumerate(given) if d is not None}
        self._ours: set[int] = set()

    def take(self, slot: int) -> Tensor | None:
        self._ours.discard(slot)
        return self._of.pop(slot, None)

    def add(self, slot: int, d: Tensor) -> None:
        total = self._of.get(slot)
        if total is None:
            self._of[slot] = d
        elif slot in self._ours:
            total.add_(d)
        else:
            self._of[slot] = total + d
            self._ours.add(slot)

    def leave(self, slot: int, like: Tensor) -> Tensor:
        """The gradient in a tensor that nobody else holds; zeros where nothing flowed."""
        total = self._of.get(slot)
        if total is None:
            return torch.zeros_like(like, memory_format=torch.contiguous_format)
        return total if slot in self._ours else total.clone()


class _Recomputed:
    """save="states": what a call saves, made when its turn comes.

    The window runs once, keeping each call's out and the factors of its last norm; of the last call
    all is kept, because its turn comes first.
    """

    def __init__(
        self, way: ModuleType, calls: Sequence[Call], nets: Nets, cos_sin: CosSin | None,
        values: list[Tensor], write: _Writes,
    ) -> None:  # fmt: skip
        self._way = way
        self._calls, self._nets, self._cos_sin = calls, nets, cos_sin
        self._inputs = CallInputs()
        self._before: list[list[Tensor]] = []
        self._last: list[tuple[Tensor | None, Tensor | None]] = []
        self._saved: list[Saved] = []  # by the call that ran last
        for k, call in enumerate(calls):
            spec, own = nets(k, call)
            self._before.append(list(values))
            self._saved = way.unsaved(values[0], spec)
            self._inputs(call, values, self._saved[0].h)
            write(k, call, values, way.run_net(self._saved, spec, own, cos_sin, True))
            self._last.append((self._saved[-1].out, self._saved[-1].scale_out))

    def __call__(self, k: int) -> list[Saved]:
        if k == len(self._calls) - 1:
            saved, self._saved = self._saved, []
            return saved
        call, values = self._calls[k], self._before[k]
        spec, own = self._nets(k, call)
        saved: list[Saved] = self._way.unsaved(values[0], spec)
        saved[-1].out, saved[-1].scale_out = self._last[k]
        self._inputs(call, values, saved[0].h)
        self._way.run_net(saved, spec, own, self._cos_sin, True, again=True)
        return saved


class CallInputs:
    """`reference.call_input` of one call after the other, with its bits.

    A sum that calls share (recurx/program.py) is formed once, whichever of them comes first.
    """

    def __init__(self) -> None:
        self._shared: int | None = None  # number of the sum that is held
        self._sum: Any = None

    def __call__(self, call: Call, values: Sequence[Tensor], out: Tensor) -> None:
        """Into `out`: left to right, rounded after each addition; `values` by slot."""
        total = functools.reduce(torch.add, [values[slot] for slot in call.state])
        if call.factors is not None and call.factors.scale != 1:
            total = total * call.factors.scale
        if not call.inject:
            out.copy_(total)
            return
        inject = self._sum
        if call.shared is None or call.shared != self._shared:
            inject = functools.reduce(torch.add, [values[slot] for slot in call.inject])
        if call.shared is not None:
            self._shared, self._sum = call.shared, inject
        torch.add(total, inject, out=out)


def _needed(calls: Sequence[Call], wanted: Sequence[bool]) -> list[set[int]]:
    """For each call the slots whose value before it has use for a gradient."""
    needed, alive = [], {slot for slot, want in enumerate(wanted) if want}
    for call in calls:
        needed.append(set(alive))
        alive.add(call.write)
    return needed
