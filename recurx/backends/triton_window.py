"""The gradient window on Triton kernels: calls that keep what their backward reads.

What is kept from the forward to the backward, beside the entering states and x, in units of D
numbers a row, call and block (D = hidden; one published attention block, T * B rows):

    save="all"      h, mid, qkv (3), mixed and the call's out: 6 and a half; nothing but gate and
                    up is computed again
    save="block"    h and the call's out: 1.5; QKV, attention and O are computed again (30 % of a
                    forward), the MLP only as far as its backward does anyway
    save="states"   nothing; the window runs once more in the backward, keeping each call's out,
                    and then each call but the last once more when its turn comes

Factors of the norms and row sums of exp are a few fp32 numbers a row. One tensor holds one kind for
all calls, so that the window's op returns eight tensors and not hundreds. A call costs one rms
launch, its blocks (recurx/backends/triton_block.py) and an addition for each gradient that is
already there; weight gradients cost one launch a weight and call, and one more a window.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recurx.backends import Window
from recurx.backends.packed import Tape
from recurx.backends.triton_block import (
    BlockTape,
    Matrices,
    WeightGrads,
    feed_forward,
    mix,
    net_backward,
)
from recurx.nets import ATTENTION, NetSpec
from recurx.operands import CosSin, Operands, Span
from recurx.problem import Problem
from recurx.schedule import INPUT, Schedule, Step


@dataclass(frozen=True)
class Place:
    """Where a block of a call lies in the kept tensors: counts over the window, in order."""

    number: int  # of all blocks
    attention: int  # attention blocks before it
    tokens: int  # token-MLP blocks before it
    heads: int  # heads before it


@dataclass(frozen=True)
class Layout:
    """The places of all blocks, call after call, and of the outs that a later call overwrites."""

    calls: tuple[tuple[Place, ...], ...]
    outs: tuple[int | None, ...]  # None: the call's out leaves as a state
    end: Place  # one past the last
    num_outs: int


@functools.lru_cache(maxsize=64)
def layout(schedule: Schedule, nets: tuple[tuple[str, NetSpec], ...], span: Span) -> Layout:
    specs, steps = dict(nets), schedule.steps[span.start : span.stop]
    last = {step.write: k for k, step in enumerate(steps)}
    at, calls, outs, count = Place(0, 0, 0, 0), [], [], 0
    for k, step in enumerate(steps):
        places = []
        for block in specs[step.net].blocks:
            places.append(at)
            mixes = block.kind == ATTENTION
            at = Place(
                at.number + 1, at.attention + mixes, at.tokens + (not mixes),
                at.heads + block.num_heads,
            )  # fmt: skip
        calls.append(tuple(places))
        leaves = last[step.write] == k
        outs.append(None if leaves else count)
        count += not leaves
    return Layout(tuple(calls), tuple(outs), at, count)


Nets = dict[str, tuple[NetSpec, list[Matrices]]]  # a net's blocks and their matrices


class TritonWindow(Window):
    """`rounded` makes the matrices in the states' dtype out of the master weights."""

    def __init__(self, rounded: Callable[[Problem, Sequence[Tensor]], Tape]) -> None:
        self._rounded = rounded

    def kept(
        self, problem: Problem, span: Span, save: str
    ) -> list[tuple[tuple[int, ...], torch.dtype]]:
        if save == "states":
            return []
        lay = layout(problem.schedule, problem.nets, span)
        batch, tokens, hidden, dtype = problem.batch, problem.tokens, problem.hidden, problem.dtype
        rows, end, wide = (batch, tokens), lay.end, torch.float32
        kept = [
            ((end.number, *rows, hidden), dtype),  # h
            ((lay.num_outs, *rows, hidden), dtype),  # outs
            ((end.number, *rows), wide),  # scale_out
        ]
        if save == "block":
            return kept
        return [
            *kept,
            ((end.number, *rows, hidden), dtype),  # mid
            ((batch * (end.attention * tokens + end.tokens * hidden),), wide),  # scale_mix
            ((end.attention, *rows, 3 * hidden), dtype),  # qkv
            ((end.attention, *rows, hidden), dtype),  # mixed
            ((batch * tokens * end.heads,), wide),  # lse
        ]

    def forward(
        self, problem: Problem, operands: Operands, span: Span, save: str
    ) -> tuple[list[Tensor], list[Tensor]]:
        with torch.cuda.device_of(operands.x):  # Triton launches on the current device
            return self._forward(problem, operands, span, save)

    def _forward(
        self, problem: Problem, operands: Operands, span: Span, save: str
    ) -> tuple[list[Tensor], list[Tensor]]:
        x, names = operands.x, problem.schedule.states
        nets, cos_sin = self._nets(problem, operands.weights), operands.float_rope()
        kept = [
            torch.empty(shape, dtype=dtype, device=x.device)
            for shape, dtype in self.kept(problem, span, save)
        ]
        inputs, values = CallInputs(), {INPUT: x, **dict(zip(names, operands.states, strict=True))}
        for k, step in enumerate(problem.schedule.steps[span.start : span.stop]):
            spec, own = nets[step.net]
            tapes = _tapes(problem, kept, span, k) if kept else _empty_tapes(x, spec)
            values[step.write] = _call(
                inputs, step, values, tapes, spec, own, cos_sin, save == "all"
            )
        entered = dict(zip(names, operands.states, strict=True))
        return [
            values[name].clone() if values[name] is entered[name] else values[name]
            for name in names
        ], kept

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
        schedule = problem.schedule
        names, entered = (INPUT, *schedule.states), (operands.x, *operands.states)
        steps = schedule.steps[span.start : span.stop]
        nets, cos_sin = self._nets(problem, operands.weights), operands.float_rope()
        grads = WeightGrads(operands.weights, wants[len(names) :])
        first, index = {}, 0
        for name, spec in problem.nets:
            first[name] = index
            index += spec.num_weights

        if kept:
            final = dict(zip(schedule.states, outs, strict=True))

            def tapes_of(k: int) -> list[BlockTape]:
                return _tapes(problem, kept, span, k, final[steps[k].write])
        else:
            tapes_of = _Recomputed(steps, nets, cos_sin, dict(zip(names, entered, strict=True)))

        d_values = _Gradients(dict(zip(schedule.states, d_outs, strict=True)))
        needed = _needed(steps, {n for n, want in zip(names, wants, strict=False) if want})
        for k in reversed(range(len(steps))):
            step = steps[k]
            d_out = d_values.take(step.write)
            if d_out is None:
                continue
            spec, own = nets[step.net]
            d_h = net_backward(tapes_of(k), spec, own, cos_sin, d_out, grads, first[step.net])
            for name in step.reads:
                if name in needed[k]:
                    d_values.add(name, d_h)

        entering = [
            d_values.leave(name, like) if want else None
            for name, like, want in zip(names, entered, wants, strict=False)
        ]
        wanted = wants[len(names) :]
        return entering + [grads.take(i) if want else None for i, want in enumerate(wanted)]

    def _nets(self, problem: Problem, weights: Sequence[Tensor]) -> Nets:
        tape = self._rounded(problem, weights)
        return {name: (spec, tape.blocks[slice(*tape.of_net[name])]) for name, spec in problem.nets}


