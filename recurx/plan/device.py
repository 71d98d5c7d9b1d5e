"""What a device can do, as plain numbers: read from it, measured on it, or published.

NOTE: the rates of GPUs are the makers' peaks for dense products. No GPU figure of this file was
measured by recurx; predictions made from them are models until a result file says otherwise.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from recurx.errors import bad_argument


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
        dram_gbs, l2_gbs: bandwidths, GB/s; the second on a CPU is the rate at which PyTorch's
            products take in weights, which they pack anew at every call.
        bf16_tflops, fp32_tflops: dense products per second, fp32 accumulation; fp32 without tf32.
        launch_us: from one kernel to the next of a CUDA graph, or one small PyTorch operator on a
            CPU.
        call_us: one kernel launched by itself from Python; as launch_us on a CPU.
        barrier_us: one barrier over all units.
        measured: whether the rates were measured on this very machine.
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

    def flops(self, itemsize: int) -> float:
        """Products per second (FLOP/s) with operands of `itemsize` bytes."""
        return 1e12 * (self.bf16_tflops if itemsize == 2 else self.fp32_tflops)

    @staticmethod
    def of(device: torch.device | str | Device | None = None) -> Device:
        """The description of a torch device, of a name in `DEVICES`, or of this CPU (None).

        A CPU is measured once a process (half a second); a GPU that is not in `DEVICES` gets
        the rates of the nearest one, scaled by its multiprocessors.

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


# Data sheets: multiprocessors, shared memory a block may use, L2, DRAM GB/s, dense bf16 and fp32
# TFLOP/s. The makers do not publish L2 bandwidth: it is an assumption, from microbenchmarks that
# report about 5,500 GB/s for an H100, scaled by multiprocessors and clock.
DEVICES = {
    "a100": _gpu("a100", (8, 0), 108, 166912, 40, 2039, 4500, 312, 19.5),
    "l4": _gpu("l4", (8, 9), 58, 101376, 48, 300, 2000, 121, 30.3),
    "rtx4090": _gpu("rtx4090", (8, 9), 128, 101376, 72, 1008, 5000, 165, 82.6),
    "h100": _gpu("h100", (9, 0), 132, 232448, 50, 3350, 5500, 989, 67),
    "h200": _gpu("h200", (9, 0), 132, 232448, 50, 4800, 5500, 989, 67),
    "b200": _gpu("b200", (10, 0), 148, 232448, 126, 8000, 10000, 2250, 75),
}


@functools.cache
def _cuda(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    capability = (found.major, found.minor)
    compact = found.name.lower().replace(" ", "").replace("-", "")
    for name, known in DEVICES.items():
        if name in compact and known.units == found.multi_processor_count:
            return known
    nearest = min(DEVICES.values(), key=lambda d: (_distance(d.capability, capability), d.name))
    share = found.multi_processor_count / nearest.units
    shared = getattr(found, "shared_memory_per_block_optin", nearest.shared_bytes)
    return replace(
        nearest,
        name=found.name,
        capability=capability,
        units=found.multi_processor_count,
        shared_bytes=shared,
        l2_bytes=getattr(found, "L2_cache_size", nearest.l2_bytes),
        dram_gbs=nearest.dram_gbs * share,
        l2_gbs=nearest.l2_gbs * share,
        bf16_tflops=nearest.bf16_tflops * share,
        fp32_tflops=nearest.fp32_tflops * share,
    )


def _distance(a: tuple[int, int], b: tuple[int, int]) -> int:
    return abs(10 * a[0] + a[1] - 10 * b[0] - b[1])


@functools.cache
def _cpu(threads: int) -> Device:
    """This CPU, measured: a copy, an operator, and products whose weights are not in a cache.

    The time of a product grows with its rows, t = intake + rows / rate: two row counts give both.
    """
    generator = torch.Generator().manual_seed(0)  # leaves the caller's random state alone
    width, inner, few, many = 512, 1536, 97, 388  # rows of one and of four samples of TRM Sudoku
    masters = [torch.randn(inner, width, generator=generator) for _ in range(16)]  # 50 MB in fp32

    def product(dtype: torch.dtype) -> tuple[float, float]:
        weights = [master.to(dtype) for master in masters]
        seconds = {}
        for rows in (few, many):
            a = torch.randn(rows, width, generator=generator).to(dtype)

            def all_products(a: torch.Tensor = a) -> None:
                for weight in weights:
                    torch.nn.functional.linear(a, weight)

            # bf16 without instructions for it is a hundred times slower: one timing tells enough.
            seconds[rows] = _best(all_products, 1 if dtype == torch.bfloat16 else 3) / len(weights)
        a_row = max((seconds[many] - seconds[few]) / (many - few), 1e-12)
        intake = max(seconds[few] - few * a_row, 1e-6)
        return 2 * inner * width / a_row / 1e12, weights[0].nbytes / intake / 1e9

    source = torch.ones(8 << 20)  # 32 MB
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _best(lambda: target.copy_(source)) / 1e9
    state = torch.ones(few, width)
    operator = 1e6 * _best(lambda: state + state, 100)
    fp32, intake = product(torch.float32)
    masters = masters[:2]
    bf16, _ = product(torch.bfloat16)
    return Device(
        "cpu", "cpu", (0, 0), threads, 0, _last_cache_bytes(), copied, intake,
        bf16_tflops=bf16, fp32_tflops=fp32,
        launch_us=operator, call_us=operator, barrier_us=1.0, measured=True,
    )  # fmt: skip


def _last_cache_bytes() -> int:
    """Size of the CPU's last cache as Linux tells it, else 0."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            text = path.read_text().strip()
            sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
    return max(sizes, default=0)


def _best(run: Callable[[], object], repeats: int = 5) -> float:
    """Shortest of several timings, seconds: a ceiling is what the machine can do undisturbed."""
    times = []
    with torch.no_grad():
        run()
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return max(min(times), 1e-9)
