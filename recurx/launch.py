"""Whether a small op runs as a Triton kernel: one question, asked by every op that has one."""

from __future__ import annotations

import functools
import importlib.util

from torch import Tensor

LEAST_CAPABILITY = (7, 0)  # what Triton compiles for


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def on_triton(tensor: Tensor) -> bool:
    """Whether kernels of `recurx.kernels` run on the device of `tensor`; imports nothing."""
    if not tensor.is_cuda or not _has_triton():
        return False
    import torch

    return torch.cuda.get_device_capability(tensor.device) >= LEAST_CAPABILITY
