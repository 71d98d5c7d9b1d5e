"""Reruns of the engine have the same bits: forward, windows and solves.

Most run on one thread, one in eight on two. RECURX_RERUNS=N makes N of each.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

import recurx
from recurx import Schedule
from recurx.backends import cpu
from recurx.models import TRM
from recurx.models.config import TRMConfig
from recurx.nets import ATTENTION, KINDS
from recurx.plan import cpu as plan
from tests.cpu import build
from tests.cpu.test_cpu_engine import run
from tests.cpu.windows import case, on_engine
from tests.small_solvers import SMALL, TOKENS, VOCAB

RERUNS = int(os.environ.get("RECURX_RERUNS", "100"))
SHAPE = dict(tokens=5, hidden=32, inner=32, heads=2)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("isa", build.usable() or [""]),
    pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str),
    pytest.mark.parametrize("kind", KINDS),
]


@pytest.fixture(autouse=True)
def by_this_isa(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not isa:
        pytest.skip("the engine is not built")
    monkeypatch.setenv("RECURX_CPU_ISA", isa)
    monkeypatch.setattr(plan, "LEAST_SPLIT", 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_repeats(work: Callable[[], list[torch.Tensor]], reruns: int) -> None:
    torch.set_num_threads(1)
    first = work()
    assert all(value.isfinite().all() for value in first)
    for number in range(reruns):
        torch.set_num_threads(1 + (number % 8 == 7))
        same = [torch.equal(a, b) for a, b in zip(first, work(), strict=True)]
        assert all(same), f"rerun {number}: {same}"


def test_calls_repeat(kind: str, dtype: torch.dtype, isa: str) -> None:
    schedule, nets, x, carry, tables = case(Schedule.trm(1, 1), kind, dtype, **SHAPE)
    cos_sin = tables if kind == ATTENTION else None
    assert_repeats(lambda: [*run(cpu.BACKEND, schedule, nets, x, carry, cos_sin).values()], RERUNS)


def test_windows_repeat(kind: str, dtype: torch.dtype, isa: str) -> None:
    given = case(Schedule.trm(1, 2), kind, dtype, **SHAPE)
    for save in ("all", "block", "states"):
        assert_repeats(lambda save=save: on_engine(cpu.BACKEND, given, save), RERUNS)


def test_solves_repeat(kind: str, dtype: torch.dtype, isa: str) -> None:
    torch.manual_seed(3)
    tokens = dict(mlp_t=kind != ATTENTION, pos_encodings="rope" if kind == ATTENTION else "none")
    config = {**SMALL, **tokens, "forward_dtype": str(dtype).removeprefix("torch.")}
    model = TRM(TRMConfig(**config)).eval()
    model.backend = "cpu"
    batch = {
        "inputs": torch.arange(3 * TOKENS, dtype=torch.int32).view(3, TOKENS) % VOCAB,
        "puzzle_identifiers": torch.zeros(3, dtype=torch.int32),
    }

    def work() -> list[torch.Tensor]:
        found = recurx.solve(model, batch, rollouts=2, sigma=0.2, seed=5)
        return [found.predictions, found.steps, found.q]

    assert_repeats(work, max(1, RERUNS // 10))
