"""What recurx would replace in the profiled step, and what that gains: predicted and measured."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from recurx.bench.profiler.attribute import NET_STAGES, PRODUCTS
from recurx.bench.profiler.result import Row, short
from recurx.bench.profiler.step import device_of
from recurx.errors import RecurxError, UnsupportedModel
from recurx.explanation import explain
from recurx.measure import seconds_of
from recurx.models import problem_of_model
from recurx.models.inner import Inner
from recurx.patching import patch
from recurx.patching.handle import PatchHandle, installed
from recurx.patching.install import find
from recurx.plan import Device, LaunchPlan
from recurx.problem import Problem
from recurx.route import EAGER, Request, route


@dataclass(frozen=True)
class Measured:
    """What the step took, for the comparison."""

    ms: float
    rows: Sequence[Row]
    cast_bytes: float  # moved to cast weights to the forward dtype


@dataclass(frozen=True)
class Advice:
    """Lines for people; the step as predicted and as measured with a patch, 0 if it was not."""

    lines: list[str]
    predicted_ms: float
    patched_ms: float


def advise(
    model: nn.Module,
    step: Callable[[], Any],
    measured: Measured,
    batch: int,
    training: bool,
    measure: bool,
    parts: Sequence[Any] = (),
    seconds: float = 10.0,
) -> Advice:
    """What to say, in the order of the model's recursions; ends with `recurx.explain`.

    Args:
        measure: patch the model for a moment and time the step again (within `seconds`).
        parts: loss head, optimisers and average of a training step, for `recurx.train.swap`.
    """
    lines: list[str] = []
    problems: list[Problem] = []
    patchable, predicted_ms, patched_ms = False, 0.0, 0.0
    for _, module, adapter in find(model):
        if isinstance(module, Inner):
            patchable = patchable or module.backend == "eager"
            lines += _own(module, measured, batch, training)
        elif installed(module, adapter.method) is not None:
            lines.append("The recursion is patched: it runs on recurx already.")
        elif adapter.differences(module):
            lines.append("recurx would replace nothing: " + "; ".join(adapter.differences(module)))
        else:
            patchable = True
            plan: Any = adapter.recipe(module, "auto")
            problem = dataclasses.replace(adapter.problem(module, plan), batch=batch)
            if problem.opaque:
                lines.append(
                    f"recurx would replace the loop of {len(problem.schedule)} net calls only: the "
                    "network is foreign code and stays PyTorch. No gain is expected."
                )
                continue
            problems.append(problem)
            lines += _replaced(problem, measured)
            predicted_ms, line = _predicted(problem, measured, training)
            lines.append(line)
    if patchable and measure:
        patched_ms, line = _gain(model, step, measured, seconds)
        lines.append(line)
    lines += [line for problem in problems for line in _not_here(problem, training)]
    if measure and parts:
        lines += _swapped(model, parts, step, measured, seconds)
    if not lines:
        lines.append("recurx would replace nothing: it finds no recursion that it knows here.")
    lines += explain(model, batch_size=max(1, batch)).splitlines()
    return Advice(lines, predicted_ms, patched_ms)


def _not_here(problem: Problem, training: bool) -> list[str]:
    """What speaks against a patch: the route it would take is PyTorch's own."""
    found = route(problem, None, Request(grad=training))
    fused = [c.backend for c in found.considered if c.refused is None and c.backend != EAGER]
    if found.backend != EAGER or not fused:
        return []
    timed = any(c.measured for c in found.considered)
    advice = "Do not patch here" if timed else "Patching is not likely to gain here"
    return [f"{advice}: `auto` would leave the recursion on PyTorch ({found.calls.why})."]


def _replaced(problem: Problem, measured: Measured) -> list[str]:
    rows = [row for row in measured.rows if row.name in NET_STAGES]
    total = sum(row.ms for row in rows)
    glue = sum(row.ms for row in rows if row.name not in (*PRODUCTS, "attention"))
    launches = sum(row.launches for row in rows)
    share = total / measured.ms if measured.ms else 0.0
    lines = [
        f"recurx would replace the recursion ({problem.schedule.name}, "
        f"{len(problem.schedule)} net calls): {short(total)} of {short(measured.ms)} ms "
        f"({share:.0%} of the step), {launches} launches.",
    ]
    if total:
        lines.append(
            f"  Why it gains: {glue / total:.0%} of that time is neither a product nor attention "
            f"(norms, RoPE, SwiGLU, sums), which fused kernels do while they write a product"
            + (
                f"; casts of the weights move {short(measured.cast_bytes / 1e6)} MB a step, "
                "which recurx does once per weight update."
                if measured.cast_bytes
                else "."
            )
        )
        lines += _products_on_a_cpu(problem)
    return lines


