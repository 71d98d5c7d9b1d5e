"""Timing of single operations by pytest-benchmark, each checked before it is timed.

    make bench-ops                                # python -m pytest bench/ops
    python -m pytest bench/ops --benchmark-json ops.json -k "call and cpu"

On a GPU the L2 is overwritten before every run, because in use the operands come from elsewhere.
"""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Seeded normal values: the same in every dtype and on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)
