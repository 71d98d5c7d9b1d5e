"""The plans of kind "library" of backend "triton" (kernels/library.py): slices as of "tiled", eight
launches a block.

What is counted: products in cuBLAS's tiles with the idle multiprocessors of their last wave, and,
because launches run one after the other, on top of that what the launches between them move, and a
barrier each: all units drain and fill.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from recurx.nets import ATTENTION, BlockSpec
from recurx.operands import Span
from recurx.plan.count import blocks_of, ceil_div, flops, round_up, weight_values
from recurx.plan.device import Device
from recurx.plan.launch import LaunchPlan, Work
from recurx.problem import Problem
from recurx.program import lower

# Tiles of a product, and their share of the rate that the largest reaches; that, and attention's
# share (kernels/attention.py). Assumptions: 0.7 to 0.8 of the peak is published for large products.
TILES = ((128, 256, 1.0), (128, 128, 0.9), (64, 64, 0.6))
EFFICIENCY, ATTENTION_SHARE = 0.75, 0.6


def library(
    problem: Problem, device: Device, slices: tuple[int, ...], l2_share: float
) -> Iterator[LaunchPlan]:
    """A plan for each number of slices of the batch.

    Args:
        l2_share: share of the L2 that a slice's activations may take.
    """
    program = lower(problem.schedule, Span(0, len(problem.schedule)))
    specs, itemsize, tokens = dict(problem.nets), problem.dtype.itemsize, problem.tokens
    weights = weight_values(problem) * itemsize
    for size in sorted({ceil_div(problem.batch, n) for n in slices}, reverse=True):
        rows = size * tokens
        state, count = rows * problem.hidden, ceil_div(problem.batch, size)
        widest = max(
            2 * max(b.inner * tokens, b.token_inner * b.hidden) for b in blocks_of(problem)
        )
        held = itemsize * (program.slots + 1) * state + itemsize * size * widest
        stays = held + weights <= l2_share * device.l2_bytes
        padded, moved, launches = 0.0, 0.0, 2
        for call in program.rows:
            launches += not call.is_identity
            moved += (len(call.state) + len(call.inject) + 1) * state
            for block in specs[call.net].blocks if call.net is not None else ():
                launches += 8
                padded += sum(_product(*sizes, device) for sizes in _products(block, size, tokens))
                if block.kind == ATTENTION:
                    scores = 4 * rows * round_up(tokens, 64) * block.hidden
                    padded += EFFICIENCY / ATTENTION_SHARE * scores
                mixer = 4 * state if block.kind == ATTENTION else 3 * size * widest // 2
                moved += mixer + 6 * state + 3 * rows * block.inner
        entering = (4 * len(problem.schedule.states) + 2) * state * itemsize
        moved = moved * itemsize + entering
        work = Work(
            flops=flops(problem), padded_flops=padded * count,
            dram_bytes=(entering if stays else moved) * count + weights,
            l2_bytes=moved * count if stays else 0.0, launches=launches * count,
            barriers=launches * count, itemsize=itemsize, efficiency=EFFICIENCY, overlap=False,
        )  # fmt: skip
        why = f"{count} slice(s) of {size} sample(s), a graph of cuBLAS and pointwise kernels each"
        yield LaunchPlan("triton", "library", (("slice", size),), work, why)


def _products(block: BlockSpec, batch: int, tokens: int) -> tuple[tuple[int, int, int], ...]:
    """(M, N, K) of each."""
    d, m = block.hidden, batch * tokens
    if block.kind == ATTENTION:
        mixer = (m, 3 * d, d), (m, d, d)
    else:
        mixer = (batch * d, 2 * block.token_inner, tokens), (batch * d, tokens, block.token_inner)
    return (*mixer, (m, 2 * block.inner, d), (m, d, block.inner))


def _product(m: int, n: int, k: int, device: Device) -> float:
    """FLOPs of the waves that the best tile takes."""
    return min(
        math.ceil(ceil_div(m, rows) * ceil_div(n, cols) / device.units)
        * device.units * 2 * rows * cols * round_up(k, 16) / share
        for rows, cols, share in TILES
    )  # fmt: skip
