"""The weights of some nets as GPU kernels read them: all matrices in one buffer, rows padded."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from recurx.forking import lazy
from recurx.nets import ATTENTION, BlockSpec, NetSpec

ALIGN = 128  # elements: every matrix starts at a multiple of 256 bytes in bf16
ROW_ALIGN = 16  # elements: rows start at multiples of 32 bytes, so that copies are 16 bytes wide


@functools.cache
def device_words(words: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 words on a device, kept for good: a CUDA graph of the caller's may hold the address.

    A copy from the host is no part of a graph: what runs inside one must have run before it.
    """
    with torch.inference_mode(False):
        return torch.tensor(words, dtype=torch.int32, device=device)


def round_into(buffers: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Round weights into buffers of the same shapes, on a GPU by one launch."""
    with torch.no_grad():
        torch._foreach_copy_(list(buffers), [weight.detach() for weight in weights])


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def padded_columns(columns: int) -> int:
    """Elements from row to row of a matrix with so many columns in a `PackedNets`."""
    return _up(columns, ROW_ALIGN)


def buffers_of(slots: Sequence, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Buffers by the names of weights; those of norms in fp32, as the reference widens them."""
    kinds = {name: torch.float32 if "norm" in name else dtype for name, _ in slots}
    return {name: torch.empty(shape, dtype=kinds[name], device=device) for name, shape in slots}


Nets = tuple[tuple[str, NetSpec], ...]


def blocks_of(nets: Nets) -> dict[str, tuple[int, int]]:
    """Which blocks, (first, one past the last) of all, make up each net."""
    ranges, first = {}, 0
    for name, spec in nets:
        ranges[name] = (first, first + len(spec.blocks))
        first += len(spec.blocks)
    return ranges


class PackedNets:
    """All matrices of some nets in one buffer, block after block, each a view with padded rows.

    The padding is zero. `blocks[i]` holds the matrices of block i over all nets, `offsets[i]` where
    they start (elements), `vectors[i]` its other weights by name, `of_net` the range of each net.
    """

    def __init__(self, nets: Nets, dtype: torch.dtype, device: torch.device) -> None:
        self.nets, self.of_net = nets, blocks_of(nets)
        self.specs: list[BlockSpec] = [block for _, spec in nets for block in spec.blocks]
        self.offsets: list[tuple[int, ...]] = []
        end = 0
        for block in self.specs:
            starts = []
            for _, rows, columns in block.products:
                starts.append(end)
                end = _up(end + rows * padded_columns(columns), ALIGN)
            self.offsets.append(tuple(starts))
        self.buffer = torch.zeros(end, dtype=dtype, device=device)
        self.blocks, self.vectors, self._views = [], [], []  # views of what holds weights
        for block, begin in zip(self.specs, self.offsets, strict=True):
            padded = []
            for at, (_, rows, columns) in zip(begin, block.products, strict=True):
                padded.append(self.buffer[at : at + rows * padded_columns(columns)].view(rows, -1))
                self._views.append(padded[-1][:, :columns])
            self.blocks.append(tuple(padded))
            self.vectors.append(buffers_of(block.slots[len(padded) :], dtype, device))
            self._views += self.vectors[-1].values()

    @lazy
    def words(self) -> Tensor:
        """int32 on the device, a row of 8 a block for kernels/recursion.py.

        (1 for a token MLP, where its four matrices start in units of ALIGN elements, 0, 0, 0)
        """
        rows = [
            [int(spec.kind != ATTENTION), *(start // ALIGN for start in starts), 0, 0, 0]
            for spec, starts in zip(self.specs, self.offsets, strict=True)
        ]
        return device_words(tuple(word for row in rows for word in row), self.buffer.device)

    def fill(self, weights: Sequence[Tensor]) -> PackedNets:
        """Round the weights (flat, net after net) into the buffer."""
        round_into(self._views, weights)
        return self
