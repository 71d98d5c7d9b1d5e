"""A program over an arena of slots, in which the Triton kernels run it.

Slot 0 is x, the states follow, then a sum that several calls inject, if there is one, and the place
of calls that are damped, if there are any. Needs no triton: plans count by it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from recurx.program import Factors, Program


class Row(NamedTuple):
    """One step over an arena of slots: a call, or with `net` None a sum alone. It is formed and run
    in slot `place`: another than `write` where that must be kept until the end, to be damped."""

    net: str | None
    write: int
    place: int
    state: tuple[int, ...]
    inject: tuple[int, ...] = ()
    factors: Factors | None = None

    @property
    def is_identity(self) -> bool:
        """Whether the input already is what its place holds."""
        scaled = self.factors is not None and self.factors.scale != 1
        return self.state == (self.place,) and not self.inject and not scaled

    @property
    def finishes(self) -> bool:
        """Whether what the net leaves is not yet what is written."""
        return self.factors is not None and self.factors[1:4] != (0, 1, 0)


@functools.lru_cache(maxsize=256)
def slots_of(program: Program) -> int:
    """How many slots there are."""
    extra = any(call.forms for call in program.calls), any(call.damped for call in program.calls)
    return program.states + 1 + sum(extra)


@functools.lru_cache(maxsize=256)
def rows_of(program: Program) -> tuple[Row, ...]:
    """The calls in order; a shared sum is a row of its own."""
    made, kept = [], program.states + 1
    for call in program.calls:
        if call.forms:
            made.append(Row(None, kept, kept, call.inject))
        inject = call.inject if call.shared is None else (kept,)
        place = slots_of(program) - 1 if call.damped else call.write
        made.append(Row(call.net, call.write, place, call.state, inject, call.factors))
    return tuple(made)
