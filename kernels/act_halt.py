"""Which samples halt after a supervision step, with exploration, in one launch.

    halted = (steps >= most | q_halt > bar) & (steps >= least),   bar = 0, or q_continue where given
    least = 2 + r1 % (most - 1) with probability `share`, else 0

    steps [B] int32 (this step included), q_halt and q_continue [B] fp32, halted [B] uint8

The random numbers are Philox 4x32-10 of (seed; first + slot, count): they depend on nothing
else, so a captured launch draws new ones as the count on the device goes on, and every device draws
the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 256


@triton.jit
def act_halt_kernel(
    steps, q_halt, q_continue, state, halted, B, threshold, first,
    MOST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < B
    seed, count = tl.load(state), tl.load(state + 1)
    zero = slot * 0
    low = zero + (count & 0x7FFFFFFF).to(tl.int32)
    high = zero + (count >> 31).to(tl.int32)
    r0, r1, _r2, _r3 = tl.philox(seed, first + slot, low, high, zero)
    explores = (r0 >> 8).to(tl.int32) < threshold
    least = tl.where(explores, 2 + (r1 >> 8).to(tl.int32) % (MOST - 1), 0)

    taken = tl.load(steps + slot, mask=inside, other=0)
    want = tl.load(q_halt + slot, mask=inside, other=0.0)
    bar = tl.load(q_continue + slot, mask=inside, other=0.0) if q_continue is not None else 0.0
    ends = ((taken >= MOST) | (want > bar)) & (taken >= least)
    tl.store(halted + slot, ends.to(tl.uint8), mask=inside)


def act_halt(
    steps: torch.Tensor,
    q_halt: torch.Tensor,
    q_continue: torch.Tensor | None,
    state: torch.Tensor,
    most: int,
    threshold: int,
    first: int = 0,
) -> torch.Tensor:
    """[B] bool; shapes as above, contiguous on one device, state int64 [2] = (seed, count).

    threshold: explore where 24 random bits are below it. first: number of the first slot.
    Checked by `recurx.models.exploration`.
    """
    halted = torch.empty(steps.shape, dtype=torch.bool, device=steps.device)
    if steps.numel():
        args, constants, options = launch_arguments(
            steps, q_halt, q_continue, state, halted.view(torch.uint8), most, threshold, first
        )
        grid = (triton.cdiv(steps.numel(), BLOCK),)
        with torch.cuda.device_of(steps):  # Triton launches on the current device
            act_halt_kernel[grid](*args, **constants, **options)
    return halted


def launch_arguments(
    steps: torch.Tensor,
    q_halt: torch.Tensor,
    q_continue: torch.Tensor | None,
    state: torch.Tensor,
    halted: torch.Tensor,
    most: int,
    threshold: int,
    first: int = 0,
) -> tuple[tuple, dict, dict]:
    """(runtime arguments, compile-time arguments, compiler options) of one launch."""
    args = (steps, q_halt, q_continue, state, halted, steps.numel(), threshold, first)
    return args, {"MOST": most, "BLOCK": BLOCK}, {"num_warps": 4}
