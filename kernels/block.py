"""One net call on the running state, in place: what the host launches for inference.

A call saves nothing: intermediates go through one scratch buffer, and h is overwritten where it
lies. Its rows stay raw between the products, with their sums of squares beside them, and are raw
when the call ends (kernels/linear.py). A forward that keeps what a backward reads is put together
in kernels/block_training.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from recurx.nets import ATTENTION, BlockSpec
from recurx.operands import CosSin

from .attention import attention
from .linear import gate_up_swiglu, linear, linear_residual, linear_residual_rms, new_squares
from .rms import normalise


class Scratch:
    """Intermediates in one buffer that is used again and again; and the sums of squares of the rows
    of h, one tensor for each half of a block: a half reads those of the other."""

    def __init__(self, elements: int, h: torch.Tensor) -> None:
        self._buffer = h.new_empty(elements)
        rows = h.numel() // h.shape[-1]
        self.mid_squares, self.squares = new_squares(rows, h), new_squares(rows, h)

    @staticmethod
    def elements(spec: BlockSpec, batch: int, tokens: int) -> int:
        """What one block asks for: its widest pair of intermediates that live together."""
        rows = batch * tokens
        mixer = 4 * rows * spec.hidden  # qkv beside the mixed heads
        if spec.kind != ATTENTION:
            mixer = batch * spec.hidden * spec.token_inner
        return max(mixer, rows * spec.inner)

    def take(self, shape: tuple[int, ...], behind: torch.Tensor | None = None) -> torch.Tensor:
        """A contiguous tensor at the front, or behind another one that is still read."""
        start = 0 if behind is None else behind.numel()
        return self._buffer[start : start + torch.Size(shape).numel()].view(shape)


def run_block(
    h: torch.Tensor,
    squares: torch.Tensor | None,
    spec: BlockSpec,
    weights: Sequence[torch.Tensor],
    cos_sin: CosSin | None,
    scratch: Scratch,
) -> None:
    """Replace h [B, T, D] (contiguous) by the block's output; four or five launches.

    h is raw if `squares` are given; the output is, and its sums of squares are `scratch.squares`.
    `weights` in the order of `WEIGHT_NAMES[spec.kind]`, in the dtype of h (rows may be padded, see
    kernels/checks.py). In place it is legal because a kernel that writes h reads of it only the
    elements it writes, and those before it writes them.
    """
    batch, tokens, hidden = h.shape
    mixer_in, mixer_out, gate_up, down = weights
    eps, mid_squares = spec.eps, None
    if spec.kind == ATTENTION:
        heads, dim = spec.num_heads, spec.head_dim
        qkv = scratch.take((batch, tokens, 3 * heads, dim))
        linear(h, mixer_in, squares=squares, eps=eps, out=qkv.view(batch, tokens, 3 * hidden))
        mixed = scratch.take((batch, tokens, heads, dim), behind=qkv)
        attention(qkv, cos_sin=cos_sin, out=mixed)
        mid_squares = scratch.mid_squares
        linear_residual(
            mixed.view(h.shape), mixer_out, h, mid_squares, squares=squares, eps=eps, out=h
        )
    else:
        if squares is not None:
            normalise(h, squares, eps=eps)
        columns = h.transpose(1, 2)
        middle = scratch.take((batch, hidden, spec.token_inner))
        gate_up_swiglu(columns, mixer_in, out=middle)
        linear_residual_rms(middle, mixer_out, columns, eps=eps, out=columns)
    middle = scratch.take((batch, tokens, spec.inner))
    gate_up_swiglu(h, gate_up, squares=mid_squares, eps=eps, out=middle)
    linear_residual(middle, down, h, scratch.squares, squares=mid_squares, eps=eps, out=h)


def run_call(
    h: torch.Tensor,
    specs: Sequence[BlockSpec],
    weights: Sequence[Sequence[torch.Tensor]],
    cos_sin: CosSin | None,
    scratch: Scratch,
) -> None:
    """Replace h [B, T, D], the input of a net call, by the call's result, raw."""
    squares = None
    for spec, block in zip(specs, weights, strict=True):
        run_block(h, squares, spec, block, cos_sin, scratch)
        squares = scratch.squares
