"""Stablemax cross-entropy in the precision of the logits (at least fp32), its gradient written out.

`losses.stablemax_cross_entropy` is the published fp64 formula; this is its opt-in replacement. The
formula that neither overflows nor cancels is explained in `kernels/stablemax_cross_entropy.py`,
which runs it on a GPU; here it is in plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recurx import ops, small_ops

IGNORE = -100  # label of tokens that do not count
TINY = 2.0**-100


def fused_stablemax_cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int = IGNORE, valid_mask: Tensor | None = None
) -> Tensor:
    """-log of s(logit of the label) / sum s, per token, without fp64; 0 where ignored.

    With u = 2^-24, V the vocabulary and every logit finite, the loss differs from the fp64 formula
    on the same logits by at most (V + 40) u of its own value, however small or large it is, and
    each entry of the gradient by at most (V + 40) u of its own value, before its rounding to the
    dtype of the logits; `kernels/stablemax_cross_entropy.py` derives that.

    Args:
        logits: [..., V], any floating dtype; fp64 logits are computed in fp64.
        labels: [...], integers in 0..V-1, or `ignore_index`. A label outside is undefined on a GPU.
        valid_mask: [...] bool, which tokens count (official code passes it); None: those that are
            not `ignore_index`.

    Returns:
        [...] fp32 (fp64 for fp64 logits).

    Source: arXiv 2501.04697.
    """
    if valid_mask is not None:
        labels = torch.where(valid_mask, labels, ignore_index)
    loss: Tensor = _forward_op(logits, labels, ignore_index)
    return loss


def _forward(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    if _kernel_takes(logits):
        from recurx.kernels.stablemax_cross_entropy import stablemax_forward

        return stablemax_forward(logits, labels, ignore_index)
    x, counts, is_label = _read(logits, labels, ignore_index)
    _, rest, own, most = _ratios(x, is_label)
    near = torch.log1p(rest / own.clamp_min(TINY))
    x_own = torch.where(is_label, x, 0).sum(-1)
    # Far below the largest: the logarithms of s themselves, log s(x) = sign(x) log(1 + |x|).
    far = rest.clamp_min(1).log() + (_log_s(most) - _log_s(x_own))
    return torch.where(counts, torch.where(own < TINY, far, near), 0)


def _backward(grad_loss: Tensor, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    if _kernel_takes(logits):
        from recurx.kernels.stablemax_cross_entropy import stablemax_backward

        return stablemax_backward(grad_loss, logits, labels, ignore_index)
    x, counts, is_label = _read(logits, labels, ignore_index)
    ratio, rest, own, _ = _ratios(x, is_label)
    share = torch.where(is_label, -rest.unsqueeze(-1), ratio)
    each = share / ((rest + own).unsqueeze(-1) * (1 + x.abs()))
    outer = torch.where(counts, grad_loss, 0).unsqueeze(-1)
    return (outer * each).to(logits.dtype).contiguous()


def _kernel_takes(logits: Tensor) -> bool:
    fits = logits.dtype in (torch.float32, torch.bfloat16) and logits.shape[-1] <= 4096
    return fits and small_ops.on_triton(logits)


def _read(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counts = labels != ignore_index
    label = torch.where(counts, labels, 0).long().unsqueeze(-1)
    is_label = torch.zeros_like(x, dtype=torch.bool).scatter_(-1, label, True)
    return x, counts, is_label


def _ratios(x: Tensor, is_label: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(s(x) / max s, their sum without the label's, the label's, the largest logit)."""
    most = x.amax(-1)
    a, b = 1 + x.abs(), (1 + most.abs()).unsqueeze(-1)
    below = torch.where(most.unsqueeze(-1) >= 0, 1 / (a * b), b / a)
    ratio = torch.where(x >= 0, a / b, below)
    rest = torch.where(is_label, 0, ratio).sum(-1)
    return ratio, rest, torch.where(is_label, ratio, 0).sum(-1), most


def _log_s(x: Tensor) -> Tensor:
    return torch.copysign(x.abs().log1p(), x)


def _forward_fake(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    return logits.new_empty(labels.shape, dtype=torch.promote_types(logits.dtype, torch.float32))


def _backward_fake(grad_loss: Tensor, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


_forward_op = ops._register("recurx::stablemax", _forward, _forward_fake)
_backward_op = ops._register("recurx::stablemax_backward", _backward, _backward_fake)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, labels, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, labels)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    logits, labels = ctx.saved_tensors
    return _backward_op(grad, logits, labels, ctx.ignore_index), None, None


torch.library.register_autograd("recurx::stablemax", _differentiate, setup_context=_save)
