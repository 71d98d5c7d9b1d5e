"""Small ops that have a Triton kernel: when it runs, and what autograd must be told afterwards."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable

import torch
from torch import Tensor

LEAST_CAPABILITY = (7, 0)  # what Triton compiles for


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def on_triton(tensor: Tensor) -> bool:
    """Whether kernels of `recurx.kernels` run on the device of `tensor`; imports nothing."""
    if not tensor.is_cuda or not _has_triton():
        return False
    return torch.cuda.get_device_capability(tensor.device) >= LEAST_CAPABILITY


def takes(*tensors: Tensor) -> bool:
    """Whether a kernel over address tables (`kernels.multi_tensor`) runs on these."""
    kinds = (torch.float32, torch.bfloat16)
    return all(on_triton(t) and t.dtype in kinds and t.is_contiguous() for t in tensors)


def wrote(tensors: Iterable[Tensor]) -> None:
    """Tell PyTorch that a kernel, or a replayed graph, changed these in place.

    Autograd's checks go by the version of a tensor, which only PyTorch's own operations count up.
    """
    from torch.autograd.graph import increment_version

    for tensor in tensors:
        if not tensor.is_inference():
            increment_version(tensor)
