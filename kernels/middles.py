"""What a variant does between the two products of an MLP, beside its activation.

    gated_norm   gate <- norm(act(gate) * up), or sigmoid(gate) * norm(gate * up)   over F
    depthwise    out[t, c] = act(bias[c] + sum of w[c, k] * x[t + k - K // 2, c])   over the tokens

gate and up are the halves of rows as a product left them, over T with a stride of D, or there is
no up. bf16 or fp32 storage, fp32 arithmetic. A program of the first holds whole rows.
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
from .pointwise import BLOCK, OPTIONS, _load, activated, affine, centred, row_tile


@triton.jit
def gated_norm_kernel(
    gate_up, M, bias, weight, R: tl.constexpr, N: tl.constexpr, ACT: tl.constexpr,
    GATED: tl.constexpr, PRODUCT: tl.constexpr, KIND: tl.constexpr, EPS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Rows of N values that lie R apart, R of them side by side in each [N, R]."""
    PARTS: tl.constexpr = 2 if GATED else 1
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)[None, :]
    inside, wide = (rows < M)[:, None] & (cols < N), rows.to(tl.int64)[:, None]
    at = wide // R * (PARTS * N * R) + wide % R + cols * R
    gate = affine(_load(gate_up, at, inside), None, bias, N, COLS)
    if GATED:
        up = _load(gate_up, at + N * R, inside)
        if bias is not None:
            up = affine(up, None, bias + N, N, COLS)
    # What lies beyond a row must add nothing to its sums: 0, whatever is computed of 0.
    if PRODUCT:
        x = tl.where(inside, gate * up, 0.0)
    elif GATED:
        x = tl.where(inside, activated(gate, ACT) * up, 0.0)
    else:
        x = tl.where(inside, activated(gate, ACT), 0.0)
    x = centred(x, inside, N, KIND)
    y = affine(x * tl.rsqrt(tl.sum(x * x, 1) / N + EPS)[:, None], weight, None, N, COLS)
    if PRODUCT:
        y *= tl.sigmoid(gate)
    tl.store(gate_up + at, y.to(gate_up.dtype.element_ty), mask=inside)


@triton.jit
def _rounded(x, at, inside, dtype: tl.constexpr):
    return tl.load(x + at, mask=inside, other=0.0).to(dtype).to(tl.float32)


@triton.jit
def channels(M, C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A program's rows and channels, and which of them there are."""
    across: tl.constexpr = (C + COLS - 1) // COLS
    rows = (tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    cols = (tl.program_id(0) % across * COLS + tl.arange(0, COLS))[None, :]
    return rows, cols, (rows < M) & (cols < C)


@triton.jit
def neighbour(
    x, rows, cols, inside, k: tl.constexpr, K: tl.constexpr, T: tl.constexpr,
    STRIDE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """What weight k of K meets: x[t + k - K // 2], 0 beyond the tokens of a sample."""
    near = rows % T + (k - K // 2)
    there = inside & (near >= 0) & (near < T)
    return _rounded(x, (rows + (k - K // 2)) * STRIDE + cols, there, dtype)


@triton.jit
def convolved(
    x, weight, bias, rows, cols, inside, T: tl.constexpr, C: tl.constexpr, STRIDE: tl.constexpr,
    K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The sums of `depthwise` before its activation, of operands rounded to `dtype`."""
    sums = tl.zeros((ROWS, COLS), tl.float32)
    for k in tl.static_range(K):
        value = neighbour(x, rows, cols, inside, k, K, T, STRIDE, dtype)
        sums += value * _rounded(weight, cols * K + k, cols < C, dtype)
    return sums + _rounded(bias, cols, cols < C, dtype)


@triton.jit
def depthwise_kernel(
    x, weight, bias, out, M, T: tl.constexpr, C: tl.constexpr, STRIDE: tl.constexpr,
    K: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows, cols, inside = channels(M, C, ROWS, COLS)
    dtype: tl.constexpr = out.dtype.element_ty
    sums = convolved(x, weight, bias, rows, cols, inside, T, C, STRIDE, K, ROWS, COLS, dtype)
    if ACT != "":
        sums = activated(sums, ACT)
    tl.store(out + rows * C + cols, sums.to(dtype), mask=inside)


# ---- launches ------------------------------------------------------------------------------------


def gated_norm(
    gate_up: Tensor, norm: Norm, *, activation: str, gated: bool, of_product: bool,
    over_tokens: bool = False, bias: Tensor | None = None,
) -> None:  # fmt: skip
    """Of the rows of gate_up, [B, T, parts * F] or over tokens [B, parts * F, D], replace gate by
    the normed middle; with `of_product` by sigmoid(gate) * norm(gate * up). `bias` [parts * F]."""
    op, parts = "kernels.gated_norm", 2 if gated else 1
    checks.same_dtype_and_device(op, gate_up=gate_up)
    samples, tokens, hidden = gate_up.shape
    n, r = (tokens // parts, hidden) if over_tokens else (hidden // parts, 1)
    most = MAX_ROW_OVER_T if over_tokens else MAX_ROW
    if not gate_up.is_contiguous() or n > most:
        raise bad_argument(op, "gate_up", f"contiguous, rows up to {most}", gate_up.shape)
    for vector, length in ((bias, parts * n), (norm.weight, n)):
        if vector is not None and vector.shape != (length,):
            raise bad_argument(op, "a vector", f"[{length}]", vector.shape)
    tile, m = row_tile(n, over_tokens), samples * (hidden if over_tokens else tokens)
    if m:
        gated_norm_kernel[(triton.cdiv(m, tile["ROWS"]),)](
            gate_up, m, bias, norm.weight, R=r, N=n, ACT=activation, GATED=gated,
            PRODUCT=of_product, KIND=norm.kind, EPS=norm.eps, **tile,
        )  # fmt: skip


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str = "", dtype: torch.dtype | None = None
) -> Tensor:
    """Each channel of x [B, T, C] convolved over the tokens, K // 2 zeros before the first; rows
    of x may lie apart. weight [C, 1, K], bias [C]; the result is contiguous, in `dtype` (bfloat16
    or float32, that of x unless given), to which the operands are rounded first."""
    op, (samples, tokens, channels) = "kernels.depthwise", x.shape
    checks.same_dtype_and_device(op, x=x, weight=weight, bias=bias)
    checks.shape(op, "bias", bias, (channels,))
    checks.shape(op, "weight", weight, (channels, 1, weight.shape[-1]))
    if x.stride(2) != 1 or x.stride(0) != tokens * x.stride(1) or not weight.is_contiguous():
        raise bad_argument(op, "x", "equal steps between its rows", x.stride())
    out = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    cols = min(BLOCK // 4, triton.next_power_of_2(channels))
    sizes = {"T": tokens, "C": channels, "STRIDE": x.stride(1), "K": weight.shape[-1]}
    sizes |= {"ACT": activation, "ROWS": BLOCK // cols, "COLS": cols, **OPTIONS}
    m = samples * tokens
    if m:
        grid = (triton.cdiv(m, BLOCK // cols) * triton.cdiv(channels, cols),)
        depthwise_kernel[grid](x, weight, bias, out, m, **sizes)
    return out
