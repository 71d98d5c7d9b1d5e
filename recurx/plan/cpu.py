"""The plan of backend "cpu": one call into the C++ engine (csrc/cpu/).

Whole samples go to threads, a group of them at once; those that are left over are split by columns
over teams of threads, with barriers between the stages.

The inner loop runs at the rate of PyTorch's large products (in processor time on one core of a Zen
3, 0.97 to 1.04 of it). What is not a product is counted in vector instructions of the source and
priced in FLOPs: two vector instructions start a cycle, and so do two multiply-adds, hence one
instruction costs a value 2 FLOPs. AMX and AVX-512 were not timed.
"""

from __future__ import annotations

import math

from recurx.nets import ATTENTION, BlockSpec
from recurx.plan.count import step_stages, weight_values
from recurx.plan.device import Device
from recurx.plan.launch import LaunchPlan, Work
from recurx.problem import Problem

GROUP_ROWS = {"amx": 390, "avx512": 390}  # RX_GROUP_ROWS of csrc/cpu/engine_*.cpp; else 200
ALIGN, PANEL = 32, 16  # columns of a product are padded to the first, scores to the second
# Depth of one sum: fp32 is cut at 128 (csrc/cpu/gemm.hpp, kSum), bf16 at 512.
SUM_DEPTH = {2: 512, 4: 128}
# A tile's start and end (clear, branch, first loads: about 50 cycles) as steps of its depth.
TILE_DEPTH = 8

# FLOPs a value: instructions x 2.
SWIGLU = 58  # exponential 17, division as long as 10, the rest 2
SOFTMAX = 40  # a score: maximum 2, exponential 17, sum 1
RESIDUAL = 10  # sum, square, scale, two stores
ROPE = 12
SUMS = 10  # a value of a call's input: loads, sums, store, and the state that leaves
TRANSPOSE = 36  # both ways, in blocks of 8 x 8
# A row's reduction over lanes, with its root or division: 45 cycles of 2 x 16 FLOPs.
ROW = 1440
BARRIERS_A_BLOCK = 5
# FLOPs of weights below which one thread does all. After every parallel operator PyTorch's own
# threads spin for milliseconds on the cores that the engine's need: 80 MFLOP between a model's
# embedding and heads took 4.1 to 7.6 ms on two threads and 1.9 ms on one (Zen 3).
LEAST_SPLIT = 1e8


def engine_threads(rows: int, weights: int, threads: int) -> int:
    """How many threads the engine takes.

    Args:
        rows: B * T.
        weights: values of all weights that the calls read, each call's counted.
        threads: how many there are.
    """
    return 1 if 2 * rows * weights < LEAST_SPLIT else threads


def candidates(problem: Problem, device: Device) -> list[LaunchPlan]:
    """One plan on a CPU, by whether there are samples enough for all threads."""
    if device.kind != "cpu":
        return []
    itemsize = 2 if problem.dtype.itemsize == 2 else 4
    stages = step_stages(problem)
    weights = sum(stage.weights for stage in stages)
    threads = engine_threads(problem.batch * problem.tokens, weights, device.units)
    each, left = divmod(problem.batch, threads)
    groups = threads * math.ceil(each / max(1, GROUP_ROWS.get(device.isa, 200) // problem.tokens))
    passes = groups + left
    specs = dict(problem.nets)
    blocks = [b for s in problem.schedule.steps if s.net in specs for b in specs[s.net].blocks]
    found = [_block(block, problem, itemsize) for block in blocks]
    sums = sum(stage.reads for stage in stages if stage.name == "inject")
    # Packed weights stream through once a net call and group, unseen from the last cache and at
    # the price of memory beyond it; activations stay in L2.
    cached = itemsize * weight_values(problem) <= device.l2_bytes
    streamed = itemsize * weights * passes
    work = Work(
        flops=sum(stage.flops for stage in stages),
        padded_flops=sum(products for products, _ in found),
        vector_flops=sum(vectors for _, vectors in found) + SUMS * sums,
        dram_bytes=0 if cached else streamed, l2_bytes=0, overlap=False,
        launches=1, from_python=True, parallel=threads,
        barriers=BARRIERS_A_BLOCK * len(blocks) if left else 0,
        # Without matrix instructions bf16 is a storage format: the engine multiplies in fp32.
        itemsize=2 if itemsize == 2 and device.isa == "amx" else 4,
    )  # fmt: skip
    kind = "columns" if each == 0 else "samples"
    settings = (("threads", threads), ("passes", passes))
    why = (
        "too few samples for all threads: each takes a share of the columns"
        if each == 0
        else "whole samples to each thread, no barrier"
    )
    return [LaunchPlan("cpu", kind, settings, work, why)]


def refusals(problem: Problem, device: Device) -> list[str]:
    return [] if device.kind == "cpu" else [f"backend cpu does not run on {device.name}"]


def _block(block: BlockSpec, problem: Problem, itemsize: int) -> tuple[float, float]:
    """(FLOPs of the padded products, FLOPs of all else) of one block."""
    batch, tokens, width = problem.batch, problem.tokens, block.hidden
    rows, depth = batch * tokens, SUM_DEPTH[itemsize]

    def product(m: float, k: int, n: int, align: int = ALIGN) -> float:
        return 2 * m * _up(n, align) * (k + TILE_DEPTH * math.ceil(k / depth))

    def swiglu(m: int, k: int, inner: int) -> tuple[float, float]:
        products = 2 * product(m, k, inner) + product(m, inner, k)
        return products, m * (SWIGLU * inner + RESIDUAL * k + ROW)

    products, vectors = swiglu(rows, width, block.inner)
    if block.kind != ATTENTION:
        more, values = swiglu(batch * width, tokens, block.token_inner)
        moved = TRANSPOSE * batch * width * _up(tokens, ALIGN)
        return products + more, vectors + values + moved
    head = block.head_dim
    queries = rows * block.num_heads
    products += product(rows, width, 3 * width) + product(rows, width, width)
    products += product(queries, head, tokens, PANEL) + product(queries, tokens, head, PANEL)
    vectors += rows * ((2 * ROPE + RESIDUAL) * width + ROW) + queries * (SOFTMAX * tokens + ROW)
    return products, vectors


def _up(n: int, to: int) -> int:
    return math.ceil(n / to) * to
