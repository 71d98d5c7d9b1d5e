"""What is left of a block beside its products, one launch each: for kernels/library.py.

    add_rms            out = rms(residual + product)                    over D or over T
    add_rms_backward   d_x = scale * (d - y * mean(d * y)),  d = d_out + product
    swiglu             gate <- silu(gate) * up
    swiglu_backward    gate, up, d_middle <- d_gate, d_up, silu(gate) * up

bf16 or fp32 storage, fp32 arithmetic: products come rounded to the storage dtype, as PyTorch's do,
and are added in fp32. A program holds whole rows; over T a row is a column of [T, D], and
neighbours are read together. A result may lie in the place of an operand.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from recurx.errors import bad_argument

from . import checks

BLOCK = 1024  # elements a program of the SwiGLU's: 8 a thread, one 16-byte access of bf16
TILE = 2048  # elements of an rms's program, unless its least rows have more
TOGETHER = 8  # least rows over T in a program: 16 bytes of bf16
MAX_COLUMNS, MAX_TOKENS = 4096, 2048  # a row over D, over T: 64 elements a thread, 3 operands
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _load(x, at, inside):
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _tile(M, R: tl.constexpr, N: tl.constexpr, OVER_T: tl.constexpr, ROWS: tl.constexpr,
          COLS: tl.constexpr):  # fmt: skip
    """A program's rows, where its elements lie, and which of them there are."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols, wide = tl.arange(0, COLS)[None, :], rows.to(tl.int64)[:, None]
    at = wide * N + cols
    if OVER_T:  # R columns a sample
        at = wide // R * (R * N) + wide % R + cols * R
    return rows, at, (rows < M)[:, None] & (cols < N)


