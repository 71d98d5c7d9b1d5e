"""What is refused a time, what is counted, and what a figure means."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import recurx
from recurx.bench import checks, counters, quantities, reference, subjects
from recurx.bench.provenance import ROOT
from recurx.bench.suites import Group
from recurx.bench.variants import Variant

CALL_GRADIENT = "gradient of a call"


@pytest.mark.parametrize(
    "name, most", [("one call", 1.25), ("gradient", 1.25), (CALL_GRADIENT, 1.25), ("logits", 1.5)]
)
def test_a_little_more_than_the_error_of_eager_is_right(name, most):
    exact, noise = torch.randn(1000), torch.randn(1000)

    def reason(times):
        yard, got = exact + 0.3 * noise, exact + 0.3 * times * noise
        return checks.judge({name: got}, {name: exact}, {name: yard}).reason

    assert not reason(most - 0.05)
    assert reason(most + 0.1)


@pytest.mark.parametrize(
    "got, reason",
    [
        (torch.full((4,), float("nan")), "not finite"),
        (torch.zeros(3), "instead of"),
        (torch.zeros(4), "drift 1"),
    ],
)
def test_what_is_wrong_is_named(got, reason):
    exact = {"z": torch.ones(4)}
    assert reason in checks.judge({"z": got}, exact, exact).reason


def test_a_gradient_may_drift_as_eagers_own_gradients_do():
    exact = {"gradient": torch.ones(100), "gradient spread": torch.tensor(0.02)}

    def reason(drift):
        return checks.judge({"gradient": (1 + drift) * torch.ones(100)}, exact, exact).reason

    assert not reason(0.08) and "drift 0.1" in reason(0.1)
    del exact["gradient spread"]
    assert "allowed 0.01" in reason(0.08)


def test_in_chaos_the_gradient_of_a_call_is_judged_and_the_whole_one_is_not():
    """In bf16 eager's own gradient drifts by more than its norm."""
    exact, noise = torch.randn(1000), torch.randn(1000)
    yard, got = exact + noise, exact + 3 * noise

    def verdict(name, got=got):
        return checks.judge({name: got}, {name: exact}, {name: yard})

    assert not verdict("gradient").reason and verdict("gradient").drift["gradient"] > 1
    assert "not finite" in verdict("gradient", got / 0).reason
    assert "drift" in verdict(CALL_GRADIENT).reason


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_wrong_gradient_of_a_call_is_seen(dtype):
    """Planted: gradients that are too long, by a few roundings of bf16."""
    exact = reference.outputs("toy", "train", 2, "cpu", "")
    yard = subjects.subject("toy", "train", Variant("eager", dtype), 2, "cpu", "net", "")
    made = subjects.subject("toy", "train", Variant("recurx-cpu", dtype), 2, "cpu", "net", "")
    reason = checks.judge(made.call_gradient, exact, yard.call_gradient).reason
    assert not reason
    longer = 1.1 if dtype == "bf16" else 1.01
    wrong = {name: longer * found for name, found in made.call_gradient.items()}
    assert "gradient of a call: drift" in checks.judge(wrong, exact, yard.call_gradient).reason


