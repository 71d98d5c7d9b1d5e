"""d_x = residual + D @ W: the data gradient of x W^T, with the gradient that goes round it added.

    D [M, K] the gradient of the product, W [K, N] the weight as it is stored ([out, in]), residual
    and d_x [M, N]; bf16 or fp32 storage, fp32 accumulation

D, residual and d_x may be 2-D, or 3-D [B, R, ...] with any strides and M = B * R rows: the
token-MLP passes transposed views. Programs that share rows of D run side by side, so D comes from
memory once and W from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from recurx.errors import bad_argument

from . import backward_tiles, checks, tiles


@triton.jit
def dgrad_kernel(
    d_out, w, residual, d_x,
    M, d_batch, r_batch, x_batch,
    R: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W_ROW: tl.constexpr,
    D_ROW: tl.constexpr, D_COL: tl.constexpr,
    R_ROW: tl.constexpr, R_COL: tl.constexpr,
    X_ROW: tl.constexpr, X_COL: tl.constexpr, RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(N, COLS)
    rows = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)
    cols = (tl.program_id(0) % across) * COLS + tl.arange(0, COLS)
    live = rows < M
    batch, row = (rows // R).to(tl.int64), (rows % R).to(tl.int64)
    d_rows = d_out + (batch * d_batch + row * D_ROW)[:, None]

    acc = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, K, DEPTH):
        ks = start + tl.arange(0, DEPTH)
        inside = live[:, None] & (ks[None, :] < K)
        slab = tl.load(d_rows + ks[None, :] * D_COL, mask=inside, other=0.0)
        w_inside = (ks[:, None] < K) & (cols[None, :] < N)
        w_slab = tl.load(w + ks[:, None] * W_ROW + cols[None, :], mask=w_inside, other=0.0)
        acc = tl.dot(slab, w_slab, acc, input_precision=PRECISION)

    inside = live[:, None] & (cols[None, :] < N)
    if RESIDUAL:
        r_g = residual + (batch * r_batch + row * R_ROW)[:, None] + cols[None, :] * R_COL
        acc += tl.load(r_g, mask=inside, other=0.0).to(tl.float32)
    x_g = d_x + (batch * x_batch + row * X_ROW)[:, None] + cols[None, :] * X_COL
    tl.store(x_g, acc.to(d_x.dtype.element_ty), mask=inside)


def dgrad(
    d_out: torch.Tensor,
    weight: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual + d_out @ weight with weight [K, N] (contiguous rows), as the forward's [out, in].

    d_out [..., K] and residual [..., N] with one or two leading axes (any strides); one dtype,
    bfloat16 or float32, and one device. Returns `out` (new, laid out like `residual`, else
    contiguous, if not given; it may be `residual`). Raises InvalidArgument on anything else.
    """
    op = "kernels.dgrad"
    checks.same_dtype_and_device(op, d_out=d_out, weight=weight, residual=residual, out=out)
    k, n = checks.matrix_of_rows(op, "weight", weight)
    if d_out.ndim not in (2, 3) or d_out.shape[-1] != k:
        raise bad_argument(op, "d_out", f"[M, {k}] or [B, R, {k}]", tuple(d_out.shape))
    expected = (*d_out.shape[:-1], n)
    if residual is not None:
        checks.shape(op, "residual", residual, expected)
    if out is None:
        out = d_out.new_empty(expected) if residual is None else torch.empty_like(residual)
    checks.shape(op, "out", out, expected)
    if out.numel() == 0:
        return out
    args, constants, options = launch_arguments(
        d_out, weight, residual, out, tiles.shared_bytes(d_out.device)
    )
    m = out.numel() // n
    grid = (triton.cdiv(m, constants["ROWS"]) * triton.cdiv(n, constants["COLS"]),)
    dgrad_kernel[grid](*args, **constants, **options)
    return out


def launch_arguments(
    d_out: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    shared: int,
) -> tuple[tuple, dict, dict]:
    """(runtime arguments, compile-time arguments, compiler options) of one launch."""
    k, n = weight.shape
    given = out if residual is None else residual  # not read without RESIDUAL
    d3, r3, x3 = (t.unsqueeze(0) if t.ndim == 2 else t for t in (d_out, given, out))
    m = x3.shape[0] * x3.shape[1]
    tile = backward_tiles.dgrad_tile(m, n, k, d_out.element_size(), shared)
    constants = {
        "R": x3.shape[1], "K": k, "N": n, "W_ROW": weight.stride(0),
        "D_ROW": d3.stride(1), "D_COL": d3.stride(2),
        "R_ROW": r3.stride(1), "R_COL": r3.stride(2),
        "X_ROW": x3.stride(1), "X_COL": x3.stride(2), "RESIDUAL": residual is not None,
        "ROWS": tile.rows, "COLS": tile.cols, "DEPTH": tile.depth, "PRECISION": "ieee",
    }  # fmt: skip
    args = (d_out, weight, given, out, m, d3.stride(0), r3.stride(0), x3.stride(0))
    return args, constants, tiles.options(tile)
