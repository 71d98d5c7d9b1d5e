"""One block on Triton kernels: forward that keeps what its backward reads, and the backward.

Names are those of recurx/reference_backward.py. The forward normalises rows where it leaves them,
because weight gradients multiply by the normalised rows: one pass more for each half of a block
than inference. Per row of an attention block (D = hidden, F = inner = 3 D as published, 2 bytes a
number) the backward launches 7 kernels and moves, in units of D numbers, 42 for the data gradients
and 17 for the weight gradients (4 more launches):

    swiglu_backward        reads mid, d_pre_out           writes d_gate_up (6), mid of the MLP (3)
    dgrad (gate_up)        reads d_gate_up (6), d_pre_out                writes d_mid
    rms_backward           reads d_mid, mid                              writes d_pre_mix
    dgrad (O)              reads d_pre_mix                               writes d_mixed
    attention_backward     reads qkv (3), mixed, d_mixed                 writes d_heads (3)
    dgrad (qkv)            reads d_heads (3), d_pre_mix                  writes d_h
    rms_backward           reads d_h, h                writes d_pre_out of the block below
    wgrad x 4              reads both factors: 1 + 3, 6 + 1, 1 + 1, 3 + 1

D=512 in bf16: 59 KB a row, against 17 MFLOP a row with gate and up computed again, so on an H100
(3 TB/s, 600 TFLOP/s) products outweigh traffic by 1.4 to 1. The factor of a row is folded into its
gradient once, by rms_backward, so that no product owns whole rows; the residual paths, RoPE's and
SwiGLU's derivatives ride in the products' epilogues.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from recurx.nets import ATTENTION, BlockSpec, NetSpec
from recurx.operands import CosSin
from recurx.packed import PackedNets

from .attention import attention
from .attention_backward import attention_backward
from .kept_layout import Saved  # with the next three: what a window asks of a way
from .kept_layout import kept_shapes as kept_shapes
from .kept_layout import saved_in as saved_in
from .kept_layout import unsaved as unsaved
from .linear import (
    dgrad,
    gate_up_swiglu,
    linear,
    linear_residual,
    linear_residual_rms,
    new_squares,
)
from .rms import normalise
from .rms_backward import rms_backward
from .swiglu_backward import swiglu_backward
from .wgrad import new_partial, wgrad, wgrad_sum

Half = Callable[..., None]  # `mix` or `feed_forward`
# The four weights of a block in the states' dtype, rows padded (recurx/packed.py).
Matrices = tuple[Tensor, ...]


class WeightGrads:
    """Gradients of all weights (flat, net after net), added up over calls in fp32."""

    def __init__(self, weights: Sequence[Tensor], wanted: Sequence[bool]) -> None:
        self._weights = weights
        self._wanted = wanted
        self._partials: dict[int, Tensor] = {}

    def add(self, index: int, d_out: Tensor, x: Tensor) -> None:
        """Add d_out^T x to the gradient of weight `index`."""
        if not self._wanted[index]:
            return
        seen = index in self._partials
        if not seen:
            self._partials[index] = new_partial(d_out, x)
        wgrad(d_out, x, self._partials[index], add=seen)

    def take(self, index: int) -> Tensor:
        """The gradient in the dtype of the master weight; zeros if no call used it."""
        partial = self._partials.pop(index, None)
        if partial is None:
            return torch.zeros_like(self._weights[index], memory_format=torch.contiguous_format)
        return wgrad_sum(partial, self._weights[index].dtype)


def mix(saved: Saved, spec: BlockSpec, weights: Matrices, cos_sin: CosSin | None) -> None:
    """The first half of a block, h -> mid, into `saved`; what it lacks is allocated."""
    h = saved.h
    batch, tokens, hidden = h.shape
    mixer_in, mixer_out = weights[:2]
    saved.mid = torch.empty_like(h) if saved.mid is None else saved.mid
    over = tokens if spec.kind == ATTENTION else hidden
    if saved.scale_mix is None:
        saved.scale_mix = h.new_empty(batch, over, dtype=torch.float32)
    if spec.kind != ATTENTION:
        columns = h.transpose(1, 2)
        middle = gate_up_swiglu(columns, mixer_in)
        to = saved.mid.transpose(1, 2)
        linear_residual_rms(middle, mixer_out, columns, eps=spec.eps, out=to, scale=saved.scale_mix)
        return
    heads, head_dim = spec.num_heads, spec.head_dim
    saved.qkv = h.new_empty(batch, tokens, 3 * hidden) if saved.qkv is None else saved.qkv
    saved.mixed = torch.empty_like(h) if saved.mixed is None else saved.mixed
    if saved.lse is None:
        saved.lse = h.new_empty(batch, heads, tokens, dtype=torch.float32)
    qkv = saved.qkv.view(batch, tokens, 3 * heads, head_dim)
    linear(h, mixer_in, out=saved.qkv)
    mixed = saved.mixed.view(batch, tokens, heads, head_dim)
    attention(qkv, cos_sin=cos_sin, out=mixed, lse=saved.lse)
    _to_rms(saved.mixed, mixer_out, h, spec.eps, saved.mid, saved.scale_mix)


def feed_forward(saved: Saved, spec: BlockSpec, weights: Matrices) -> None:
    """The second half of a block, mid -> out, into `saved`."""
    gate_up, down = weights[2:]
    assert saved.mid is not None, "mix comes first"
    saved.out = torch.empty_like(saved.h) if saved.out is None else saved.out
    if saved.scale_out is None:
        saved.scale_out = saved.h.new_empty(saved.h.shape[:2], dtype=torch.float32)
    middle = gate_up_swiglu(saved.mid, gate_up)
    _to_rms(middle, down, saved.mid, spec.eps, saved.out, saved.scale_out)


def _to_rms(a: Tensor, weight: Tensor, x: Tensor, eps: float, out: Tensor, scale: Tensor) -> None:
    """rms(x + a @ weight^T) into `out`, the factors of its rows into `scale`."""
    squares = new_squares(scale.numel(), x)
    linear_residual(a, weight, x, squares, out=out)
    normalise(out, squares, eps=eps, scale=scale)


def weights_of(packed: PackedNets, net: str) -> list[Matrices]:
    """What a window hands on to the functions below: of each block its matrices."""
    return packed.blocks[slice(*packed.of_net[net])]


def run_net(
    saved: list[Saved], spec: NetSpec, matrices: Sequence[Matrices], cos_sin: CosSin | None,
    keep: bool, again: bool = False, halves: tuple[Half, Half] = (mix, feed_forward),
) -> Tensor:  # fmt: skip
    """The net on saved[0].h; without `keep` what `mix` makes is not saved.

    `again`: the last block's out is there already, so its feed-forward is not run.
    """
    first, second = halves
    for number, (own, block, weights) in enumerate(zip(saved, spec.blocks, matrices, strict=True)):
        full = own if keep else Saved(own.h, own.out, own.scale_out)
        first(full, block, weights, cos_sin)
        if not (again and number == len(saved) - 1):
            second(full, block, weights)
            own.out, own.scale_out = full.out, full.scale_out
    out = saved[-1].out
    assert out is not None
    return out


def net_backward(
    saved: Sequence[Saved],
    spec: NetSpec,
    matrices: Sequence[Matrices],
    cos_sin: CosSin | None,
    d_out: Tensor,
    grads: WeightGrads,
    first: int,
) -> Tensor:
    """d_h of one net call, from d_out of its last block.

    `matrices` are those of each block; the gradient of the net's weight i goes to `grads` under
    `first + i`. Blocks that lack what `mix` makes get it for the time of their turn.
    """
    d_h = d_out
    for number in reversed(range(len(saved))):
        block, own, held = spec.blocks[number], matrices[number], saved[number]
        if held.mid is None:
            held = Saved(held.h, held.out, held.scale_out)
            mix(held, block, own, cos_sin)
        # d_out is not ours to overwrite, what a block returns is.
        d_pre_out = rms_backward(
            saved[number].out, held.scale_out, d_h, out=None if d_h is d_out else d_h
        )
        # A data gradient has a weight's columns for columns: the padding would be some of them.
        own = tuple(w[:, : shape[1]] for w, shape in zip(own, block.weight_shapes, strict=True))
        index = first + number * len(own)
        d_mid = _feed_forward_backward(held, own, d_pre_out, grads, index)
        backward = _attention_backward if block.kind == ATTENTION else _token_mlp_backward
        d_h = backward(held, block, own, cos_sin, d_mid, grads, index)
    return d_h


def _feed_forward_backward(
    saved: Saved, weights: Matrices, d_pre_out: Tensor, grads: WeightGrads, index: int
) -> Tensor:
    """d_mid, in the place of d_pre_out."""
    _, _, gate_up, down = weights
    d_gate_up, middle = swiglu_backward(saved.mid, gate_up, down, d_pre_out)
    grads.add(index + 3, d_pre_out, middle)
    grads.add(index + 2, d_gate_up, saved.mid)
    return dgrad(d_gate_up, gate_up, residual=d_pre_out, out=d_pre_out)


def _attention_backward(
    saved: Saved,
    spec: BlockSpec,
    weights: Matrices,
    cos_sin: CosSin | None,
    d_mid: Tensor,
    grads: WeightGrads,
    index: int,
) -> Tensor:
    """d_h, in the place of d_mid."""
    qkv, o = weights[:2]
    batch, tokens, hidden = saved.h.shape
    d_pre_mix = rms_backward(saved.mid, saved.scale_mix, d_mid, out=d_mid)
    d_mixed = dgrad(d_pre_mix, o)
    grads.add(index + 1, d_pre_mix, saved.mixed)
    heads, dim = spec.num_heads, spec.head_dim
    shape = (batch, tokens, heads, dim)
    kept = saved.qkv.view(batch, tokens, 3 * heads, dim)
    d_heads = attention_backward(
        kept, saved.mixed.view(shape), saved.lse, d_mixed.view(shape), cos_sin, rotated=False
    ).view(batch, tokens, 3 * hidden)
    del d_mixed
    grads.add(index, d_heads, saved.h)
    return dgrad(d_heads, qkv, residual=d_pre_mix, out=d_pre_mix)


def _token_mlp_backward(
    saved: Saved,
    spec: BlockSpec,
    weights: Matrices,
    cos_sin: CosSin | None,
    d_mid: Tensor,
    grads: WeightGrads,
    index: int,
) -> Tensor:
    """As `_attention_backward`; the mixer runs over T, on transposed views."""
    gate_up, down = weights[:2]
    x, d_columns = saved.h.transpose(1, 2), d_mid.transpose(1, 2)
    d_pre_mix = rms_backward(saved.mid.transpose(1, 2), saved.scale_mix, d_columns, out=d_columns)
    d_gate_up, middle = swiglu_backward(x, gate_up, down, d_pre_mix)
    grads.add(index + 1, d_pre_mix, middle)
    grads.add(index, d_gate_up, x)
    return dgrad(d_gate_up, gate_up, residual=d_pre_mix, out=d_pre_mix).transpose(1, 2)
