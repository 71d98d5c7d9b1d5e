"""What a device can do, as plain numbers: read from it, measured on it, or published.

NOTE: the rates of GPUs are the makers' peaks for dense products. No GPU figure of this file was
measured by recurx; predictions made from them are models until a result file says otherwise.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from recurx import measure
from recurx.errors import bad_argument
from recurx.hashing import hash_once


@hash_once
@dataclass(frozen=True)
class Device:
    """One processor, as plans see it.

    Args:
        name: short name, a key of `DEVICES` or the processor's own.
        kind: "cuda" or "cpu".
        capability: CUDA compute capability; (0, 0) for a CPU.
        units: multiprocessors, or threads that compute.
        shared_bytes: shared memory that one block may use; 0 for a CPU.
        l2_bytes: the cache that all units share (L2 of a GPU, L3 of a CPU); 0 if unknown.
        dram_gbs, l2_gbs: bandwidths, GB/s; the first of a copy, read and write counted; the second
            on a CPU is the rate at which PyTorch's products pack weights, anew at every call.
        bf16_tflops, fp32_tflops: dense products per second, fp32 accumulation; fp32 without tf32.
        launch_us: from one kernel to the next of a CUDA graph; on a CPU one operator of a model in
            PyTorch, the Python around it included.
        call_us: one kernel launched by itself from Python; on a CPU one call of `recurx.recurse`.
        barrier_us: one barrier over all units; on a CPU what a stage of one sample loses by being
            split over all threads: waiting, and lines that one core wrote and another reads.
        split_us: of a CPU, what a PyTorch operator loses so.
        stream_gbs: of a CPU, rate at which all threads together read weights that lie in the last
            cache; 0 where that is not known, and hides behind the products.
        measured: whether the rates were measured on this very machine.
        isa: of a CPU, which of the engine's instruction sets runs; "" without an engine.
        clusters: (D, CTAs of a cluster, clusters that run at once) of each cluster kernel, as the
            driver counts them; () where nobody asked it.
        guess: name of the device that the rates were taken from, scaled; "" if they are its own.
    """

    name: str
    kind: str
    capability: tuple[int, int]
    units: int
    shared_bytes: int
    l2_bytes: int
    dram_gbs: float
    l2_gbs: float
    bf16_tflops: float
    fp32_tflops: float
    launch_us: float
    call_us: float
    barrier_us: float
    measured: bool = False
    isa: str = ""
    stream_gbs: float = 0.0
    split_us: float = 0.0
    clusters: tuple[tuple[int, int, int], ...] = ()
    guess: str = ""

    def flops(self, itemsize: int) -> float:
        """Products per second (FLOP/s) with operands of `itemsize` bytes."""
        return 1e12 * (self.bf16_tflops if itemsize == 2 else self.fp32_tflops)

    @property
    def mma_sync(self) -> float:
        """Share of a GPU's bf16 peak that mma.sync reaches: 0.62 is published for Hopper, and what
        has instructions of its own beyond that (capability 10) is taken for half as good."""
        return {8: 1.0, 9: 0.62, 12: 1.0}.get(self.capability[0], 0.3)

    @property
    def shared_gbs(self) -> float:
        """GB/s of all shared memories of a GPU: 128 bytes a clock and multiprocessor, the clock
        being that of the bf16 rate, or of the fp32 rate where makers sell products at half."""
        fp32 = 128 * 2, self.fp32_tflops
        bf16 = {(8, 0): 2048, (9, 0): 4096, (10, 0): 8192}.get(self.capability)
        flops_a_clock, rate = fp32 if bf16 is None else (bf16, self.bf16_tflops)
        return 1e3 * rate * 128 / flops_a_clock

    @property
    def source(self) -> str:
        """Where the rates come from, in a few words."""
        if self.guess:
            return f"a guess, those of {self.guess} scaled by multiprocessors"
        return "measured here" if self.measured else "published peaks, not measured here"

    @staticmethod
    def of(device: torch.device | str | Device | None = None) -> Device:
        """The description of a torch device, of a name in `DEVICES`, or of this CPU (None).

        A CPU is measured once a process (a second); a GPU that is not in `DEVICES` gets
        the rates of the nearest one, scaled by its multiprocessors, and says so (`guess`).

        Raises:
            InvalidArgument: an unknown name.
        """
        if isinstance(device, Device):
            return device
        if isinstance(device, str) and device in DEVICES:
            return DEVICES[device]
        try:
            torch_device = torch.device("cpu" if device is None else device)
        except (RuntimeError, TypeError):
            known = ", ".join([*DEVICES, "cpu", "cuda"])
            raise bad_argument("plan.Device.of", "device", f"one of {known}", device) from None
        if torch_device.type == "cuda":
            return _cuda(torch_device.index or 0)
        return _cpu(torch.get_num_threads())


def _gpu(
    name: str, capability: tuple[int, int], units: int, shared: int, l2_mb: float,
    dram: float, l2: float, bf16: float, fp32: float,
) -> Device:  # fmt: skip
    # Assumptions: 1 us between the nodes of a graph, 5 us for a launch from Python, and 1.2 us for
    # a barrier over the grid (1 to 1.5 us are published).
    return Device(
        name, "cuda", capability, units, shared, int(l2_mb * 2**20), dram, l2, bf16, fp32,
        launch_us=1.0, call_us=5.0, barrier_us=1.2,
    )  # fmt: skip


# Data sheets: multiprocessors, shared memory a block may use, L2 MB, DRAM GB/s, dense bf16 (fp32
# sums) and fp32 TFLOP/s. The makers do not publish L2 bandwidth: it is an assumption, 5,500 GB/s of
# an H100 (microbenchmarks report about that) and 16 bytes a clock and multiprocessor of the others,
# but 30 on an A100. GB10: an eighth of its sparse FP4 rate, as on other cards with full rate.
# h200: NOT the data sheet's 4,800 GB/s and 989 TFLOP/s, but what others report to have measured on
# one (large copies, large products at its power limit); recurx has not measured them.
DEVICES = {
    "a100": _gpu("a100", (8, 0), 108, 166912, 40, 2039, 4500, 312, 19.5),
    "rtx3090": _gpu("rtx3090", (8, 6), 82, 101376, 6, 936, 2200, 71, 35.6),
    "rtxa6000": _gpu("rtxa6000", (8, 6), 84, 101376, 6, 768, 2400, 154.8, 38.7),
    "a10": _gpu("a10", (8, 6), 72, 101376, 6, 600, 1900, 125, 31.2),
    "a10g": _gpu("a10g", (8, 6), 80, 101376, 6, 600, 2200, 70, 35),
    "l4": _gpu("l4", (8, 9), 58, 101376, 48, 300, 2000, 121, 30.3),
    "l40s": _gpu("l40s", (8, 9), 142, 101376, 96, 864, 5700, 362, 91.6),
    "rtx4090": _gpu("rtx4090", (8, 9), 128, 101376, 72, 1008, 5000, 165, 82.6),
    "h100": _gpu("h100", (9, 0), 132, 232448, 50, 3350, 5500, 989, 67),
    "h200": _gpu("h200", (9, 0), 132, 232448, 60, 4300, 5500, 788, 67),
    "gh200": _gpu("gh200", (9, 0), 132, 232448, 60, 4000, 5500, 989, 67),
    "h20": _gpu("h20", (9, 0), 78, 232448, 60, 4000, 3300, 148, 44),
    "b200": _gpu("b200", (10, 0), 148, 232448, 126, 8000, 10000, 2250, 75),
    "rtx5090": _gpu("rtx5090", (12, 0), 170, 101376, 96, 1792, 6500, 209.5, 104.8),
    "rtxpro6000": _gpu("rtxpro6000", (12, 0), 188, 101376, 128, 1792, 7800, 503.8, 125),
    "gb10": _gpu("gb10", (12, 1), 48, 101376, 24, 273, 1900, 125, 31),
}


@functools.cache
def _cuda(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    made = gpu_device(
        found.name, (found.major, found.minor), found.multi_processor_count,
        getattr(found, "shared_memory_per_block_optin", 0), getattr(found, "L2_cache_size", 0),
    )  # fmt: skip
    return replace(made, clusters=measure.cluster_places(index))


def gpu_device(
    name: str, capability: tuple[int, int], units: int, shared_bytes: int = 0, l2_bytes: int = 0
) -> Device:
    """The entry of `DEVICES` that a GPU's own name and size mean, or a guess from the nearest by
    architecture and multiprocessors; sizes of 0 are that one's."""
    compact = name.lower().replace(" ", "").replace("-", "")
    listed = [d for d in DEVICES.values() if d.name in compact and d.units == units]
    if listed:
        known = max(listed, key=lambda d: len(d.name))  # a GH200's name holds "h200"
        sizes = shared_bytes or known.shared_bytes, l2_bytes or known.l2_bytes
        return replace(known, shared_bytes=sizes[0], l2_bytes=sizes[1])

    def distance(known: Device) -> tuple[int, int]:
        major, minor = known.capability
        return abs(10 * (major - capability[0]) + minor - capability[1]), abs(known.units - units)

    nearest = min(DEVICES.values(), key=distance)
    share = units / nearest.units
    rates = ("dram_gbs", "l2_gbs", "bf16_tflops", "fp32_tflops")
    return replace(
        nearest, name=name, capability=capability, units=units, guess=nearest.name,
        shared_bytes=shared_bytes or nearest.shared_bytes, l2_bytes=l2_bytes or nearest.l2_bytes,
        **{rate: getattr(nearest, rate) * share for rate in rates},
    )  # fmt: skip


