"""Backward of what a block does between the two products of an MLP, a variant's too.

    middle_backward       of `swiglu`:     gate, up, d_middle <- d_gate, d_up, middle
    gated_norm_backward   of `gated_norm`: the same
    depthwise_backward    of `depthwise`:  d_x, in two launches

As kernels/pointwise_backward.py: computed again in registers, fp32 sums a program for vectors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recurx.errors import bad_argument

from . import checks
from .branch import Norm
from .fields import MAX_ROW, MAX_ROW_OVER_T
from .middles import channels, convolved, neighbour
from .pointwise import BLOCK, OPTIONS, _half, _load, activated, affine, centred, gates_tile
from .pointwise_backward import leave_sum, new_sums, norm_backward, tile_backward


@triton.jit
def slope(x, ACT: tl.constexpr):
    """The derivative of `activated`."""
    if ACT == "silu":
        s = tl.sigmoid(x)
        y = s * (1.0 + x * (1.0 - s))
    elif ACT == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACT == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        y = s + x * s * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
    elif ACT == "relu":
        y = tl.where(x <= 0.0, 0.0, 1.0)
    elif ACT == "relu2":
        y = tl.where(x <= 0.0, 0.0, 2.0 * x)
    else:
        tl.static_assert(ACT == "sigmoid")
        s = tl.sigmoid(x)
        y = s * (1.0 - s)
    return y


@triton.jit
def middle_backward_kernel(
    gate_up, d_middle, R, bias, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ACT: tl.constexpr, GATED: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """As `swiglu_kernel`, whose middle takes the place of its gradient."""
    cols, at, place, inside = _half(R, WIDTH, ROWS, COLS)
    if not GATED:
        at = place
    gate, d = _load(gate_up, at, inside), _load(d_middle, place, inside)
    if bias is not None:
        gate += _load(bias, cols // EACH, cols < WIDTH)
    middle, d_gate = activated(gate, ACT), d * slope(gate, ACT)
    dtype = gate_up.dtype.element_ty
    if GATED:
        up = _load(gate_up, at + WIDTH, inside)
        if bias is not None:
            up += _load(bias + WIDTH // EACH, cols // EACH, cols < WIDTH)
        tl.store(gate_up + at + WIDTH, (d * middle).to(dtype), mask=inside)
        middle, d_gate = middle * up, d_gate * up
    tl.store(gate_up + at, d_gate.to(dtype), mask=inside)
    tl.store(d_middle + place, middle.to(dtype), mask=inside)


@triton.jit
def gated_norm_backward_kernel(
    gate_up, d_middle, M, bias, weight, d_weight, R: tl.constexpr, N: tl.constexpr,
    ACT: tl.constexpr, GATED: tl.constexpr, PRODUCT: tl.constexpr, KIND: tl.constexpr,
    EPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """As `gated_norm_kernel`, whose middle takes the place of its gradient."""
    PARTS: tl.constexpr = 2 if GATED else 1
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)[None, :]
    inside, wide = (rows < M)[:, None] & (cols < N), rows.to(tl.int64)[:, None]
    at = wide // R * (PARTS * N * R) + wide % R + cols * R
    place = wide // R * (N * R) + wide % R + cols * R
    gate = affine(_load(gate_up, at, inside), None, bias, N, COLS)
    d, by = _load(d_middle, place, inside), activated(gate, ACT)
    if PRODUCT:
        by = gate
    x = by
    if GATED:
        up = _load(gate_up, at + N * R, inside)
        if bias is not None:
            up = affine(up, None, bias + N, N, COLS)
        x = by * up
    x = centred(tl.where(inside, x, 0.0), inside, N, KIND)
    factor = tl.rsqrt(tl.sum(x * x, 1) / N + EPS)
    x *= factor[:, None]
    y = affine(x, weight, None, N, COLS)
    if PRODUCT:
        opened = tl.sigmoid(gate)
        d_opened = d * y * opened * (1.0 - opened)
        d *= opened
        y *= opened
    leave_sum(d_weight, d * x, N, COLS)
    d = norm_backward(affine(d, weight, None, N, COLS), x, factor, inside, N, KIND)
    dtype = gate_up.dtype.element_ty
    tl.store(d_middle + place, y.to(dtype), mask=inside)
    if GATED:
        tl.store(gate_up + at + N * R, (d * by).to(dtype), mask=inside)
        d *= up
    if PRODUCT:
        d += d_opened
    else:
        d *= slope(gate, ACT)
    tl.store(gate_up + at, d.to(dtype), mask=inside)


@triton.jit
def depthwise_sums_kernel(
    x, weight, bias, d_out, d_sum, sums, M, T: tl.constexpr, C: tl.constexpr,
    STRIDE: tl.constexpr, K: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """d_sum: the gradient before the activation. sums [row tiles, K + 1, C]: of weight and bias."""
    across: tl.constexpr = (C + COLS - 1) // COLS
    rows, cols, inside = channels(M, C, ROWS, COLS)
    dtype: tl.constexpr = d_out.dtype.element_ty
    d = _load(d_out, rows * C + cols, inside)
    if ACT != "":
        total = convolved(x, weight, bias, rows, cols, inside, T, C, STRIDE, K, ROWS, COLS, dtype)
        d *= slope(total, ACT)
        tl.store(d_sum + rows * C + cols, d.to(d_sum.dtype.element_ty), mask=inside)
    if sums is not None:
        to = sums + (tl.program_id(0) // across).to(tl.int64) * ((K + 1) * C) + cols
        for k in tl.static_range(K):
            value = neighbour(x, rows, cols, inside, k, K, T, STRIDE, dtype)
            tl.store(to + k * C, tl.sum(d * value, 0)[None, :], mask=cols < C)
        tl.store(to + K * C, tl.sum(d, 0)[None, :], mask=cols < C)


@triton.jit
def depthwise_spread_kernel(
    d_sum, weight, d_x, M, T: tl.constexpr, C: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """d_x[t, c] = sum of w[c, k] * d_sum[t - (k - K // 2), c]."""
    rows, cols, inside = channels(M, C, ROWS, COLS)
    token, d = rows % T, tl.zeros((ROWS, COLS), tl.float32)
    for k in tl.static_range(K):
        reader = token - (k - K // 2)
        there = inside & (reader >= 0) & (reader < T)
        value = _load(d_sum, (rows - (k - K // 2)) * C + cols, there)
        d += value * _load(weight, cols * K + k, cols < C)
    tl.store(d_x + rows * C + cols, d.to(d_x.dtype.element_ty), mask=inside)


# ---- launches ------------------------------------------------------------------------------------


def middle_backward(
    gate_up: Tensor, rows: int, d_middle: Tensor, *, activation: str = "silu", gated: bool = True,
    bias: Tensor | None = None,
) -> None:  # fmt: skip
    """Of `rows` equal rows, as `swiglu` takes them: gate and up become their gradients, d_middle,
    contiguous, the middle."""
    op, parts = "kernels.middle_backward", 2 if gated else 1
    checks.same_dtype_and_device(op, gate_up=gate_up, d_middle=d_middle)
    count = d_middle.numel()
    even = gate_up.numel() == parts * count and count % max(1, rows) == 0
    if not (even and gate_up.is_contiguous() and d_middle.is_contiguous()):
        raise bad_argument(op, "d_middle", f"contiguous, 1 / {parts} of gate_up", d_middle.shape)
    if count:
        grid, sizes = gates_tile(op, count // rows, rows, bias, activation, gated)
        middle_backward_kernel[grid](gate_up, d_middle, rows, bias, **sizes)


def gated_norm_backward(
    gate_up: Tensor, d_middle: Tensor, norm: Norm, *, activation: str, gated: bool,
    of_product: bool, over_tokens: bool = False, bias: Tensor | None = None, wanted: bool = True,
) -> Tensor | None:  # fmt: skip
    """As `middle_backward`, of rows as `gated_norm` takes them. Returns the sums of the gradient of
    the norm's weight [programs, F], if it has one that is wanted."""
    op, parts = "kernels.gated_norm_backward", 2 if gated else 1
    checks.same_dtype_and_device(op, gate_up=gate_up, d_middle=d_middle)
    samples, tokens, hidden = d_middle.shape
    n, r = (tokens, hidden) if over_tokens else (hidden, 1)
    whole = (samples, parts * tokens, hidden) if over_tokens else (samples, tokens, parts * hidden)
    checks.shape(op, "gate_up", gate_up, whole)
    if not (gate_up.is_contiguous() and d_middle.is_contiguous()):
        raise bad_argument(op, "gate_up", "contiguous, as d_middle", gate_up.stride())
    if n > (most := MAX_ROW_OVER_T if over_tokens else MAX_ROW):
        raise bad_argument(op, "gate_up", f"rows up to {most}", n)
    for vector, length in ((bias, parts * n), (norm.weight, n)):
        if vector is not None and vector.shape != (length,):
            raise bad_argument(op, "a vector", f"[{length}]", vector.shape)
    tile, m = tile_backward(n, over_tokens), samples * (hidden if over_tokens else tokens)
    programs = triton.cdiv(m, tile["ROWS"])
    sums = new_sums(gate_up, programs, n) if wanted and norm.weight is not None else None
    if m:
        gated_norm_backward_kernel[(programs,)](
            gate_up, d_middle, m, bias, norm.weight, sums, R=r, N=n, ACT=activation, GATED=gated,
            PRODUCT=of_product, KIND=norm.kind, EPS=norm.eps, **tile,
        )  # fmt: skip
    return sums


def depthwise_backward(
    x: Tensor, weight: Tensor, bias: Tensor, d_out: Tensor, activation: str = "",
    wanted: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(d_x, sums) of `depthwise` on the same operands, from that of its result, contiguous [B, T,
    C]; sums [parts, K + 1, C]: of the weight, and the last of the bias, if they are `wanted`."""
    op, (samples, tokens, channels) = "kernels.depthwise_backward", x.shape
    checks.same_dtype_and_device(op, x=x, weight=weight, bias=bias, d_out=d_out)
    checks.shape(op, "d_out", d_out, (samples, tokens, channels))
    width = weight.shape[-1]
    checks.shape(op, "weight", weight, (channels, 1, width))
    if x.stride(2) != 1 or x.stride(0) != tokens * x.stride(1) or not d_out.is_contiguous():
        raise bad_argument(op, "x", "equal steps between its rows", x.stride())
    m, cols = samples * tokens, min(BLOCK // 8, triton.next_power_of_2(channels))
    sizes = {"T": tokens, "C": channels, "K": width, "ROWS": BLOCK // cols, "COLS": cols, **OPTIONS}
    parts = triton.cdiv(m, BLOCK // cols)
    grid = (parts * triton.cdiv(channels, cols),)
    sums = new_sums(x, parts, width + 1, channels) if wanted else None
    d_sum, d_x = torch.empty_like(d_out) if activation else d_out, torch.empty_like(d_out)
    if m:
        given = x, weight, bias, d_out, d_sum, sums, m
        if activation or wanted:
            depthwise_sums_kernel[grid](*given, STRIDE=x.stride(1), ACT=activation, **sizes)
        depthwise_spread_kernel[grid](d_sum, weight, d_x, m, **sizes)
    return d_x, sums
