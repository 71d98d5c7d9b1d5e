"""What this machine can do, measured in the same run: the ceilings of the roofline."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from recurx.timing import synchronize

COPY_VALUES = 16 << 20  # 64 MB of fp32: beyond the caches of the processors we know
PRODUCT_ROWS = {"cpu": 512, "cuda": 4096}  # enough to fill the device, 0.27 and 137 GFLOP
LIMIT = 0.3  # seconds for each ceiling


@dataclass(frozen=True)
class Ceilings:
    """Best of several timings: GB/s of a large copy (read + write), TFLOP/s of square products."""

    gbs: float
    tflops: dict[str, float]  # dtype -> TFLOP/s

    @property
    def best_tflops(self) -> float:
        return max(self.tflops.values())

    def bound(self, flops: float, moved: float) -> float:
        """Least seconds for this work: the roofline."""
        return max(flops / (self.best_tflops * 1e12), moved / (self.gbs * 1e9))


def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Ceilings of `device`: a copy of 64 MB, and square products in fp32 and in `dtype`."""
    source = torch.ones(COPY_VALUES, device=device)
    target = torch.empty_like(source)
    gbs = 2 * source.nbytes / _best(lambda: target.copy_(source), device) / 1e9
    tflops, rows = {}, PRODUCT_ROWS.get(device.type, 512)
    for kind in dict.fromkeys((torch.float32, dtype)):
        # As models multiply: by a transposed weight. Without it CPUs take slow paths in bf16.
        generator = torch.Generator().manual_seed(0)  # leaves the caller's random state alone
        a = torch.randn(rows, rows, generator=generator).to(device, kind)
        seconds = _best(lambda a=a: torch.nn.functional.linear(a, a), device)
        tflops[str(kind).removeprefix("torch.")] = 2 * rows**3 / seconds / 1e12
    return Ceilings(gbs, tflops)


def _best(run: Callable[[], object], device: torch.device) -> float:
    """Shortest timing within about `LIMIT` seconds: a ceiling is what is reached undisturbed."""
    best, until = float("inf"), time.perf_counter() + LIMIT
    with torch.no_grad():
        run()
        while best == float("inf") or time.perf_counter() < until:
            synchronize(device)
            begin = time.perf_counter()
            run()
            synchronize(device)
            best = min(best, time.perf_counter() - begin)
    return max(best, 1e-9)
