"""A schedule as a table of numbers, which kernels read instead of being compiled for it.

States live in the slots of one arena: slot 0 is x, slots 1..S the states in the order of
`schedule.states`, and slot S + 1, where it pays, a sum that several calls inject (z_H + x in TRM:
constant over a cycle, so it is formed once). A call forms its input in the slot it writes and the
net then updates that slot in place: the running h *is* the carry.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from recurx.operands import Span
from recurx.schedule import INPUT, Schedule

ROW = 8  # words a call in the table; see kernels/inject.py


@dataclass(frozen=True)
class Call:
    """write <- net(sum(state) + (sum(inject))) on slots; `net` None: only the sum is formed."""

    net: str | None
    write: int
    state: tuple[int, ...]
    inject: tuple[int, ...] = ()

    @property
    def is_identity(self) -> bool:
        """Whether the input already is what the written slot holds."""
        return self.state == (self.write,) and not self.inject


@dataclass(frozen=True)
class CallTable:
    """The calls of a schedule on `slots` slots."""

    calls: tuple[Call, ...]
    slots: int

    def table(self, blocks: Mapping[str, tuple[int, int]]) -> tuple[int, ...]:
        """The int32 words that kernels read: a row a call, then the slots that the calls read.

        `blocks` says which blocks (first, one past the last) make up each net. A row is (first
        block, last block, write, where its reads start, number of states, of injects, 0, 0).
        """
        rows: list[int] = []
        reads: list[int] = []
        for call in self.calls:
            first, last = (0, 0) if call.net is None else blocks[call.net]
            at = ROW * len(self.calls) + len(reads)
            rows += [first, last, call.write, at, len(call.state), len(call.inject), 0, 0]
            reads += [*call.state, *call.inject]
        return tuple(rows + reads)


@functools.lru_cache(maxsize=64)
def lower(schedule: Schedule, span: Span) -> CallTable:
    """The calls of `span`, sums that stay the same for several calls hoisted."""
    slot = {name: number for number, name in enumerate((INPUT, *schedule.states))}
    steps = schedule.steps[span.start : span.stop]
    kept = len(slot)
    calls: list[Call] = []
    held: tuple[str, ...] | None = None  # whose sum the kept slot holds
    for number, step in enumerate(steps):
        inject = tuple(slot[name] for name in step.inject)
        if len(inject) > 1:
            if held != step.inject and _recurs(steps[number:]):
                calls.append(Call(None, kept, inject))
                held = step.inject
            if held == step.inject:
                inject = (kept,)
        calls.append(
            Call(step.net, slot[step.write], tuple(slot[name] for name in step.state), inject)
        )
        if held is not None and step.write in held:
            held = None
    uses_kept = any(call.write == kept for call in calls)
    return CallTable(tuple(calls), kept + uses_kept)


def _recurs(steps: tuple) -> bool:  # type: ignore[type-arg]
    """Whether the call after the first one injects the same sum, still unchanged."""
    first = steps[0]
    return len(steps) > 1 and steps[1].inject == first.inject and first.write not in first.inject
