"""What the machine reaches (`recurx.measure`), in the words of result files."""

from __future__ import annotations

from typing import Any

import torch

from recurx import measure

MOST_FLOPS = {"cpu": 2e9, "cuda": 2e12}  # of the case's own product; more rows show no more


def ceilings_of(device: str, rows: int, hidden: int, inner: int) -> dict[str, Any]:
    """Ceilings for a case of `rows` = B * T: its largest product (gate-up), a large one, a copy."""
    n, side = 2 * inner, measure.LARGE[device]
    m = max(1, min(rows, int(MOST_FLOPS[device] / (2 * hidden * n))))
    products = {"case": (m, hidden, n), "large": (side, side, side)}
    found: dict[str, Any] = {
        "copy_gbs": round(measure.copy_gbs(device), 2),
        **{f"{kind}_product": list(sizes) for kind, sizes in products.items()},
    }
    if device == "cpu":  # what `recurx.bench.predict` needs beside
        found |= {
            "operator_us": round(measure.operator_us(), 3),
            "cache_bytes": measure.last_cache_bytes(),
            "stream_gbs": round(measure.stream_gbs(), 2),
            "barrier_us": round(measure.barrier_us(), 3),
            "split_us": round(measure.split_us(), 3),
        }
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for kind, sizes in products.items():
            rate = measure.product_tflops(*sizes, dtype, device)
            found[f"{kind}_{name}_tflops"] = round(rate, 5)
    return found


def peak_tflops(ceilings: dict[str, Any], dtype: str) -> float:
    """What rows of a dtype are judged by: the fastest product that gives results of that dtype.

    A processor without bf16 instructions multiplies bf16 faster in fp32.
    """
    names = ("fp32",) if dtype == "fp32" else ("fp32", "bf16")
    return max(ceilings[f"{kind}_{name}_tflops"] for name in names for kind in ("case", "large"))
