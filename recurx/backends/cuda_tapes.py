"""The weights of a net as CUDA kernels read them, in memory that stays and is filled at every use.

Filling takes two launches whatever the net: all weights rounded to bf16 in one, then a kernel of
the family that packs, or for the grid kernel, whose layout is a permutation, a gather.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from recurx.backends import cuda_abi, cuda_grid
from recurx.backends.cuda_launch import blocks
from recurx.nets import NetSpec
from recurx.packed import round_into

Stream = ctypes.c_void_p | None


class KernelTape:
    """Packed by a kernel of the family."""

    def __init__(
        self, library: cuda_abi.Library, kind: str, spec: NetSpec, tokens: int, device: torch.device
    ) -> None:
        family = cuda_abi.FAMILIES[kind]
        self._library, self._entry = library, f"rx_{family}_pack"
        shapes = [shape for block in spec.blocks for shape in block.weight_shapes]
        self._rounded = [torch.empty(s, dtype=torch.bfloat16, device=device) for s in shapes]
        p = self._p = cuda_abi.RxPack(spec.hidden, tokens, len(spec.blocks))
        p.blocks[: p.num_blocks] = blocks(spec)
        p.weights[: len(shapes)] = [weight.data_ptr() for weight in self._rounded]
        size = library.bytes_of(f"rx_{family}_tape_bytes", p)
        self.packed = torch.empty(size, dtype=torch.uint8, device=device)
        p.tape = self.packed.data_ptr()

    def fill(self, weights: Sequence[Tensor], stream: Stream) -> KernelTape:
        round_into(self._rounded, weights)
        self._library.call(self._entry, self._p, stream)
        return self


class GridTape:
    """Gathered in the order of the grid kernel; element 0 is the zero of all padding."""

    def __init__(self, spec: NetSpec, device: torch.device) -> None:
        shapes = [shape for block in spec.blocks for shape in block.weight_shapes]
        sizes = [math.prod(shape) for shape in shapes]
        numbers = torch.arange(1, 1 + sum(sizes), dtype=torch.int32, device=device)
        self._order = cuda_grid.in_order(spec, _cut(numbers, sizes, shapes))
        self._flat = torch.zeros(1 + sum(sizes), dtype=torch.bfloat16, device=device)
        self._rounded = _cut(self._flat[1:], sizes, shapes)
        self.packed = torch.empty(len(self._order), dtype=torch.bfloat16, device=device)

    def fill(self, weights: Sequence[Tensor], stream: Stream) -> GridTape:
        round_into(self._rounded, weights)
        gather(self._flat, self._order, self.packed)
        return self


def gather(flat: Tensor, order: Tensor, out: Tensor) -> None:
    torch.index_select(flat, 0, order, out=out)


def _cut(flat: Tensor, sizes: Sequence[int], shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    return [part.view(s) for part, s in zip(flat.split(list(sizes)), shapes, strict=True)]


class PermutedTape:
    """Permuted by PyTorch at every use, for the grid kernel: the codes of quantised weights, and
    whatever somebody else's graph captures, which may hold nothing of ours."""

    def __init__(self, spec: NetSpec, fp8: bool) -> None:
        self._spec, self._fp8 = spec, fp8
        self.packed: Tensor

    def fill(self, weights: Sequence[Tensor], stream: Stream) -> PermutedTape:
        self.packed = cuda_grid.pack(self._spec, weights, self._fp8)
        return self
