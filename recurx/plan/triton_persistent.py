"""The plans of kind "persistent" of backend "triton" (kernels/recursion.py), with its thresholds.

A program owns `group` samples as one matrix of `rows` rows and streams all weights of a call past
it, so the L2 traffic of weights grows with the number of programs, and so does the speed until
every multiprocessor has one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from recurx.kernels.arena import rows_of
from recurx.nets import ATTENTION, BlockSpec
from recurx.operands import Span
from recurx.plan.count import blocks_of, flops, round_up, weight_values
from recurx.plan.device import Device
from recurx.plan.launch import LaunchPlan, Work
from recurx.problem import Problem
from recurx.program import lower

ROWS = (32, 64, 128)  # of a program; 16 would leave three warps of four without a tile
# Most rows by itemsize and width (D rounded up to a power of two). Accumulator, operand and scores
# share a block's registers; with more rows accumulators spill, as the compiled code for sm_80 and
# sm_90 says (thousands of spills; within these limits some addresses that live over a loop).
MOST_ROWS = {2: {32: 128, 64: 128, 128: 128, 256: 32}, 4: {32: 64, 64: 64}}
CHUNK = {2: 32, 4: 16}  # of the inner width, each a product of depth `chunk` with the down matrix
TOKEN_CHUNK = {2: 64, 4: 16}  # here it is the rows of a product: 64 for wgmma, 16 a warp for mma
# Share of the tensor rate. An assumption: one block of 4 to 8 warps a multiprocessor, and in the
# loop over heads products wait for their weights. Not measured.
EFFICIENCY = 0.25
SCRATCH_BYTES = 8192  # conversions between the layouts of products, beside the operands


def persistent(problem: Problem, device: Device) -> Iterator[LaunchPlan]:
    """A plan for each number of rows that holds a sample, alone and filled up with samples."""
    if why_not(problem, device) is not None:
        return
    hidden, itemsize = problem.hidden, problem.dtype.itemsize
    for rows in ROWS:
        most = _most_samples(problem, rows)
        for group in sorted({1, most}) if most else ():
            settings = launch_settings(hidden, rows, group, itemsize, device)
            if settings is None:
                continue
            programs = math.ceil(problem.batch / group)
            why = f"one launch, {programs} program(s) own {group} sample(s) each for all calls"
            work = _work(problem, dict(settings), programs, device)
            yield LaunchPlan("triton", "persistent", settings, work, why)


def why_not(problem: Problem, device: Device) -> str | None:
    """One sentence: why no plan of this kind fits, or None."""
    blocks, itemsize = blocks_of(problem), problem.dtype.itemsize
    if problem.tokens > ROWS[-1]:
        return f"persistent: a program holds at most {ROWS[-1]} tokens, got T={problem.tokens}"
    widest = max(MOST_ROWS[itemsize])
    if problem.hidden > widest:
        return f"persistent: for nets up to D={widest} in {problem.dtype}, got D={problem.hidden}"
    if len({block.eps for block in blocks}) > 1 or len({block.inner for block in blocks}) > 1:
        return "persistent: compiled for one inner width and one eps, these blocks differ"
    for kind in {block.kind for block in blocks}:
        if len({block for block in blocks if block.kind == kind}) > 1:
            return f"persistent: compiled for one shape of block, the {kind} blocks differ"
    fits = [rows for rows in ROWS if _most_samples(problem, rows)]
    if all(launch_settings(problem.hidden, r, 1, itemsize, device) is None for r in fits):
        return (
            f"persistent: T={problem.tokens} rows of D={problem.hidden} in {problem.dtype} do not "
            f"fit the registers and shared memory of one block on {device.name}"
        )
    return None


def _width(hidden: int) -> int:
    """D as the kernel pads it."""
    return 1 << (hidden - 1).bit_length()


def _most_samples(problem: Problem, rows: int) -> int:
    """Samples that fit `rows` rows; a token MLP mixes rows, so it has one a program."""
    if any(block.kind != ATTENTION for block in blocks_of(problem)):
        return int(problem.tokens <= rows)
    return min(rows // problem.tokens, problem.batch)


def launch_settings(
    hidden: int, rows: int, group: int, itemsize: int, device: Device
) -> tuple[tuple[str, int], ...] | None:
    """Every size of the launch, or None if it does not fit."""
    width = _width(hidden)
    if rows > MOST_ROWS[itemsize].get(width, 0):
        return None
    chunk = CHUNK[itemsize]
    for stages in (2, 1):  # of the loop over the inner width: gate, up and down of a chunk each
        shared = (rows + 3 * chunk * stages) * width * itemsize + SCRATCH_BYTES
        if shared <= device.shared_bytes:
            break
    else:
        return None
    # 16 rows a warp: with fewer the tensor-core layouts make warps repeat each other's products.
    # But at width 256 two warps cannot hold the operand, and fp32 has no such layouts.
    warps = 8 if itemsize == 4 or width > 128 else rows // 16
    return (
        ("rows", rows), ("group", group), ("chunk", chunk), ("token_chunk", TOKEN_CHUNK[itemsize]),
        ("head_stages", 1), ("stages", stages), ("warps", warps),
    )  # fmt: skip


def _work(problem: Problem, settings: dict[str, int], programs: int, device: Device) -> Work:
    program = lower(problem.schedule, Span(0, len(problem.schedule)))
    specs, itemsize = dict(problem.nets), problem.dtype.itemsize
    rows, width = settings["rows"], _width(problem.hidden)
    state = problem.batch * problem.tokens * problem.hidden * itemsize
    padded = l2 = 0.0
    for call in rows_of(program):
        l2 += (len(call.state) + len(call.inject) + 1) * state
        for block in specs[call.net].blocks if call.net is not None else ():
            padded += _block_flops(block, rows, width, settings)
            weights = sum(a * b for a, b in block.weight_shapes) * itemsize
            l2 += programs * weights + 4 * state
    slots = 2 * len(problem.schedule.states) + 1
    # Programs beyond a whole wave leave the other multiprocessors idle, which counts as padding.
    waves = math.ceil(programs / device.units)
    busy = programs if waves == 1 else waves * device.units
    return Work(
        flops=flops(problem),
        padded_flops=padded * busy,
        dram_bytes=2 * slots * state + weight_values(problem) * itemsize,
        l2_bytes=l2 + 2 * slots * state,
        launches=3,  # copy in, the recursion, copy out
        parallel=min(programs, device.units),
        itemsize=itemsize,
        efficiency=EFFICIENCY,
        from_python=True,
    )


def _block_flops(block: BlockSpec, rows: int, width: int, settings: dict[str, int]) -> float:
    """What one program multiplies for a block, padding included."""
    inner = round_up(block.inner, settings["chunk"])
    if block.kind == ATTENTION:
        mixer = 8 * rows * width * block.hidden + 4 * rows * rows * block.hidden
    else:
        mixer = 6 * rows * width * round_up(block.token_inner, settings["token_chunk"])
    return mixer + 6 * rows * width * inner
