"""Where a step is while it runs: module, recursion, net call, block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple


class Where(NamedTuple):
    """Where an operator runs, or a module stands.

    Args:
        part: "top" (outside every known module), "loss", "act", "inner", "io" (a child of the
            inner module that is no net), a head, "net", "foreign" (a net recurx cannot read),
            "block", a part of `roles.BLOCK_PARTS`, "module" (of a model that recurx does not know),
            "user" and "optimizer" (ranges of those), or "gradients".
        name: of the net ("L", "H", "net"), the module's attribute, or the range's name.
        recursion, call: numbers in the step, or -1.
        block: number of the block in its net, or -1.
    """

    part: str = "top"
    name: str = ""
    recursion: int = -1
    call: int = -1
    block: int = -1


class Position:
    """The stack of places that a step is in; whoever sees a call pushes, and pops after it."""

    def __init__(self) -> None:
        self.recursion = self.call = -1
        self.cycles: dict[int, int] = {}  # recursion -> net calls of one cycle, 0 if unknown
        self.stack = [Where()]

    @property
    def where(self) -> Where:
        return self.stack[-1]

    @contextlib.contextmanager
    def range(self, where: Where) -> Iterator[None]:
        """Operators inside run in `where`."""
        self.stack.append(where)
        try:
            yield
        finally:
            self.stack.pop()

    def begin_recursion(self, cycle: int) -> None:
        """The next net call is call 0 of a new recursion whose cycles have `cycle` calls."""
        self.recursion, self.call = self.recursion + 1, -1
        self.cycles[self.recursion] = cycle

    def inside(self, part: str, name: str = "", block: int = -1) -> Where:
        """`part` of the present recursion and call."""
        return Where(part, name, self.recursion, self.call, block)
