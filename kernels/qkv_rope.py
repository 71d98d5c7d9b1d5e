"""qkv = X @ W^T with rotary embeddings on Q and K, one launch.

    X [B, T, D], W [3D, D] holding Q, K, V in this order; qkv [B, T, 3H, head_dim], H = D / head_dim
    rope(x)[j]        = x[j] cos[t, j] - x[j + half] sin[t, j]         for j < half = head_dim / 2
    rope(x)[j + half] = x[j + half] cos[t, j + half] + x[j] sin[t, j + half]

The rotation pairs column j of a head with column j + half. A program therefore computes two
products side by side, the first and the second halves of its heads: a pair is in one thread.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from recurx.errors import bad_argument

from . import checks, tiles
from .products import add_product

HEAD_DIMS = (32, 64, 128)


@triton.jit
def _half_product(
    x, w, rows, live, weight_rows, within, D: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, HALF: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The products with `weight_rows` and with the rows half a head further."""
    low = tl.zeros((ROWS, COLS), tl.float32)
    high = tl.zeros((ROWS, COLS), tl.float32)
    x_rows = x + rows.to(tl.int64)[:, None] * D
    for start in range(0, D, DEPTH):
        ks = start + tl.arange(0, DEPTH)
        slab = tl.load(x_rows + ks[None, :], mask=live[:, None] & (ks[None, :] < D), other=0.0)
        inside = within[None, :] & (ks[:, None] < D)
        w_low = w + weight_rows[None, :] * D + ks[:, None]
        low_slab = tl.load(w_low, mask=inside, other=0.0)
        high_slab = tl.load(w_low + HALF * D, mask=inside, other=0.0)
        low = add_product(low, slab, low_slab, PRECISION)
        high = add_product(high, slab, high_slab, PRECISION)
    return low, high


@triton.jit
def qkv_rope_kernel(
    x, w, cos, sin, out,
    M,
    T: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, ROTATE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.program_id(1) * COLS + tl.arange(0, COLS)  # counts pairs over all heads of Q, K, V
    head, j = pair // HALF, pair % HALF
    live, within = rows < M, pair < 3 * D // 2
    column = head * (2 * HALF) + j
    low, high = _half_product(
        x, w, rows, live, column, within, D, ROWS, COLS, DEPTH, HALF, PRECISION
    )
    inside = live[:, None] & within[None, :]
    if ROTATE:
        turned = inside & (head[None, :] < D // HALF)  # D / HALF is twice H: the heads of Q and K
        at = (rows % T)[:, None] * (2 * HALF) + j[None, :]
        cos_low = tl.load(cos + at, mask=turned, other=1.0)
        sin_low = tl.load(sin + at, mask=turned, other=0.0)
        cos_high = tl.load(cos + at + HALF, mask=turned, other=1.0)
        sin_high = tl.load(sin + at + HALF, mask=turned, other=0.0)
        first = low * cos_low - high * sin_low
        high = high * cos_high + low * sin_high
        low = first
    pointers = out + rows.to(tl.int64)[:, None] * (3 * D) + column[None, :]
    tl.store(pointers, low.to(out.dtype.element_ty), mask=inside)
    tl.store(pointers + HALF, high.to(out.dtype.element_ty), mask=inside)


def qkv_rope(
    x: torch.Tensor,
    weight: torch.Tensor,
    head_dim: int,
    cos_sin: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B, T, 3H, head_dim]: Q, K and V of x [B, T, D]; Q and K rotated unless cos_sin is None.

    x contiguous, weight [3D, D] contiguous, both bfloat16 or both float32; cos and sin float32
    [T, head_dim]; head_dim 32, 64 or 128. Raises InvalidArgument on anything else.
    """
    op = "kernels.qkv_rope"
    checks.same_dtype_and_device(op, x=x, weight=weight, out=out)
    if x.ndim != 3 or not x.is_contiguous():
        raise bad_argument(op, "x", "a contiguous [B, T, D]", f"{tuple(x.shape)}, {x.stride()}")
    batch, tokens, d = x.shape
    checks.contiguous_matrix(op, "weight", weight)
    checks.shape(op, "weight", weight, (3 * d, d))
    if head_dim not in HEAD_DIMS or d % head_dim:
        raise bad_argument(op, "head_dim", f"one of {HEAD_DIMS} that divides {d}", head_dim)
    for name, tensor in zip(("cos", "sin"), cos_sin or (), strict=False):
        checks.shape(op, name, tensor, (tokens, head_dim))
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise bad_argument(op, name, "contiguous float32", tensor.dtype)
    expected = (batch, tokens, 3 * d // head_dim, head_dim)
    if out is None:
        out = torch.empty(expected, dtype=x.dtype, device=x.device)
    checks.shape(op, "out", out, expected)
    if out.numel() == 0:
        return out
    shared = tiles.shared_bytes(x.device)
    args, constants, options = launch_arguments(x, weight, head_dim, cos_sin, out, shared)
    grid = (
        triton.cdiv(batch * tokens, constants["ROWS"]),
        triton.cdiv(3 * d // 2, constants["COLS"]),
    )
    qkv_rope_kernel[grid](*args, **constants, **options)
    return out


def launch_arguments(
    x: torch.Tensor,
    weight: torch.Tensor,
    head_dim: int,
    cos_sin: tuple[torch.Tensor, torch.Tensor] | None,
    out: torch.Tensor,
    shared: int,
) -> tuple[tuple, dict, dict]:
    """(runtime arguments, compile-time arguments, compiler options) of one launch."""
    batch, tokens, d = x.shape
    m = batch * tokens
    tile = tiles.qkv_tile(m, d, x.element_size(), shared)
    cos, sin = cos_sin if cos_sin else (x, x)  # not read without ROTATE
    constants = {
        "T": tokens, "D": d, "HALF": head_dim // 2, "ROTATE": cos_sin is not None,
        "ROWS": tile.rows, "COLS": tile.cols, "DEPTH": tile.depth, "PRECISION": "ieee",
    }  # fmt: skip
    return (x, weight, cos, sin, out, m), constants, tiles.options(tile)