# Of a CPU, as shares of what is measured on it. PyTorch's products pack their weights at every
# call, reading them in strides: 2.3 to 2.6 GB/s a thread beside a copy of 12 (TRM, HRM; Zen 3);
# with AVX-512 8 beside 13 on one thread (229 ms of products in a TRM step that take 160 warm), 5 of
# two (same step).
PACKING, PACKING_WIDE = 0.2, 0.45
AMX = ("amx", "amx_split")
WIDE = ("avx512", "avx512_bf16", *AMX)
# `recurx.recurse` checks, encodes and dispatches as long as 60 operators of the tiny block run: 0.2
# to 0.3 ms to 4.4 us (Xeon), 0.7 ms on a Zen 3.
CALL_OPERATORS = 60
# One operator of a small model (17 tokens of 64) to one of the tiny block (4 of 32): 5.0 us to 3.7.
MODEL_OPERATOR = 1.35
BARRIER_US = 1.0  # where it was not measured: a spin of two threads on one cache line
# Where it was not measured: small-64 at B=64, about as fast on one thread as on two.
SPLIT_US = 20.0
# PyTorch packs both operands of a square product for matrix units, which takes as long as it does.
MATRIX_PRODUCT = (2112, 256, 1408)


def cpu_device(
    threads: int, copy_gbs: float, fp32_tflops: float, bf16_tflops: float, operator_us: float,
    cache_bytes: int, isa: str, stream_gbs: float = 0.0, barrier_us: float = 0.0,
    split_us: float = 0.0,
) -> Device:  # fmt: skip
    """A CPU by its measured ceilings: a large copy, large products, one operator from Python,
    weights read from the last cache, and what splitting costs (0: not measured)."""
    packing = PACKING_WIDE if isa in WIDE else PACKING
    return Device(
        "cpu", "cpu", (0, 0), threads, 0, cache_bytes, copy_gbs, packing * copy_gbs,
        bf16_tflops=bf16_tflops, fp32_tflops=fp32_tflops,
        launch_us=MODEL_OPERATOR * operator_us, call_us=CALL_OPERATORS * operator_us,
        barrier_us=barrier_us or BARRIER_US, split_us=(split_us or SPLIT_US) if threads > 1 else 0,
        measured=True, isa=isa, stream_gbs=stream_gbs,
    )  # fmt: skip


