"""The plans of backend "triton" (recurx/backends/triton.py), and their thresholds.

persistent, library: see recurx/plan/triton_persistent.py and triton_library.py.
graph: what differs from TRM and HRM, by PyTorch's operators captured in a graph (graph_slice.py).
tiled: the batch is cut into slices whose activations stay in L2 for the whole recursion; a slice is
one captured graph of at most five kernels a block and one a call, and one at the end. Several slice
sizes are proposed, because the last wave of tiles is rarely full, and because one may be better off
outside L2 than in slices too small for the device; the predicted time decides.

What is counted: products with the padding of the tiles and with the idle multiprocessors of the
last wave; L2 traffic of every tile's operands; DRAM traffic of what enters and leaves.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from recurx.kernels import fields, tiles
from recurx.kernels.arena import rows_of, slots_of
from recurx.nets import ATTENTION, BlockSpec
from recurx.operands import Span
from recurx.plan import eager
from recurx.plan.count import blocks_of, flops, round_up, weight_values, why_not_heads
from recurx.plan.device import Device
from recurx.plan.launch import LaunchPlan, Work
from recurx.plan.triton_library import library
from recurx.plan.triton_persistent import persistent, why_not
from recurx.problem import Problem
from recurx.program import Program, lower

# Share of the L2 that a slice's activations may take; weights and what passes through need the
# rest. An assumption: caches hash addresses, so a working set of all of it does not stay.
L2_SHARE = 0.7
MAX_ROW = 1024  # values of a row, over D or T, that an rms's tile holds
HEAD_DIMS = (32, 64, 128)
MAX_TOKENS = 1024  # of attention
SLICES = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32, 48, 64)  # numbers of slices that are tried
# Samples of the largest slice: a recording keeps all its activations (110 MB at T=97, D=512).
MAX_SLICE = 128
# Share of the rate that the inner loops of Triton's products reach on whole tiles. An assumption
# (published figures of Triton's matmul on sm_80 and sm_90 are 0.6 to 0.8), not measured here.
EFFICIENCY = 0.65
# Of L2's bandwidth, what a few multiprocessors alone leave: an assumption, 64 B a clock.
ALONE = 0.5


def candidates(problem: Problem, device: Device) -> list[LaunchPlan]:
    """Plans that fit `device`."""
    if device.kind != "cuda" or problem.batch == 0:
        return []
    sizes = sorted(_sizes(problem), reverse=True)
    found = [_graph(problem, device, size) for size in sizes if problem.changed]
    if why_no_kernel(problem) is not None:
        return found
    found += library(problem, device, sizes, L2_SHARE)
    if problem.changed_blocks:
        return found
    found += persistent(problem, device)
    return found if why_not_tiled(problem) else [*_tiled(problem, device), *found]


def _graph(problem: Problem, device: Device, size: int) -> LaunchPlan:
    """PyTorch's operators in a graph: their traffic, and launches without Python."""
    count = math.ceil(problem.batch / size)
    slices = dataclasses.replace(problem, batch=size * count)
    work = eager.candidates(slices, device)[0].work
    work = dataclasses.replace(work, from_python=False, launches=work.launches * count)
    why = f"{count} slice(s) of {size} sample(s), a graph of PyTorch's operators each"
    return LaunchPlan("triton", "graph", (("slice", size),), work, why)


def refusals(problem: Problem, device: Device) -> list[str]:
    """One sentence for each kind of plan that does not fit."""
    if device.kind != "cuda":
        return [f"backend triton does not run on {device.name}"]
    if problem.batch == 0:
        return ["backend triton needs no plan for an empty batch"]
    if (reason := why_no_kernel(problem)) is not None:
        return [f"backend triton {reason}"]
    if problem.changed_blocks:
        return ["triton/tiled, triton/persistent: run blocks of TRM and HRM alone"]
    reasons = why_not(problem, device), why_not_tiled(problem)
    return [f"triton/{reason}" for reason in reasons if reason is not None]


