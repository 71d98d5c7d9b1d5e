"""One AdamATan2 step of any number of weights in one launch.

    m <- m + (1 - beta1) (g - m);   v <- beta2 v + (1 - beta2) g^2
    w <- w (1 - lr * decay) - lr * atan2(m / (1 - beta1^t), sqrt(v / (1 - beta2^t)))

w and g in bf16 or fp32, m and v in fp32; t, the number of steps, is an fp32 value of each weight on
the device, so nothing here waits for it and a captured launch counts on. lr is a float or a value
on the device. A program takes one chunk (`multi_tensor`); nothing is read that another one writes.

Errors: atan by a polynomial of degree 17 in min/max, within 3 units of 2^-24 of atan on [0, 1]
(measured over two million points), divisions and roots rounded to nearest; 1 - beta^t without
cancellation by its series.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from recurx.errors import bad_argument

from . import multi_tensor
from .multi_tensor import chunk_mask, chunk_pointer

# atan(a) / a in powers of a^2 on [0, 1]: relative error 1.5e-8 in exact arithmetic (a fit of least
# largest relative error, iterated least squares over Chebyshev points).
A0 = tl.constexpr(0.9999999847656758)
A1 = tl.constexpr(-0.3333307334380136)
A2 = tl.constexpr(0.19992619365199768)
A3 = tl.constexpr(-0.14203644253611142)
A4 = tl.constexpr(0.10640933184947396)
A5 = tl.constexpr(-0.07504292739031096)
A6 = tl.constexpr(0.04269149792840053)
A7 = tl.constexpr(-0.016068615788745987)
A8 = tl.constexpr(0.0028498863199071696)
HALF_PI = tl.constexpr(math.pi / 2)


@triton.jit
def atan2_right(y, x):
    """atan2(y, x) for x >= 0; 0 where both are 0."""
    tall = tl.abs(y)
    large = tl.maximum(tall, x)
    a = tl.where(large > 0, tl.div_rn(tl.minimum(tall, x), tl.where(large > 0, large, 1.0)), 0.0)
    t = a * a
    p = A8 * t + A7
    p = p * t + A6
    p = p * t + A5
    p = p * t + A4
    p = p * t + A3
    p = p * t + A2
    p = p * t + A1
    p = p * t + A0
    angle = a * p
    angle = tl.where(tall > x, HALF_PI - angle, angle)
    return tl.where(y < 0, -angle, angle)


@triton.jit
def one_minus_power(rate, steps):
    """1 - beta^steps with rate = -log(beta); the series where the difference would cancel."""
    p = rate * steps
    series = 1.0 - p / 9.0
    series = 1.0 - p / 8.0 * series
    series = 1.0 - p / 7.0 * series
    series = 1.0 - p / 6.0 * series
    series = 1.0 - p / 5.0 * series
    series = 1.0 - p / 4.0 * series
    series = 1.0 - p / 3.0 * series
    series = 1.0 - p / 2.0 * series
    return tl.where(p < 0.5, p * series, 1.0 - tl.exp(-p))


@triton.jit
def adam_atan2_kernel(
    table, lr, weight1, weight2, beta2, rate1, rate2, decay,
    LR_ON_DEVICE: tl.constexpr, WEIGHT_BF16: tl.constexpr, GRAD_BF16: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = table + tl.program_id(0) * 6
    offsets = tl.arange(0, CHUNK)
    inside = chunk_mask(row + 5, offsets, ALIGNED)
    w_at = chunk_pointer(row, WEIGHT_BF16, ALIGNED) + offsets
    g_at = chunk_pointer(row + 1, GRAD_BF16, ALIGNED) + offsets
    m_at = chunk_pointer(row + 2, False, ALIGNED) + offsets
    v_at = chunk_pointer(row + 3, False, ALIGNED) + offsets
    steps = tl.load(chunk_pointer(row + 4, False, False))
    rate = tl.load(lr) if LR_ON_DEVICE else lr

    w = tl.load(w_at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(m_at, mask=inside, other=0.0)
    v = tl.load(v_at, mask=inside, other=0.0)
    m += weight1 * (g - m)
    v = beta2 * v + weight2 * g * g
    mean = tl.div_rn(m, one_minus_power(rate1, steps))
    square = tl.div_rn(v, one_minus_power(rate2, steps))
    w = w * (1.0 - rate * decay) - rate * atan2_right(mean, tl.sqrt_rn(square))

    tl.store(w_at, w.to(w_at.dtype.element_ty), mask=inside)
    tl.store(m_at, m, mask=inside)
    tl.store(v_at, v, mask=inside)


def adam_atan2(
    weights: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    means: Sequence[torch.Tensor],
    squares: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    *,
    lr: float | torch.Tensor,
    betas: tuple[float, float],
    weight_decay: float,
    tables: multi_tensor.Tables,
    name: object = "",
) -> None:
    """Update weights, means and squares in place; `steps` already count this step.

    weights and grads: contiguous, one dtype each (bf16 or fp32); means and squares fp32 of the same
    shapes; steps 0-d fp32; all on one device. lr: a float, or a 0-d fp32 tensor there. Raises
    InvalidArgument.
    """
    op = "kernels.adam_atan2"
    for arg, tensors in (("weights", weights), ("grads", grads)):
        if not multi_tensor.takes(*tensors) or len({t.dtype for t in tensors}) > 1:
            got = sorted({str(t.dtype) for t in tensors})
            raise bad_argument(op, arg, "contiguous tensors, all bf16 or all fp32", got)
    for arg, tensors in (("means", means), ("squares", squares), ("steps", steps)):
        if not multi_tensor.takes(*tensors) or any(t.dtype != torch.float32 for t in tensors):
            got = sorted({str(t.dtype) for t in tensors})
            raise bad_argument(op, arg, "contiguous fp32 tensors", got)
    live = [n for n, w in enumerate(weights) if w.numel()]
    if not live:
        return
    lists = [[ts[n] for n in live] for ts in (weights, grads, means, squares)]
    with torch.cuda.device_of(weights[0]):  # Triton launches on the current device
        table, aligned = tables.get(name, lists, [[steps[n] for n in live]])
        args, constants, options = launch_arguments(
            table, lr, betas, weight_decay, weights[0].dtype, grads[0].dtype, aligned
        )
        adam_atan2_kernel[(table.shape[0],)](*args, **constants, **options)


def launch_arguments(
    table: torch.Tensor,
    lr: float | torch.Tensor,
    betas: tuple[float, float],
    weight_decay: float,
    weight_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    aligned: bool,
) -> tuple[tuple, dict, dict]:
    """(runtime arguments, compile-time arguments, compiler options) of one launch."""
    rates = [-math.log(beta) if beta else math.inf for beta in betas]
    on_device = isinstance(lr, torch.Tensor)
    rate = lr if on_device else float(lr)
    args = (table, rate, 1 - betas[0], 1 - betas[1], float(betas[1]), *rates, float(weight_decay))
    constants = {
        "LR_ON_DEVICE": on_device, "WEIGHT_BF16": weight_dtype == torch.bfloat16,
        "GRAD_BF16": grad_dtype == torch.bfloat16, "ALIGNED": aligned, "CHUNK": multi_tensor.CHUNK,
    }  # fmt: skip
    return args, constants, {"num_warps": multi_tensor.WARPS, "enable_fp_fusion": True}
