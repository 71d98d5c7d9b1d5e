"""`python -m recurx bench host`: Python between `recurx.recurse` and the engine's entry, a call.

Engines are left out: what they would compute is replaced by a clock, GPU ones run over a stub of
their library (and of a captured graph) for an H100 that need not be here. What remains is what a
call costs on the host: checks, the route, packed weights and tables looked up. Reading the weights
(a hash on a CPU, two launches that round and pack on a GPU) counts to the engine.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from recurx import backends, recurse
from recurx.backends import triton
from recurx.backends.graphs import Capture
from recurx.bench.cases import build
from recurx.errors import BackendUnavailable
from recurx.plan.device import Device
from recurx.plan.launch import LaunchPlan, all_candidates
from recurx.problem import Problem

SCHEMA = "recurx-host-1"
BUDGET_US, SMALL_BUDGET_US = 150, 60
# (case, batch, dtype, backend, microseconds allowed)
ROWS = (
    ("small-64", 1, "fp32", "cpu", SMALL_BUDGET_US),
    ("small-64", 64, "bf16", "cpu", SMALL_BUDGET_US),
    *(("trm-att", batch, "bf16", name, BUDGET_US) for name in ("cpu", "triton", "cuda")
      for batch in (1, 8, 64)),
    ("small-64", 1, "bf16", "triton", BUDGET_US),
)  # fmt: skip
TRITON_KINDS = triton.Triton.kinds  # of plan
WARM = 20  # calls that plan, lower and pack
Reached = Callable[..., Any]


class StubLibrary:
    """Stands for the compiled CUDA kernels: every size is 256 bytes, every launch succeeds."""

    kinds = ("owner", "grid", "cluster")
    has_timeline = False

    def __init__(self, reached: Reached) -> None:
        self._reached = reached

    def call(self, name: str, *arguments: Any) -> None:
        self._reached(name)

    def bytes_of(self, name: str, *arguments: Any) -> int:
        return 256


class _Simulated(triton.Triton):
    """Takes CPU tensors."""

    def __init__(
        self, device: Device, capture: Capture | None, kinds: Sequence[str], slice: int | None
    ) -> None:
        super().__init__()
        self._device, self._given, self._kinds, self._slice = device, capture, kinds, slice
        self._pick = functools.lru_cache(maxsize=256)(self._find_plan)

    def runs_on(self, device_type: str) -> bool:
        return device_type in ("cuda", "cpu")

    def why_unavailable(self) -> str | None:
        return triton.why_no_triton()

    def plan(self, problem: Problem, device: torch.device) -> LaunchPlan:
        if device.type == "cpu":
            return self._pick(problem, self.name)
        return super().plan(problem, device)

    def plan_device(self, device: torch.device | str) -> Device:
        return self._device if "cpu" in str(device) else super().plan_device(device)

    def _find_plan(self, problem: Problem, name: str) -> LaunchPlan:
        plans = [p for p in all_candidates(problem, self._device, name)
                 if p.kind in self._kinds
                 and self._slice in (None, dict(p.settings).get("slice"))]  # fmt: skip
        return min(plans, key=lambda plan: plan.seconds(self._device))

    def _capture(self, device: torch.device) -> Capture | None:
        return self._given if device.type == "cpu" else super()._capture(device)


@contextlib.contextmanager
def simulated(
    device: Device,
    *,
    capture: Capture | None = None,
    kinds: Sequence[str] = TRITON_KINDS,
    slice: int | None = None,
) -> Iterator[None]:
    """Inside, backend "triton" takes CPU tensors: something else than a GPU runs what is launched.

    That is up to the caller (tests/kernels has an interpreter, tests/emulator runs PTX). Triton's
    own interpreter is not enough: it computes bf16 wrongly. Not for several threads.

    Args:
        device: what plans are made for.
        capture: stands for the capture of a CUDA graph; None launches plainly.
        kinds: the kinds of plan to choose from.
        slice: the number of samples a slice must have, one that is proposed; None for any.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(backends.changed)  # after the real one is back
        engine = _Simulated(device, capture, kinds, slice)
        stack.enter_context(mock.patch.object(triton, "BACKEND", engine))
        backends.changed()
        yield


