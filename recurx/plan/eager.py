"""The plan of backend "eager": the official code's operators, one after the other.

Bytes are counted from the operators that the official code runs, with their casts to fp32 and
back: 0.54 GB a sample and supervision step of TRM-att Sudoku, which a dispatch count confirms
(538 MB by this table), plus 1.15 GB of weight casts.
"""

from __future__ import annotations

from recurx.nets import ATTENTION
from recurx.plan.count import Stage, step_stages
from recurx.plan.device import Device
from recurx.plan.launch import LaunchPlan, Work
from recurx.problem import Problem

# Kernels of one block and of the sums before a call, counted in the official bf16 code on the way
# to 1,784 (TRM-att) and 1,238 (TRM-mlp) kernels a supervision step of 42 blocks.
OPERATORS = {"attention": 41, "token_mlp": 28}
INJECT_OPERATORS = 2

# Bytes moved for each value that a stage writes, where that is not just reads plus writes: rms_norm
# and RoPE widen to fp32 and run 6 to 8 elementwise operators there. (bf16, fp32)
BYTES_PER_WRITE = {"norm": (38, 32), "t_norm": (38, 32), "rope": (52, 40)}
SWIGLU_BYTES = (10, 20)  # silu reads and writes, then a product of two


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
    specs = dict(problem.nets)
    total = 0
    for step in problem.schedule.steps:
        total += INJECT_OPERATORS
        for block in specs[step.net].blocks if step.net in specs else ():
            total += OPERATORS["attention" if block.kind == ATTENTION else "token_mlp"]
    return total


def candidates(problem: Problem, device: Device) -> list[LaunchPlan]:
    """One plan: it runs anything, anywhere."""
    found = step_stages(problem)
    itemsize = 2 if problem.dtype.itemsize == 2 else 4
    flops = sum(stage.flops for stage in found)
    # A CPU's products pack the weights anew at every call: that rate is the device's l2_gbs.
    packed = itemsize * sum(s.weights for s in found) if device.kind == "cpu" else 0
    work = Work(
        flops=flops, padded_flops=flops, dram_bytes=sum(_bytes(s, itemsize) for s in found),
        l2_bytes=packed, launches=operators(problem), itemsize=itemsize, overlap=False,
        from_python=device.kind == "cuda",
    )  # fmt: skip
    return [LaunchPlan("eager", "operators", (), work, "plain PyTorch, the reference")]


def refusals(problem: Problem, device: Device) -> list[str]:
    return []
