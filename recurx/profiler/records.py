"""What a trace holds: operators, where each ran, and their times."""

from __future__ import annotations

from dataclasses import dataclass, field

from recurx.profiler.counts import Place
from recurx.profiler.fused import Split
from recurx.profiler.where import Where

FORWARD, BACKWARD = "forward", "backward"


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
