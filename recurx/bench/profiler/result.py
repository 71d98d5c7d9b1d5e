"""The result of a profile: plain numbers by domain. `report.py` prints and saves them."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from recurx.bench.profiler.attribute import STAGES
from recurx.bench.profiler.ceilings import Ceilings
from recurx.bench.profiler.records import Op
from recurx.errors import bad_argument


@dataclass
class Row:
    """One stage (or net call) of the step.

    Args:
        name: short name, a key of `STAGES` or a name of the user's.
        label, group: for people; group is "net", "around", "training" or "other".
        ms, forward_ms, backward_ms: milliseconds of the untraced step (see `report_how.j2`).
        share: of the step.
        operators, launches: ATen operators; kernels (on a CPU: operators that are no views).
        flops, bytes: counted from the operators.
        tflops, gbs: achieved.
        of_roof: share of what the roofline allows for this work; above 1 where the data stay in a
            cache that is faster than memory.
        limit: which roof is nearer, "compute" or "memory".
    """

    name: str
    label: str
    group: str
    ms: float = 0.0
    forward_ms: float = 0.0
    backward_ms: float = 0.0
    share: float = 0.0
    operators: int = 0
    launches: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    tflops: float = 0.0
    gbs: float = 0.0
    of_roof: float = 0.0
    limit: str = ""


@dataclass
class Call:
    """One net call. `backward_ms` is 0 outside the gradient window."""

    recursion: int
    cycle: int
    call: int
    net: str
    forward_ms: float
    backward_ms: float

    @property
    def ms(self) -> float:
        return self.forward_ms + self.backward_ms


@dataclass
class Sync:
    """A place where the host waits for the device (on a CPU: would wait for a GPU)."""

    place: str
    text: str
    what: str
    stage: str
    count: int


@dataclass
class Engine:
    """One recurx op: which calls ran where, and the engine's own split (empty if opaque)."""

    backend: str
    what: str
    ms: float
    flops: float
    phases: list[tuple[str, float, float]]  # (phase, ms, FLOPs; 0 if not counted)

    @property
    def label(self) -> str:
        opaque = "" if self.phases else " (opaque: no split inside)"
        return f"{self.backend}: {self.what}{opaque}"


# Of an event inside a kernel; "sample" may be there too.
TIMELINE_KEYS = ("owner", "call", "block", "phase", "start_ns", "end_ns")


@dataclass(frozen=True)
class Timeline:
    """Events inside one kernel: who did what when, sorted by owner and time.

    The clock starts at the first event.
    """

    events: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, events: Iterable[dict[str, Any]]) -> Timeline:
        """Checked and sorted.

        Raises:
            InvalidArgument: an event lacks a key, or ends before it starts.
        """
        checked = []
        for number, event in enumerate(events):
            missing = [key for key in TIMELINE_KEYS if key not in event]
            if missing:
                raise bad_argument(
                    "profile", f"timeline[{number}]", f"a dict with {', '.join(TIMELINE_KEYS)}",
                    f"one without {', '.join(missing)}",
                )  # fmt: skip
            if event["end_ns"] < event["start_ns"]:
                raise bad_argument(
                    "profile", f"timeline[{number}]", "end_ns >= start_ns",
                    f"{event['start_ns']}..{event['end_ns']}",
                )  # fmt: skip
            checked.append({key: event[key] for key in (*TIMELINE_KEYS, "sample") if key in event})
        first = min((event["start_ns"] for event in checked), default=0)
        for event in checked:
            event |= {key: event[key] - first for key in ("start_ns", "end_ns")}
        checked.sort(key=lambda e: (e["owner"], e["start_ns"], -e["end_ns"]))
        return cls(tuple(checked))

    @property
    def owners(self) -> list[int]:
        return sorted({event["owner"] for event in self.events})

    @property
    def span_ms(self) -> float:
        """From the first event to the end of the last."""
        return max((event["end_ns"] for event in self.events), default=0) * 1e-6

    def phases(self) -> dict[str, float]:
        """{phase: ms}, mean over owners, longest first; "(between phases)" is what is left."""
        total: dict[str, float] = defaultdict(float)
        for event in self.events:
            total[event["phase"]] += (event["end_ns"] - event["start_ns"]) * 1e-6
        owners = len(self.owners) or 1
        mean = {phase: ms / owners for phase, ms in total.items()}
        mean["(between phases)"] = max(0.0, self.span_ms - sum(mean.values()))
        return dict(sorted(mean.items(), key=lambda item: -item[1]))

    def shares(self) -> dict[str, float]:
        """{phase: share of the kernel}."""
        phases = self.phases()
        total = sum(phases.values()) or 1.0
        return {phase: ms / total for phase, ms in phases.items()}

    def to_dict(self) -> dict[str, Any]:
        return {"owners": len(self.owners), "span_ms": self.span_ms, "phases_ms": self.phases()}