def why_no_kernel(problem: Problem) -> str | None:
    """One sentence: why no kind but perhaps "graph" runs it, or None."""
    attends = any(block.kind == ATTENTION for block in blocks_of(problem))
    if (why := fields.why_not(problem)) is not None:
        return why
    if problem.tokens > (most := MAX_TOKENS if attends else fields.MAX_ROW_OVER_T):
        return f"runs up to T={most} tokens, got T={problem.tokens}"
    if problem.hidden > fields.MAX_ROW:
        return f"runs up to D={fields.MAX_ROW}, got D={problem.hidden}"
    return why_not_heads(problem, HEAD_DIMS, f"in {HEAD_DIMS}")


# ---- tiled -----------------------------------------------------------------------------------


def why_not_tiled(problem: Problem) -> str | None:
    """One sentence: why no plan of this kind fits, or None."""
    widest = max(size for b in blocks_of(problem) for size in (b.hidden, b.tokens))
    if widest > MAX_ROW:
        return f"tiled: a program holds rows of at most {MAX_ROW} values, got {widest}"
    return None


@dataclass(frozen=True)
class _Kernel:
    """One launch: programs, what a program multiplies, the bytes that all of them load from L2, and
    those of the activations that come from and go to DRAM if they do not stay in L2."""

    programs: int
    program_flops: float
    loaded: float
    read: float
    stored: float


def _sizes(problem: Problem) -> set[int]:
    """Samples of a slice that are tried."""
    return {min(MAX_SLICE, math.ceil(problem.batch / n)) for n in SLICES}


def _tiled(problem: Problem, device: Device) -> Iterator[LaunchPlan]:
    program = lower(problem.schedule, Span(0, len(problem.schedule)))
    sizes = _sizes(problem)
    sizes.add(min(problem.batch, MAX_SLICE, max(1, _samples_in_l2(problem, program, device))))
    for size in sorted(sizes, reverse=True):
        work = _tiled_work(problem, program, size, device)
        slices = math.ceil(problem.batch / size)
        kept = "kept in" if size <= _samples_in_l2(problem, program, device) else "more than"
        why = f"{slices} slice(s) of {size} sample(s), a graph of kernels each, {kept} L2"
        yield LaunchPlan("triton", "tiled", (("slice", size),), work, why)


def sample_bytes(problem: Problem, program: Program) -> int:
    """Bytes of one sample's states and intermediates in a slice."""
    widest = max(
        max(4 * problem.tokens * block.hidden, problem.tokens * block.inner)
        if block.kind == ATTENTION
        else max(block.hidden * block.token_inner, problem.tokens * block.inner)
        for block in blocks_of(problem)
    )
    values = slots_of(program) * problem.tokens * problem.hidden + widest
    return values * problem.dtype.itemsize


