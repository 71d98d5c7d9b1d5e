"""d_W = D^T X over all rows, in fp32 and added up over calls without atomics.

    D [M, N] the gradient of X @ W^T, X [M, K]; d_W [N, K]; partial [split, N, K] fp32

Rows are cut into steps of `depth`, steps into `split` fixed ranges. A program owns one tile of one
range's partial sum: it adds its rows to what earlier calls left there, so the sum over the calls of
a window costs one read and one write of the partial sums and no launch of its own. `wgrad_sum` adds
the ranges in their order, once a window. The same shape on the same device always adds in the same
order: reruns are bit-equal.

D and X may be 2-D, or 3-D [B, R, ...] with any strides and M = B * R rows. A step lies within one
sample, so that its addresses are one pointer and offsets that stay the same over the loop; where
strides allow it all rows count as one sample.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from recurx.errors import bad_argument

from . import backward_tiles, checks, tiles

SUM_BLOCK = 1024  # elements that a program of wgrad_sum adds


@triton.jit
def wgrad_kernel(
    d_out, x, partial,
    samples, R, span, d_batch, x_batch,
    N: tl.constexpr, K: tl.constexpr, FLAT: tl.constexpr, EVEN: tl.constexpr,
    D_ROW: tl.constexpr, D_COL: tl.constexpr, X_ROW: tl.constexpr, X_COL: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Tiles of one range run side by side and share its rows through the cache.
    across = tl.cdiv(K, COLS)
    tile = tl.program_id(0)
    ns = (tile // across) * ROWS + tl.arange(0, ROWS)
    ks = (tile % across) * COLS + tl.arange(0, COLS)
    part = tl.program_id(1)
    inside = (ns[:, None] < N) & (ks[None, :] < K)
    to = partial + part.to(tl.int64) * (N * K) + ns[:, None] * K + ks[None, :]

    acc = tl.zeros((ROWS, COLS), tl.float32)
    if ADD:
        acc += tl.load(to, mask=inside, other=0.0)
    row = tl.arange(0, DEPTH).to(tl.int64)
    d_at = d_out + row[:, None] * D_ROW + ns[None, :] * D_COL
    x_at = x + row[:, None] * X_ROW + ks[None, :] * X_COL
    # What is known to be inside has no mask: EVEN says that steps divide a sample.
    d_inside = (ns[None, :] < N) | (N % ROWS == 0)
    x_inside = (ks[None, :] < K) | (K % COLS == 0)
    steps = tl.cdiv(R, DEPTH)
    for step in range(part * span, tl.minimum(samples * steps, (part + 1) * span)):
        sample = 0 if FLAT else step // steps
        first = (step - sample * steps).to(tl.int64) * DEPTH
        d_first, x_first = first * D_ROW, first * X_ROW
        if not FLAT:
            d_first += sample.to(tl.int64) * d_batch
            x_first += sample.to(tl.int64) * x_batch
        live = (row[:, None] < R - first) | EVEN
        d_slab = tl.load(d_at + d_first, mask=live & d_inside, other=0.0)
        x_slab = tl.load(x_at + x_first, mask=live & x_inside, other=0.0)
        acc = tl.dot(tl.trans(d_slab), x_slab, acc, input_precision=PRECISION)
    tl.store(to, acc, mask=inside)


@triton.jit
def wgrad_sum_kernel(partial, out, numel, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < numel
    total = tl.load(partial + at, mask=live, other=0.0)
    for part in tl.static_range(1, SPLIT):
        total += tl.load(partial + part * numel + at, mask=live, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=live)


def new_partial(d_out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Uninitialised partial sums [split, N, K] fp32 for gradients of this shape."""
    n, k = d_out.shape[-1], x.shape[-1]
    m = d_out.numel() // n
    tile = backward_tiles.wgrad_tile(m, n, k, x.element_size(), tiles.shared_bytes(x.device))
    split = backward_tiles.wgrad_split(m, n, k, tile, tiles.multiprocessors(x.device))
    return torch.empty(split, n, k, dtype=torch.float32, device=x.device)


def wgrad(d_out: torch.Tensor, x: torch.Tensor, partial: torch.Tensor, *, add: bool) -> None:
    """Write d_out^T x into `partial` (of `new_partial`), or add it to what is there.

    d_out [..., N] and x [..., K] with the same one or two leading axes, any strides, one dtype
    (bfloat16 or float32), one device. Raises InvalidArgument on anything else.
    """
    op = "kernels.wgrad"
    checks.same_dtype_and_device(op, d_out=d_out, x=x)
    if d_out.ndim not in (2, 3) or d_out.shape[:-1] != x.shape[:-1]:
        got = f"{tuple(d_out.shape)} and x {tuple(x.shape)}"
        raise bad_argument(op, "d_out", "the leading axes of x, one or two", got)
    checks.float32(op, "partial", partial, (partial.shape[0], d_out.shape[-1], x.shape[-1]))
    shared = tiles.shared_bytes(x.device)
    args, constants, options = launch_arguments(d_out, x, partial, add, shared)
    across = triton.cdiv(constants["K"], constants["COLS"])
    grid = (triton.cdiv(constants["N"], constants["ROWS"]) * across, partial.shape[0])
    wgrad_kernel[grid](*args, **constants, **options)


def launch_arguments(
    d_out: torch.Tensor, x: torch.Tensor, partial: torch.Tensor, add: bool, shared: int
) -> tuple[tuple, dict, dict]:
    """(runtime arguments, compile-time arguments, compiler options) of one launch."""
    split, n, k = partial.shape
    d3, x3 = (t.unsqueeze(0) if t.ndim == 2 else t for t in (d_out, x))
    samples, rows = x3.shape[:2]
    m = samples * rows
    flat = all(samples == 1 or t.stride(0) == rows * t.stride(1) for t in (d3, x3))
    samples, rows = (1, m) if flat else (samples, rows)
    tile = backward_tiles.wgrad_tile(m, n, k, x.element_size(), shared)
    span = triton.cdiv(samples * triton.cdiv(rows, tile.depth), split)
    constants = {
        "N": n, "K": k, "FLAT": flat, "EVEN": rows % tile.depth == 0,
        "D_ROW": d3.stride(1), "D_COL": d3.stride(2),
        "X_ROW": x3.stride(1), "X_COL": x3.stride(2), "ADD": add,
        "ROWS": tile.rows, "COLS": tile.cols, "DEPTH": tile.depth, "PRECISION": "ieee",
    }  # fmt: skip
    args = (d_out, x, partial, samples, rows, span, d3.stride(0), x3.stride(0))
    return args, constants, tiles.options(tile)


def wgrad_sum(partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight gradient [N, K] in `dtype`: the partial sums added first to last."""
    split, n, k = partial.shape
    if split == 1 and dtype == torch.float32:
        return partial.view(n, k)
    out = torch.empty(n, k, dtype=torch.float32, device=partial.device)
    args, constants, options = sum_arguments(partial, out)
    wgrad_sum_kernel[(triton.cdiv(n * k, SUM_BLOCK),)](*args, **constants, **options)
    return out.to(dtype)


def sum_arguments(partial: torch.Tensor, out: torch.Tensor) -> tuple[tuple, dict, dict]:
    """(runtime arguments, compile-time arguments, compiler options) of one launch."""
    constants = {"SPLIT": partial.shape[0], "BLOCK": SUM_BLOCK}
    return (partial, out, out.numel()), constants, {"num_warps": 4}
