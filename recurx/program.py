"""A schedule as numbers: which slots a call reads and writes, and which sums are formed once.

This is the one place that decides it; every engine obeys. Slot 0 is x, slots 1..S are the states in
the order of `schedule.states`, and slot S + 1 holds a sum that several calls inject (z_H + x in
TRM: constant over a cycle). Where all slots lie in one arena (Triton) a call forms its input in the
slot it writes and the net then updates that slot in place: the running h *is* the carry.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

from recurx.hashing import hash_once
from recurx.operands import Span
from recurx.schedule import INPUT, Schedule, Step


class Factors(NamedTuple):
    """Of a `Step`; `keep` is 1 - damping, `number` a noisy call's, 0.5 whatever is `learned`."""

    scale: float
    keep: float
    damping: float
    noise: float
    number: int
    learned: tuple[tuple[str, str], ...] = ()


PLAIN = Factors(1.0, 0.0, 1.0, 0.0, 0)


class Call(NamedTuple):
    """write <- net(sum(state) + (sum(inject))), by slot; with factors as `Step` says.

    Args:
        shared: number of the sum over `inject` if several calls use it, else None.
        forms: whether this is the call that forms the shared sum; the others find it kept.
        stays: whether the next call overwrites what this one writes, and reads it as its first
            operand alone: then it need not leave the chip in between.
        factors: None where a step has none.
    """

    net: str
    write: int
    state: tuple[int, ...]
    inject: tuple[int, ...] = ()
    shared: int | None = None
    forms: bool = False
    stays: bool = False
    factors: Factors | None = None

    @property
    def damped(self) -> bool:
        return self.factors is not None and self.factors.keep != 0


@hash_once
@dataclass(frozen=True)
class Program:
    """The calls of a schedule, lowered; `states` is how many states there are."""

    calls: tuple[Call, ...]
    states: int


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
        called, learned = span.start + number if step.noise else 0, tuple(step.learned.items())
        scale, damping = (0.5 if isinstance(f, str) else f for f in (step.scale, step.damping))
        factors = Factors(scale, 1 - damping, damping, step.noise, called, learned)
        calls.append(
            Call(
                step.net, slot[step.write], tuple(state), tuple(inject), shared, forms,
                _continues(step, after), factors if step.changed else None,
            )
        )  # fmt: skip
        if held is not None and step.write in held:
            held = None
    return Program(tuple(calls), len(slot) - 1)


def _injects_the_same(step: Step, after: Step | None) -> bool:
    """Whether the call after `step` injects the same sum, still unchanged."""
    return after is not None and after.inject == step.inject and step.write not in step.inject


def _continues(step: Step, after: Step | None) -> bool:
    """Whether the call after `step` overwrites what it wrote and reads it first, and only there: a
    damped one reads it once more."""
    if after is None or after.write != step.write or after.state[0] != step.write:
        return False
    if after.damping != 1:
        return False
    return step.write not in (*after.state[1:], *after.inject)