WRONG = {  # where a recursion whose states are right, or nearly, goes on to a wrong gradient
    "window a call late": lambda s: replace(s, grad_from=s.grad_from + 1),
    "window a call early": lambda s: replace(s, grad_from=s.grad_from - 1),
    "first call left out": lambda s: replace(s, steps=s.steps[1:], grad_from=s.grad_from - 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["trm-att", "small-64"])
def test_a_training_step_is_right_and_a_wrong_one_is_seen(case):
    """At full size a gradient is badly conditioned, so what is allowed is wide; not too wide."""
    exact = reference.outputs(case, "train", 1, "cpu", "")

    def reason(engine, change=lambda schedule: schedule):
        made = subjects.subject(case, "train", Variant(engine, "fp32"), 1, "cpu", "net", "")
        made.model.inner.schedule = change(made.model.inner.schedule)
        torch.manual_seed(2)
        made.step()
        return checks.judge(made.outputs(), exact, yard).reason

    yard: dict[str, torch.Tensor] = {}
    assert not reason("eager")
    if recurx.backends.get("cpu").why_unavailable() is None:
        assert not reason("recurx-cpu")
    for change in WRONG.values():
        assert "gradient: drift" in reason("eager", change)


def test_nothing_to_compare_is_wrong():
    assert checks.judge({}, {"z": torch.ones(1)}, {}).reason == "nothing to compare"


def test_answers_may_differ_in_few_cells():
    exact = {"answers": torch.zeros(1000, dtype=torch.int64)}
    got = exact["answers"].clone()
    got[:9] = 1
    assert not checks.judge({"answers": got}, exact, {}).reason
    got[:30] = 1
    assert "drift 0.03" in checks.judge({"answers": got}, exact, {}).reason


def test_launches_count_operators_but_no_views():
    x = torch.randn(4, 4)

    def step():
        return (x.transpose(0, 1)[:2] + 1).mul_(2).t()

    assert counters.launches(step, "cpu", compiled=False)["launches"] == 2
    compiled = counters.launches(step, "cpu", compiled=True)
    assert compiled["launches"] is None and "not counted" in compiled["launches_are"]


def test_memory_sees_a_buffer():
    # In a process of its own: here the allocator may hold as much from an earlier test.
    script = (
        "import torch; from recurx.bench.counters import Memory; memory = Memory('cpu');"
        "torch.ones(16 << 20); print(memory.peak()['peak_mib'])"  # 64 MiB, freed at once
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert 60 < float(done.stdout) < 100, done.stderr


def test_counted_work_is_that_of_the_papers():
    """28.6 GFLOP a supervision step of TRM-att on Sudoku, 13.6 MB of bf16 weights."""
    work = quantities.Work.of(Group("trm-att", "step", 2), "cpu")
    assert work.flops / 2 == pytest.approx(28.6e9, rel=0.02)
    state = 2 * 97 * 512 * 2
    assert work.bytes["bf16"] - 5 * state == pytest.approx(13.6e6, rel=0.01)
    assert work.bytes["fp32"] == 2 * work.bytes["bf16"]
    train = quantities.Work.of(Group("trm-att", "train", 2), "cpu")
    # The window is 7 of 21 calls, its backward twice its forward.
    assert train.flops / work.flops == pytest.approx(1 + 2 * 7 / 21, rel=0.001)


def test_rates_follow_from_flops_and_the_best_ceilings_of_the_run():
    work = quantities.Work.of(Group("toy", "step", 1, dtypes=("fp32",)), "cpu")
    seconds = 10 * work.flops / 0.2e12
    found = work.rates(seconds, {})
    found |= {"status": "timed", "dtype": "fp32", "p50_ms": 1e3 * seconds}
    slow = {"copy_gbs": 8.0, "case_fp32_tflops": 0.05, "large_fp32_tflops": 0.1}
    fast = {"copy_gbs": 10.0, "case_fp32_tflops": 0.1, "large_fp32_tflops": 0.2}
    groups = [
        {"ceilings": ceilings, "bytes": work.bytes, "rows": rows}
        for ceilings, rows in ((fast, []), (slow, [found]))
    ]
    quantities.against_ceilings({"groups": groups})
    assert found["of_peak"] == pytest.approx(0.1, rel=0.01)
    assert found["tflops"] == pytest.approx(0.02, rel=0.01)
    floor = max(work.flops / 0.2e12, work.bytes["fp32"] / 10e9)
    assert found["of_floor"] == pytest.approx(floor / seconds, rel=0.01)


def test_quantiles():
    row = quantities.timed([t / 1e3 for t in (5, 1, 4, 2, 3)], repeats=7)
    assert (row["p20_ms"], row["p50_ms"], row["p80_ms"]) == (2, 3, 5)
    assert row["times_ms"] == [5, 1, 4, 2, 3] and row["repeats"] == 7