@dataclass
class Result:
    """Where one step of a recursive model spends its time.

    Args:
        title, kind: what was profiled; "supervision step", "training step" or "step".
        device, dtype, threads, batch, versions: on what.
        step_ms: untraced steps, in ms, in order; `ms` is their median.
        traces, traced_ms, lost_ms: how many traced steps, the shortest, and what the tracer's own
            books took of it.
        overhead_us: what the trace added to each operator, taken out of the stage times.
        rows, calls, syncs, engines: see their classes.
        launches, operators: of the step.
        idle_ms: on a GPU, the step without its kernels: the device waits for the host.
        ceilings: measured in the same run.
        halting: {step: samples that halt at it}, and how many did not in `halting_steps` steps.
        advice: what recurx would replace, and what that gains.
        predicted_ms, patched_ms: the step with the recursion on recurx: predicted by the cost
            model, and measured; 0 if it was not.
        commands: ready lines for Nsight.
        timeline: phases inside a kernel of the CUDA engine, if given.
    """

    title: str
    kind: str
    device: str
    dtype: str
    threads: int
    batch: int
    versions: dict[str, str]
    step_ms: list[float]
    traces: int
    traced_ms: float
    lost_ms: float
    overhead_us: float
    rows: list[Row]
    calls: list[Call]
    syncs: list[Sync]
    engines: list[Engine]
    launches: int
    operators: int
    idle_ms: float
    ceilings: Ceilings
    halting: dict[int, int] = field(default_factory=dict)
    halting_open: int = 0
    halting_steps: int = 0
    advice: list[str] = field(default_factory=list)
    predicted_ms: float = 0.0
    patched_ms: float = 0.0
    commands: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    timeline: Timeline | None = None
    ops: list[Op] = field(default_factory=list, repr=False)
    kernel_events: list[tuple[str, float, float]] = field(default_factory=list, repr=False)

    @property
    def ms(self) -> float:
        """The untraced step: the median."""
        return statistics.median(self.step_ms)

    def row(self, name: str) -> Row:
        """The stage called `name`; zeros if it did not run."""
        return next((row for row in self.rows if row.name == name), empty_row(name))

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON; without single operators."""
        skip = {"ops", "kernel_events", "timeline"}
        values = {k: v for k, v in vars(self).items() if k not in skip}
        for name in ("rows", "calls", "syncs", "engines"):
            values[name] = [asdict(item) for item in values[name]]
        values["ceilings"] = asdict(self.ceilings)
        values["timeline"] = None if self.timeline is None else self.timeline.to_dict()
        return {"recurx_profile": 1, "ms": self.ms, **values}

    def add_timeline(self, events: Iterable[dict[str, Any]]) -> None:
        """Add phases inside a kernel: dicts with owner, call, block, phase, start_ns, end_ns.

        Raises:
            InvalidArgument: an event lacks a key, or ends before it starts.
        """
        self.timeline = Timeline.of(events)
        shares = self.timeline.shares()
        for engine in self.engines:
            if engine.backend == "cuda" and not engine.phases:
                engine.phases = [(name, share * engine.ms, 0.0) for name, share in shares.items()]


def short(value: float) -> str:
    """Four digits, without an exponent for large numbers."""
    return f"{value:.4g}" if abs(value) < 9999.5 else f"{value:,.0f}"


def empty_row(name: str) -> Row:
    base = name.partition(": ")[0]
    group, label = STAGES.get(base, ("other", name))
    return Row(name, label if name == base else name.replace("optimizer", "optimiser"), group)
