"""What a backend made of weights, kept until a parameter changes; what that is, is its own affair.

A change shows in a tensor's address or `_version` (optimiser steps, `copy_`), or else in the
backend's fingerprint of its contents, if it has one.
"""

from __future__ import annotations

import operator
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from recurx.forking import fork_lock

Memory = list[tuple[int, int]]  # (address, bytes) of each contiguous weight
Marks = list[tuple[Any, ...]]  # of each weight: what differs after a change that PyTorch sees


class _Entry(NamedTuple):
    marks: Marks
    memory: Memory
    fingerprint: Hashable
    refs: tuple[weakref.ref[Tensor], ...]
    made: Any


class WeightCache:
    """Made things by (key, weight tensors): weak, bounded, safe to use from several threads.

    Args:
        limit: how many are kept; the least recently used goes first.
        fingerprint: of the contents of memory, for edits that no version counter shows; or None.
    """

    def __init__(self, limit: int, fingerprint: Callable[[Memory], Hashable] | None = None) -> None:
        self._limit = limit
        self._fingerprint = fingerprint or (lambda _: None)
        self._lock = fork_lock()
        self._entries: OrderedDict[Any, _Entry] = OrderedDict()

    def get(self, key: Hashable, weights: Sequence[Tensor], make: Callable[[Any], Any]) -> Any:
        """What `make` made of these weights; made again if a weight changed since.

        Args:
            key: what else the thing depends on.
            make: called with the thing made before of the same tensors (None for the first time),
                which it may overwrite and return, so that its addresses stay.
        """
        slot = (key, *map(id, weights))
        with self._lock:
            marks = _marks(weights)
            entry = self._entries.get(slot)
            # Of these very tensors? An id may belong to a new one by now.
            if entry and not all(map(operator.is_, [ref() for ref in entry.refs], weights)):
                entry = None
            unmoved = entry is not None and entry.marks == marks  # then its memory still stands
            if unmoved and self._fingerprint(entry.memory) == entry.fingerprint:
                self._entries.move_to_end(slot)
                return entry.made
            memory = [(w.data_ptr(), w.nbytes) for w in weights if w.is_contiguous()]
            fingerprint = self._fingerprint(memory)
            self._entries.pop(slot, None)
            made = make(None if entry is None else entry.made)
            refs = tuple(weakref.ref(weight, lambda _: self._drop(slot)) for weight in weights)
            self._entries[slot] = _Entry(marks, memory, fingerprint, refs, made)
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


def _marks(weights: Sequence[Tensor]) -> Marks:
    try:
        return [(w.data_ptr(), w._version, w.dtype, w.stride()) for w in weights]
    except RuntimeError:  # an inference tensor has no version counter
        return [
            (w.data_ptr(), -1 if w.is_inference() else w._version, w.dtype, w.stride())
            for w in weights
        ]
