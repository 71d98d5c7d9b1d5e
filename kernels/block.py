"""One net call on the running state, in place: what the host launches for inference.

A call saves nothing: intermediates go through one scratch buffer, and h is overwritten where it
lies. A forward that keeps what a backward reads is put together in kernels/block_training.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from recurx.nets import ATTENTION, BlockSpec
from recurx.operands import CosSin

from .attention import attention
from .gate_up_swiglu import gate_up_swiglu
from .linear_residual_rms import linear_residual_rms
from .qkv_rope import qkv_rope


class Scratch:
    """Intermediates in one buffer that is used again and again."""

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self._buffer = torch.empty(elements, dtype=dtype, device=device)

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
    spec: BlockSpec,
    weights: Sequence[torch.Tensor],
    cos_sin: CosSin | None,
    scratch: Scratch,
) -> None:
    """Replace h [B, T, D] (contiguous) by the block's output; four or five launches.

    `weights` in the order of `WEIGHT_NAMES[spec.kind]`, in the dtype of h (rows may be padded, see
    kernels/checks.py). In place it is legal because a kernel that writes h reads of it only the
    rows it owns, and those before it writes them.
    """
    batch, tokens, hidden = h.shape
    mixer_in, mixer_out, gate_up, down = weights
    if spec.kind == ATTENTION:
        heads, dim = spec.num_heads, spec.head_dim
        qkv = scratch.take((batch, tokens, 3 * heads, dim))
        qkv_rope(h, mixer_in, dim, cos_sin, out=qkv)
        mixed = scratch.take((batch, tokens, heads, dim), behind=qkv)
        attention(qkv, out=mixed)
        linear_residual_rms(mixed.view(h.shape), mixer_out, h, eps=spec.eps, out=h)
    else:
        columns = h.transpose(1, 2)
        middle = scratch.take((batch, hidden, spec.token_inner))
        gate_up_swiglu(columns, mixer_in, out=middle)
        linear_residual_rms(middle, mixer_out, columns, eps=spec.eps, out=columns)
    middle = scratch.take((batch, tokens, spec.inner))
    gate_up_swiglu(h, gate_up, out=middle)
    linear_residual_rms(middle, down, h, eps=spec.eps, out=h)


def run_call(
    h: torch.Tensor,
    specs: Sequence[BlockSpec],
    weights: Sequence[Sequence[torch.Tensor]],
    cos_sin: CosSin | None,
    scratch: Scratch,
) -> None:
    """Replace h [B, T, D], the input of a net call, by the call's result."""
    for spec, block in zip(specs, weights, strict=True):
        run_block(h, spec, block, cos_sin, scratch)
