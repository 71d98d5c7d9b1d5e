"""Where each halted slot finds its next sample in a ring, in one launch.

    index[i] = (cursor + number of halted slots before i) % capacity;   cursor += number of halted

    halted [B] uint8, cursor one int64, index [B] int64 (of slots that go on: any valid row)

One program of one warp walks over the slots, so that the ranks need no second pass and the cursor
is written by the only program that reads it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 256  # slots at a time, 8 a thread


@triton.jit
def queue_take_kernel(halted, cursor, index, B, CAPACITY: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.load(cursor)
    for start in range(0, B, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        ends = tl.load(halted + slot, mask=slot < B, other=0).to(tl.int64)
        before = tl.cumsum(ends, 0) - ends
        tl.store(index + slot, (at + before) % CAPACITY, mask=slot < B)
        at += tl.sum(ends, 0)
    tl.debug_barrier()  # every thread has read the cursor
    tl.store(cursor, at)


def queue_take(halted: torch.Tensor, cursor: torch.Tensor, capacity: int) -> torch.Tensor:
    """index [B] int64 for halted [B] bool; moves `cursor` (0-d int64), all on one device."""
    index = torch.empty(halted.shape, dtype=torch.int64, device=halted.device)
    if halted.numel():
        args, constants, options = launch_arguments(
            halted.contiguous().view(torch.uint8), cursor, index, capacity
        )
        with torch.cuda.device_of(halted):  # Triton launches on the current device
            queue_take_kernel[(1,)](*args, **constants, **options)
    return index


def launch_arguments(
    halted: torch.Tensor, cursor: torch.Tensor, index: torch.Tensor, capacity: int
) -> tuple[tuple, dict, dict]:
    """(runtime arguments, compile-time arguments, compiler options) of one launch."""
    constants = {"CAPACITY": capacity, "BLOCK": BLOCK}
    return (halted, cursor, index, halted.numel()), constants, {"num_warps": 1}
