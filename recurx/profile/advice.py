"""What recurx would replace in the profiled step, and what that gains: predicted and measured."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from recurx.errors import RecurxError
from recurx.explain import explain
from recurx.models.inner import Inner
from recurx.patch import patch
from recurx.patch.handle import installed
from recurx.patch.install import find
from recurx.plan import Device, LaunchPlan
from recurx.problem import Problem
from recurx.profile.attribute import NET_STAGES, PRODUCTS
from recurx.profile.ceilings import synchronize
from recurx.profile.result import Row, median
from recurx.profile.step import device_of


@dataclass(frozen=True)
class Measured:
    """What the step took, for the comparison."""

    ms: float
    rows: Sequence[Row]
    cast_bytes: float  # moved to cast weights to the forward dtype


def advise(
    model: nn.Module,
    step: Callable[[], Any],
    measured: Measured,
    batch: int,
    training: bool,
    measure: bool,
    seconds: float = 10.0,
) -> list[str]:
    """Lines for people, in the order of the model's recursions; ends with `recurx.explain`.

    Args:
        measure: patch the model for a moment and time the step again (within `seconds`).
    """
    lines: list[str] = []
    patchable = False
    for _, module, adapter in find(model):
        if isinstance(module, Inner):
            lines.append("The recursion is recurx's own model already; see below which backend.")
        elif installed(module, adapter.method) is not None:
            lines.append("The recursion is patched: it runs on recurx already.")
        elif adapter.differences(module):
            lines.append("recurx would replace nothing: " + "; ".join(adapter.differences(module)))
        else:
            patchable = True
            plan: Any = adapter.plan(module, "auto")
            problem = dataclasses.replace(adapter.problem(module, plan), batch=batch)
            lines += _replaced(problem, measured)
            lines += _predicted(problem, measured, training)
    if patchable and measure:
        lines.append(_gain(model, step, measured, seconds))
    if not lines:
        lines.append("recurx would replace nothing: it finds no recursion that it knows here.")
    return [*lines, *explain(model, batch_size=max(1, batch)).splitlines()]


def _replaced(problem: Problem, measured: Measured) -> list[str]:
    rows = [row for row in measured.rows if row.name in NET_STAGES]
    total = sum(row.ms for row in rows)
    glue = sum(row.ms for row in rows if row.name not in (*PRODUCTS, "attention"))
    launches = sum(row.launches for row in rows)
    share = total / measured.ms if measured.ms else 0.0
    lines = [
        f"recurx would replace the recursion ({problem.schedule.name}, "
        f"{len(problem.schedule)} net calls): {total:.4g} of {measured.ms:.4g} ms "
        f"({share:.0%} of the step), {launches} launches.",
    ]
    if total:
        lines.append(
            f"  Why it gains: {glue / total:.0%} of that time is neither a product nor attention "
            f"(norms, RoPE, SwiGLU, sums), which fused kernels do while they write a product"
            + (
                f"; casts of the weights move {measured.cast_bytes / 1e6:.4g} MB a step, "
                "which recurx does once per weight update."
                if measured.cast_bytes
                else "."
            )
        )
    return lines


def _predicted(problem: Problem, measured: Measured, training: bool) -> list[str]:
    if problem.opaque:
        return [f"  Predicted: nothing, {', '.join(problem.opaque)} is foreign code."]
    device = Device.of(problem.device_type)
    try:
        plan = LaunchPlan.pick(problem, device)
    except RecurxError as error:
        return [f"  Predicted: no plan: {error}"]
    seconds = plan.seconds(device)
    rows = [row for row in measured.rows if row.name in NET_STAGES]
    now = sum(row.forward_ms for row in rows)
    then = seconds * 1e3
    if training:  # the window runs under autograd as before
        outside = problem.schedule.grad_from / len(problem.schedule)
        then = then * outside + now * (1 - outside)
    step = measured.ms - now + then
    parts = plan.work.parts(device)
    limit = max(parts, key=lambda name: parts[name])
    state = "measured rates" if device.measured else "published rates, unverified"
    return [
        f"  Predicted (a model, {state}): forward of the recursion {now:.4g} -> {then:.4g} ms, "
        f"the step {measured.ms:.4g} -> {step:.4g} ms ({measured.ms / step:.2f}x), "
        f"limited by {limit}; plan {plan}",
    ]


def _gain(model: nn.Module, step: Callable[[], Any], measured: Measured, seconds: float) -> str:
    """Patch, run the same step, undo."""
    device = device_of(model)
    times: list[float] = []
    try:
        with patch(model):
            until = time.perf_counter() + seconds
            step()  # packs weights
            while len(times) < 3 and (not times or time.perf_counter() < until):
                synchronize(device)
                begin = time.perf_counter()
                step()
                synchronize(device)
                times.append((time.perf_counter() - begin) * 1e3)
    except RecurxError as error:
        return f"  Measured: nothing; recurx.patch refuses this model: {error}"
    after = median(times)
    return (
        f"  Measured here: recurx.patch(model) takes the step from {measured.ms:.4g} to "
        f"{after:.4g} ms ({measured.ms / after:.2f}x; median of {len(times)} steps)."
    )