@contextlib.contextmanager
def stubbed(name: str, reached: Reached) -> Iterator[None]:
    """Inside, backend `name` takes CPU tensors and calls `reached` where its engine would start.

    States come back unset: only the way to the engine is real.
    """
    from recurx.plan import DEVICES

    with contextlib.ExitStack() as stack:
        for rounds in ("packed", "backends.cuda"):
            stack.enter_context(mock.patch(f"recurx.{rounds}.round_into", lambda *_: None))
        packer = lambda *_: lambda weights: weights[0].new_empty(16)  # noqa: E731
        stack.enter_context(mock.patch("recurx.backends.cuda_grid.packer", packer))
        if name == "cpu":
            from recurx import _C

            stack.enter_context(mock.patch.object(_C, "cpu_run", reached))
            stack.enter_context(mock.patch.object(_C, "cpu_digest", lambda *_: 0))
        elif name == "triton":
            from recurx.kernels.library import LibrarySlice
            from recurx.kernels.tiled import TiledSlice

            for copies in ("launch", "enter", "leave"):  # a GPU makes them beside the host
                for slices in (TiledSlice, LibrarySlice):
                    stack.enter_context(mock.patch.object(slices, copies, lambda *_: None))
            stack.enter_context(mock.patch("recurx.kernels.recursion.recursion", reached))
            capture = lambda launch: reached  # noqa: E731
            stack.enter_context(simulated(DEVICES["h100"], capture=capture))
        else:
            module = importlib.import_module("recurx.backends.cuda")
            engine = module.Cuda(ModuleType("stub"), DEVICES["h100"])
            engine._library = StubLibrary(reached)
            stack.callback(backends.changed)  # after the real one is back
            stack.enter_context(mock.patch.object(module, "BACKEND", engine))
            backends.changed()
        yield


def measure(case: str, batch: int, dtype: str, backend: str, calls: int = 400) -> list[float]:
    """Microseconds of each of `calls` calls without gradient, sorted."""
    inner = build(case, dtype, backend, batch).inner
    config = inner.config
    x = torch.randn(batch, config.tokens, config.hidden_size).to(config.dtype)
    carry = {name: torch.randn_like(x) for name in inner.schedule.states}
    arrived = [0.0]

    def reached(*_: Any) -> None:
        arrived[0] = time.perf_counter()

    found = []
    with stubbed(backend, reached), torch.no_grad():
        schedule, nets, tables = inner.schedule, inner.nets(), inner.cos_sin()
        for _ in range(WARM + calls):
            begin = time.perf_counter()
            recurse(schedule, nets, x, carry, backend=backend, cos_sin=tables)
            found.append(1e6 * (arrived[0] - begin))
    return sorted(found[WARM:])


def run() -> dict[str, Any]:
    """All rows as a JSON document; a backend that is not here has a reason instead of figures."""
    from recurx.bench.provenance import provenance

    rows = []
    for case, batch, dtype, backend, budget in ROWS:
        row: dict[str, Any] = {
            "case": case, "batch": batch, "dtype": dtype, "backend": backend, "budget_us": budget,
        }  # fmt: skip
        try:
            times = measure(case, batch, dtype, backend)
        except (ImportError, BackendUnavailable) as error:
            row["refused"] = str(error)
        else:
            share = {q: times[int(q / 100 * len(times))] for q in (20, 50, 80)}
            row |= {f"p{q}_us": round(took, 1) for q, took in share.items()}
        rows.append(row)
    return {
        "schema": SCHEMA,
        "provenance": provenance("cpu", torch.get_num_threads()),
        "rows": rows,
    }


def lines(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of `run` for a table."""
    return [
        (
            row["case"], str(row["batch"]), row["dtype"], row["backend"], str(row["budget_us"]),
            *(f"{row[q]:.1f}" if q in row else "" for q in ("p20_us", "p50_us", "p80_us")),
            row.get("refused", ""),
        )
        for row in document["rows"]
    ]  # fmt: skip