def _products_on_a_cpu(problem: Problem) -> list[str]:
    """Why the products themselves gain, where they do: [] on a GPU, whose rates all code shares."""
    device = Device.of(problem.device_type)
    if device.kind != "cpu":
        return []
    slow = device.bf16_tflops < device.fp32_tflops / 2
    widened = device.isa in ("portable", "avx2", "avx512", "neon")
    if problem.dtype == torch.bfloat16 and slow and widened:
        return [
            f"  Products gain most: bf16 ones of PyTorch reach {device.bf16_tflops:.2g} TFLOP/s "
            f"on this processor and fp32 ones {device.fp32_tflops:.2g}; recurx stores bf16 and "
            "multiplies in fp32."
        ]
    packing = LaunchPlan.pick(problem, device, "eager").work.parts(device)["l2"]
    if not packing:
        return []
    return [
        f"  PyTorch's products also pack the weights anew at every call, about "
        f"{short(1e3 * packing)} ms a step (a model); recurx keeps them packed."
    ]


def _predicted(problem: Problem, measured: Measured, training: bool) -> tuple[float, str]:
    device = Device.of(problem.device_type)
    try:
        plan = LaunchPlan.pick(problem, device, route(problem).backend)
    except RecurxError as error:
        return 0.0, f"  Predicted: no plan: {error}"
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
    return step, (
        f"  Predicted (a model, {state}): forward of the recursion {short(now)} -> "
        f"{short(then)} ms, the step {short(measured.ms)} -> {short(step)} ms "
        f"({measured.ms / step:.2f}x), limited by {limit}; plan {plan}"
    )


def _own(inner: Inner, measured: Measured, batch: int, training: bool) -> list[str]:
    problem = problem_of_model(inner, max(1, batch))
    if inner.backend != "eager":
        return [f"The recursion is recurx's own model already, on backend {inner.backend!r}."]
    return ['This is recurx\'s own model, with backend="eager" (the reference). With "auto":',
            *_replaced(problem, measured), _predicted(problem, measured, training)[1]]  # fmt: skip


@contextlib.contextmanager
def _on_recurx(model: nn.Module) -> Iterator[None]:
    """The recursion on recurx for a moment: patched, or by the backend of recurx's own model."""
    own = [module for module in model.modules() if isinstance(module, Inner)]
    if not own:
        with patch(model):
            yield
        return
    with PatchHandle() as handle:
        for inner in own:
            handle.put(inner, "backend", "auto")
        yield


def _gain(
    model: nn.Module, step: Callable[[], Any], measured: Measured, seconds: float
) -> tuple[float, str]:
    """Patch, run the same step, undo."""
    try:
        with _on_recurx(model):
            times = _times(step, device_of(model), seconds)
    except RecurxError as error:
        return 0.0, f"  Measured: nothing; recurx.patch refuses this model: {error}"
    after = statistics.median(times)
    return after, (
        f"  Measured here: on recurx the step goes from {short(measured.ms)} to "
        f"{short(after)} ms ({measured.ms / after:.2f}x; median of {len(times)} steps)."
    )


def _swapped(
    model: nn.Module, parts: Sequence[Any], step: Callable[[], Any], measured: Measured,
    seconds: float,
) -> list[str]:  # fmt: skip
    """The same with loss, optimisers and average on recurx as well; [] if none can be."""
    from recurx.train.swap import swap

    names = []
    with contextlib.ExitStack() as stack:
        for part in parts:
            try:
                stack.enter_context(swap(part))
            except UnsupportedModel:
                continue
            names.append(type(part).__name__)
        if not names:
            return []
        with contextlib.suppress(UnsupportedModel):
            stack.enter_context(_on_recurx(model))
        times = _times(step, device_of(model), seconds)
    after = statistics.median(times)
    rest = sum(row.ms for row in measured.rows if row.group == "training")
    return [
        f"recurx.train.swap would replace the inside of {', '.join(names)} (all training stages "
        f"together: {short(rest)} of {short(measured.ms)} ms).",
        f"  Measured here: with the recursion on recurx as well, the step takes {short(after)} ms "
        f"({measured.ms / after:.2f}x; median of {len(times)} steps).",
    ]


def _times(step: Callable[[], Any], device: torch.device, seconds: float) -> list[float]:
    """Milliseconds of up to three steps within `seconds`, after one that packs weights."""
    times: list[float] = []
    until = time.perf_counter() + seconds
    step()
    while len(times) < 3 and (not times or time.perf_counter() < until):
        times.append(1e3 * seconds_of(step, device))
    return times