class _Gradients:
    """Gradients of the values, added up in their dtype; a tensor is written to only if it is ours
    alone, for one d_h goes to every value that a call read."""

    def __init__(self, given: dict[str, Tensor | None]) -> None:
        self._of = {name: None if d is None else d.contiguous() for name, d in given.items()}
        self._ours: set[str] = set()

    def take(self, name: str) -> Tensor | None:
        self._ours.discard(name)
        return self._of.pop(name, None)

    def add(self, name: str, d: Tensor) -> None:
        total = self._of.get(name)
        if total is None:
            self._of[name] = d
        elif name in self._ours:
            total.add_(d)
        else:
            self._of[name] = total + d
            self._ours.add(name)

    def leave(self, name: str, like: Tensor) -> Tensor:
        """The gradient in a tensor that nobody else holds; zeros where nothing flowed."""
        total = self._of.get(name)
        if total is None:
            return torch.zeros_like(like, memory_format=torch.contiguous_format)
        return total if name in self._ours else total.clone()


class _Recomputed:
    """save="states": the tapes of a call, made when its turn comes.

    The window runs once, keeping each call's out and the factors of its last norm; the last call
    keeps its tapes too, because its turn comes first.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        nets: Nets,
        cos_sin: CosSin | None,
        values: dict[str, Tensor],
    ) -> None:
        self._steps, self._nets, self._cos_sin = steps, nets, cos_sin
        self._inputs = CallInputs()
        self._before: list[dict[str, Tensor]] = []
        self._last: list[tuple[Tensor | None, Tensor | None]] = []
        self._tapes: list[BlockTape] = []
        for step in steps:
            spec, own = nets[step.net]
            self._before.append(dict(values))
            self._tapes = _empty_tapes(values[INPUT], spec)
            values[step.write] = _call(
                self._inputs, step, values, self._tapes, spec, own, cos_sin, True
            )
            self._last.append((self._tapes[-1].out, self._tapes[-1].scale_out))

    def __call__(self, k: int) -> list[BlockTape]:
        if k == len(self._steps) - 1:
            tapes, self._tapes = self._tapes, []
            return tapes
        step = self._steps[k]
        spec, own = self._nets[step.net]
        tapes = _empty_tapes(self._before[k][INPUT], spec)
        tapes[-1].out, tapes[-1].scale_out = self._last[k]
        _call(
            self._inputs, step, self._before[k], tapes, spec, own, self._cos_sin, True, again=True
        )
        return tapes


def _call(
    inputs: CallInputs,
    step: Step,
    values: Mapping[str, Tensor],
    tapes: list[BlockTape],
    spec: NetSpec,
    matrices: Sequence[Matrices],
    cos_sin: CosSin | None,
    keep: bool,
    again: bool = False,
) -> Tensor:
    """One call into its tapes; without `keep` they are left without what `mix` makes.

    `again`: the last block's out is there already, so its feed-forward is not run.
    """
    inputs(step, values, tapes[0].h)
    for number, (tape, block, own) in enumerate(zip(tapes, spec.blocks, matrices, strict=True)):
        full = tape if keep else BlockTape(tape.h, tape.out, tape.scale_out)
        mix(full, block, own, cos_sin)
        if not (again and number == len(tapes) - 1):
            feed_forward(full, block, own)
            tape.out, tape.scale_out = full.out, full.scale_out
    out = tapes[-1].out
    assert out is not None
    return out


class CallInputs:
    """sum(state) + (sum(inject)) of one call after the other, with `reference.call_input`'s bits.

    A sum that the next call injects again (z_H + x, constant over a cycle) is formed once.
    """

    def __init__(self) -> None:
        self._terms: tuple[Tensor, ...] = ()
        self._sum: Tensor | None = None

    def __call__(self, step: Step, values: Mapping[str, Tensor], out: Tensor) -> None:
        """Into `out`: left to right, rounded after each addition."""
        total = values[step.state[0]]
        for name in step.state[1:]:
            total = total + values[name]
        if step.inject:
            torch.add(total, self._inject(tuple(values[name] for name in step.inject)), out=out)
        else:
            out.copy_(total)

    def _inject(self, terms: tuple[Tensor, ...]) -> Tensor:
        if len(terms) == 1:
            return terms[0]
        same = len(terms) == len(self._terms)
        if not (same and all(a is b for a, b in zip(terms, self._terms, strict=True))):
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            self._terms, self._sum = terms, total
        assert self._sum is not None
        return self._sum


def _tapes(
    problem: Problem,
    kept: Sequence[Tensor],
    span: Span,
    k: int,
    final: Tensor | None = None,
) -> list[BlockTape]:
    """The tapes of call k on the kept tensors; `final` is its out where that left as a state."""
    lay = layout(problem.schedule, problem.nets, span)
    spec = dict(problem.nets)[problem.schedule.steps[span.start + k].net]
    batch, tokens, hidden = problem.batch, problem.tokens, problem.hidden
    h, outs, scale_out = kept[:3]
    tapes = []
    for place, block in zip(lay.calls[k], spec.blocks, strict=True):
        tape = BlockTape(h[place.number], scale_out=scale_out[place.number])
        if tapes:
            tapes[-1].out = tape.h
        tapes.append(tape)
        if len(kept) == 3:
            continue
        mid, scale_mix, qkv, mixed, lse = kept[3:]
        tape.mid = mid[place.number]
        at = batch * (place.attention * tokens + place.tokens * hidden)
        if block.kind == ATTENTION:
            tape.scale_mix = scale_mix[at : at + batch * tokens].view(batch, tokens)
            tape.qkv, tape.mixed = qkv[place.attention], mixed[place.attention]
            rows = batch * tokens
            part = lse[rows * place.heads : rows * (place.heads + block.num_heads)]
            tape.lse = part.view(batch, block.num_heads, tokens)
        else:
            tape.scale_mix = scale_mix[at : at + batch * hidden].view(batch, hidden)
    place = lay.outs[k]
    tapes[-1].out = final if place is None else outs[place]
    return tapes


def _empty_tapes(x: Tensor, spec: NetSpec) -> list[BlockTape]:
    """Tapes that allocate as they go; each block's input is the out of the one before."""
    hs = [torch.empty_like(x) for _ in spec.blocks]
    return [BlockTape(h, out) for h, out in zip(hs, [*hs[1:], None], strict=True)]


def _needed(steps: Sequence[Step], wanted: set[str]) -> list[set[str]]:
    """For each call the names whose value before it has use for a gradient."""
    needed, alive = [], set(wanted)
    for step in steps:
        needed.append(set(alive))
        alive.add(step.write)
    return needed
