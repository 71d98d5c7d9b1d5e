"""d_x = scale * (d_out - y * mean(d_out * y)): the backward of y = rms(x), over D or over T.

    scale = rsqrt(mean(x^2) + eps), one a row, kept by the forward; y = scale * x
    y, d_out and d_x [M, N], or [B, R, N] with any strides; fp32 arithmetic

The forward keeps y and scale, which the next product reads anyway, and never x. A program owns
whole rows. Bytes: y and d_out are read once and d_x is written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from recurx.errors import bad_argument

from . import backward_tiles, checks, tiles

MAX_COLUMNS = 1024


@triton.jit
def rms_backward_kernel(
    y, scale, d_out, d_x,
    M, y_batch, d_batch, x_batch,
    R: tl.constexpr, N: tl.constexpr,
    Y_ROW: tl.constexpr, Y_COL: tl.constexpr,
    D_ROW: tl.constexpr, D_COL: tl.constexpr,
    X_ROW: tl.constexpr, X_COL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    live = rows < M
    inside = live[:, None] & (cols[None, :] < N)
    batch, row = (rows // R).to(tl.int64), (rows % R).to(tl.int64)
    y_g = y + (batch * y_batch + row * Y_ROW)[:, None] + cols[None, :] * Y_COL
    d_g = d_out + (batch * d_batch + row * D_ROW)[:, None] + cols[None, :] * D_COL
    normed = tl.load(y_g, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(d_g, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(scale + rows, mask=live, other=0.0)
    along = tl.sum(d * normed, 1) / N
    result = factor[:, None] * (d - normed * along[:, None])
    x_g = d_x + (batch * x_batch + row * X_ROW)[:, None] + cols[None, :] * X_COL
    tl.store(x_g, result.to(d_x.dtype.element_ty), mask=inside)


def rms_backward(
    y: torch.Tensor, scale: torch.Tensor, d_out: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The gradient of x where y = rms(x) over the last axis, from y and the factor of each row.

    y and d_out [..., N] with one or two leading axes (any strides), bfloat16 or float32, N at most
    1024; scale contiguous float32 of the leading axes. Returns `out` (new, laid out like `d_out`,
    if not given; it may be `d_out`). Raises InvalidArgument on anything else.
    """
    op = "kernels.rms_backward"
    checks.same_dtype_and_device(op, y=y, d_out=d_out, out=out)
    if y.ndim not in (2, 3) or not 0 < y.shape[-1] <= MAX_COLUMNS:
        expected = f"[M, N] or [B, R, N], N at most {MAX_COLUMNS}"
        raise bad_argument(op, "y", expected, tuple(y.shape))
    checks.shape(op, "d_out", d_out, tuple(y.shape))
    checks.float32(op, "scale", scale, tuple(y.shape[:-1]))
    out = torch.empty_like(d_out) if out is None else out
    checks.shape(op, "out", out, tuple(y.shape))
    if y.numel() == 0:
        return out
    args, constants, options = launch_arguments(y, scale, d_out, out)
    grid = (triton.cdiv(scale.numel(), constants["ROWS"]),)
    rms_backward_kernel[grid](*args, **constants, **options)
    return out


def launch_arguments(
    y: torch.Tensor, scale: torch.Tensor, d_out: torch.Tensor, out: torch.Tensor
) -> tuple[tuple, dict, dict]:
    """(runtime arguments, compile-time arguments, compiler options) of one launch."""
    y3, d3, x3 = (t.unsqueeze(0) if t.ndim == 2 else t for t in (y, d_out, out))
    tile = backward_tiles.rms_tile(y.shape[-1], y3.stride(1) == 1)
    m = y3.shape[0] * y3.shape[1]
    constants = {
        "R": y3.shape[1], "N": y3.shape[2],
        "Y_ROW": y3.stride(1), "Y_COL": y3.stride(2),
        "D_ROW": d3.stride(1), "D_COL": d3.stride(2),
        "X_ROW": x3.stride(1), "X_COL": x3.stride(2),
        "ROWS": tile.rows, "COLS": tile.cols,
    }  # fmt: skip
    args = (y, scale, d_out, out, m, y3.stride(0), d3.stride(0), x3.stride(0))
    return args, constants, tiles.options(tile)