# TFLOP/s of products a thread, fp32 and bf16, by the instructions that PyTorch finds for bf16:
# a Zen 3, a Zen 4 and a Sapphire Rapids.
TYPICAL = {"": (0.06, 0.008), "avx512_bf16": (0.115, 0.23), "amx": (0.172, 0.5)}
TYPICAL_COPY_GBS, TYPICAL_OPERATOR_US = 12.0, 4.0


@functools.cache
def typical_cpu(threads: int) -> Device:
    """This CPU by rates that are usual for its instructions: at once, and in every process the
    same, which measured ones are not."""
    found = "avx512_bf16" if getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() else ""
    found = "amx" if getattr(torch.cpu, "_is_amx_tile_supported", bool)() else found
    fp32, bf16 = (threads * rate for rate in TYPICAL[found])
    made = cpu_device(
        threads, threads * TYPICAL_COPY_GBS, fp32, bf16, TYPICAL_OPERATOR_US,
        measure.last_cache_bytes(), measure.engine_isa(),
    )  # fmt: skip
    return replace(made, measured=False)


@functools.cache
def _cpu(threads: int) -> Device:
    """This CPU, measured; inside a caller's `with torch.device("cuda")` too."""
    with torch.device("cpu"):
        isa, side = measure.engine_isa(), measure.LARGE["cpu"]
        square = (side, side, side)
        fp32, bf16 = (
            measure.product_tflops(*square, dtype, "cpu")
            for dtype in (torch.float32, torch.bfloat16)
        )
        if isa in AMX:
            bf16 = max(bf16, measure.product_tflops(*MATRIX_PRODUCT, torch.bfloat16, "cpu"))
        return cpu_device(
            threads, measure.copy_gbs("cpu"), fp32, bf16, measure.operator_us(),
            measure.last_cache_bytes(), isa, measure.stream_gbs(), measure.barrier_us(),
            measure.split_us(),
        )  # fmt: skip
