"""loss = -log(s(x_label) / sum s(x)), s(x) = x + 1 for x >= 0, 1 / (1 - x) below; and its gradient.

    logits [B, R, V] (any strides, V innermost) bf16 or fp32, labels [B, R], loss [B, R] fp32
    d loss / d x_i = (s(x_i) / sum s - [i = label]) / (1 + |x_i|)

Without fp64, and without overflow or cancellation for any finite logits: s is divided by its
largest value, so the ratios are at most 1 whatever the logits; the loss is log1p(q), q = (sum of
the other ratios) / (ratio of the label), and the label's gradient is minus the share of the others.
s' / s = 1 / (1 + |x|) on both sides of 0. A program owns whole rows.

With u = 2^-24, loss and gradient are off by at most (V + 40) u of their own value. Derivation:
1 + |x| rounds once (u); a ratio s(x) / max s is at most two of these, a product and a division
(4 u); sums of V terms of one sign add (V - 1) u at most; q is the quotient of two such (V + 8) u;
log1p never enlarges a relative error for q >= 0, and its own is under 10 u (lg2.approx of a GPU:
4 u, and 2 u of 1 + q over log 2); a gradient is a ratio, a sum, a division and two products more.
The rest is room for an approximate logarithm of the two largest logits where the label lies 2^100
below.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from recurx.errors import bad_argument

MAX_VOCAB = 4096
ELEMENTS = 2048  # logits a program
TINY = tl.constexpr(2.0**-100)  # below it q would overflow for wide vocabularies


@triton.jit
def log1p(q):
    """log(1 + q) for q >= 0; 2 atanh(q / (2 + q)) by its series up to q = 1."""
    z = tl.div_rn(tl.minimum(q, 1.0), 2.0 + tl.minimum(q, 1.0))
    t = z * z
    p = t * (1.0 / 15.0) + 1.0 / 13.0
    p = p * t + 1.0 / 11.0
    p = p * t + 1.0 / 9.0
    p = p * t + 1.0 / 7.0
    p = p * t + 1.0 / 5.0
    p = p * t + 1.0 / 3.0
    p = p * t + 1.0
    return tl.where(q <= 1.0, 2.0 * z * p, tl.log(1.0 + tl.maximum(q, 1.0)))


@triton.jit
def load_rows(
    logits, labels, M, batch_stride, ignore,
    R: tl.constexpr, V: tl.constexpr, X_ROW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """(rows, live, columns, logits fp32, in the vocabulary, is the label, counts) of a program."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    live = rows < M
    at = (rows // R).to(tl.int64) * batch_stride + (rows % R) * X_ROW
    inside = live[:, None] & (cols < V)[None, :]
    x = tl.load(logits + at[:, None] + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    label = tl.load(labels + rows, mask=live, other=0)
    counts = live & (label != ignore)
    label = tl.where(counts, label, 0).to(tl.int32)
    return rows, live, cols, x, inside, cols[None, :] == label[:, None], counts


@triton.jit
def ratios(x, inside, is_label):
    """(s(x) / max s, sum of it without the label, of the label, the largest logit)."""
    most = tl.max(tl.where(inside, x, float("-inf")), 1)
    most = tl.where(most == float("-inf"), 0.0, most)  # rows beyond the last
    a, b = 1.0 + tl.abs(x), (1.0 + tl.abs(most))[:, None]
    below = tl.where(most[:, None] >= 0, tl.div_rn(1.0, a * b), tl.div_rn(b, a))
    ratio = tl.where(inside, tl.where(x >= 0, tl.div_rn(a, b), below), 0.0)
    rest = tl.sum(tl.where(is_label, 0.0, ratio), 1)
    own = tl.sum(tl.where(is_label, ratio, 0.0), 1)
    return ratio, rest, own, most


@triton.jit
def stablemax_forward_kernel(
    logits, labels, loss, M, batch_stride, ignore,
    R: tl.constexpr, V: tl.constexpr, X_ROW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows, live, _cols, x, inside, is_label, counts = load_rows(
        logits, labels, M, batch_stride, ignore, R, V, X_ROW, ROWS, COLS
    )
    _, rest, own, most = ratios(x, inside, is_label)
    near = log1p(tl.div_rn(rest, tl.maximum(own, TINY)))
    # Far below the largest: the logarithms of s themselves, log s(x) = sign(x) log(1 + |x|).
    x_own = tl.sum(tl.where(is_label, x, 0.0), 1)
    log_most = tl.where(most < 0, -log1p(tl.abs(most)), log1p(tl.abs(most)))
    log_own = tl.where(x_own < 0, -log1p(tl.abs(x_own)), log1p(tl.abs(x_own)))
    far = tl.log(tl.maximum(rest, 1.0)) + (log_most - log_own)
    value = tl.where(counts, tl.where(own < TINY, far, near), 0.0)
    tl.store(loss + rows, value, mask=live)


@triton.jit
def stablemax_backward_kernel(
    logits, labels, grad_loss, grad, M, batch_stride, ignore,
    R: tl.constexpr, V: tl.constexpr, X_ROW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows, live, cols, x, inside, is_label, counts = load_rows(
        logits, labels, M, batch_stride, ignore, R, V, X_ROW, ROWS, COLS
    )
    ratio, rest, own, _most = ratios(x, inside, is_label)
    share = tl.where(is_label, -rest[:, None], ratio)
    outer = tl.load(grad_loss + rows, mask=live, other=0.0).to(tl.float32)
    outer = tl.where(counts, outer, 0.0)
    each = tl.div_rn(share, tl.maximum(rest + own, 1.0)[:, None] * (1.0 + tl.abs(x)))
    at = grad + rows.to(tl.int64)[:, None] * V + cols[None, :]
    tl.store(at, (outer[:, None] * each).to(grad.dtype.element_ty), mask=inside)


def stablemax_forward(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    """The loss of each token, fp32 [...]; 0 where ignored.

    logits [..., V] bf16 or fp32, labels [...] int32 or int64, one device. Raises InvalidArgument.
    """
    check("kernels.stablemax_forward", logits, labels)
    loss = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    if logits.numel():
        args, constants, options = launch_arguments(logits, labels, ignore_index)
        grid = (triton.cdiv(labels.numel(), constants["ROWS"]),)
        with torch.cuda.device_of(logits):  # Triton launches on the current device
            stablemax_forward_kernel[grid](*args[:2], loss, *args[2:], **constants, **options)
    return loss


def stablemax_backward(
    grad_loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    """The gradient of the logits in their dtype, contiguous; grad_loss [...] fp32."""
    check("kernels.stablemax_backward", logits, labels)
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if logits.numel():
        args, constants, options = launch_arguments(logits, labels, ignore_index)
        outer = grad_loss.contiguous()
        grid = (triton.cdiv(labels.numel(), constants["ROWS"]),)
        with torch.cuda.device_of(logits):
            args = (*args[:2], outer, grad, *args[2:])
            stablemax_backward_kernel[grid](*args, **constants, **options)
    return grad


def check(op: str, logits: torch.Tensor, labels: torch.Tensor) -> None:
    if logits.dtype not in (torch.float32, torch.bfloat16):
        raise bad_argument(op, "logits", "bfloat16 or float32", logits.dtype)
    if logits.ndim < 2 or not 1 <= logits.shape[-1] <= MAX_VOCAB:
        expected = f"[..., V] with V in 1..{MAX_VOCAB}"
        raise bad_argument(op, "logits", expected, tuple(logits.shape))
    if labels.shape != logits.shape[:-1] or labels.dtype not in (torch.int32, torch.int64):
        expected = f"int32 or int64 {tuple(logits.shape[:-1])}"
        raise bad_argument(op, "labels", expected, f"{labels.dtype} {tuple(labels.shape)}")


def launch_arguments(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int
) -> tuple[tuple, dict, dict]:
    """(runtime arguments without the outputs, compile-time arguments, compiler options)."""
    vocab = logits.shape[-1]
    if logits.ndim != 3 or logits.stride(-1) != 1:
        logits = logits.reshape(1, -1, vocab).contiguous()
    cols = max(2, triton.next_power_of_2(vocab))
    constants = {
        "R": logits.shape[1], "V": vocab, "X_ROW": logits.stride(1),
        "ROWS": max(1, ELEMENTS // cols), "COLS": cols,
    }  # fmt: skip
    args = (logits, labels.contiguous(), labels.numel(), logits.stride(0), ignore_index)
    return args, constants, {"num_warps": 4, "enable_fp_fusion": True}