@triton.jit
def add_rms_kernel(
    residual, product, out, scale, M, EPS: tl.constexpr, KEEP: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, OVER_T: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows, at, inside = _tile(M, R, N, OVER_T, ROWS, COLS)
    x = _load(residual, at, inside) + _load(product, at, inside)
    factor = tl.rsqrt(tl.sum(x * x, 1) / N + EPS)
    tl.store(out + at, (x * factor[:, None]).to(out.dtype.element_ty), mask=inside)
    if KEEP:
        tl.store(scale + rows, factor, mask=rows < M)


@triton.jit
def add_rms_backward_kernel(
    y, scale, d_out, product, d_x, M, ADD: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, OVER_T: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows, at, inside = _tile(M, R, N, OVER_T, ROWS, COLS)
    normed, d = _load(y, at, inside), _load(d_out, at, inside)
    if ADD:
        d += _load(product, at, inside)
    along = tl.sum(d * normed, 1) / N
    factor = tl.load(scale + rows, mask=rows < M, other=0.0)
    result = factor[:, None] * (d - normed * along[:, None])
    tl.store(d_x + at, result.to(d_x.dtype.element_ty), mask=inside)


@triton.jit
def _half(R, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Where a program's elements of [R, WIDTH] lie, as gates of [R, 2 WIDTH] and there, and which
    of them there are."""
    across: tl.constexpr = (WIDTH + COLS - 1) // COLS
    rows = (tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    cols = (tl.program_id(0) % across * COLS + tl.arange(0, COLS))[None, :]
    return rows * (2 * WIDTH) + cols, rows * WIDTH + cols, (rows < R) & (cols < WIDTH)


@triton.jit
def swiglu_kernel(gate_up, R, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    at, _, inside = _half(R, WIDTH, ROWS, COLS)
    gate, up = _load(gate_up, at, inside), _load(gate_up, at + WIDTH, inside)
    middle = gate * tl.sigmoid(gate) * up
    tl.store(gate_up + at, middle.to(gate_up.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    gate_up, d_middle, R, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    at, place, inside = _half(R, WIDTH, ROWS, COLS)
    gate, up = _load(gate_up, at, inside), _load(gate_up, at + WIDTH, inside)
    d = _load(d_middle, place, inside)
    sigmoid = tl.sigmoid(gate)
    d_gate = d * up * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))
    dtype = gate_up.dtype.element_ty
    tl.store(gate_up + at, d_gate.to(dtype), mask=inside)
    tl.store(gate_up + at + WIDTH, (d * gate * sigmoid).to(dtype), mask=inside)
    tl.store(d_middle + place, (gate * sigmoid * up).to(dtype), mask=inside)


# ---- launches: contiguous bfloat16 or float32 of one device, else InvalidArgument ----------------


def add_rms(
    residual: Tensor, product: Tensor, out: Tensor, eps: float, *, over_tokens: bool = False,
    scale: Tensor | None = None,
) -> None:  # fmt: skip
    """out = rms(residual + product) over D or over T, all [B, T, D]; the factors of the rows,
    [B, T] or [B, D] float32, go into `scale` if that is given."""
    grid, m, sizes = _rows("add_rms", over_tokens, scale, residual, product, out)
    if m:
        args = residual, product, out, out if scale is None else scale, m
        add_rms_kernel[grid](*args, EPS=eps, KEEP=scale is not None, **sizes)


def add_rms_backward(
    y: Tensor, scale: Tensor, d_out: Tensor, product: Tensor | None, *, over_tokens: bool = False
) -> Tensor:
    """The gradient of x where y = rms(x), from that of y, d_out (+ product), and the factors that
    `add_rms` wrote; all but those [B, T, D]."""
    d_x, added = torch.empty_like(y), product is not None
    grid, m, sizes = _rows("add_rms_backward", over_tokens, scale, y, d_out, product)
    if m:
        args = y, scale, d_out, product if added else d_out, d_x, m
        add_rms_backward_kernel[grid](*args, ADD=added, **sizes)
    return d_x


def _rows(op: str, over_tokens: bool, scale: Tensor | None, *tensors: Tensor | None) -> Any:
    """(grid, rows, compile-time arguments and options) of a launch over rows."""
    given = {f"tensor {n}": t for n, t in enumerate(tensors) if t is not None}
    checks.same_dtype_and_device(f"kernels.{op}", **given)
    first = given["tensor 0"]
    for name, tensor in given.items():
        checks.shape(op, name, tensor, tuple(first.shape))
        if tensor.ndim != 3 or not tensor.is_contiguous():
            raise bad_argument(op, name, "contiguous [B, T, D]", f"strides {tensor.stride()}")
    batch, tokens, hidden = first.shape
    n, r = (tokens, hidden) if over_tokens else (hidden, tokens)
    if n > (MAX_TOKENS if over_tokens else MAX_COLUMNS):
        raise bad_argument(op, "tensor 0", f"rows of {MAX_COLUMNS}, over T {MAX_TOKENS}", n)
    if scale is not None:
        checks.float32(op, "scale", scale, (batch, r))
    cols = triton.next_power_of_2(n)
    rows = max(TILE // cols, TOGETHER if over_tokens else 1)
    sizes = {"R": r, "N": n, "OVER_T": over_tokens, "ROWS": rows, "COLS": cols, **OPTIONS}
    sizes["num_warps"] = 4 if rows * cols <= 2 * TILE else 8
    return (triton.cdiv(batch * r, rows),), batch * r, sizes


def swiglu(gate_up: Tensor, rows: int, d_middle: Tensor | None = None) -> None:
    """Of `rows` equal rows, replace gate, the first half of each, by silu(gate) * up.

    With `d_middle`, half as large, backward: gate, up and d_middle become their gradients and that
    product.
    """
    op, count = "kernels.swiglu", gate_up.numel() // 2
    checks.same_dtype_and_device(op, gate_up=gate_up, d_middle=d_middle)
    half = gate_up[:0] if d_middle is None else d_middle
    fits = gate_up.is_contiguous() and half.is_contiguous() and half.numel() in (0, count)
    if not fits or gate_up.numel() % (2 * max(1, rows)):
        got = f"{tuple(gate_up.shape)}, {tuple(half.shape)}"
        raise bad_argument(op, "gate_up", f"contiguous, {rows} rows, d_middle half of it", got)
    if count:
        width = count // rows
        even = min(width & -width, BLOCK)  # columns that no edge cuts, where those are enough
        cols = even if even >= BLOCK // 8 else min(BLOCK, triton.next_power_of_2(width))
        sizes = {"WIDTH": width, "ROWS": BLOCK // cols, "COLS": cols, **OPTIONS}
        grid = (triton.cdiv(rows, BLOCK // cols) * triton.cdiv(width, cols),)
        if d_middle is None:
            swiglu_kernel[grid](gate_up, rows, **sizes)
        else:
            swiglu_backward_kernel[grid](gate_up, d_middle, rows, **sizes)
