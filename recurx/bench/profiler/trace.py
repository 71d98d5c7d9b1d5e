"""The trace as Chrome/Perfetto JSON: nested named ranges on the host, kernels, engine phases.

Ranges are made from the path of each operator (step > cycle > net call > block > stage): a range
is a run of operators that share the path down to it, so ranges nest and never overlap.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from recurx.bench.profiler.attribute import NET_STAGES
from recurx.bench.profiler.records import BACKWARD, Op
from recurx.bench.profiler.result import Result, empty_row

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


def ranges(ops: Iterable[Op], kind: str) -> Iterator[tuple[int, str, int, int]]:
    """(depth, name, start, end) of every range, in ns, outer ranges closed after inner ones."""
    yield from _nested([(path(op, kind), op) for op in ops], 0)


def _nested(
    ops: Iterable[tuple[tuple[str, ...], Op]], depth: int
) -> Iterator[tuple[int, str, int, int]]:
    """The ranges from `depth` on of operators that share their path so far."""
    for names, group in itertools.groupby(ops, key=lambda op: op[0][depth : depth + 1]):
        inside = list(group)
        if names:
            yield from _nested(inside, depth + 1)
            yield depth, names[0], inside[0][1].start, inside[-1][1].end


def chrome_trace(profile: Result) -> dict[str, Any]:
    """The whole trace, as `Profile.save_trace` writes it."""
    events = [*_titles(HOST, "host: traced step, tracer's books taken out", {1: "step"})]
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
        events += _titles(GPU, "GPU", {1: "kernels"})
    for name, start_us, us in profile.kernel_events:
        events.append(_event(GPU, 1, name, "kernel", start_us * 1e3, (start_us + us) * 1e3, {}))
    if profile.timeline is not None:
        owners = {owner: f"owner {owner}" for owner in profile.timeline.owners}
        events += _titles(ENGINE, "recurx engine: phases inside the kernel", owners)
        begin = next((op.end - op.run for op in profile.ops if op.split is not None), 0)
        for e in profile.timeline.events:
            arguments = {key: e[key] for key in ("call", "block", "sample") if key in e}
            span = begin + e["start_ns"], begin + e["end_ns"]
            events.append(_event(ENGINE, e["owner"], e["phase"], "phase", *span, arguments))
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": profile.versions}


def _event(
    pid: int, tid: int, name: str, category: str, start: float, end: float, args: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": name, "cat": category, "ph": "X", "pid": pid, "tid": tid,
        "ts": start / 1e3, "dur": (end - start) / 1e3, "args": args,
    }  # fmt: skip


def _titles(pid: int, name: str, threads: dict[int, str]) -> Iterator[dict[str, Any]]:
    """Events that name a process and its threads."""
    yield {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}}
    for tid, title in threads.items():
        args = {"name": title}
        yield {"name": "thread_name", "ph": "M", "pid": pid, "tid": tid, "args": args}
