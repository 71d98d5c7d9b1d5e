"""How an operation is timed, and what is refused."""

from __future__ import annotations

import pytest
import torch

from bench.ops import DEVICE

FLUSH_BYTES = 256 << 20  # more than any L2
# One operation, one or two roundings of its result, and the sums of its products.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 0.02}


@pytest.fixture
def timed(benchmark):
    """timed(run, *operands): time `run(*operands)` on the device of the operands."""

    def measure(run, *operands, rounds=100):
        if DEVICE == "cpu":
            return benchmark(run, *operands)
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=DEVICE)

        def before():
            flush.zero_()
            torch.cuda.synchronize()

        def once():
            run(*operands)
            torch.cuda.synchronize()

        return benchmark.pedantic(once, setup=before, rounds=rounds, warmup_rounds=3)

    return measure


@pytest.fixture
def check():
    """check(got, exact): refuse to time what is wrong."""

    def judge(got, exact):
        error = float((got.double() - exact).norm() / exact.norm())
        assert error <= ALLOWED[got.dtype], f"relative error {error:.3g}"

    return judge