def _samples_in_l2(problem: Problem, program: Program, device: Device) -> int:
    """Samples of a slice whose activations stay in L2; beside the weights, if those leave room."""
    weights = weight_values(problem) * problem.dtype.itemsize
    room = L2_SHARE * device.l2_bytes
    room = room - weights if weights < room else room
    return int(room // sample_bytes(problem, program))


def _tiled_work(problem: Problem, program: Program, size: int, device: Device) -> Work:
    slices = math.ceil(problem.batch / size)
    itemsize = problem.dtype.itemsize
    specs = dict(problem.nets)
    state = size * problem.tokens * problem.hidden * itemsize
    weights = weight_values(problem) * itemsize
    # Weights that do not fit beside the activations come from DRAM anew at each call, and
    # activations that do not fit at all with each kernel.
    held = size * sample_bytes(problem, program)
    weights_stay = weights + held <= L2_SHARE * device.l2_bytes
    activations_stay = held <= L2_SHARE * device.l2_bytes
    padded = l2 = dram = 0.0
    launches, raw = 0, False  # whether the row before has left a state that is not normalised
    flops_a_byte = device.flops(itemsize) * EFFICIENCY / (device.l2_gbs * 1e9)
    for call in rows_of(program):
        if raw or not call.is_identity:
            launches += 1
            moved = (len(call.state) + len(call.inject) + 1) * state
            l2 += moved
            dram += 0 if activations_stay else moved
        raw = call.net is not None
        for number, block in enumerate(specs[call.net].blocks if raw else ()):
            if not weights_stay:
                dram += sum(a * b for a, b in block.weight_shapes) * itemsize
            kernels = _block_kernels(block, number > 0, size, problem.tokens, itemsize, device)
            for kernel in kernels:
                # A wave is as long as one program: as its products, or as its operands from L2, of
                # whose bandwidth a multiprocessor has its share, and twice that among idle ones.
                waves = math.ceil(kernel.programs / device.units)
                loading = min(1.0, max(ALONE, kernel.programs / device.units))
                waiting = loading * kernel.loaded / kernel.programs * flops_a_byte
                if kernel.program_flops:
                    padded += waves * device.units * max(kernel.program_flops, waiting)
                l2 += kernel.loaded + kernel.stored
                dram += 0 if activations_stay else kernel.read + kernel.stored
                launches += 1
    inputs = len(problem.schedule.states) + 1
    # States are copied in and out, and the last one is normalised.
    entering = 2 * (inputs + len(problem.schedule.states) + 1) * state
    return Work(
        flops=flops(problem),
        padded_flops=padded * slices,
        dram_bytes=(dram + entering) * slices + weights,
        l2_bytes=(l2 + entering) * slices,
        launches=(launches + 3) * slices,
        itemsize=itemsize,
        efficiency=EFFICIENCY,
    )


def _block_kernels(
    block: BlockSpec, raw: bool, batch: int, tokens: int, itemsize: int, device: Device
) -> Iterator[_Kernel]:
    """`raw`: whether the block before it has left its rows for this one to normalise."""
    d, chip = block.hidden, tiles.Chip(device.shared_bytes, device.units)
    m = batch * tokens
    if block.kind == ATTENTION:
        yield _product(m, d, 3 * d, itemsize, chip)
        yield _attention(batch, tokens, block, itemsize, device.shared_bytes)
        yield _product(m, d, d, itemsize, chip, residual=True)
    else:
        inner, state = block.token_inner, m * d * itemsize
        if raw:
            yield _Kernel(1, 0, state, state, state)
        yield _product(batch * d, tokens, inner, itemsize, chip, swiglu=True)
        tile = tiles.row_tile(tokens, inner, itemsize, chip)
        yield _product(batch * d, inner, tokens, itemsize, chip, residual=True, tile=tile)
    yield _product(m, d, block.inner, itemsize, chip, swiglu=True)
    yield _product(m, block.inner, d, itemsize, chip, residual=True)


def _product(
    m: int, k: int, n: int, itemsize: int, chip: tiles.Chip, *, swiglu: bool = False,
    residual: bool = False, tile: tiles.Tile | None = None,
) -> _Kernel:  # fmt: skip
    """A product that stores [m, n]; `swiglu`: of 2 n columns. A row's sums of squares, a few
    numbers for each tile, are not counted."""
    wide = 2 * n if swiglu else n
    tile = tile or tiles.product_tile(m, wide, k, itemsize, chip)
    programs = math.ceil(m / tile.rows) * math.ceil(wide / (2 * tile.cols))
    depth = round_up(k, tile.depth)
    around = m * n * itemsize if residual else 0
    loaded = programs * (tile.rows + 2 * tile.cols) * depth * itemsize + around
    flops = 4 * tile.rows * tile.cols * depth
    return _Kernel(programs, flops, loaded, m * k * itemsize + around, m * n * itemsize)


def _attention(batch: int, tokens: int, block: BlockSpec, itemsize: int, shared: int) -> _Kernel:
    tile = tiles.attention_tile(tokens, block.head_dim, itemsize, shared)
    rows, keys = math.ceil(tokens / tile.rows), round_up(tokens, tile.cols)
    programs = rows * batch * block.num_heads
    loaded = programs * (tile.rows + 2 * keys) * block.head_dim * itemsize
    stored = batch * tokens * block.hidden * itemsize
    return _Kernel(programs, 4 * tile.rows * keys * block.head_dim, loaded, 3 * stored, stored)
