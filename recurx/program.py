"""A schedule as numbers: which slots a call reads and writes, and which sums are formed once.

This is the one place that decides it; every engine obeys. Slot 0 is x, slots 1..S are the states in
the order of `schedule.states`, and slot S + 1 holds a sum that several calls inject (z_H + x in
TRM: constant over a cycle). Where all slots lie in one arena (Triton) a call forms its input in the
slot it writes and the net then updates that slot in place: the running h *is* the carry.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from recurx.forking import lazy
from recurx.hashing import hash_once
from recurx.operands import Span
from recurx.schedule import INPUT, Schedule, Step

# Words a row in the table: a multiple of 16 bytes, so that Triton compiles one kernel for all rows.
ROW = 8


class Call(NamedTuple):
    """write <- net(sum(state) + (sum(inject))), by slot.

    Args:
        shared: number of the sum over `inject` if several calls use it, else None.
        forms: whether this is the call that forms the shared sum; the others find it kept.
        stays: whether the next call overwrites what this one writes, and reads it as its first
            operand alone: then it need not leave the chip in between.
    """

    net: str
    write: int
    state: tuple[int, ...]
    inject: tuple[int, ...] = ()
    shared: int | None = None
    forms: bool = False
    stays: bool = False


class Row(NamedTuple):
    """One step over an arena of slots: a call, or with `net` None a sum alone."""

    net: str | None
    write: int
    state: tuple[int, ...]
    inject: tuple[int, ...] = ()

    @property
    def is_identity(self) -> bool:
        """Whether the input already is what the written slot holds."""
        return self.state == (self.write,) and not self.inject


@hash_once
@dataclass(frozen=True)
class Program:
    """The calls of a schedule, lowered; `states` is how many states there are."""

    calls: tuple[Call, ...]
    states: int

    @lazy
    def slots(self) -> int:
        """x, the states, and the shared sum if there is one."""
        return self.states + 1 + any(call.forms for call in self.calls)

    @lazy
    def rows(self) -> tuple[Row, ...]:
        """The calls over an arena: a shared sum is a row of its own, and lies in the last slot."""
        rows, kept = [], self.states + 1
        for call in self.calls:
            if call.forms:
                rows.append(Row(None, kept, call.inject))
            inject = call.inject if call.shared is None else (kept,)
            rows.append(Row(call.net, call.write, call.state, inject))
        return tuple(rows)

    def table(self, blocks: Mapping[str, tuple[int, int]]) -> tuple[int, ...]:
        """The int32 words that kernels read: the rows, then the slots that they read.

        `blocks` says which blocks (first, one past the last) make up each net. A row is (first
        block, last block, write, where its reads start, number of states, of injects, 0, 0).
        """
        words: list[int] = []
        reads: list[int] = []
        for row in self.rows:
            first, last = (0, 0) if row.net is None else blocks[row.net]
            at = ROW * len(self.rows) + len(reads)
            words += [first, last, row.write, at, len(row.state), len(row.inject), 0, 0]
            reads += [*row.state, *row.inject]
        return tuple(words + reads)


@functools.lru_cache(maxsize=256)
def lower(schedule: Schedule, span: Span) -> Program:
    """The calls of `span`, sums that stay the same for several calls shared."""
    slot = {name: number for number, name in enumerate((INPUT, *schedule.states))}
    steps = schedule.steps[span.start : span.stop]
    calls: list[Call] = []
    held: tuple[str, ...] | None = None  # whose sum is kept
    sums = 0
    for number, step in enumerate(steps):
        after = steps[number + 1] if number + 1 < len(steps) else None
        forms = len(step.inject) > 1 and held != step.inject and _injects_the_same(step, after)
        if forms:
            held, sums = step.inject, sums + 1
        shared = sums if len(step.inject) > 1 and held == step.inject else None
        state, inject = ([slot[name] for name in names] for names in (step.state, step.inject))
        calls.append(
            Call(
                step.net, slot[step.write], tuple(state), tuple(inject), shared, forms,
                _continues(step, after),
            )
        )  # fmt: skip
        if held is not None and step.write in held:
            held = None
    return Program(tuple(calls), len(slot) - 1)


def _injects_the_same(step: Step, after: Step | None) -> bool:
    """Whether the call after `step` injects the same sum, still unchanged."""
    return after is not None and after.inject == step.inject and step.write not in step.inject


def _continues(step: Step, after: Step | None) -> bool:
    """Whether the call after `step` overwrites what it wrote and reads it first, and only there."""
    if after is None or after.write != step.write or after.state[0] != step.write:
        return False
    return step.write not in (*after.state[1:], *after.inject)
