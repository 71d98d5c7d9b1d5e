"""The plan of backend "eager": the official code's operators, one after the other.

Bytes are counted from the operators that the official code runs, with their casts to fp32 and
back: 0.54 GB a sample and supervision step of TRM-att Sudoku, which a dispatch count confirms
(538 MB by this table), plus 1.15 GB of weight casts.

What holds for CPUs alone was measured stage by stage, by `recurx.profile` in processor time on one
core of a Zen 3: TRM, HRM and small nets, B from 1 to 256.
"""

from __future__ import annotations

from recurx.nets import ATTENTION, TOKEN_MLP
from recurx.plan.count import PRODUCTS, Stage, blocks_of, called_blocks, step_stages
from recurx.plan.device import AMX, Device
from recurx.plan.launch import LaunchPlan, Work
from recurx.problem import Problem

# Kernels of one block and of the sums before a call, counted in the official bf16 code on the way
# to 1,784 (TRM-att) and 1,238 (TRM-mlp) kernels a supervision step of 42 blocks.
OPERATORS = {ATTENTION: 41, TOKEN_MLP: 28}
OPERATORS_FP32 = {ATTENTION: 30, TOKEN_MLP: 21}  # without the casts
INJECT_OPERATORS = 2

# Bytes moved for each value that a stage writes, where that is not just reads plus writes: rms_norm
# and RoPE widen to fp32 and run 6 to 8 elementwise operators there. (bf16, fp32)
BYTES_PER_WRITE = {"norm": (38, 32), "t_norm": (38, 32), "rope": (52, 40)}
SWIGLU_BYTES = (10, 20)  # silu reads and writes, then a product of two

# Share of a copy's bandwidth that a CPU's elementwise operators reach: strides, exponentials, and
# fresh memory for every result (6 to 8 GB/s a thread beside a copy of 12).
CPU_BANDWIDTH = 0.6
# The same for tensors that a cache holds with their neighbours: a Xeon copies 8 MB at twice the
# rate of 64 MB. A larger cache (480 MB there) is many cores', and a core sees no more of it.
CACHED_BANDWIDTH, LARGEST_CACHE, TENSORS = 1.0, 32 << 20, 4
SPLIT_VALUES = 32768  # of one operator: PyTorch's grain; fewer values stay on one thread
# PyTorch's attention on a CPU beside its products, in FLOPs: for a score, and for a value of the
# result. Timed at T from 17 to 916: 4.5 ns a score and 0.25 us a row of 64, to 14 ps a FLOP.
SCORE, ATTENTION_VALUE = 70, 280
# Without bf16 instructions, a bf16 product of a transposed input (the token MLP's first) runs on
# one thread, at this share of the rate that one thread has else: 1.3 of 7.4 to 8.7 GFLOP/s.
TRANSPOSED = 0.155


def _bytes(stage: Stage, itemsize: int) -> float:
    column = 0 if itemsize == 2 else 1
    if stage.name in BYTES_PER_WRITE:
        return BYTES_PER_WRITE[stage.name][column] * stage.writes
    if stage.name.endswith("swiglu"):
        return SWIGLU_BYTES[column] * stage.writes
    # bf16 weights are cast from fp32 masters at every call: 4 bytes read, 2 written, 2 read.
    weight = 8 if itemsize == 2 else 4
    return weight * stage.weights + itemsize * (stage.reads + stage.writes)


def operators(problem: Problem) -> int:
    """PyTorch operators of one recursion."""
    counts = OPERATORS if problem.dtype.itemsize == 2 else OPERATORS_FP32
    most = max(counts.values())  # of a variant as many as of attention, and some for each field
    blocks = sum(
        most + 2 * len(block.changed) if block.changed else counts[block.kind]
        for block in called_blocks(problem)
    )
    steps = sum(INJECT_OPERATORS + 3 * len(step.changed) for step in problem.schedule.steps)
    return steps + blocks


def candidates(problem: Problem, device: Device) -> list[LaunchPlan]:
    """One plan: it runs anything, anywhere."""
    found = step_stages(problem)
    itemsize = 2 if problem.dtype.itemsize == 2 else 4
    if device.kind == "cpu":
        work = _on_cpu(problem, found, itemsize, device)
    else:
        flops = sum(stage.flops for stage in found)
        moved = sum(_bytes(s, itemsize) for s in found)
        work = Work(
            flops=flops, padded_flops=flops, dram_bytes=moved, l2_bytes=0,
            launches=operators(problem), itemsize=itemsize, overlap=False,
            from_python=device.kind == "cuda",
        )  # fmt: skip
    return [LaunchPlan("eager", "operators", (), work, "plain PyTorch, the reference")]


def _on_cpu(problem: Problem, found: list[Stage], itemsize: int, device: Device) -> Work:
    blocks = blocks_of(problem)
    heads = max([b.num_heads for b in blocks], default=0)
    matrix = itemsize == 2 and device.isa in AMX
    values = problem.batch * problem.tokens * problem.hidden
    widest = max([2 * b.inner / b.hidden for b in blocks], default=1.0)
    cache = min(device.l2_bytes, LARGEST_CACHE)
    cached = itemsize * values * widest * TENSORS <= cache
    products = vectors = packed = moved = 0.0
    for stage in found:
        if stage.name == "attention":
            scores = stage.writes * problem.tokens * heads / problem.hidden
            vectors += SCORE * scores + ATTENTION_VALUE * stage.writes
            products += stage.flops if matrix else 0.0
            vectors += 0.0 if matrix else stage.flops
            continue
        weights = (8 if itemsize == 2 else 4) * stage.weights
        share = CPU_BANDWIDTH / CACHED_BANDWIDTH if cached else 1.0
        moved += weights + share * (_bytes(stage, itemsize) - weights)
        if stage.name not in PRODUCTS:
            continue
        slow = 1.0
        if itemsize == 2 and device.bf16_tflops < device.fp32_tflops:
            slow = device.units / TRANSPOSED if stage.name == "t_gate_up" else 1.0
        products += slow * stage.flops
        if itemsize == 4:  # packing reads fp32 weights; bf16 ones are read to be cast
            moved -= itemsize * stage.weights
            packed += itemsize * stage.weights
    return Work(
        flops=sum(stage.flops for stage in found), padded_flops=products, vector_flops=vectors,
        dram_bytes=moved, bandwidth=CPU_BANDWIDTH, l2_bytes=packed, overlap=False,
        launches=operators(problem), itemsize=itemsize,
        splits=operators(problem) if values > SPLIT_VALUES else 0,
    )  # fmt: skip


def refusals(problem: Problem, device: Device) -> list[str]:
    return []
