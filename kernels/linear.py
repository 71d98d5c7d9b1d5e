"""A @ W^T for every product of a block, forward and backward, with its norm deferred: one kernel.

    rms(x) = x * rsqrt(mean(x^2) + eps) over the N columns, in fp32, no weight
    A [M, K], W [N, K] (or [K, N]: a data gradient); bf16 or fp32 storage, fp32 accumulation

No program owns whole rows of D. A product that ends in a norm stores its rows as they are (`raw`)
and beside them, for each tile of columns, the rows' sums of squares: `squares` [tiles, M] fp32. Who
reads the rows scales: with scale = rsqrt(sum(squares) / N + eps), one number a row,

    linear              scale * (raw @ W^T)                      Q, K, V, not rotated yet
    gate_up_swiglu      silu(gate) * up of scale * (raw @ W^T)   gate and up, one tile of each
    linear_residual     scale * raw + A @ W^T, and its squares   the tail of attention and of SwiGLU
    dgrad               residual + D @ W                         the gradient of a product's input

because a factor of a row commutes with the product. So tiles are as large as registers allow, or
as small as a small batch needs (tiles.product_tile).

A token-MLP normalises over T, and what follows it reads its rows along D: there the factor lies
along K and cannot wait. T columns are few: `linear_residual_rms` owns them whole and normalises
before it stores. For the same reason a token-MLP reads rows that are normalised already
(kernels/rms.py).

A program computes two tiles of `cols` columns from one slab of A: gate and up, or the halves of a
tile, which the epilogue takes one after the other. A, residual and out may be 2-D, or 3-D
[B, R, ...] with any strides and M = B * R rows: the token-MLP passes transposed views. Programs
that share rows of A run side by side. `out` may be `residual`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recurx.errors import bad_argument

from . import checks, tiles
from .products import add_product
from .rms import row_scale

MAX_WHOLE = 1024  # columns of a row that one program owns
Launch = tuple[tuple, dict, dict]  # arguments, compile-time arguments, compiler options


@triton.jit
def _transposed(
    w, n, ks, N: tl.constexpr, K: tl.constexpr, W_N: tl.constexpr, W_K: tl.constexpr,
    WHOLE_K: tl.constexpr,
):  # fmt: skip
    """W[n, ks]^T, 0 outside."""
    inside = (n < N)[None, :]
    if not WHOLE_K:
        inside = inside & (ks < K)[:, None]
    return tl.load(w + n[None, :] * W_N + ks[:, None] * W_K, mask=inside, other=0.0)


@triton.jit
def _start(
    residual, row_offset, cols, live, scale,
    N: tl.constexpr, COL: tl.constexpr, RESIDUAL: tl.constexpr, SCALED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """What a product is added to: the residual, scaled if it is raw."""
    if RESIDUAL:
        inside = live[:, None] & (cols[None, :] < N)
        at = residual + row_offset[:, None] + cols[None, :] * COL
        around = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            around = around * scale[:, None]
    else:
        around = tl.zeros((ROWS, COLS), tl.float32)
    return around


@triton.jit
def _store(out, row_offset, cols, live, value, N: tl.constexpr, COL: tl.constexpr):
    inside = live[:, None] & (cols[None, :] < N)
    pointers = out + row_offset[:, None] + cols[None, :] * COL
    tl.store(pointers, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def linear_kernel(
    a, w, residual, squares, out, kept,
    M, depth, a_batch, r_batch, o_batch,
    R: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W_N: tl.constexpr, W_K: tl.constexpr,
    W_COLS: tl.constexpr, A_ROW: tl.constexpr, A_COL: tl.constexpr, R_ROW: tl.constexpr,
    R_COL: tl.constexpr, O_ROW: tl.constexpr, O_COL: tl.constexpr,
    SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr, KEEP: tl.constexpr,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = COLS if SWIGLU else 2 * COLS  # columns of `out` a program makes
    APART: tl.constexpr = N if SWIGLU else COLS  # rows of W from one tile to the other
    WHOLE_K: tl.constexpr = K % DEPTH == 0
    across = tl.cdiv(N, WIDE)
    tile = tl.program_id(0) % across
    # Offsets from the first row, in 32 bits: those of 64, kept over the loop, would spill.
    start_row = (tl.program_id(0) // across) * ROWS
    within = tl.arange(0, ROWS)
    rows = start_row + within
    cols = tile * WIDE + tl.arange(0, COLS)
    live = rows < M
    if R > 0:
        batch, row = (rows // R).to(tl.int64), (rows % R).to(tl.int64)
        a_rows = batch * a_batch + row * A_ROW
        r_rows = batch * r_batch + row * R_ROW
        o_rows = batch * o_batch + row * O_ROW
    else:
        a += start_row.to(tl.int64) * A_ROW
        residual += start_row.to(tl.int64) * R_ROW
        out += start_row.to(tl.int64) * O_ROW
        a_rows = within * A_ROW
        r_rows = within * R_ROW
        o_rows = within * O_ROW
    scale = live  # not read unless something is scaled
    if PARTS > 0:
        scale = row_scale(squares, rows, live, M, PARTS, WIDTH, EPS)
    # Masked columns are 0 in product and residual, so they add nothing to a sum of squares.
    END: tl.constexpr = N if SWIGLU else N - COLS  # of the columns that have a second one
    SCALED: tl.constexpr = PARTS > 0
    more = cols + COLS
    # The residual comes first: after the products, beside both accumulators, it would spill.
    first = _start(residual, r_rows, cols, live, scale, N, R_COL, RESIDUAL, SCALED, ROWS, COLS)
    second = _start(residual, r_rows, more, live, scale, N, R_COL, RESIDUAL, SCALED, ROWS, COLS)
    # Both are K. LLVM unrolls a short loop whose end it knows, and then it spills.
    end = K if K >= 16 * DEPTH else depth
    for start in range(0, end, DEPTH):
        ks = start + tl.arange(0, DEPTH)
        inside = live[:, None]
        if not WHOLE_K:
            inside = inside & (ks < K)[None, :]
        slab = tl.load(a + a_rows[:, None] + ks[None, :] * A_COL, mask=inside, other=0.0)
        one = _transposed(w, cols, ks, N, W_COLS, W_N, W_K, WHOLE_K)
        other = _transposed(w + APART * W_N, cols, ks, END, W_COLS, W_N, W_K, WHOLE_K)
        first = add_product(first, slab, one, PRECISION)
        second = add_product(second, slab, other, PRECISION)

    if SCALED and not RESIDUAL:
        first = first * scale[:, None]
        second = second * scale[:, None]
    if SWIGLU:
        _store(out, o_rows, cols, live, first * tl.sigmoid(first) * second, N, O_COL)
    else:
        sums = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        if NORM == "rows":
            sums = tl.rsqrt(sums / N + EPS)
            first = first * sums[:, None]
            second = second * sums[:, None]
        _store(out, o_rows, cols, live, first, N, O_COL)
        _store(out, o_rows, more, live, second, N, O_COL)
        if KEEP:
            tl.store(kept + tile * M + rows, sums, mask=live)


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    squares: Tensor | None = None,
    eps: float = 1e-5,
    out: Tensor | None = None,
) -> Tensor:
    """rms(x) @ weight^T if `squares` are those of x's rows, x @ weight^T without.

    x [..., K] with one or two leading axes (any strides), weight [N, K] contiguous (its rows may be
    padded with zeros to a multiple of 16 columns), one dtype (bfloat16 or float32), one device;
    squares float32 [tiles, rows] as `linear_residual` leaves them. Returns a [..., N] (`out`, if
    given, which may be strided). Raises InvalidArgument on anything else.
    """
    n = _check("kernels.linear", x, weight, out)
    return _launch("kernels.linear", x, weight, n, out, squares=squares, eps=eps)


def gate_up_swiglu(
    x: Tensor,
    weight: Tensor,
    *,
    squares: Tensor | None = None,
    eps: float = 1e-5,
    out: Tensor | None = None,
) -> Tensor:
    """silu(x @ gate^T) * (x @ up^T) with weight [2F, K] holding gate, then up; else as `linear`."""
    op = "kernels.gate_up_swiglu"
    twice = _check(op, x, weight, out)
    if twice % 2:
        raise bad_argument(op, "weight", "an even number of rows: gate, then up", twice)
    return _launch(op, x, weight, twice // 2, out, squares=squares, eps=eps, swiglu=True)


def new_squares(rows: int, like: Tensor) -> Tensor:
    """Where `linear_residual` leaves the sums of squares of so many rows like those of `like`."""
    chip = tiles.chip(like.device)
    n = like.shape[-1]
    tile = tiles.product_tile(rows, n, n, like.element_size(), chip)
    return like.new_empty(-(-n // (2 * tile.cols)), rows, dtype=torch.float32)


def linear_residual(
    a: Tensor,
    weight: Tensor,
    residual: Tensor,
    sums: Tensor,
    *,
    squares: Tensor | None = None,
    eps: float = 1e-5,
    out: Tensor | None = None,
) -> Tensor:
    """rms(residual) + a @ weight^T, not normalised, its sums of squares into `sums`.

    The residual [..., N] is scaled if `squares` are those of its rows, else taken as it is; `sums`
    is of `new_squares`, and not `squares`. Else as `linear`.
    """
    op = "kernels.linear_residual"
    n = _check(op, a, weight, out, residual)
    if squares is sums:
        raise bad_argument(op, "sums", "another tensor than `squares`", "the same")
    return _launch(
        op, a, weight, n, out, residual=residual, squares=squares, kept=sums, norm="sums", eps=eps
    )


def linear_residual_rms(
    a: Tensor,
    weight: Tensor,
    residual: Tensor,
    *,
    eps: float = 1e-5,
    out: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """rms(residual + a @ weight^T) over the last axis, at most 1024 columns; else as `linear`.

    Writes the factors rsqrt(mean(x^2) + eps) into `scale` [...] (contiguous float32), if given.
    """
    op = "kernels.linear_residual_rms"
    n = _check(op, a, weight, out, residual)
    if n > MAX_WHOLE:
        raise bad_argument(op, "weight", f"at most {MAX_WHOLE} output columns", n)
    if scale is not None:
        checks.float32(op, "scale", scale, tuple(a.shape[:-1]))
        scale = scale.view(1, -1)
    return _launch(op, a, weight, n, out, residual=residual, kept=scale, norm="rows", eps=eps)


def dgrad(
    d_out: Tensor, weight: Tensor, *, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """residual + d_out @ weight with weight [K, N] (contiguous rows), as the forward's [out, in].

    d_out [..., K] and residual [..., N] as in `linear`; `out` may be `residual`.
    """
    op = "kernels.dgrad"
    checks.same_dtype_and_device(op, d_out=d_out, weight=weight, residual=residual, out=out)
    k, n = checks.matrix_of_rows(op, "weight", weight)
    if d_out.ndim not in (2, 3) or d_out.shape[-1] != k:
        raise bad_argument(op, "d_out", f"[M, {k}] or [B, R, {k}]", tuple(d_out.shape))
    return _launch(op, d_out, weight.T, n, out, residual=residual)


def _check(
    op: str, a: Tensor, weight: Tensor, out: Tensor | None, residual: Tensor | None = None
) -> int:
    """The number of the weight's rows."""
    checks.same_dtype_and_device(op, a=a, weight=weight, residual=residual, out=out)
    if a.ndim not in (2, 3):
        raise bad_argument(op, "a", "[M, K] or [B, R, K]", tuple(a.shape))
    return checks.weight_matrix(op, "weight", weight, a.shape[-1])[0]


