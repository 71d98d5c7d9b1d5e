"""The plan of backend "cpu": one call into the C++ engine (csrc/cpu/).

Whole samples go to threads, a group of them at once; those that are left over are split by columns
over teams of threads, with barriers between the stages.

The inner loop runs at the rate of PyTorch's large products: in processor time on one core, 0.97 to
1.04 of it on a Zen 3, 0.9 with AVX-512 on a Xeon (Granite Rapids), half of that by `TILE_DEPTH`.
What is not a product is counted in vector instructions of the source and priced in FLOPs: two
vector instructions start a cycle, and so do two multiply-adds, hence one instruction costs a value
2 FLOPs.

PyTorch's bf16 products say little about AMX: at 97 rows they take three times as long as ours. A
tile product of 16 x 16 x 32 takes 16 cycles, in which AVX-512 does 1,024 FLOPs of 16,384, so
matrix units run at 16 times the rate of fp32. The rest was timed stage by stage on one thread of
the Xeon: TRM, HRM and ARC.

With AVX512_BF16 and no AMX they say what both cores of the engine reach, which do products of pairs
at twice the rate of multiply-adds. PyTorch's fp32 products do not: on a Zen 5 they stay at 40 % of
it, where its bf16 ones and both cores come to 92 %.
"""

from __future__ import annotations

import math

from recurx.measure import BARRIERS
from recurx.nets import ATTENTION, BlockSpec
from recurx.plan.count import called_blocks, round_up, step_stages, weight_values
from recurx.plan.device import AMX, WIDE, Device
from recurx.plan.launch import LaunchPlan, Work
from recurx.problem import Problem

DOT = "avx512_bf16"
GROUP_ROWS = dict.fromkeys(WIDE, 390)  # RX_GROUP_ROWS of csrc/cpu/engine_*.cpp; else 200
ALIGN, PANEL = 32, 16  # columns of a product are padded to the first, scores to the second
PANEL_WIDE = 32  # with AVX-512 and AMX
# RX_ROW_TILE; else 4.
ROW_TILE = {"avx2": 6, "neon": 12, "neon_bf16": 12, "neon_bfmmla": 12, **dict.fromkeys(WIDE, 14)}
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

# ---- AMX and AVX-512, timed on a Xeon at 172 GFLOP/s of fp32 a thread ----

MATRIX = 16  # tile products: times the rate of fp32
# Share of it without epilogues and stores: 6.9 to 7.5 ns a tile product, 5.1 from registers alone.
TILES = 0.7
# amx_split: six tile products for one of fp32, 14 loads of tiles where 24 are. Reckoned.
SPLIT = MATRIX / 6 * TILES
# FLOPs of a value that leaves the tiles and is stored and loaded again, 0.22 to 0.26 ns (qkv, o,
# gate-up); its vector instructions run beside the tiles. Further chunks of the depth are only
# stored and loaded.
TURN, TURN_CHUNK = 40, 20
SOFTMAX_AMX = 80  # a score: 0.54 ns with its products in rows of 916
# A row of scores, one dependent step after another (two reductions, a division, a masked vector):
# 59 ns, 160 cycles of 2 x 32 FLOPs, by rows of 97 against rows of 916.
ROW_WIDE = 10000
# AVX512_BF16, on a Zen 5: exponentials and reciprocals to bf16's accuracy; in either type rows of
# scores that overlap.
SWIGLU_DOT, SOFTMAX_DOT, ROW_DOT = 30, 28, 5000
# Share of the last cache's bandwidth at which prefetches bring weights: 12 GB/s of 28, as 16 fill
# buffers and their latency allow. What does not come while products run is waited for: with AMX at
# one sample about a fifth of the time, with AVX-512 nothing.
PREFETCHED = 0.43

# ----

