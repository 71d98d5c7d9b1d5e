"""Time the fused GPU kernels against PyTorch's operations, on this device, in one run.

    python -m bench.gpu_kernels [--quick]

Every variant is checked against fp64 first. The variants take turns, so that a slow minute of the
machine hits all of them; L2 is flushed between launches, because in use the operands come from
elsewhere. One JSON row a line: microseconds at p20, p50 and p80, TFLOP/s and GB/s at p50.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

import torch

from bench.provenance import provenance

# rows, K, N: the O and down products of TRM-att Sudoku at B = 1, 8, 64 and 512
SHAPES = [(97 * b, k, 512) for b in (1, 8, 64, 512) for k in (512, 1536)]


def plain(a: torch.Tensor, w: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    x = (residual + a @ w.T).float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)).to(a.dtype)


def variants() -> dict[str, Callable[..., torch.Tensor]]:
    from recurx.kernels.linear_residual_rms import linear_residual_rms

    return {
        "eager": plain,
        "torch.compile": torch.compile(plain, dynamic=False),
        "triton": linear_residual_rms,
    }


def check(run: Callable[..., torch.Tensor], operands: list[torch.Tensor]) -> float:
    """The relative error against fp64 of the first rows."""
    few = [operands[0][:256], operands[1], operands[2][:256]]
    exact = plain(*(t.double() for t in few))
    return ((run(*few).double() - exact).norm() / exact.norm()).item()


def time_in_turns(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Microseconds of each launch, by CUDA events around it; the variants take turns."""
    flush = torch.empty(128 << 20, dtype=torch.int8, device="cuda")  # more than any L2
    events = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            flush.zero_()
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            run()
            pair[1].record()
            events[name].append(pair)
    torch.cuda.synchronize()
    return {
        name: sorted(1e3 * start.elapsed_time(end) for start, end in pairs)
        for name, pairs in events.items()
    }


def measure(m: int, k: int, n: int, repeats: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((m, k), (n, k), (m, n))
    operands = [torch.randn(*s, generator=generator).to("cuda", torch.bfloat16) for s in shapes]
    operands[1] *= k**-0.5
    kinds = variants()
    errors = {name: check(run, operands) for name, run in kinds.items()}
    calls = {name: (lambda run=run: run(*operands)) for name, run in kinds.items()}
    for _ in range(3):
        for call in calls.values():
            call()
    rows = []
    for name, times in time_in_turns(calls, repeats).items():
        p20, p50, p80 = (times[int(len(times) * q)] for q in (0.2, 0.5, 0.8))
        moved = 2 * (m * k + n * k + 2 * m * n)
        rows.append(
            {
                "kernel": "linear_residual_rms", "variant": name, "m": m, "k": k, "n": n,
                "p20_us": round(p20, 2), "p50_us": round(p50, 2), "p80_us": round(p80, 2),
                "tflops": round(2e-6 * m * n * k / p50, 1), "gb_s": round(1e-3 * moved / p50, 1),
                "relative_error": round(errors[name], 6),
            }
        )  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repeats")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.gpu_kernels: torch sees no CUDA device")
        return 1
    print(json.dumps(provenance()))
    worst = 0.0
    for shape in SHAPES[4:6] if arguments.quick else SHAPES:
        for row in measure(*shape, repeats=20 if arguments.quick else 100):
            worst = max(worst, row["relative_error"])
            print(json.dumps(row), flush=True)
    return int(worst > 0.01)  # bf16 storage: one rounding is 0.2 %


if __name__ == "__main__":
    sys.exit(main())
