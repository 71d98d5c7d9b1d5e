"""Weights in the form that a backend multiplies, made once and kept until a parameter changes.

`WeightCache` is the bookkeeping that backends share; what is made of the weights is theirs.
`Tape` is the form of the GPU backends: all matrices of a net in one buffer, in the states' dtype.

A change shows in a tensor's address or `_version` (optimiser steps, `copy_`), or else in the
backend's fingerprint of its contents, if it has one.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from recurx.nets import ATTENTION, WEIGHT_NAMES, BlockSpec, NetSpec

ALIGN = 128  # elements: every matrix starts at a multiple of 256 bytes in bf16
ROW_ALIGN = 16  # elements: rows start at multiples of 32 bytes, so that copies are 16 bytes wide


@functools.cache
def device_words(words: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 words on a device, kept for good: a CUDA graph of the caller's may hold the address.

    A copy from the host is no part of a graph: what runs inside one must have run before it.
    """
    return torch.tensor(words, dtype=torch.int32, device=device)


class WeightCache:
    """Made things by (key, weight tensors): weak, bounded, safe to use from several threads.

    Args:
        limit: how many are kept; the least recently used goes first.
        fingerprint: of the weights' contents, for edits that no version counter shows; or None.
    """

    def __init__(
        self, limit: int, fingerprint: Callable[[Sequence[Tensor]], Hashable] | None = None
    ) -> None:
        self._limit = limit
        self._fingerprint = fingerprint
        self._lock = threading.Lock()
        self._entries: OrderedDict[Any, tuple[Any, tuple[weakref.ref[Tensor], ...], Any]] = (
            OrderedDict()
        )

    def get(
        self,
        key: Hashable,
        weights: Sequence[Tensor],
        make: Callable[[Any], Any],
    ) -> Any:
        """What `make` made of these weights; made again if a weight changed since.

        Args:
            key: what else the thing depends on.
            make: called with the thing made before of the same tensors (None for the first time),
                which it may overwrite and return, so that its addresses stay.
        """
        slot = (key, tuple(id(weight) for weight in weights))
        with self._lock:
            state = self._state(weights)
            entry = self._entries.get(slot)
            # An id may belong to a new tensor by now; the weak references tell.
            if entry is not None and not all(
                ref() is weight for ref, weight in zip(entry[1], weights, strict=True)
            ):
                entry = None
            if entry is not None and entry[0] == state:
                self._entries.move_to_end(slot)
                return entry[2]
            self._entries.pop(slot, None)
            made = make(None if entry is None else entry[2])
            refs = tuple(weakref.ref(weight, lambda _: self._drop(slot)) for weight in weights)
            self._entries[slot] = (state, refs, made)
            while len(self._entries) > self._limit:
                self._entries.popitem(last=False)
            return made

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def _drop(self, slot: Any) -> None:
        # Runs whenever the collector pleases, the lock perhaps held by this very thread: dict
        # methods are atomic, and a lost race only drops an entry that is made again.
        self._entries.pop(slot, None)

    def _state(self, weights: Sequence[Tensor]) -> tuple[Any, ...]:
        marks = tuple(
            (w.data_ptr(), -1 if w.is_inference() else w._version, w.dtype, w.stride())
            for w in weights
        )
        return marks, None if self._fingerprint is None else self._fingerprint(weights)


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def padded_columns(columns: int) -> int:
    """Elements from row to row of a matrix with so many columns in a `Tape`."""
    return _up(columns, ROW_ALIGN)


class Tape:
    """All matrices of some nets in one buffer, block after block, each a view with padded rows.

    The padding is zero. `blocks[i]` holds the four matrices of block i over all nets, `offsets[i]`
    where they start (elements), `of_net` the range of blocks of each net.
    """

    def __init__(
        self, nets: Sequence[tuple[str, NetSpec]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.specs: list[BlockSpec] = [block for _, spec in nets for block in spec.blocks]
        self.of_net: dict[str, tuple[int, int]] = {}
        self.offsets: list[tuple[int, ...]] = []
        shapes: list[tuple[int, int]] = []
        first, end = 0, 0
        for name, spec in nets:
            self.of_net[name] = (first, first + len(spec.blocks))
            first += len(spec.blocks)
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
        per_block = [len(WEIGHT_NAMES[block.kind]) for block in self.specs]
        ends = [sum(per_block[: i + 1]) for i in range(len(per_block))]
        self.blocks = [
            tuple(self._padded[e - count : e]) for e, count in zip(ends, per_block, strict=True)
        ]

    @functools.cached_property
    def words(self) -> Tensor:
        """int32 on the device, a row of 8 a block for kernels/recursion.py.

        (1 for a token MLP, where its four matrices start in units of ALIGN elements, 0, 0, 0)
        """
        rows = [
            [int(spec.kind != ATTENTION), *(start // ALIGN for start in starts), 0, 0, 0]
            for spec, starts in zip(self.specs, self.offsets, strict=True)
        ]
        return device_words(tuple(word for row in rows for word in row), self.buffer.device)

    def fill(self, weights: Sequence[Tensor]) -> Tape:
        """Round the weights (flat, net after net) into the buffer."""
        with torch.no_grad():
            torch._foreach_copy_(self._views, [weight.detach() for weight in weights])
        return self
