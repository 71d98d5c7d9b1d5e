"""h = sum(state) + (sum(inject)), the input of a net call: each sum left to right, one launch.

    arena [slots, ...] holds x, the states and sums that are kept; h goes into one of its slots
    every partial sum is rounded to the storage dtype: the contract of recurx.reference.call_input

What is added is data, a row of the call table (recurx/program.py), so that one kernel serves
every schedule. Writing into a slot that is read is legal: an element is read before it is written,
by the same thread.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from recurx.errors import bad_argument
from recurx.program import ROW

from . import checks

BLOCK = 1024  # elements a program: 8 a thread, one 16-byte access of bf16


@triton.jit
def read_slot(arena, table, at, slot_stride, offset, mask):
    """The elements at `offset` of the slot that `table[at]` names."""
    slot = tl.load(table + at).to(tl.int64)
    return tl.load(arena + slot * slot_stride + offset, mask=mask, other=0.0)


@triton.jit
def read_sum(arena, table, at, count, slot_stride, offset, mask):
    """The sum of `count` slots, left to right, rounded to the storage dtype after each."""
    total = read_slot(arena, table, at, slot_stride, offset, mask)
    for i in range(1, count):
        term = read_slot(arena, table, at + i, slot_stride, offset, mask)
        total = (total.to(tl.float32) + term.to(tl.float32)).to(arena.dtype.element_ty)
    return total


@triton.jit
def call_input(arena, table, row, slot_stride, offset, mask):
    """sum(state) + (sum(inject)) of the call whose row starts at `row`."""
    at, states, injects = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    h = read_sum(arena, table, at, states, slot_stride, offset, mask)
    if injects > 0:
        inject = read_sum(arena, table, at + states, injects, slot_stride, offset, mask)
        h = (h.to(tl.float32) + inject.to(tl.float32)).to(arena.dtype.element_ty)
    return h


@triton.jit
def call_input_kernel(arena, table, row, n, slot_stride, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < n
    h = call_input(arena, table, row, slot_stride, offset, mask)
    write = tl.load(row + 2).to(tl.int64)
    tl.store(arena + write * slot_stride + offset, h, mask=mask)


def form_call_input(arena: torch.Tensor, table: torch.Tensor, call: int) -> None:
    """Write the input of call number `call` of the table into the slot that the call writes.

    arena contiguous [slots, ...], bfloat16 or float32; table int32 as `Program.table` makes it,
    on the same device. Raises InvalidArgument on anything else.
    """
    op = "kernels.form_call_input"
    checks.same_dtype_and_device(op, arena=arena)
    if arena.ndim < 2 or not arena.is_contiguous():
        raise bad_argument(op, "arena", "a contiguous [slots, ...]", f"strides {arena.stride()}")
    if table.dtype != torch.int32 or table.device != arena.device or not table.is_contiguous():
        expected = f"contiguous int32 on {arena.device}"
        raise bad_argument(op, "table", expected, f"{table.dtype} on {table.device}")
    if arena[0].numel():
        args, constants, options = launch_arguments(arena, table, call)
        call_input_kernel[(triton.cdiv(args[3], BLOCK),)](*args, **constants, **options)


def launch_arguments(
    arena: torch.Tensor, table: torch.Tensor, call: int
) -> tuple[tuple, dict, dict]:
    """(runtime arguments, compile-time arguments, compiler options) of one launch."""
    args = (arena, table, table[call * ROW :], arena[0].numel(), arena.stride(0))
    return args, {"BLOCK": BLOCK}, {"num_warps": 4}
