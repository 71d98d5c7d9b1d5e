"""What one ATen operator moves and computes, whether it is only a view, whether it makes the host
wait for a GPU, and from which line of the user's source it comes.

FLOPs: 2 M N K of a product; 4 per score and head dimension of attention (forward); one per value
written (pointwise) or read (reductions). Bytes: every tensor read and written once, a broadcast
dimension (stride 0) counted as one.
"""

from __future__ import annotations

import linecache
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Views that PyTorch does not mark as such, and allocations: no kernel runs.
FREE = {"_unsafe_view", "detach", "alias", "lift_fresh", "empty", "empty_like", "new_empty",
         "empty_strided", "new_empty_strided", "set_", "resize_"}  # fmt: skip
_MOVES = {"_to_copy", "clone", "copy_", "cat", "stack", "zeros", "ones", "full", "zeros_like",
          "ones_like", "full_like", "fill_", "zero_", "where", "index", "embedding", "gather",
          "index_put_", "index_select", "masked_fill", "new_zeros", "contiguous"}  # fmt: skip
_REDUCTIONS = {"mean", "sum", "amax", "amin", "max", "argmax", "all", "any", "_softmax"}

# Operators whose result the host needs before it can go on.
_SYNCS = {
    "_local_scalar_dense": "reads a value: .item(), bool(), int(), if",
    "is_nonzero": "reads a value: bool(), if",
    "equal": "reads a value: torch.equal",
    "nonzero": "size depends on data: nonzero",
    "masked_select": "size depends on data: masked_select",
    "_unique": "size depends on data: unique",
    "_unique2": "size depends on data: unique",
    "unique_dim": "size depends on data: unique",
    "unique_consecutive": "size depends on data: unique_consecutive",
}
_TORCH = os.path.dirname(torch.__file__) + os.sep
_OPTIMIZERS = os.path.join(_TORCH, "optim") + os.sep  # its own reads are worth a place
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep


class Place(NamedTuple):
    """A line of source."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors among arguments or results, lists included."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)


def nbytes(tensor: Tensor) -> int:
    """Bytes of the distinct values of a tensor."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    count = math.prod(size if stride else min(size, 1) for size, stride in sizes)
    return count * tensor.element_size()


def work(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> tuple[float, int]:
    """(FLOPs, bytes) of an operator that is not free."""
    reads = list(tensors_in(args)) + list(tensors_in(kwargs))
    writes = list(tensors_in(out))
    if not writes and name.endswith("_") and args:
        writes = list(tensors_in(args[0]))  # _foreach_..._ returns nothing
    moved = sum(nbytes(t) for t in reads) + sum(nbytes(t) for t in writes)
    return _flops(name, args, reads, writes), moved


def _flops(name: str, args: Sequence[Any], reads: list[Tensor], writes: list[Tensor]) -> float:
    if name in ("mm", "bmm", "linear", "mkldnn_linear", "matmul"):
        return 2.0 * writes[0].numel() * reads[0].shape[-1]
    if name in ("addmm", "baddbmm"):
        return 2.0 * writes[0].numel() * reads[1].shape[-1]
    if "scaled_dot_product" in name:
        backward = name.endswith("backward")
        query, key, value = reads[1:4] if backward else reads[:3]
        pairs = query.numel() // max(1, query.shape[-1]) * key.shape[-2]
        forward = 2.0 * pairs * (query.shape[-1] + value.shape[-1])
        return 2.5 * forward if backward else forward  # 5 products for 2
    if name in _MOVES or not writes:
        return 0.0
    if name in _REDUCTIONS:
        return float(sum(t.numel() for t in reads))
    return float(sum(t.numel() for t in writes if t.is_floating_point()))


def sync_kind(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> str | None:
    """Why the host waits for the device here (on a CPU: would, if it were a GPU), or None."""
    if name in _SYNCS:
        return _SYNCS[name]
    if name in ("index", "index_put_", "index_put") and any(
        t.dtype in (torch.bool, torch.uint8) for t in tensors_in(args[1])
    ):
        return "size depends on data: index by a mask"
    if name in ("_to_copy", "copy_") and not kwargs.get("non_blocking", False):
        devices = [t.device.type for t in (*tensors_in(args), *tensors_in(out))]
        if name == "copy_":
            devices = [devices[1] if len(devices) > 1 else devices[0], devices[0]]
        if devices[0] != "cpu" and devices[-1] == "cpu":
            return "copies to the host"
    return None


def source_place() -> Place:
    """The innermost line that belongs neither to torch (but for its optimisers, below their base
    class) nor to the profiler."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        optimizer = file.startswith(_OPTIMIZERS) and not file.endswith("optimizer.py")
        if optimizer or not file.startswith((_TORCH, _HERE, "<frozen")):
            text = linecache.getline(file, frame.f_lineno).strip()
            return Place(file, frame.f_lineno, text)
        frame = frame.f_back
    return Place("(autograd thread)", 0, "")
