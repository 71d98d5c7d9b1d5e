"""What a trace holds: operators, where each ran, and their times; and where a step is meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from recurx.bench.profiler.counts import Place
from recurx.bench.profiler.fused import Split

FORWARD, BACKWARD = "forward", "backward"


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


@dataclass(slots=True)
class Op:
    """One operator of the step; times in ns since the step began, by the tracer's clock.

    `start` is the end of the operator before; `run` is the time inside the operator itself. The
    last fields are filled by `attribute.resolve`.
    """

    name: str
    where: Where
    start: int
    end: int
    run: int
    free: bool
    flops: float
    bytes: int
    phase: str = FORWARD
    origin: int = -1  # backward: index of the forward operator; -1 if there is none
    reads_table: bool = False
    sync: str | None = None
    place: Place | None = None
    split: Split | None = None
    kernels: list[tuple[str, float]] = field(default_factory=list)  # CUDA: (name, us)
    stage: str = ""
    cycle: int = -1
    call: int = -1
    net: str = ""

    @property
    def ns(self) -> int:
        return self.end - self.start


@dataclass
class Trace:
    """All operators of one step; `wall` and `lost` in ns (measured around it; taken out)."""

    ops: list[Op]
    wall: int
    lost: int
    cycles: dict[int, int]  # recursion -> net calls of one cycle, 0 if unknown
    ns: list[int]  # of every operator: its shortest in `steps` traced steps
    steps: int = 1


def best_of(traces: list[Trace]) -> Trace:
    """The shortest trace; with it, each operator's shortest time in all those that ran the same
    operators, since a busy machine interrupts one step here and another there."""
    best = min(traces, key=lambda trace: trace.wall - trace.lost)
    names = [op.name for op in best.ops]
    same = [trace for trace in traces if [op.name for op in trace.ops] == names]
    best.ns = [min(times) for times in zip(*(trace.ns for trace in same), strict=True)]
    best.steps = len(same)
    return best
