"""Ctrl-C in the middle of an engine call: soon, once, and nothing is broken afterwards.

A signal may come between any two blocks, so these tests count what was done and never the time:
the call that is stopped would go on for minutes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import recurx
from recurx import Schedule
from recurx.backends import cpu
from recurx.plan import cpu as plan
from tests.cpu import build
from tests.cpu.test_cpu_beside import CALLS, given_of
from tests.cpu.test_cpu_engine import run
from tests.factories import make_inputs, make_net, rope

LONG = Schedule.trm(4000, 6)  # 28,000 calls: minutes
SHORT = Schedule.trm(1, 2)
SHAPE = dict(tokens=37, hidden=256)

pytestmark = pytest.mark.skipif(
    cpu.BACKEND.why_unavailable() is not None or os.name != "posix",
    reason=f"the engine or POSIX signals are missing: {cpu.BACKEND.why_unavailable()}",
)


@pytest.fixture(params=[(1, 1), (1, 2), (4, 2), (5, 3)], ids=lambda p: f"B={p[0]} threads={p[1]}")
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Batch size; alone, one team, groups, and groups with teams after them."""
    batch, count = request.param
    before = torch.get_num_threads()
    monkeypatch.setattr(plan, "LEAST_SPLIT", 0)
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    torch.set_num_threads(count)
    yield batch
    torch.set_num_threads(before)


def call(schedule: Schedule, batch: int) -> Callable[[], dict[str, Tensor]]:
    nets = {"L": make_net(**SHAPE, heads=8)}
    x, carry = make_inputs(schedule, batch=batch, **SHAPE)
    tables = rope(**SHAPE, heads=8)
    return lambda: run(cpu.BACKEND, schedule, nets, x, carry, tables)


@pytest.fixture
def handled() -> Iterator[list[Any]]:
    """A timer of signals whose handler calls what is put into the list, in the engine's calls."""
    todo: list[Any] = []

    def handler(_: int, frame: Any) -> None:
        if frame.f_code is cpu.Cpu.run.__code__:
            for action in todo:
                action()

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
    yield todo
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_ctrl_c_ends_a_call_and_the_engine_goes_on(case: int, handled: list[Any]) -> None:
    cpu.BACKEND.packed.clear()  # nets of other tests, which the collector frees when it pleases
    short, long = call(SHORT, case), call(LONG, case)
    expected = short()
    for _ in range(3):
        handled.append(interrupt)
        with pytest.raises(KeyboardInterrupt):
            long()
        handled.clear()
        got = short()
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert len(cpu.BACKEND.packed) == 2  # each net packed once


def test_a_handler_that_returns_changes_nothing(handled: list[Any]) -> None:
    """It may itself call the engine, whose lock this thread holds."""
    middle, short = call(Schedule.trm(60, 6), 2), call(SHORT, 2)
    expected, inner = middle(), short()
    seen: list[bool] = []

    def ask() -> None:
        again = short()
        seen.append(all(torch.equal(again[name], inner[name]) for name in inner))

    handled.append(ask)
    while len(seen) < 3:
        got = middle()
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert all(seen)


def test_a_call_on_another_thread_is_left_alone(handled: list[Any]) -> None:
    """Python's handlers run on the main thread; and who waits for the engine can be interrupted."""
    middle, short = call(Schedule.trm(400, 6), 2), call(SHORT, 2)
    expected = middle()
    begun, results = threading.Event(), []

    def work() -> None:
        begun.set()
        results.append(middle())

    worker = threading.Thread(target=work)
    worker.start()
    begun.wait()
    handled.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        while True:  # mostly waiting for the other call to end
            short()
    handled.clear()
    worker.join()
    assert all(torch.equal(results[0][name], expected[name]) for name in expected)


def test_through_an_op_of_pytorch(handled: list[Any]) -> None:
    """Where operators are watched, the call goes through PyTorch's dispatcher and back."""
    schedule, nets = LONG, {"L": make_net(**SHAPE, heads=8)}
    x, carry = make_inputs(schedule, batch=2, **SHAPE)
    tables = rope(**SHAPE, heads=8)
    handled.append(interrupt)
    with pytest.raises(KeyboardInterrupt), FlopCounterMode(display=False):
        recurx.recurse(schedule, nets, x, carry, backend="cpu", cos_sin=tables)
    handled.clear()
    assert call(SHORT, 2)().keys() == carry.keys()


@pytest.mark.parametrize(
    ("setting", "backend"), [("own", "cpu"), ("openmp", "cpu"), ("openmp", "eager")]
)
def test_a_real_sigint(setting: str, backend: str) -> None:
    """As a shell sends it, on both kinds of threads; the process ends as Python's do."""
    code = """
import os, sys, torch
torch.set_num_threads(2)
os.cpu_count = lambda: 2
from recurx import solve
from recurx.models import TRM
model = TRM(hidden_size=256, num_heads=8, H_cycles=1000, L_cycles=6, L_layers=2, seq_len=33,
            vocab_size=11, batch_size=4, num_puzzle_identifiers=1, backend=sys.argv[1]).eval()
batch = {"inputs": torch.randint(11, (4, 33))}
print("begun", flush=True)
try:
    solve(model, batch)
except KeyboardInterrupt:
    model.inner.schedule = model.inner.schedule.trm(1, 1)
    print(int(solve(model, batch).steps.min()), flush=True)
    raise
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code, backend], cwd=build.ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "RECURX_CPU_THREADS": setting},
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "begun\n"
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(1.5)  # else it would not have been in a call
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert out == "16\n" and "KeyboardInterrupt" in err and child.returncode == -signal.SIGINT


def test_handlers_of_signals_compute_as_their_own_code() -> None:
    """Though the window that they interrupt knows no numbers below 2^-126."""
    got: list[bool] = []
    tiny = torch.full((64,), 2.0**-130)
    before = signal.signal(signal.SIGALRM, lambda *_: got.append(bool((tiny * 0.5 != 0).all())))
    _, nets, x, _, rope, seed, _ = given_of("dropout", torch.float32)
    steps = Schedule(CALLS.steps * 20)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    try:
        until = time.monotonic() + 20
        while len(got) < 5 and time.monotonic() < until:
            z = x.repeat(40, 1, 1).requires_grad_()
            out = recurx.recurse(
                steps, nets, z, {"z": z.detach()}, cos_sin=rope, seed=seed, backend="cpu"
            )["z"]
            out.sum().backward()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(got) >= 5 and all(got)
