"""What a backend made of weights, kept for the next call, and never older than the weights.

PyTorch's version counters prove nothing (NOTES.md). So what was made is used again only if a digest
of all contents says so (CPU), and is otherwise made anew, into the same memory, at every call (GPU,
where reading an answer back would cost more than packing). Inside `frozen_weights()` the caller
answers for the weights, and each is packed once.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import operator
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recurx.forking import fork_lock

_freeze: contextvars.ContextVar[object | None] = contextvars.ContextVar("freeze", default=None)


@contextlib.contextmanager
def frozen_weights() -> Iterator[None]:
    """Inside, in this thread, nobody writes to weights: each is looked at once, at its first use.

    Within another one it changes nothing.
    """
    token = _freeze.set(_freeze.get() or object())
    try:
        yield
    finally:
        _freeze.reset(token)


def frozen() -> bool:
    """Whether this thread is inside `frozen_weights`."""
    return _freeze.get() is not None


class _Entry(NamedTuple):
    made: Any
    digest: Hashable  # of the contents that it was made of; None: unknown
    refs: tuple[weakref.ref[Any], ...]  # to the storages where they lie
    freeze: object | None  # under which it was last found to be right

    def is_of(self, storages: Sequence[Any]) -> bool:
        return all(map(operator.is_, [ref() for ref in self.refs], storages))


class WeightCache:
    """Made things by (key, where the weights lie): bounded, safe to use from several threads.

    Only memory is known here, no tensor and no module, so that tensors may be swapped or replaced
    in their modules at will. What was made of memory that is freed goes with it.

    Args:
        limit: how many are kept; the least recently used goes first.
        digest: of the contents of weights; None: they are made anew at every call.
    """

    def __init__(
        self, limit: int, digest: Callable[[Sequence[Tensor]], Hashable] | None = None
    ) -> None:
        self._limit = limit
        self._digest = digest or (lambda _: None)
        self._lock = fork_lock()
        self._entries: OrderedDict[Any, _Entry] = OrderedDict()

    def get(self, key: Hashable, weights: Sequence[Tensor], make: Callable[[Any], Any]) -> Any:
        """What `make` made of these weights as they are now.

        Args:
            key: what else the thing depends on.
            make: called with the thing made before of the same memory (None for the first time),
                which it may overwrite and return, so that its addresses stay.
        """
        slot = (key, *[(w.data_ptr(), w.shape, w.stride(), w.dtype) for w in weights])
        storages = [weight.untyped_storage() for weight in weights]
        freeze = _freeze.get()
        entry = self._entries.get(slot)
        # The address may belong to other weights by now.
        if entry and entry.freeze is freeze is not None and entry.is_of(storages):
            return entry.made
        digest = self._digest(weights)  # before packing: what is written later shows next time
        with self._lock:
            entry = self._entries.pop(slot, None)
            if entry and not entry.is_of(storages):
                entry = None
            if entry and digest is not None and entry.digest == digest:
                made = entry.made
            else:
                with torch.inference_mode(False):  # the next call may not be in inference mode
                    made = make(entry and entry.made)
                if self._digest(weights) != digest:  # somebody writes at this moment
                    digest = freeze = None
            drop = functools.partial(self._drop, slot)
            refs = entry.refs if entry else tuple(weakref.ref(s, drop) for s in storages)
            self._entries[slot] = _Entry(made, digest, refs, freeze)
            while len(self._entries) > self._limit:
                self._entries.popitem(last=False)
            return made

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def _drop(self, slot: Any, _: Any) -> None:
        # Runs whenever the collector pleases, the lock perhaps held by this very thread: dict
        # methods are atomic, and a lost race only drops an entry that is made again.
        self._entries.pop(slot, None)
