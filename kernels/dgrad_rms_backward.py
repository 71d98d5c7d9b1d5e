"""d_x = rms'(residual + D @ W) in one launch: a data gradient, and the rms that stands below it.

    d_y = residual + D @ W          the gradient of y = rms(x), which fed both the product and its
                                    residual; D [M, K], W [K, N] as stored, residual [M, N]
    d_x = scale * (d_y - y * mean(d_y * y))     with y [M, N] and scale [M] kept by the forward

The mirror of linear_residual_rms: a program owns `rows` whole rows, so d_y stays in registers from
the product to the store and is never written. Bytes: D, residual and y are read once, d_x is
written once. N is covered by up to four power-of-two chunks, which the epilogue takes one after the
other: three operands of all columns at once would spill.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from recurx.errors import bad_argument

from . import backward_tiles, checks, tiles

MAX_COLUMNS = 1024


@triton.jit
def _accumulate(
    acc, slab, w, cols, ks, K: tl.constexpr, N: tl.constexpr, W_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + slab @ W[ks, cols]."""
    inside = (ks[:, None] < K) & (cols[None, :] < N)
    w_slab = tl.load(w + ks[:, None] * W_ROW + cols[None, :], mask=inside, other=0.0)
    return tl.dot(slab, w_slab, acc, input_precision=PRECISION)


@triton.jit
def _load(tensor, offset, cols, live, N: tl.constexpr):
    inside = live[:, None] & (cols[None, :] < N)
    loaded = tl.load(tensor + offset[:, None] + cols[None, :], mask=inside, other=0.0)
    return loaded.to(tl.float32)


@triton.jit
def _store(d_x, offset, cols, live, d_y, y, factor, along, N: tl.constexpr):
    # y is read once more, from L2: beside the accumulator it does not fit the registers.
    inside = live[:, None] & (cols[None, :] < N)
    pointers = y + offset[:, None] + cols[None, :]
    again = tl.load(pointers, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    value = factor[:, None] * (d_y - again * along[:, None])
    pointers = d_x + offset[:, None] + cols[None, :]
    tl.store(pointers, value.to(d_x.dtype.element_ty), mask=inside)


@triton.jit
def dgrad_rms_backward_kernel(
    d_out, w, residual, y, scale, d_x,
    M,
    K: tl.constexpr, N: tl.constexpr, W_ROW: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNKS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < M
    d_rows = d_out + rows.to(tl.int64)[:, None] * K
    offset = rows.to(tl.int64) * N
    n0 = tl.arange(0, COLS)
    n1 = n0 + COLS
    n2 = n1 + COLS
    n3 = n2 + COLS

    acc0 = tl.zeros((ROWS, COLS), tl.float32)
    acc1 = tl.zeros((ROWS, COLS), tl.float32)
    acc2 = tl.zeros((ROWS, COLS), tl.float32)
    acc3 = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, K, DEPTH):
        ks = start + tl.arange(0, DEPTH)
        inside = live[:, None] & (ks[None, :] < K)
        slab = tl.load(d_rows + ks[None, :], mask=inside, other=0.0)
        acc0 = _accumulate(acc0, slab, w, n0, ks, K, N, W_ROW, PRECISION)
        if CHUNKS >= 2:
            acc1 = _accumulate(acc1, slab, w, n1, ks, K, N, W_ROW, PRECISION)
        if CHUNKS >= 3:
            acc2 = _accumulate(acc2, slab, w, n2, ks, K, N, W_ROW, PRECISION)
        if CHUNKS >= 4:
            acc3 = _accumulate(acc3, slab, w, n3, ks, K, N, W_ROW, PRECISION)

    # Masked columns hold 0 in every term, so they add nothing to the mean.
    acc0 += _load(residual, offset, n0, live, N)
    along = tl.sum(acc0 * _load(y, offset, n0, live, N), 1)
    if CHUNKS >= 2:
        acc1 += _load(residual, offset, n1, live, N)
        along += tl.sum(acc1 * _load(y, offset, n1, live, N), 1)
    if CHUNKS >= 3:
        acc2 += _load(residual, offset, n2, live, N)
        along += tl.sum(acc2 * _load(y, offset, n2, live, N), 1)
    if CHUNKS >= 4:
        acc3 += _load(residual, offset, n3, live, N)
        along += tl.sum(acc3 * _load(y, offset, n3, live, N), 1)
    along = along / N
    factor = tl.load(scale + rows, mask=live, other=0.0)

    _store(d_x, offset, n0, live, acc0, y, factor, along, N)
    if CHUNKS >= 2:
        _store(d_x, offset, n1, live, acc1, y, factor, along, N)
    if CHUNKS >= 3:
        _store(d_x, offset, n2, live, acc2, y, factor, along, N)
    if CHUNKS >= 4:
        _store(d_x, offset, n3, live, acc3, y, factor, along, N)


def dgrad_rms_backward(
    d_out: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    """The gradient of x where y = rms(x) fed `y @ weight^T` and a residual.

    All contiguous (of weight only the rows): d_out [..., K], weight [K, N], residual and y
    [..., N], scale float32 [...], N at most 1024; one dtype, bfloat16
    or float32, and one device. Raises InvalidArgument on anything else.
    """
    op = "kernels.dgrad_rms_backward"
    checks.same_dtype_and_device(op, d_out=d_out, weight=weight, residual=residual, y=y)
    k, n = checks.matrix_of_rows(op, "weight", weight)
    if n > MAX_COLUMNS:
        raise bad_argument(op, "weight", f"at most {MAX_COLUMNS} columns", n)
    for name, tensor, width in (("d_out", d_out, k), ("residual", residual, n), ("y", y, n)):
        checks.shape(op, name, tensor, (*d_out.shape[:-1], width))
        if not tensor.is_contiguous():
            raise bad_argument(op, name, "a contiguous tensor", f"strides {tensor.stride()}")
    checks.float32(op, "scale", scale, tuple(d_out.shape[:-1]))
    out = torch.empty_like(residual)
    if out.numel() == 0:
        return out
    args, constants, options = launch_arguments(
        d_out, weight, residual, y, scale, out, tiles.shared_bytes(d_out.device)
    )
    grid = (triton.cdiv(scale.numel(), constants["ROWS"]),)
    dgrad_rms_backward_kernel[grid](*args, **constants, **options)
    return out


def launch_arguments(
    d_out: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
    shared: int,
) -> tuple[tuple, dict, dict]:
    """(runtime arguments, compile-time arguments, compiler options) of one launch."""
    k, n = weight.shape
    tile = backward_tiles.wide_rows_tile(n, k, d_out.element_size(), shared)
    constants = {
        "K": k, "N": n, "W_ROW": weight.stride(0),
        "ROWS": tile.rows, "COLS": tile.cols, "CHUNKS": tile.chunks, "DEPTH": tile.depth,
        "PRECISION": "ieee",
    }  # fmt: skip
    args = (d_out, weight, residual, y, scale, out, out.numel() // n)
    return args, constants, tiles.options(tile)
