"""The plans of kind "library" of backend "triton" (kernels/library.py), eight launches a block.

What is counted: products in tiles of cuBLAS's, with the idle multiprocessors of the last wave; and,
as launches run one after the other, on top of that what those between products move, and a barrier
each, for all units drain and fill.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from recurx.kernels.arena import rows_of, slots_of
from recurx.nets import ATTENTION, BlockSpec
from recurx.operands import Span
from recurx.plan.count import blocks_of, ceil_div, flops, round_up, weight_values
from recurx.plan.device import Device
from recurx.plan.launch import LaunchPlan, Work
from recurx.problem import Problem
from recurx.program import lower

# Tiles, and what share of the large ones' rate they reach; that, and attention's. Assumptions: of
# large products 0.7 to 0.8 of the peak is published.
TILES = ((128, 256, 1.0), (128, 128, 0.9), (64, 64, 0.6))
EFFICIENCY, ATTENTION_SHARE = 0.75, 0.6


def library(
    problem: Problem, device: Device, sizes: Iterable[int], l2_share: float
) -> Iterator[LaunchPlan]:
    """A plan for slices of each of these sizes; activations may take `l2_share` of the L2."""
    program = lower(problem.schedule, Span(0, len(problem.schedule)))
    specs, itemsize, tokens = dict(problem.nets), problem.dtype.itemsize, problem.tokens
    weights = weight_values(problem) * itemsize
    widest = max(2 * max(b.inner * tokens, b.token_inner * b.hidden) for b in blocks_of(problem))
    for size in sorted(sizes, reverse=True):
        rows, count = size * tokens, ceil_div(problem.batch, size)
        state = rows * problem.hidden
        held = itemsize * ((slots_of(program) + 1) * state + size * widest)
        padded, moved, launches = 0.0, 0.0, 2
        for call in rows_of(program):
            launches += not call.is_identity
            moved += (len(call.state) + len(call.inject) + 1) * state
            for block in specs[call.net].blocks if call.net is not None else ():
                launches += 2 * len(block.products) + 4 * bool(block.changed)
                padded += _products(block, size, tokens, device)
                mixer = 3 * size * block.token_inner * block.hidden
                moved += (mixer or 4 * state) + 6 * state + 3 * rows * block.inner
        entering = (4 * len(problem.schedule.states) + 2) * state * itemsize
        moved, stays = moved * itemsize + entering, held + weights <= l2_share * device.l2_bytes
        work = Work(
            flops=flops(problem), padded_flops=padded * count,
            dram_bytes=(entering if stays else moved) * count + weights,
            l2_bytes=moved * count if stays else 0.0, launches=launches * count,
            barriers=launches * count, itemsize=itemsize, efficiency=EFFICIENCY, overlap=False,
        )  # fmt: skip
        why = f"{count} slice(s) of {size} sample(s), a graph of cuBLAS and pointwise kernels each"
        yield LaunchPlan("triton", "library", (("slice", size),), work, why)


def _products(block: BlockSpec, batch: int, tokens: int, device: Device) -> float:
    """FLOPs of a block's products and attention, idle multiprocessors counted."""
    d, m, rows_of_t = block.hidden, batch * tokens, {"t_gate_up": batch * block.hidden}
    sizes = [(rows_of_t.get(s, m), d if s == "t_down" else n, k) for s, n, k in block.products]
    width = block.num_heads * block.head_dim if block.kind == ATTENTION else 0
    attention = 4 * m * round_up(block.line(tokens), 64) * width
    return attention * EFFICIENCY / ATTENTION_SHARE + sum(
        min(
            round_up(ceil_div(m, rows) * ceil_div(n, cols), device.units)
            * 2 * rows * cols * round_up(k, 16) / share
            for rows, cols, share in TILES
        )
        for m, n, k in sizes
    )  # fmt: skip
