"""The trace as Chrome/Perfetto JSON: nested named ranges on the host, kernels, engine phases.

Ranges are made from the path of each operator (step > cycle > net call > block > stage): a range
is a run of operators that share the path down to it, so ranges nest and never overlap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from recurx.profiler.attribute import NET_STAGES
from recurx.profiler.records import BACKWARD, Op
from recurx.profiler.result import Result, empty_row

HOST, GPU, ENGINE = 1, 2, 3  # process ids in the trace


def path(op: Op, kind: str) -> tuple[str, ...]:
    """Names of the ranges around an operator, outermost first."""
    names = [kind]
    if op.phase == BACKWARD:
        names.append("backward")
    if op.call >= 0 and op.split is None and op.stage in NET_STAGES:
        again = f" of recursion {op.where.recursion}" if op.where.recursion > 0 else ""
        if op.cycle >= 0:
            names.append(f"cycle {op.cycle}{again}")
        names.append(f"call {op.call}: net {op.net}{again}")
        if op.where.block >= 0:
            names.append(f"block {op.where.block}")
    names.append(empty_row(op.stage).label)
    return tuple(names)


def ranges(ops: Sequence[Op], kind: str) -> Iterator[tuple[int, str, int, int]]:
    """(depth, name, start, end) of every range, in ns, outer ranges closed after inner ones."""
    open_ranges: list[tuple[str, int]] = []
    before = 0
    for op in ops:
        names = path(op, kind)
        same = 0
        for (name, _), other in zip(open_ranges, names, strict=False):
            if name != other:
                break
            same += 1
        # A leaf range also ends where a deeper path goes on below it.
        while len(open_ranges) > same:
            name, start = open_ranges.pop()
            yield len(open_ranges), name, start, before
        open_ranges += [(name, op.start) for name in names[same:]]
        before = op.end
    while open_ranges:
        name, start = open_ranges.pop()
        yield len(open_ranges), name, start, before


def chrome_trace(profile: Result) -> dict[str, Any]:
    """The whole trace, as `Profile.save_trace` writes it."""
    events = [_named(HOST, "host: traced step, tracer's books taken out"), _thread(HOST, 1, "step")]
    for _, name, start, end in ranges(profile.ops, profile.kind):
        events.append(_event(HOST, 1, name, "range", start, end, {}))
    for op in profile.ops:
        arguments: dict[str, Any] = {"flops": op.flops, "bytes": op.bytes}
        if op.sync:
            arguments |= {"sync": op.sync, "place": str(op.place)}
        if op.split is not None:
            arguments |= {"backend": op.split.backend, "calls": [op.split.start, op.split.stop]}
            arguments["phases"] = {phase: share for phase, share, _ in op.split.phases}
        # The operator itself: the end of its span; the time before it is Python and dispatch.
        events.append(_event(HOST, 1, op.name, "operator", op.end - op.run, op.end, arguments))
    if profile.kernel_events:
        events += [_named(GPU, "GPU"), _thread(GPU, 1, "kernels")]
        for name, start_us, us in profile.kernel_events:
            events.append(_event(GPU, 1, name, "kernel", start_us * 1e3, (start_us + us) * 1e3, {}))
    if profile.timeline is not None:
        events.append(_named(ENGINE, "recurx engine: phases inside the kernel"))
        begin = next((op.end - op.run for op in profile.ops if op.split is not None), 0)
        for owner in profile.timeline.owners:
            events.append(_thread(ENGINE, owner, f"owner {owner}"))
        for e in profile.timeline.events:
            events.append(
                _event(
                    ENGINE, e["owner"], e["phase"], "phase", begin + e["start_ns"],
                    begin + e["end_ns"], {k: e[k] for k in ("call", "block", "sample") if k in e},
                )
            )  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": profile.versions}


def _event(
    pid: int, tid: int, name: str, category: str, start: float, end: float, args: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": name, "cat": category, "ph": "X", "pid": pid, "tid": tid,
        "ts": start / 1e3, "dur": (end - start) / 1e3, "args": args,
    }  # fmt: skip


def _named(pid: int, name: str) -> dict[str, Any]:
    return {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}}


def _thread(pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": "thread_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
