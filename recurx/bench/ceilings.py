"""What the machine reaches: copy bandwidth and products, measured in the run they judge."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from recurx.plan.device import barrier_us, last_cache_bytes, operator_us, split_us, stream_gbs

COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}  # beyond every cache
LARGE = {"cpu": 1024, "cuda": 8192}  # side of the square product: about a peak
MOST_FLOPS = {"cpu": 2e9, "cuda": 2e12}  # of the case's own product; more rows show no more


def best_seconds(run: Callable[[], Any], device: str, seconds: float = 0.15) -> float:
    """The fastest of several runs within about `seconds`, one at least: a ceiling is a best."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    run()
    wait()
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        begin = time.perf_counter()
        run()
        wait()
        now = time.perf_counter()
        best = min(best, now - begin)
        if now > end:
            return best


def copy_gbs(device: str) -> float:
    """GB/s of a copy, bytes read plus bytes written."""
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * 4e-9 * source.numel() / best_seconds(lambda: target.copy_(source), device)


def product_tflops(m: int, k: int, n: int, dtype: torch.dtype, device: str) -> float:
    """TFLOP/s of [m, k] @ [k, n] with real data: zeros run faster on matrix units."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(m, k, generator=generator).to(device, dtype)
    b = torch.randn(n, k, generator=generator).to(device, dtype)
    out = torch.empty(m, n, device=device, dtype=dtype)
    return 2e-12 * m * k * n / best_seconds(lambda: torch.mm(a, b.T, out=out), device)


def measure(device: str, rows: int, hidden: int, inner: int) -> dict[str, Any]:
    """Ceilings for a case of `rows` = B * T: its largest product (gate-up), a large one, a copy."""
    n = 2 * inner
    m = max(1, min(rows, int(MOST_FLOPS[device] / (2 * hidden * n))))
    side = LARGE[device]
    found: dict[str, Any] = {
        "copy_gbs": round(copy_gbs(device), 2), "case_product": [m, hidden, n],
        "large_product": [side, side, side],
    }  # fmt: skip
    if device == "cpu":  # what `recurx.bench.predict` needs beside
        found |= {"operator_us": round(operator_us(), 3), "cache_bytes": last_cache_bytes()}
        found["stream_gbs"] = round(stream_gbs(), 2)
        found |= {"barrier_us": round(barrier_us(), 3), "split_us": round(split_us(), 3)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        found[f"case_{name}_tflops"] = round(product_tflops(m, hidden, n, dtype, device), 5)
        found[f"large_{name}_tflops"] = round(product_tflops(side, side, side, dtype, device), 5)
    return found


def peak_tflops(ceilings: dict[str, Any], dtype: str) -> float:
    """What rows of a dtype are judged by: the fastest product that gives results of that dtype.

    A processor without bf16 instructions multiplies bf16 faster in fp32.
    """
    names = ("fp32",) if dtype == "fp32" else ("fp32", "bf16")
    return max(ceilings[f"{kind}_{name}_tflops"] for name in names for kind in ("case", "large"))
