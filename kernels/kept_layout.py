"""Where what a window keeps lies: one tensor holds one kind for all calls, block after block.

So the window's op returns eight tensors and not hundreds.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recurx.nets import ATTENTION, NetSpec
from recurx.operands import Span
from recurx.problem import Problem
from recurx.program import lower
from recurx.schedule import Schedule


@dataclass
class Saved:
    """What the backward of one block reads. h [B, T, D] is the block's input.

    out = rms(pre_out) and mid = rms(pre_mix) with the factors of their rows; qkv, not rotated,
    [B, T, 3D], mixed [B, T, D] and lse [B, H, T] of an attention block. What is None is computed
    again.
    """

    h: Tensor
    out: Tensor | None = None
    scale_out: Tensor | None = None
    mid: Tensor | None = None
    scale_mix: Tensor | None = None  # [B, T], of a token-MLP [B, D]
    qkv: Tensor | None = None
    mixed: Tensor | None = None
    lse: Tensor | None = None


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
    """The layout of the calls of `span`."""
    specs, program = dict(nets), lower(schedule, span)
    last = {call.write: k for k, call in enumerate(program.calls)}
    at, calls, outs, count = Place(0, 0, 0, 0), [], [], 0
    for k, call in enumerate(program.calls):
        places = []
        for block in specs[call.net].blocks:
            places.append(at)
            mixes = block.kind == ATTENTION
            at = Place(
                at.number + 1, at.attention + mixes, at.tokens + (not mixes),
                at.heads + block.num_heads,
            )  # fmt: skip
        calls.append(tuple(places))
        # What is damped or noisy leaves as another tensor than its call's out.
        as_it_is = not call.damped and (call.factors is None or not call.factors.noise)
        leaves = last[call.write] == k and as_it_is
        outs.append(None if leaves else count)
        count += not leaves
    return Layout(tuple(calls), tuple(outs), at, count)


def kept_shapes(
    problem: Problem, span: Span, save: str
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each kept tensor, as `Window.kept`."""
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


def saved_in(
    kept: Sequence[Tensor], problem: Problem, span: Span, k: int, final: Tensor | None = None
) -> list[Saved]:
    """What call k saves, block by block, as views of the kept tensors.

    `final` is the call's out where that left as a state.
    """
    lay = layout(problem.schedule, problem.nets, span)
    spec = dict(problem.nets)[problem.schedule.steps[span.start + k].net]
    batch, tokens, hidden = problem.batch, problem.tokens, problem.hidden
    h, outs, scale_out = kept[:3]
    saved: list[Saved] = []
    for place, block in zip(lay.calls[k], spec.blocks, strict=True):
        own = Saved(h[place.number], scale_out=scale_out[place.number])
        if saved:
            saved[-1].out = own.h
        saved.append(own)
        if len(kept) == 3:
            continue
        mid, scale_mix, qkv, mixed, lse = kept[3:]
        own.mid = mid[place.number]
        at = batch * (place.attention * tokens + place.tokens * hidden)
        if block.kind == ATTENTION:
            own.scale_mix = scale_mix[at : at + batch * tokens].view(batch, tokens)
            own.qkv, own.mixed = qkv[place.attention], mixed[place.attention]
            rows = batch * tokens
            part = lse[rows * place.heads : rows * (place.heads + block.num_heads)]
            own.lse = part.view(batch, block.num_heads, tokens)
        else:
            own.scale_mix = scale_mix[at : at + batch * hidden].view(batch, hidden)
    place = lay.outs[k]
    saved[-1].out = final if place is None else outs[place]
    return saved


def unsaved(x: Tensor, spec: NetSpec) -> list[Saved]:
    """One for each block, allocated as it goes; a block's input is the out of the one before."""
    hs = [torch.empty_like(x) for _ in spec.blocks]
    return [Saved(h, out) for h, out in zip(hs, [*hs[1:], None], strict=True)]
