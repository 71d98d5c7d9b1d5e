"""Forked children answer, whatever other threads do at that moment and whoever loads what first."""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import recurx
from recurx import Schedule
from recurx.backends import cpu
from recurx.forking import fork_lock, lazy
from tests.cpu import build
from tests.factories import make_inputs, make_net, rope
from tests.forked import in_child

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
engine = pytest.mark.skipif(
    cpu.BACKEND.why_unavailable() is not None, reason=f"{cpu.BACKEND.why_unavailable()}"
)


def script(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=build.ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def busy() -> Iterator[Callable[[Callable[[], Any]], None]]:
    """Runs something on another thread, which `begun` tells of and `end` lets go."""
    threads: list[threading.Thread] = []

    def start(work: Callable[[], Any]) -> None:
        threads.append(threading.Thread(target=work))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join()


@engine
def test_under_load() -> None:
    """By hand with more: `python -m tests.process.fork_load --children 100`."""
    script("-m", "tests.process.fork_load", "--children", "12", "--seed", "5")


@engine
def test_a_child_loads_the_engine_first() -> None:
    """OpenMP's threads are gone in the child, and no handler of ours was there to see the fork."""
    script(
        "-c",
        """
import os, signal, sys, torch
torch.set_num_threads(2)
torch.ones(1 << 22).exp()  # OpenMP has its threads now
import recurx
from recurx.plan import cpu as plan
from tests.factories import make_inputs, make_net, rope
plan.LEAST_SPLIT = 0
os.cpu_count = lambda: 2
schedule = recurx.Schedule.trm(1, 1)
nets, (x, carry), tables = {"L": make_net()}, make_inputs(schedule), rope()
assert "recurx._C" not in sys.modules
child = os.fork()
if child == 0:
    signal.alarm(30)  # and no operators of PyTorch: its own threads are gone
    with torch.no_grad():
        recurx.recurse(schedule, nets, x, carry, backend="cpu", cos_sin=tables)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
""",
    )


class _Answers(Dataset[Tensor]):
    schedule = Schedule.trm(1, 1)
    nets: ClassVar[dict[str, Any]] = {"L": make_net()}

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        x, carry = make_inputs(self.schedule, seed=index)
        with torch.no_grad():
            out = recurx.recurse(self.schedule, self.nets, x, carry, backend="cpu", cos_sin=rope())
        return out["z_H"]


@engine
def test_workers_of_a_data_loader(busy: Callable[[Callable[[], Any]], None]) -> None:
    answers, stop = _Answers(), threading.Event()
    expected = [answers[i] for i in range(len(answers))]

    def load() -> None:
        while not stop.is_set():
            answers[0]

    busy(load)
    try:
        loader = DataLoader(
            answers, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
        )
        got = list(loader)
    finally:
        stop.set()
    assert all(torch.equal(*both) for both in zip(got, expected, strict=True))


# ---- locks and imports ---------------------------------------------------------------------------


def test_a_lock_is_free_in_the_child(busy: Callable[[Callable[[], Any]], None]) -> None:
    locks = {"ours": fork_lock(), "Python's": threading.RLock()}
    held, end = threading.Event(), threading.Event()

    def hold() -> None:
        with locks["ours"], locks["Python's"]:
            held.set()
            end.wait()

    busy(hold)
    held.wait()
    try:
        assert not locks["ours"].acquire(timeout=0.01)
        assert in_child(lambda: locks["ours"].acquire(timeout=0.01)) == 0
        assert in_child(lambda: not locks["Python's"].acquire(timeout=0.01)) == 0
    finally:
        end.set()


class _Slow:
    def __init__(self, begun: threading.Event, end: threading.Event) -> None:
        self.begun, self.end = begun, end

    @lazy
    def value(self) -> int:
        self.begun.set()
        self.end.wait()
        return 3


def test_a_lazy_attribute_is_not_locked(busy: Callable[[Callable[[], Any]], None]) -> None:
    begun, end = threading.Event(), threading.Event()
    done = threading.Event()
    done.set()
    slow, other = _Slow(begun, end), _Slow(threading.Event(), done)
    busy(lambda: slow.value)
    begun.wait()
    try:
        assert in_child(lambda: other.value == 3 and vars(other)["value"] == 3) == 0
    finally:
        end.set()


class _Finder:
    """Finds recurx.late, whose finding (stage 0) or execution (stage 1) waits for an event."""

    def __init__(self, stage: int) -> None:
        self.stage, self.begun, self.end = stage, threading.Event(), threading.Event()

    def wait(self, stage: int) -> None:
        if stage == self.stage:
            self.begun.set()
            self.end.wait(0.5)

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name != "recurx.late":
            return None
        self.wait(0)
        return importlib.machinery.ModuleSpec(name, self)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        self.wait(1)
        module.VALUE = 3


@pytest.mark.parametrize("stage", [0, 1])
def test_a_fork_waits_for_imports(
    stage: int, busy: Callable[[Callable[[], Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    finder = _Finder(stage)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    busy(lambda: importlib.import_module("recurx.late"))
    finder.begun.wait()
    try:
        assert in_child(lambda: importlib.import_module("recurx.late").VALUE == 3) == 0
    finally:
        finder.end.set()
        sys.modules.pop("recurx.late", None)
