"""A problem: all that a backend needs to know to accept or refuse a recursion, and to plan it."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recurx.forking import lazy
from recurx.hashing import hash_once
from recurx.nets import Net, NetSpec
from recurx.schedule import Schedule


@hash_once
@dataclass(frozen=True)
class Problem:
    """One recursion on one batch: schedule, nets, shape, dtype and device; hashable, printable.

    Args:
        schedule: the net calls.
        nets: (name, spec) of each net that the schedule calls, in the order of `schedule.nets`.
        batch, tokens, hidden: B, T, D of the states.
        dtype: dtype of x and of every state.
        device_type: "cpu", "cuda", ...
        rope: whether rotary tables are given.
        needs_grad: whether gradient through the window is wanted.
        opaque: names of nets that are plain callables; those run on the eager backend only.
    """

    schedule: Schedule
    nets: tuple[tuple[str, NetSpec], ...]
    batch: int
    tokens: int
    hidden: int
    dtype: torch.dtype
    device_type: str
    rope: bool = False
    needs_grad: bool = False
    opaque: tuple[str, ...] = ()

    @lazy
    def cuts(self) -> tuple[slice, ...]:
        """Where in the flat list of weights those of each net lie."""
        cuts, first = [], 0
        for _, spec in self.nets:
            cuts.append(slice(first, first + spec.num_weights))
            first = cuts[-1].stop
        return tuple(cuts)

    @lazy
    def changed(self) -> tuple[str, ...]:
        """Fields of blocks, then factors of steps, that are not as in TRM and HRM, each once."""
        return tuple(dict.fromkeys((*self.changed_blocks, *self.schedule.changed)))

    @lazy
    def changed_blocks(self) -> tuple[str, ...]:
        """Those of blocks alone; a learned factor of steps is the block of a norm here."""
        return tuple(dict.fromkeys(name for _, spec in self.nets for name in spec.changed))

    def unknown(self, fields: Collection[str]) -> str | None:
        """What differs from TRM and HRM in another field than these, in a sentence; or None."""
        for name, spec in self.nets:
            for number, block in enumerate(spec.blocks):
                for field in block.changed:
                    if field not in fields:
                        value = f"{field}={getattr(block, field)!r}"
                        return f"does not run {value} of block {number} of net {name!r}"
        missing = [field for field in self.schedule.changed if field not in fields]
        return f"does not run steps with {missing[0]}" if missing else None

    def bind(self, weights: Sequence[Tensor]) -> dict[str, Net]:
        """Cut the flat list of weights into nets, each checked."""
        return {
            name: Net(spec, weights[cut])
            for (name, spec), cut in zip(self.nets, self.cuts, strict=True)
        }

    def __str__(self) -> str:
        nets = ", ".join(
            f"{name}: {' + '.join(b.kind for b in spec.blocks)} (F={spec.blocks[0].inner})"
            for name, spec in self.nets
        )
        nets += "".join(f", {name}: any callable" for name in self.opaque)
        return (
            f"{self.schedule.name}, {len(self.schedule)} calls, window {self.schedule.window}; "
            f"B={self.batch} T={self.tokens} D={self.hidden} {str(self.dtype)[6:]} "
            f"on {self.device_type}; nets {nets}"
        )


def encode(schedule: Schedule, nets: Sequence[tuple[str, NetSpec]]) -> str:
    """Schedule and net specs as one string, the static argument of the custom op.

    NOTE: plain f-strings and joins, so that torch.compile folds it to a constant while tracing.
    """
    return "|".join([schedule.key, *[f"{name}={spec.key}" for name, spec in nets]])


@functools.lru_cache(maxsize=256)
def decode(text: str) -> tuple[Schedule, tuple[tuple[str, NetSpec], ...]]:
    """The inverse of `encode`."""
    schedule, *nets = text.split("|")
    named = [net.split("=", 1) for net in nets]
    return Schedule.from_key(schedule), tuple((name, NetSpec.from_key(key)) for name, key in named)
