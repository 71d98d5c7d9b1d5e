"""Triton kernels run on the GPU where there is one, else in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def triton_device() -> Iterator[str]:
    """The device to put tensors on; while the fixture is active launched kernels run there."""
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    if torch.cuda.is_available():
        yield "cuda"
        return
    from bf16_interpreter import interpreting

    with interpreting():
        yield "cpu"
