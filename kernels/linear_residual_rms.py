"""out = rms(residual + A @ W^T) in one launch: the tail of attention, SwiGLU and token-MLP.

    rms(x) = x * rsqrt(mean(x^2) + eps) over the N columns, in fp32, no weight
    A [M, K], W [N, K], residual and out [M, N]; bf16 or fp32 storage, fp32 accumulation

One program owns `rows` whole rows, so the mean of squares needs no second pass: the accumulator
stays in registers from the product to the store. W is streamed in slabs of `depth` columns. N need
not be a power of two: it is covered by up to three power-of-two chunks (`tiles.split_columns`).

A, residual and out may be 2-D, or 3-D [B, R, N] with any strides and M = B * R rows; the token-MLP
passes `h.transpose(1, 2)` ([B, D, T]) and so normalises over T without a copy. `out` may be
`residual`: a program reads its rows before it writes them. For the backward it can keep `scale` [M]
fp32, the rsqrt of each row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from recurx.errors import bad_argument

from . import checks, tiles
from .products import add_product

MAX_COLUMNS = 1024  # beyond it a row's accumulator no longer fits the registers of a block


@triton.jit
def _accumulate(
    acc, a_slab, w, cols, ks, W_ROW: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr
):
    """acc + a_slab @ W[cols, ks]^T."""
    inside = (cols[None, :] < N) & (ks[:, None] < W_ROW)
    w_slab = tl.load(w + cols[None, :] * W_ROW + ks[:, None], mask=inside, other=0.0)
    return add_product(acc, a_slab, w_slab, PRECISION)


@triton.jit
def _load_residual(residual, row_offset, cols, live, N: tl.constexpr, COL: tl.constexpr):
    inside = live[:, None] & (cols[None, :] < N)
    return tl.load(residual + row_offset[:, None] + cols[None, :] * COL, mask=inside, other=0.0)


@triton.jit
def _store(out, row_offset, cols, live, value, N: tl.constexpr, COL: tl.constexpr):
    inside = live[:, None] & (cols[None, :] < N)
    pointers = out + row_offset[:, None] + cols[None, :] * COL
    tl.store(pointers, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def linear_residual_rms_kernel(
    a, w, residual, out, kept,
    M, a_batch, r_batch, o_batch,
    R: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W_ROW: tl.constexpr, EPS: tl.constexpr,
    A_ROW: tl.constexpr, A_COL: tl.constexpr,
    R_ROW: tl.constexpr, R_COL: tl.constexpr,
    O_ROW: tl.constexpr, O_COL: tl.constexpr, KEEP_SCALE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNKS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < M
    batch, row = (rows // R).to(tl.int64), (rows % R).to(tl.int64)
    a_rows = a + (batch * a_batch + row * A_ROW)[:, None]
    n0 = tl.arange(0, COLS)
    n1 = n0 + COLS
    n2 = n1 + COLS

    acc0 = tl.zeros((ROWS, COLS), tl.float32)
    acc1 = tl.zeros((ROWS, COLS), tl.float32)
    acc2 = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, K, DEPTH):
        ks = start + tl.arange(0, DEPTH)
        inside = live[:, None] & (ks[None, :] < K)
        slab = tl.load(a_rows + ks[None, :] * A_COL, mask=inside, other=0.0)
        acc0 = _accumulate(acc0, slab, w, n0, ks, W_ROW, N, PRECISION)
        if CHUNKS == 3:
            acc1 = _accumulate(acc1, slab, w, n1, ks, W_ROW, N, PRECISION)
            acc2 = _accumulate(acc2, slab, w, n2, ks, W_ROW, N, PRECISION)

    # Masked columns hold 0 in both terms, so they add nothing to the sum of squares.
    r_rows = batch * r_batch + row * R_ROW
    acc0 += _load_residual(residual, r_rows, n0, live, N, R_COL).to(tl.float32)
    squares = tl.sum(acc0 * acc0, 1)
    if CHUNKS == 3:
        acc1 += _load_residual(residual, r_rows, n1, live, N, R_COL).to(tl.float32)
        acc2 += _load_residual(residual, r_rows, n2, live, N, R_COL).to(tl.float32)
        squares += tl.sum(acc1 * acc1, 1) + tl.sum(acc2 * acc2, 1)
    scale = tl.rsqrt(squares / N + EPS)
    if KEEP_SCALE:
        tl.store(kept + rows, scale, mask=live)
    scale = scale[:, None]

    o_rows = batch * o_batch + row * O_ROW
    _store(out, o_rows, n0, live, acc0 * scale, N, O_COL)
    if CHUNKS == 3:
        _store(out, o_rows, n1, live, acc1 * scale, N, O_COL)
        _store(out, o_rows, n2, live, acc2 * scale, N, O_COL)


def linear_residual_rms(
    a: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    *,
    eps: float = 1e-5,
    out: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """rms(residual + a @ weight^T) over the last axis.

    a [..., K] and residual [..., N] with one or two leading axes (any strides), weight [N, K]
    contiguous (its rows may be padded with zeros to a multiple of 16 columns), N at most 1024; all
    of one dtype, bfloat16 or float32, on one device. Returns `out` (new, laid out like `residual`,
    if not given), and writes the rms's factor of each row into `scale` (contiguous float32 of
    residual's leading axes), if given. Raises InvalidArgument on anything else.
    """
    _check(a, weight, residual, out, scale)
    out = torch.empty_like(residual) if out is None else out
    if residual.numel() == 0:
        return out
    args, constants, options = launch_arguments(
        a, weight, residual, out, eps, tiles.shared_bytes(a.device), scale
    )
    m = residual.numel() // residual.shape[-1]
    linear_residual_rms_kernel[(triton.cdiv(m, constants["ROWS"]),)](*args, **constants, **options)
    return out


def launch_arguments(
    a: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    out: torch.Tensor,
    eps: float,
    shared: int,
    scale: torch.Tensor | None = None,
) -> tuple[tuple, dict, dict]:
    """(runtime arguments, compile-time arguments, compiler options) of one launch.

    `shared` is the shared memory (bytes) a block of the device may use.
    """
    n, k = weight.shape[0], a.shape[-1]
    tile = tiles.row_tile(n, k, a.element_size(), shared)
    a3, r3, o3 = (t.unsqueeze(0) if t.ndim == 2 else t for t in (a, residual, out))
    kept = out if scale is None else scale
    args = (a, weight, residual, out, kept, r3.shape[0] * r3.shape[1])
    args += (a3.stride(0), r3.stride(0), o3.stride(0))
    constants = {
        "R": r3.shape[1], "K": k, "N": n, "W_ROW": weight.stride(0), "EPS": eps,
        "A_ROW": a3.stride(1), "A_COL": a3.stride(2),
        "R_ROW": r3.stride(1), "R_COL": r3.stride(2),
        "O_ROW": o3.stride(1), "O_COL": o3.stride(2), "KEEP_SCALE": scale is not None,
        "ROWS": tile.rows, "COLS": tile.cols, "CHUNKS": tile.chunks, "DEPTH": tile.depth,
        "PRECISION": "ieee",  # read for fp32 only: tf32 would lose 13 of its 23 mantissa bits
    }  # fmt: skip
    return args, constants, tiles.options(tile)


def _check(
    a: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    out: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> None:
    op = "kernels.linear_residual_rms"
    checks.same_dtype_and_device(op, a=a, weight=weight, residual=residual, out=out)
    if a.ndim not in (2, 3):
        raise bad_argument(op, "a", "[M, K] or [B, R, K]", tuple(a.shape))
    n, _ = checks.weight_matrix(op, "weight", weight, a.shape[-1])
    if n > MAX_COLUMNS:
        raise bad_argument(op, "weight", f"at most {MAX_COLUMNS} output columns", n)
    checks.shape(op, "residual", residual, (*a.shape[:-1], n))
    if out is not None:
        checks.shape(op, "out", out, (*a.shape[:-1], n))
    if scale is not None:
        checks.float32(op, "scale", scale, tuple(a.shape[:-1]))
