"""From operators with their stages to the tables of a `Profile`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from recurx.bench.profiler.attribute import STAGES
from recurx.bench.profiler.ceilings import Ceilings
from recurx.bench.profiler.records import BACKWARD, Op, Trace
from recurx.bench.profiler.result import Call, Engine, Row, Sync, empty_row


def operator_ms(trace: Trace, step_ms: float) -> tuple[list[float], float]:
    """Milliseconds of every operator of an untraced step, and the overhead taken out (us each).

    The trace costs about the same for every operator: that much is taken from each (but at most
    four fifths of it), and the rest is scaled to add up to `step_ms`.
    """
    raw = [ns * 1e-6 for ns in trace.ns]
    overhead = max(0.0, (sum(raw) - step_ms) / max(1, len(raw)))
    less = [max(ms - overhead, 0.2 * ms) for ms in raw]
    factor = step_ms / sum(less) if sum(less) > 0 else 1.0
    return [ms * factor for ms in less], overhead * 1e3


def make_rows(
    ops: Sequence[Op], ms: Sequence[float], total: float, roofs: Ceilings,
    kernels: Sequence[tuple[str, float, float]] = (),
) -> list[Row]:  # fmt: skip
    """Stages in the order of `STAGES`, ranges of the user after them.

    `kernels` are all of a CUDA step: those that no operator launched go to "other".
    """
    rows: dict[str, Row] = {}
    for op, time in zip(ops, ms, strict=True):
        row = rows.setdefault(op.stage, empty_row(op.stage))
        row.ms += time
        if op.phase == BACKWARD:
            row.backward_ms += time
        else:
            row.forward_ms += time
        row.operators += 1
        row.launches += len(op.kernels) if kernels else not op.free
        row.flops += op.flops
        row.bytes += op.bytes
    stray = len(kernels) - sum(row.launches for row in rows.values()) if kernels else 0
    if stray > 0:
        row = rows.setdefault("other", empty_row("other"))
        left = max(0.0, sum(us for _, _, us in kernels) * 1e-3 - sum(ms))
        row.ms, row.forward_ms = row.ms + left, row.forward_ms + left
        row.launches += stray
    order = {name: index for index, name in enumerate(STAGES)}
    for row in rows.values():
        seconds = row.ms * 1e-3
        row.share = row.ms / total if total else 0.0
        if seconds > 0:
            row.tflops, row.gbs = row.flops / seconds / 1e12, row.bytes / seconds / 1e9
            row.of_roof = roofs.bound(row.flops, row.bytes) / seconds
        compute = row.flops / (roofs.best_tflops * 1e12)
        row.limit = "compute" if compute > row.bytes / (roofs.gbs * 1e9) else "memory"
    return sorted(rows.values(), key=lambda r: order.get(r.name.partition(": ")[0], len(order)))


def make_calls(ops: Sequence[Op], ms: Sequence[float]) -> list[Call]:
    """Net calls in order; fused ops of recurx hold several and are not among them."""
    calls: dict[tuple[int, int], Call] = {}
    for op, time in zip(ops, ms, strict=True):
        if op.call < 0 or op.split is not None:
            continue
        key = (op.where.recursion, op.call)
        call = calls.setdefault(key, Call(key[0], op.cycle, op.call, op.net, 0.0, 0.0))
        if op.phase == BACKWARD:
            call.backward_ms += time
        else:
            call.forward_ms += time
    return [calls[key] for key in sorted(calls)]


def make_syncs(ops: Iterable[Op]) -> list[Sync]:
    """Places where the host waits, most frequent first."""
    counted: Counter[tuple[str, str, str, str]] = Counter()
    for op in ops:
        if op.sync and op.place:
            counted[(str(op.place), op.place.text, op.sync, op.stage)] += 1
    return [Sync(*key, count) for key, count in counted.most_common()]


def make_engines(ops: Sequence[Op], ms: Sequence[float]) -> list[Engine]:
    """The recurx ops of the step with their own split."""
    found = []
    for op, time in zip(ops, ms, strict=True):
        split = op.split
        if split is None:
            continue
        direction = "backward" if split.backward else "forward"
        what = f"{direction} of calls {split.start}..{split.stop - 1} of {split.calls}"
        phases = [(phase, share * time, flops) for phase, share, flops in split.phases]
        found.append(Engine(split.backend, what, time, split.flops, phases))
    return found
