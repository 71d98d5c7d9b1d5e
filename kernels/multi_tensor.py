"""Address tables: one launch over any number of tensors, wherever they lie.

A row of a table describes one chunk of one tensor: the address of that chunk in each of the lists
(weights, gradients, ...), the addresses of values that the whole tensor shares, and how many
elements the chunk has. A program takes one row. The table lives on the device and is made again
only when an address has changed, so a captured launch goes on reading it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from recurx.errors import RecurxError

CHUNK = 1024  # elements a program: 8 a thread; 7 million weights are 6,800 programs
WARPS = 4


@triton.jit
def chunk_pointer(slot, BF16: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in `slot` of a table as a pointer to bf16 or fp32."""
    address = tl.load(slot)
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    if BF16:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    else:
        pointer = address.to(tl.pointer_type(tl.float32))
    return pointer


@triton.jit
def chunk_mask(slot, offsets, ALIGNED: tl.constexpr):
    """Which of `offsets` the chunk has, from its count in `slot`."""
    count = tl.load(slot).to(tl.int32)
    if ALIGNED:
        count = tl.multiple_of(count, 8)
    return offsets < count


class Tables:
    """Tables of one user, kept as long as their addresses stay the same."""

    def __init__(self) -> None:
        self._kept: dict[object, tuple[tuple[int, ...], torch.Tensor, bool]] = {}

    def get(
        self,
        name: object,
        lists: Sequence[Sequence[torch.Tensor]],
        shared: Sequence[Sequence[torch.Tensor]] = (),
    ) -> tuple[torch.Tensor, bool]:
        """The table int64 [chunks, len(lists) + len(shared) + 1], and whether all is aligned.

        Args:
            name: which table of this user.
            lists: lists of contiguous tensors, the n-th of each with the same number of elements.
            shared: lists with one value for each tensor.

        Raises:
            RecurxError: an address changed while a graph is being captured.
        """
        addresses = tuple(t.data_ptr() for tensors in (*lists, *shared) for t in tensors)
        key = (*addresses, *(t.numel() for t in lists[0]))
        kept = self._kept.get(name)
        if kept is None or kept[0] != key:
            with torch.inference_mode(False):  # the next step may be outside
                kept = (key, *self._build(lists, shared))
            self._kept[name] = kept
        return kept[1], kept[2]

    @staticmethod
    def _build(
        lists: Sequence[Sequence[torch.Tensor]], shared: Sequence[Sequence[torch.Tensor]]
    ) -> tuple[torch.Tensor, bool]:
        device = lists[0][0].device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RecurxError(
                "recurx.kernels.multi_tensor: a weight, gradient or state moved since the warm-up, "
                "while a graph is captured. Keep gradients (zero_grad(set_to_none=False)) and run "
                "one step outside the capture first."
            )
        rows = []
        for index, first in enumerate(lists[0]):
            starts = np.arange(0, first.numel(), CHUNK, dtype=np.int64)
            columns = [ts[index].data_ptr() + starts * ts[index].element_size() for ts in lists]
            columns += [np.full_like(starts, ts[index].data_ptr()) for ts in shared]
            columns.append(np.minimum(CHUNK, first.numel() - starts))
            rows.append(np.stack(columns, axis=1))
        table = np.concatenate(rows)
        wide = len(lists)
        aligned = not (table[:, :wide] % 16).any() and not (table[:, -1] % 8).any()
        host = torch.from_numpy(table)
        if device.type != "cuda":
            return host, aligned
        return host.pin_memory().to(device, non_blocking=True), aligned


def takes(*tensors: torch.Tensor) -> bool:
    """Whether a table can hold these tensors."""
    return all(t.is_contiguous() and t.dtype in (torch.float32, torch.bfloat16) for t in tensors)
