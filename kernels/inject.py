"""h = scale * sum(state) + (sum(inject)), the input of a net call, sums left to right, one launch.

    arena [slots, ...] holds x, the states and sums that are kept; h goes into one of its slots
    every partial sum is rounded to the storage dtype: the contract of recurx.reference.call_input

What is added is data, a row of the call table (kernels/call_table.py), so that one kernel serves
every schedule. Writing into a slot that is read is legal: an element is read before it is written,
by the same thread. A scale is compiled in where a program has one.

The slot that the call before was run in holds rows that are not normalised (kernels/linear.py):
they are normalised and rounded as they are read, and left so for whoever reads the slot later.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from recurx.errors import bad_argument

from . import checks, tiles
from .call_table import ROW, learned, load_factor
from .rms import row_scale, whole_rows


@triton.jit
def read_slot(arena, table, at, slot_stride, offset, mask, raw=None, factor=None):
    """Elements at `offset` of the slot that `table[at]` names, times `factor` if it is `raw`."""
    slot = tl.load(table + at).to(tl.int64)
    value = tl.load(arena + slot * slot_stride + offset, mask=mask, other=0.0)
    if raw is not None:
        normed = (value.to(tl.float32) * factor).to(value.dtype)
        value = tl.where(slot == raw, normed, value)
    return value


@triton.jit
def read_sum(arena, table, at, count, slot_stride, offset, mask, raw=None, factor=None):
    """The sum of `count` slots, left to right, rounded to the storage dtype after each."""
    total = read_slot(arena, table, at, slot_stride, offset, mask, raw, factor)
    for i in range(1, count):
        term = read_slot(arena, table, at + i, slot_stride, offset, mask, raw, factor)
        total = (total.to(tl.float32) + term.to(tl.float32)).to(arena.dtype.element_ty)
    return total


@triton.jit
def call_input(
    arena, table, row, slot_stride, offset, mask, SCALED: tl.constexpr, raw=None, factor=None,
    each=None,
):  # fmt: skip
    """scale * sum(state) + (sum(inject)) of the call whose row starts at `row`; `each`: a learned
    scale's values of the columns."""
    at, states, injects = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    h = read_sum(arena, table, at, states, slot_stride, offset, mask, raw, factor)
    if SCALED:
        h = (load_factor(table, row, 0) * h.to(tl.float32)).to(arena.dtype.element_ty)
    if each is not None:
        h = (each * h.to(tl.float32)).to(arena.dtype.element_ty)
    if injects > 0:
        at += states
        inject = read_sum(arena, table, at, injects, slot_stride, offset, mask, raw, factor)
        h = (h.to(tl.float32) + inject.to(tl.float32)).to(arena.dtype.element_ty)
    return h


@triton.jit
def call_input_kernel(
    arena, table, row, before, squares,
    M, slot_stride, scale,
    D: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr, SCALED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows, live, offset, mask = whole_rows(M, D, ROWS, COLS)
    write = tl.load(row + 2).to(tl.int64)
    each = None if scale is None else learned(scale, D, COLS)
    if PARTS > 0:
        raw = tl.load(before + 2)
        factor = row_scale(squares, rows, live, M, PARTS, D, EPS)[:, None]
        h = call_input(arena, table, row, slot_stride, offset, mask, SCALED, raw, factor, each)
        if raw != write:
            left = read_slot(arena, before, 2, slot_stride, offset, mask, raw, factor)
            tl.store(arena + raw.to(tl.int64) * slot_stride + offset, left, mask=mask)
    else:
        h = call_input(arena, table, row, slot_stride, offset, mask, SCALED, each=each)
    tl.store(arena + write * slot_stride + offset, h, mask=mask)


def form_call_input(
    arena: torch.Tensor,
    table: torch.Tensor,
    call: int,
    *,
    before: int | None = None,
    squares: torch.Tensor | None = None,
    eps: float = 0.0,
    scaled: bool = False,
    scale: torch.Tensor | None = None,
) -> None:
    """Write the input of call number `call` of the table into the slot that the call runs in.

    arena contiguous [slots, ..., D], bfloat16 or float32; table int32 as `call_table` makes it, on
    the same device; `scaled`: the row has factors, and of them its scale counts, or instead of
    it the learned `scale`, float32 [D]. If call number
    `before` has left raw rows in the slot it wrote, `squares` [tiles, rows] are theirs; afterwards
    the slot is normalised. Raises InvalidArgument on anything else.
    """
    op = "kernels.form_call_input"
    checks.same_dtype_and_device(op, arena=arena)
    if arena.ndim < 2 or not arena.is_contiguous():
        raise bad_argument(op, "arena", "a contiguous [slots, ...]", f"strides {arena.stride()}")
    if table.dtype != torch.int32 or table.device != arena.device or not table.is_contiguous():
        expected = f"contiguous int32 on {arena.device}"
        raise bad_argument(op, "table", expected, f"{table.dtype} on {table.device}")
    if squares is not None:
        rows = arena[0].numel() // max(1, arena.shape[-1])
        checks.float32(op, "squares", squares, (squares.shape[0], rows))
    if scale is not None:
        checks.float32(op, "scale", scale, arena.shape[-1:])
    if arena[0].numel():
        args, constants, options = launch_arguments(
            arena, table, call, before, squares, eps, scaled, scale
        )
        grid = (triton.cdiv(args[5], constants["ROWS"]),)
        call_input_kernel[grid](*args, **constants, **options)


def launch_arguments(
    arena: torch.Tensor,
    table: torch.Tensor,
    call: int,
    before: int | None = None,
    squares: torch.Tensor | None = None,
    eps: float = 0.0,
    scaled: bool = False,
    scale: torch.Tensor | None = None,
) -> tuple[tuple, dict, dict]:
    """(runtime arguments, compile-time arguments, compiler options) of one launch."""
    d = arena.shape[-1]
    rows, cols = tiles.pass_tile(d)
    args = (arena, table, table[call * ROW :], table[(before or 0) * ROW :])
    args += (table if squares is None else squares, arena[0].numel() // d, arena.stride(0), scale)
    parts = 0 if squares is None else squares.shape[0]
    constants = {
        "D": d, "PARTS": parts, "EPS": eps, "SCALED": scaled and scale is None, "ROWS": rows,
        "COLS": cols,
    }  # fmt: skip
    return args, constants, {"num_warps": 4}
