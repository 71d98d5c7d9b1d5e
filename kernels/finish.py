"""What is written by a call with factors, from what its net left; one launch.

    out = (1 - l) * out + l * rms(x) + noise          each product and sum rounded to the storage

x lies in the call's place, raw with its sums of squares or normalised (kernels/linear.py), `out` in
the slot that is written: the same without damping. Elements are read before they are written, by
the same thread. The noise is that of `recurx.noise`: of the call, the sample and the element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tiles
from .call_table import ROW, learned, load_factor, load_number
from .noise import normal_numbers
from .rms import row_scale, whole_rows


@triton.jit
def damped(table, row, value, old):
    """(1 - l) * old + l * value in the dtype of `old`, as the reference rounds it."""
    kept = (load_factor(table, row, 1) * old.to(tl.float32)).to(old.dtype)
    taken = (load_factor(table, row, 2) * value.to(tl.float32)).to(old.dtype)
    return (kept.to(tl.float32) + taken.to(tl.float32)).to(old.dtype)


@triton.jit
def noisy(table, row, value, seed, entry, element):
    """value + noise of the row's call, for elements of samples `entry`."""
    drawn = normal_numbers(seed, entry, load_number(table, row), element)
    noise = (load_factor(table, row, 3) * drawn).to(value.dtype)
    return (value.to(tl.float32) + noise.to(tl.float32)).to(value.dtype)


@triton.jit
def finish_kernel(
    x, out, table, row, squares, stream,
    M, T, share,
    D: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr, NOISY: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows, live, offset, mask = whole_rows(M, D, ROWS, COLS)
    value = tl.load(x + offset, mask=mask, other=0.0)
    if PARTS > 0:
        factor = row_scale(squares, rows, live, M, PARTS, D, EPS)[:, None]
        value = (value.to(tl.float32) * factor).to(value.dtype)
    if share is not None:  # in fp32, as PyTorch multiplies by a vector of it
        new, old = learned(share, D, COLS), tl.load(out + offset, mask=mask, other=0.0)
        value = ((1.0 - new) * old.to(tl.float32) + new * value.to(tl.float32)).to(value.dtype)
    elif tl.load(row + 2) != tl.load(row + 7):
        value = damped(table, row, value, tl.load(out + offset, mask=mask, other=0.0))
    if NOISY:
        entry = (rows // T)[:, None] + tl.load(stream + 1).to(tl.int32)
        cols = tl.arange(0, COLS)
        element = (rows % T)[:, None] * D + cols[None, :]
        value = noisy(table, row, value, tl.load(stream), entry, element)
    tl.store(out + offset, value, mask=mask)


def finish_call(
    x: torch.Tensor,
    out: torch.Tensor,
    table: torch.Tensor,
    call: int,
    *,
    stream: torch.Tensor | None,
    squares: torch.Tensor | None = None,
    eps: float = 0.0,
    share: torch.Tensor | None = None,
) -> None:
    """Write to `out` what call number `call` of the table makes of x, its net's result.

    x and out [B, T, D], contiguous, bfloat16 or float32, slots of one arena; table int32 as
    `call_table` makes it; `squares` [tiles, rows] float32 if x is raw; `stream` int64 [2], the seed
    and the number of the first sample, or None where the call has no noise; `share`
    float32 [D], a learned damping. Its one caller is kernels/tiled.py, which has made all of these;
    nothing is checked again.
    """
    if x.numel():
        args, constants, options = launch_arguments(
            x, out, table, call, stream, squares, eps, share
        )
        grid = (triton.cdiv(args[6], constants["ROWS"]),)
        finish_kernel[grid](*args, **constants, **options)


def launch_arguments(
    x: torch.Tensor,
    out: torch.Tensor,
    table: torch.Tensor,
    call: int,
    stream: torch.Tensor | None,
    squares: torch.Tensor | None,
    eps: float,
    share: torch.Tensor | None = None,
) -> tuple[tuple, dict, dict]:
    """(runtime arguments, compile-time arguments, compiler options) of one launch."""
    d = x.shape[-1]
    rows, cols = tiles.pass_tile(d)
    args = (x, out, table, table[call * ROW :], table if squares is None else squares)
    args += (table if stream is None else stream, x.numel() // d, x.shape[-2], share)
    constants = {
        "D": d, "PARTS": 0 if squares is None else squares.shape[0], "EPS": eps,
        "NOISY": stream is not None, "ROWS": rows, "COLS": cols,
    }  # fmt: skip
    return args, constants, {"num_warps": 4}