# FLOPs of weights below which one thread does all. After every parallel operator PyTorch's own
# threads spin for milliseconds on the cores that the engine's need: 80 MFLOP between a model's
# embedding and heads took 4.1 to 7.6 ms on two threads and 1.9 ms on one (Zen 3). Since then the
# engine runs on those threads itself; where the limit belongs now was not timed.
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
    groups = threads * math.ceil(each / _group_samples(device.isa, problem.tokens))
    passes = groups + left
    blocks = called_blocks(problem)
    found = [_block(block, problem, itemsize, device.isa) for block in blocks]
    sums = sum(stage.reads for stage in stages if stage.name == "inject")
    # Packed weights stream through once a net call and group: from the last cache while products
    # run, from memory at its price (on a Zen 5 HRM's 54 MB cost nothing beside the products).
    # Activations stay in L2.
    amx = itemsize == 2 and device.isa in AMX
    products = sum(products for products, _ in found)
    # The rate of multiply-adds as a multiple of PyTorch's fp32 products.
    fma = max(1.0, device.flops(2) / device.flops(4) / 2) if device.isa == DOT else 1.0
    efficiency = MATRIX * TILES if amx else fma * (2 if itemsize == 2 and device.isa == DOT else 1)
    if itemsize == 4 and device.isa == "amx_split":
        efficiency = SPLIT
    busy = min(1.0, threads / device.units)
    streamed, share = itemsize * weights * passes, 1.0
    cached = itemsize * weight_values(problem) <= device.l2_bytes
    if cached or device.isa == DOT:
        share = PREFETCHED * device.stream_gbs * busy / device.dram_gbs if cached else 1.0
        seconds = products / (device.flops(4) * busy * efficiency)
        streamed = max(0.0, streamed - 1e9 * device.dram_gbs * share * seconds) if share else 0.0
        share = share or 1.0  # 0: not measured, and never seen
    work = Work(
        flops=sum(stage.flops for stage in stages),
        padded_flops=products,
        vector_flops=(sum(vectors for _, vectors in found) + SUMS * sums) / fma,
        dram_bytes=streamed, bandwidth=share, l2_bytes=0, overlap=False,
        launches=1, from_python=True, parallel=threads,
        barriers=BARRIERS * len(blocks) if left else 0,
        # Without instructions for it bf16 is a storage format: the engine multiplies in fp32.
        itemsize=4, efficiency=efficiency,
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


def _block(block: BlockSpec, problem: Problem, itemsize: int, isa: str) -> tuple[float, float]:
    """(FLOPs of the padded products, FLOPs of all else) of one block."""
    batch, tokens, width = problem.batch, problem.tokens, block.hidden
    depth = SUM_DEPTH[itemsize]
    amx, dot = itemsize == 2 and isa in AMX, itemsize == 2 and isa == DOT
    # Rows are cut into tiles of R or R - 1: those of a group, and the queries of a sample.
    tile = 1 if amx else ROW_TILE.get(isa, 4)
    samples = max(1, min(batch, _group_samples(isa, tokens)))
    rows = batch * _tiled(samples * tokens, tile) / samples
    panel, row = (PANEL_WIDE, ROW_WIDE) if isa in WIDE else (PANEL, ROW)
    softmax, silu = SOFTMAX_AMX if amx else SOFTMAX, SWIGLU
    if isa == DOT:
        row = ROW_DOT
        softmax, silu = (SOFTMAX_DOT, SWIGLU_DOT) if dot else (softmax, silu)

    def product(m: float, k: int, n: int, align: int = ALIGN) -> float:
        start = 0 if amx else 2 * TILE_DEPTH if dot else TILE_DEPTH * math.ceil(k / depth)
        return 2 * m * round_up(n, align) * (k + start)

    def after(m: float, k: int, n: int, each: float) -> float:
        """Vectors of m x n results of depth k, `each` FLOPs a value."""
        if amx:
            each = TURN + TURN_CHUNK * (math.ceil(k / depth) - 1)
        return m * n * each

    def swiglu(m: float, k: int, inner: int) -> tuple[float, float]:
        products = 2 * product(m, k, inner) + product(m, inner, k)
        vectors = after(m, k, inner, silu) + after(m, inner, k, RESIDUAL)
        return products, vectors + m * ROW

    if block.changed:  # the middle's activation, and a pass over h for each product and norm
        found = [
            (product(batch * width if name.startswith("t_") else rows, inside, out),
             after(rows, inside, out, RESIDUAL))
            for name, out, inside in block.products
        ]  # fmt: skip
        products, vectors = (sum(part) for part in zip((0, 0), *found, strict=True))
        vectors += rows * (block.inner * silu + 4 * (width * RESIDUAL + ROW))
        if block.kind == ATTENTION:
            queries, line = batch * tokens * block.num_heads, block.line(tokens)
            tiled = queries * _tiled(line, tile) / line
            products += 2 * product(tiled, block.head_dim, line, panel)
            vectors += queries * (softmax * line + row + ROPE * block.head_dim)
        return products, vectors
    products, vectors = swiglu(rows, width, block.inner)
    if block.kind != ATTENTION:
        more, values = swiglu(batch * width, tokens, block.token_inner)
        moved = TRANSPOSE * batch * width * round_up(tokens, ALIGN)
        return products + more, vectors + values + moved
    head = block.head_dim
    queries = batch * tokens * block.num_heads
    tiled = queries * _tiled(tokens, tile) / tokens
    products += product(rows, width, 3 * width) + product(rows, width, width)
    products += product(tiled, head, tokens, panel) + product(tiled, tokens, head, panel)
    vectors += after(rows, width, 3 * width, 2 * ROPE / 3) + after(rows, width, width, RESIDUAL)
    vectors += rows * ROW + queries * (softmax * tokens + row)
    return products, vectors


def _group_samples(isa: str, tokens: int) -> int:
    return max(1, GROUP_ROWS.get(isa, 200) // tokens)


def _tiled(rows: int, tile: int) -> int:
    """Rows that tiles of `tile` rows or one less compute, or one or two smaller ones."""
    few = 5 * tile // 8 + 1
    if tile > 1 and (rows <= few or tile < rows <= 2 * few):
        return few * math.ceil(rows / few)
    tiles = math.ceil(rows / tile)
    return tiles * tile - min(tiles, tiles * tile - rows)