def _launch(
    op: str,
    a: Tensor,
    w: Tensor,
    n: int,
    out: Tensor | None,
    *,
    residual: Tensor | None = None,
    squares: Tensor | None = None,
    kept: Tensor | None = None,
    **more: object,
) -> Tensor:
    expected = (*a.shape[:-1], n)
    if residual is not None:
        checks.shape(op, "residual", residual, expected)
    if out is None:
        out = a.new_empty(expected) if residual is None else torch.empty_like(residual)
    checks.shape(op, "out", out, expected)
    m = out.numel() // max(1, n)
    for name, given in (("squares", squares), ("sums", kept)):
        if given is not None:
            checks.float32(op, name, given, (given.shape[0], m))
    if out.numel() == 0:
        return out
    args, constants, options = launch_arguments(
        a, w, out, tiles.chip(a.device), residual=residual, squares=squares, kept=kept, **more
    )
    across = triton.cdiv(n, constants["COLS"] * (1 if constants["SWIGLU"] else 2))
    if kept is not None and kept.shape[0] != across:
        raise bad_argument(op, "sums", "a tensor of new_squares", tuple(kept.shape))
    linear_kernel[(triton.cdiv(m, constants["ROWS"]) * across,)](*args, **constants, **options)
    return out


def launch_arguments(
    a: Tensor,
    w: Tensor,
    out: Tensor,
    chip: tiles.Chip,
    *,
    residual: Tensor | None = None,
    squares: Tensor | None = None,
    kept: Tensor | None = None,
    swiglu: bool = False,
    norm: str = "no",
    eps: float = 0.0,
) -> Launch:
    """(runtime arguments, compile-time arguments, compiler options) of one launch.

    w [N, K'] with any strides; norm "no", "sums" (of squares into `kept`) or "rows" (normalised).
    """
    n, k, itemsize = out.shape[-1], a.shape[-1], a.element_size()
    around = out if residual is None else residual  # not read without RESIDUAL
    a3, r3, o3 = (t.unsqueeze(0) if t.ndim == 2 else t for t in (a, around, out))
    m = o3.shape[0] * o3.shape[1]
    flat = all(t.stride(0) == t.shape[1] * t.stride(1) for t in (a3, r3, o3))
    if norm == "rows":
        tile = tiles.row_tile(n, k, itemsize, chip)
    else:
        tile = tiles.product_tile(m, 2 * n if swiglu else n, k, itemsize, chip)
    constants = {
        "R": 0 if flat else o3.shape[1], "K": k, "N": n, "W_N": w.stride(0), "W_K": w.stride(1),
        "W_COLS": w.shape[1], "A_ROW": a3.stride(1), "A_COL": a3.stride(2),
        "R_ROW": r3.stride(1), "R_COL": r3.stride(2), "O_ROW": o3.stride(1), "O_COL": o3.stride(2),
        "SWIGLU": swiglu, "RESIDUAL": residual is not None, "NORM": norm, "KEEP": kept is not None,
        "PARTS": 0 if squares is None else squares.shape[0],
        "WIDTH": k if residual is None else n, "EPS": eps,
        "ROWS": tile.rows, "COLS": tile.cols, "DEPTH": tile.depth,
        "PRECISION": "ieee",  # read for fp32 only: tf32 would lose 13 of its 23 mantissa bits
    }  # fmt: skip
    args = (a, w, around, a if squares is None else squares, out, a if kept is None else kept)
    args += (m, k, a3.stride(0), r3.stride(0), o3.stride(0))
    return args, constants, tiles.options(tile)
