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

    The padding is zero. `blocks[i]` holds the four matrices of block i over all nets, `offsets[i]`
    where they start (elements), `of_net` the range of blocks of each net.
    """

    def __init__(self, nets: Nets, dtype: torch.dtype, device: torch.device) -> None:
        self.nets, self.of_net = nets, blocks_of(nets)
        self.specs: list[BlockSpec] = [block for _, spec in nets for block in spec.blocks]
        self.offsets: list[tuple[int, ...]] = []
        shapes: list[tuple[int, int]] = []
        end = 0
        for block in self.specs:
            starts = []
            for rows, columns in block.weight_shapes:
                starts.append(end)
                shapes.append((rows, columns))
                end = _up(end + rows * padded_columns(columns), ALIGN)
            self.offsets.append(tuple(starts))
        self.buffer = torch.zeros(end, dtype=dtype, device=device)
        flat = [start for starts in self.offsets for start in starts]
        # The matrices with their padding, and the part of each that holds weights.
        self._padded = [
            self.buffer[at : at + rows * padded_columns(columns)].view(rows, -1)
            for at, (rows, columns) in zip(flat, shapes, strict=True)
        ]
        self._views = [
            padded[:, :columns] for padded, (_, columns) in zip(self._padded, shapes, strict=True)
        ]
        self.blocks = [tuple(self._padded[4 * i : 4 * i + 4]) for i in range(len(self.specs))]

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
