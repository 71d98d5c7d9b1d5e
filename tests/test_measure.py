"""What a machine reaches: the clock itself, and that every figure is one, by whatever runs here."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from recurx import measure
from recurx.bench import ceilings
from recurx.bench.profiler.ceilings import Ceilings
from recurx.plan import Device, device

ABOVE = ("recurx.api", "recurx.backends", "recurx.plan", "recurx.bench.profiler", "recurx.bench")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    monkeypatch.setattr(measure, "COPY_BYTES", {"cpu": 1 << 18})
    monkeypatch.setattr(measure, "LARGE", {"cpu": 64})


def test_the_fastest_run_counts_and_the_first_does_not():
    times = iter([0.0, 0.03, 0.01, 0.02])
    assert 0.01 <= measure.best_seconds(lambda: time.sleep(next(times)), repeats=3) < 0.02
    with pytest.raises(StopIteration):
        next(times)


def test_more_runs_until_the_seconds_are_over():
    runs = []
    measure.best_seconds(lambda: runs.append(time.sleep(0.005)), seconds=0.05)
    assert 3 < len(runs) <= 12
    runs.clear()
    measure.best_seconds(lambda: runs.append(time.sleep(0.01)), seconds=0.0)
    assert len(runs) == 2


def test_every_figure_is_one_and_nothing_is_left_behind():
    threads, drawn = torch.get_num_threads(), torch.random.get_rng_state()
    found = ceilings.ceilings_of("cpu", 8, 64, 128)
    assert all(value > 0 for name, value in found.items() if name.endswith(("gbs", "tflops")))
    roof = Ceilings.of(torch.device("cpu"), torch.bfloat16)
    assert roof.gbs > 0 and set(roof.tflops) == {"float32", "bfloat16"}
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_splitting_costs_nothing_on_one_thread_and_something_on_two():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert measure.split_us() == measure.barrier_us() == 0.0
        torch.set_num_threads(2)
        assert measure.split_us() > 0
        assert (measure.barrier_us() > 0) == bool(measure.engine_isa())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_a_plan_sees_this_machine_by_the_same_figures(monkeypatch):
    figures = {
        "copy_gbs": 20.0, "operator_us": 5.0, "last_cache_bytes": 1 << 20, "engine_isa": "amx",
        "stream_gbs": 40.0, "barrier_us": 3.0, "split_us": 7.0,
    }  # fmt: skip
    for name, value in figures.items():
        monkeypatch.setattr(measure, name, lambda *_, value=value: value)
    # By the depth of the product: matrix units are fastest on one that is not square.
    rates = {(64, torch.float32): 0.2, (64, torch.bfloat16): 1.0, (256, torch.bfloat16): 1.7}
    monkeypatch.setattr(measure, "product_tflops", lambda m, k, n, dtype, _: rates[k, dtype])
    device._cpu.cache_clear()
    try:
        wanted = device.cpu_device(torch.get_num_threads(), 20.0, 0.2, 1.7, 5.0, 1 << 20, "amx",
                                   40.0, 3.0, 7.0)  # fmt: skip
        assert Device.of("cpu") == wanted
    finally:
        device._cpu.cache_clear()


def test_it_lies_below_all_that_uses_it():
    """Its own imports alone, and one barrier: the engine is called without `recurx.recurse`."""
    code = (
        "import sys, torch; torch.set_num_threads(2); from recurx import measure; "
        f"measure.barrier_us(); print([name for name in {ABOVE} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
