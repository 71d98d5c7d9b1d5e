"""x = x * rsqrt(sum(squares) / N + eps) in place: rows that a product left raw, normalised.

    x [M, N] in the storage dtype, squares [tiles, M] fp32 as kernels/linear.py leaves them; the
    factor of each row goes into `scale` [M] fp32, if asked for: the backward reads it

For who cannot wait for the next product's epilogue: the last call of a recursion, a token-MLP that
follows another block, and a forward whose backward multiplies by the normalised rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from recurx.errors import bad_argument

from . import checks, tiles


@triton.jit
def whole_rows(M, N: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A program's rows of N columns, which of them there are, where their elements lie, and which
    of these there are."""
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    live = rows < M
    at = rows.to(tl.int64)[:, None] * N + cols[None, :]
    return rows, live, at, live[:, None] & (cols[None, :] < N)


@triton.jit
def row_scale(squares, rows, live, M, PARTS: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """rsqrt(mean(x^2) + eps) of rows of WIDTH columns, from the sums that PARTS programs left."""
    total = tl.load(squares + rows, mask=live, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(squares + part * M + rows, mask=live, other=0.0)
    return tl.rsqrt(total / WIDTH + EPS)


@triton.jit
def normalise_kernel(
    x, squares, scale,
    M,
    N: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows, live, at, inside = whole_rows(M, N, ROWS, COLS)
    factor = row_scale(squares, rows, live, M, PARTS, N, EPS)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * factor[:, None]
    tl.store(x + at, value.to(x.dtype.element_ty), mask=inside)
    if KEEP:
        tl.store(scale + rows, factor, mask=live)


def normalise(
    x: torch.Tensor,
    squares: torch.Tensor,
    *,
    eps: float = 1e-5,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Replace x by rms(x), in place; returns it.

    x [..., N] contiguous, bfloat16 or float32; squares [tiles, rows] and scale [...] contiguous
    float32. Raises InvalidArgument on anything else.
    """
    op = "kernels.normalise"
    checks.same_dtype_and_device(op, x=x)
    if x.ndim < 2 or not x.is_contiguous():
        raise bad_argument(op, "x", "a contiguous [..., N]", f"strides {x.stride()}")
    checks.float32(op, "squares", squares, (squares.shape[0], x.numel() // max(1, x.shape[-1])))
    if scale is not None:
        checks.float32(op, "scale", scale, tuple(x.shape[:-1]))
    if x.numel():
        args, constants, options = launch_arguments(x, squares, scale, eps)
        normalise_kernel[(triton.cdiv(args[3], constants["ROWS"]),)](*args, **constants, **options)
    return x


def launch_arguments(
    x: torch.Tensor, squares: torch.Tensor, scale: torch.Tensor | None, eps: float
) -> tuple[tuple, dict, dict]:
    """(runtime arguments, compile-time arguments, compiler options) of one launch."""
    rows, cols = tiles.pass_tile(x.shape[-1])
    constants = {
        "N": x.shape[-1], "PARTS": squares.shape[0], "EPS": eps, "KEEP": scale is not None,
        "ROWS": rows, "COLS": cols,
    }  # fmt: skip
    kept = squares if scale is None else scale
    return (x, squares, kept, squares.shape[1]), constants, {"num_warps": 4}
