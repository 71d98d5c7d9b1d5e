"""One block on Triton kernels: forward that keeps what its backward reads, and the backward.

Names are those of recurx/reference_backward.py. Per row of an attention block (D = hidden, F =
inner = 3 D as published, 2 bytes a number) the backward launches 5 kernels and moves, in units of
D numbers, 36 for the data gradients and 17 for the weight gradients (4 more launches):

    swiglu_backward        reads mid, d_pre_out           writes d_gate_up (6), mid of the MLP (3)
    dgrad_rms_backward     reads d_gate_up (6), d_pre_out, mid           writes d_pre_mix
    dgrad (O)              reads d_pre_mix                               writes d_mixed
    attention_backward     reads qkv (3), mixed, d_mixed                 writes d_heads (3)
    dgrad_rms_backward     reads d_heads (3), d_pre_mix, h     writes d_pre_out of the block below
    wgrad x 4              reads both factors: 1 + 3, 6 + 1, 1 + 1, 3 + 1

D=512 in bf16: 53 KB a row, against 17 MFLOP a row with gate and up computed again, so on an H100
(3 TB/s, 600 TFLOP/s) products outweigh traffic by 1.6 to 1. The residual paths, the rms's, RoPE's
and SwiGLU's derivatives ride in the products' epilogues; the token-MLP has two rms of its own
launch, because its norm runs across the rows of the next product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recurx.nets import ATTENTION, BlockSpec, NetSpec
from recurx.operands import CosSin

from .attention import attention
from .attention_backward import attention_backward
from .dgrad import dgrad
from .dgrad_rms_backward import dgrad_rms_backward
from .gate_up_swiglu import gate_up_swiglu
from .linear_residual_rms import linear_residual_rms
from .qkv_rope import qkv_rope
from .rms_backward import rms_backward
from .swiglu_backward import swiglu_backward
from .wgrad import new_partial, wgrad, wgrad_sum

# The four weights of a block in the states' dtype, rows padded (recurx/packed.py).
Matrices = tuple[Tensor, ...]


@dataclass
class Saved:
    """What the backward of one block reads. h [B, T, D] is the block's input.

    out = rms(pre_out) and mid = rms(pre_mix) with the factors of their rows; rotated qkv
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
    qkv_rope(h, mixer_in, head_dim, cos_sin, out=qkv)
    attention(qkv, out=saved.mixed.view(batch, tokens, heads, head_dim), lse=saved.lse)
    linear_residual_rms(
        saved.mixed, mixer_out, h, eps=spec.eps, out=saved.mid, scale=saved.scale_mix
    )


def feed_forward(saved: Saved, spec: BlockSpec, weights: Matrices) -> None:
    """The second half of a block, mid -> out, into `saved`."""
    gate_up, down = weights[2:]
    assert saved.mid is not None, "mix comes first"
    saved.out = torch.empty_like(saved.h) if saved.out is None else saved.out
    if saved.scale_out is None:
        saved.scale_out = saved.h.new_empty(saved.h.shape[:2], dtype=torch.float32)
    middle = gate_up_swiglu(saved.mid, gate_up)
    linear_residual_rms(middle, down, saved.mid, eps=spec.eps, out=saved.out, scale=saved.scale_out)


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
    d_pre_out = rms_backward(saved[-1].out, saved[-1].scale_out, d_out)
    for number in reversed(range(len(saved))):
        block, own, held = spec.blocks[number], matrices[number], saved[number]
        if held.mid is None:
            held = Saved(held.h, held.out, held.scale_out)
            mix(held, block, own, cos_sin)
        below = saved[number - 1] if number else None
        backward = _attention_block if block.kind == ATTENTION else _token_block
        # A data gradient has a weight's columns for columns: the padding would be some of them.
        own = tuple(w[:, : shape[1]] for w, shape in zip(own, block.weight_shapes, strict=True))
        index = first + number * len(own)
        d_pre_out = backward(held, block, own, cos_sin, d_pre_out, grads, index, below)
    return d_pre_out


def _attention_block(
    saved: Saved,
    spec: BlockSpec,
    weights: Matrices,
    cos_sin: CosSin | None,
    d_pre_out: Tensor,
    grads: WeightGrads,
    index: int,
    below: Saved | None,
) -> Tensor:
    """d_pre_out of the block below, whose out is this block's h; d_h if there is none."""
    qkv, o, gate_up, down = weights
    batch, tokens, hidden = saved.h.shape
    d_gate_up, middle = swiglu_backward(saved.mid, gate_up, down, d_pre_out)
    grads.add(index + 3, d_pre_out, middle)
    grads.add(index + 2, d_gate_up, saved.mid)
    del middle
    d_pre_mix = dgrad_rms_backward(d_gate_up, gate_up, d_pre_out, saved.mid, saved.scale_mix)
    del d_gate_up
    d_mixed = dgrad(d_pre_mix, o)
    grads.add(index + 1, d_pre_mix, saved.mixed)
    heads, dim = spec.num_heads, spec.head_dim
    shape = (batch, tokens, heads, dim)
    rotated = saved.qkv.view(batch, tokens, 3 * heads, dim)
    d_heads = attention_backward(
        rotated, saved.mixed.view(shape), saved.lse, d_mixed.view(shape), cos_sin
    ).view(batch, tokens, 3 * hidden)
    del d_mixed
    grads.add(index, d_heads, saved.h)
    if below is None:
        return dgrad(d_heads, qkv, residual=d_pre_mix, out=d_pre_mix)
    return dgrad_rms_backward(d_heads, qkv, d_pre_mix, saved.h, below.scale_out)


def _token_block(
    saved: Saved,
    spec: BlockSpec,
    weights: Matrices,
    cos_sin: CosSin | None,
    d_pre_out: Tensor,
    grads: WeightGrads,
    index: int,
    below: Saved | None,
) -> Tensor:
    """As `_attention_block`; the mixer runs over T, on transposed views."""
    t_gate_up, t_down, gate_up, down = weights
    d_gate_up, middle = swiglu_backward(saved.mid, gate_up, down, d_pre_out)
    grads.add(index + 3, d_pre_out, middle)
    grads.add(index + 2, d_gate_up, saved.mid)
    d_mid = dgrad(d_gate_up, gate_up, residual=d_pre_out, out=d_pre_out)
    x = saved.h.transpose(1, 2)
    d_columns = d_mid.transpose(1, 2)
    d_pre_mix = rms_backward(saved.mid.transpose(1, 2), saved.scale_mix, d_columns, out=d_columns)
    d_gate_up, middle = swiglu_backward(x, t_gate_up, t_down, d_pre_mix)
    grads.add(index + 1, d_pre_mix, middle)
    grads.add(index, d_gate_up, x)
    d_h = dgrad(d_gate_up, t_gate_up, residual=d_pre_mix, out=d_pre_mix).transpose(1, 2)
    return d_h if below is None else rms_backward(saved.h, below.scale_out, d_h, out=d_h)
