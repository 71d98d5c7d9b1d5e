"""Products by the vendor's library (cuBLAS), exact whatever the process has set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from recurx.forking import fork_lock

_lock = fork_lock()
_inside, _before = 0, {}


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Inside, cuBLAS adds in fp32 and takes fp32 operands as they are, whatever the process set:
    its settings are changed until the last thread has left."""
    global _inside, _before
    matmul: Any = torch.backends.cuda.matmul
    # From 2.9 on the old name must not be read where somebody set the new one.
    fp32 = (
        ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    )
    bf16 = "allow_bf16_reduced_precision_reduction"
    with _lock:
        if not _inside:
            reduced, split = getattr(matmul, bf16), getattr(matmul, f"{bf16}_split_k", None)
            _before = {fp32[0]: getattr(matmul, fp32[0]),
                       bf16: reduced if split is None else (reduced, split)}  # fmt: skip
            setattr(matmul, *fp32)
            setattr(matmul, bf16, False if split is None else (False, split))
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            for name, value in () if _inside else _before.items():
                setattr(matmul, name, value)


def multiply(
    x: Tensor, matrix: Tensor, over_tokens: bool = False, out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Of x [B, T, K] and matrix [N, K], x matrix^T [B, T, N], plus `bias` [N] if there is one; over
    tokens, of x [B, K, D], matrix x [B, N, D]. Each sample or row of x is one piece of memory,
    `out` contiguous."""
    shape = (len(x), len(matrix), x.shape[2]) if over_tokens else (*x.shape[:2], len(matrix))
    out = x.new_empty(shape) if out is None else out
    if over_tokens:
        return torch.bmm(matrix.expand(len(x), -1, -1), x, out=out)
    rows = x.flatten(0, 1), matrix.t()
    if bias is None:
        torch.mm(*rows, out=out.flatten(0, 1))
    else:
        torch.addmm(bias, *rows, out=out.flatten(0, 1))
    return out
