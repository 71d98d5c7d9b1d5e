"""The compiled CPU engine on every instruction set: numerics, schedules, threads, weight cache.

The instruction sets of this machine run in recurx._C; all of them, emulated where the processor
lacks them, in a second build of the same sources (tests/cpu/build.py).
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import torch
from torch import Tensor

import recurx
from recurx import BackendUnavailable, Schedule, Step, reference
from recurx.backends import cpu
from recurx.nets import ATTENTION, KINDS, TOKEN_MLP, Net
from recurx.operands import Operands, Span
from recurx.plan import cpu as plan
from tests.cpu import build
from tests.cpu.windows import each_engine
from tests.factories import make_inputs, make_net, problem_for, rope, rounded, wide
from tests.forked import in_child
from tests.kernels.compare import assert_as_exact

DTYPES = [torch.float32, torch.bfloat16]
ONE = Schedule((Step("L", "z", ("z",), ("x",)),))


@pytest.fixture(autouse=True)
def small_work_is_split_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the small shapes here would all run on one thread."""
    monkeypatch.setattr(plan, "LEAST_SPLIT", 0)


def run(
    backend: cpu.Cpu,
    schedule: Schedule,
    nets: dict[str, Net],
    x: Tensor,
    carry: dict[str, Tensor],
    cos_sin: tuple[Tensor, Tensor] | None = None,
    start: int = 0,
    stop: int | None = None,
) -> dict[str, Tensor]:
    problem = problem_for(schedule, nets, x)
    assert backend.why_unsupported(problem) is None
    weights = [w for name in schedule.nets for w in nets[name].weights]
    stop = len(schedule) if stop is None else stop
    states = [carry[name] for name in schedule.states]
    out = backend.run(problem, Operands(x, states, weights, cos_sin), Span(start, stop))
    return dict(zip(schedule.states, out, strict=True))


# ---- numerics ------------------------------------------------------------------------------------

# Each shape has an edge of some instruction set in it.
SHAPES = {
    "one ragged tile": dict(tokens=13, hidden=64, inner=96, heads=2),
    "16-wide heads": dict(tokens=17, hidden=64, inner=256, heads=4),
    "48-wide heads, inner 100": dict(tokens=40, hidden=96, inner=100, heads=2),
    "112-wide heads": dict(tokens=33, hidden=224, inner=64, heads=2),
    "128-wide heads, two depths": dict(tokens=9, hidden=1024, inner=544, heads=8),
    "sudoku": dict(tokens=97, hidden=512, inner=1536, heads=8, token_inner=512),
    "many tokens": dict(tokens=600, hidden=64, inner=64, heads=2, token_inner=256),
}


@functools.lru_cache(maxsize=2)  # shared by the engines
def judged(kind: str, name: str, dtype: torch.dtype) -> tuple[tuple, Tensor, Tensor]:
    """What `run` takes of one call, and what comes of it in PyTorch and in fp64."""
    shape = SHAPES[name]
    net = make_net(kind, blocks=1, **shape)
    size = dict(tokens=shape["tokens"], hidden=shape["hidden"])
    cos_sin = rope(**size, heads=shape["heads"]) if kind == ATTENTION else None
    x, carry = make_inputs(ONE, batch=2, dtype=dtype, **size)
    exact_net, plain_net = (rounded(net, dtype, to) for to in (torch.float64, torch.float32))
    exact = reference.run(ONE, {"L": exact_net}, x.double(), wide(carry), cos_sin)
    plain = reference.run(ONE, {"L": plain_net}, x, carry, cos_sin)
    return (ONE, {"L": net}, x, carry, cos_sin), plain["z"], exact["z"]


@each_engine
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_call_against_fp64(engine: cpu.Cpu, kind: str, shape: str, dtype: torch.dtype) -> None:
    given, plain, exact = judged(kind, shape, dtype)
    got = run(engine, *given)["z"]
    assert_as_exact(got, plain, exact)
    with pytest.raises(AssertionError, match="relative error"):  # the tolerance bites
        got[:, -1] = got[:, 0]  # the last token lost
        assert_as_exact(got, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_any_size(engine: cpu.Cpu, dtype: torch.dtype) -> None:
    """Scores of a million: without a true maximum the softmax is inf / inf."""
    net = make_net(ATTENTION, blocks=1)
    net.weights[0] = net.weights[0] * 1000
    x, carry = make_inputs(ONE, dtype=dtype)
    exact_net, plain_net = (rounded(net, dtype, to) for to in (torch.float64, torch.float32))
    exact = reference.run(ONE, {"L": exact_net}, x.double(), wide(carry))["z"]
    plain = reference.run(ONE, {"L": plain_net}, x, carry)["z"]
    got = run(engine, ONE, {"L": net}, x, carry)["z"]
    assert torch.isfinite(got).all()
    # A row whose two best scores are closer than their rounding may pick either: compare the rest.
    agree = (plain.double() - exact).norm(dim=-1) < 0.05 * exact.norm(dim=-1)
    assert agree.double().mean() > 0.8
    assert_as_exact(got[agree], plain[agree], exact[agree], ratio=2)


def test_nan_stays_in_its_sample(engine: cpu.Cpu) -> None:
    net = make_net(ATTENTION)
    x, carry = make_inputs(ONE, batch=4, dtype=torch.bfloat16)
    clean = run(engine, ONE, {"L": net}, x, carry, rope())["z"]
    x[2, 5, 7] = float("nan")
    got = run(engine, ONE, {"L": net}, x, carry, rope())["z"]
    assert got[2].isnan().all()
    others = [0, 1, 3]
    assert torch.equal(got[others], clean[others])


# ---- schedules: a whole run has the bits of its calls one by one ---------------------------------

FREE = Schedule(
    (
        Step("A", "p", ("p", "x"), ("q", "r", "x")),
        Step("A", "q", ("q",), ("q", "r", "x")),  # the inject sum of call 0, still valid
        Step("A", "q", ("r",), ("q", "r", "x")),  # the same names, but q was written
        Step("B", "r", ("q",), ()),
        Step("B", "p", ("p", "q", "r"), ("x",)),
    )
)
SYSTEMS = {
    "trm": Schedule.trm(2, 3),
    "hrm": Schedule.hrm(2, 2),
    "single_z": Schedule.single_z(2, 2),
    "hier6": Schedule.hier(6, 2),
    "free": FREE,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_run_is_its_calls(engine: cpu.Cpu, system: str, kind: str, dtype: torch.dtype) -> None:
    schedule = SYSTEMS[system]
    nets = {name: make_net(kind, seed=seed) for seed, name in enumerate(schedule.nets)}
    x, carry = make_inputs(schedule, dtype=dtype)
    cos_sin = rope() if kind == ATTENTION else None
    kept = {name: state.clone() for name, state in carry.items()}
    whole = run(engine, schedule, nets, x, carry, cos_sin)
    assert all(torch.equal(carry[name], kept[name]) for name in carry), "inputs were modified"

    one_by_one = carry
    for k, step in enumerate(schedule.steps):
        # The input of the call formed by PyTorch, so that no hoisted sum can be stale.
        h = reference.call_input(step, {"x": x, **one_by_one}, {})
        alone = Schedule((Step(step.net, "z", ("z",)),))
        written = run(engine, alone, nets, x, {"z": h}, cos_sin)["z"]
        one_by_one = {**one_by_one, step.write: written}
        part = run(engine, schedule, nets, x, carry, cos_sin, 0, k + 1)
        assert torch.equal(part[step.write], written), f"call {k} ({step})"
    assert all(torch.equal(whole[name], one_by_one[name]) for name in whole)


def test_two_nets_are_not_mixed_up(engine: cpu.Cpu) -> None:
    schedule = Schedule.hrm(1, 1)
    nets = {name: make_net(seed=seed) for seed, name in enumerate(schedule.nets)}
    x, carry = make_inputs(schedule)
    right = run(engine, schedule, nets, x, carry, rope())
    swapped = dict(zip(nets, reversed(nets.values()), strict=True))
    wrong = run(engine, schedule, swapped, x, carry, rope())
    expected = reference.run(schedule, nets, x, carry, rope())
    torch.testing.assert_close(right["z_H"], expected["z_H"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wrong["z_H"], expected["z_H"], rtol=1e-2, atol=1e-2)


# ---- batches and threads -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 2, 5, 11])
def test_bits_do_not_depend_on_threads_or_batch(
    engine: cpu.Cpu, kind: str, batch: int, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    schedule = Schedule.trm(1, 2)
    shape = dict(tokens=37, hidden=96)
    nets = {"L": make_net(kind, **shape, heads=3)}
    x, carry = make_inputs(schedule, batch=batch, dtype=torch.bfloat16, **shape)
    cos_sin = rope(**shape, heads=3)
    torch.set_num_threads(1)
    expected = run(engine, schedule, nets, x, carry, cos_sin)
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        got = run(engine, schedule, nets, x, carry, cos_sin)
        for name in expected:
            assert torch.equal(got[name], expected[name]), f"{count} threads, {name}"
    last = {name: state[-1:] for name, state in carry.items()}
    alone = run(engine, schedule, nets, x[-1:], last, cos_sin)
    for name in expected:
        assert torch.equal(alone[name], expected[name][-1:]), f"sample alone, {name}"


def test_small_work_stays_on_one_thread(
    native: cpu.Cpu, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the limit lies: 2 * B * T times the weights that the calls read."""
    used: list[int] = []
    module = types.SimpleNamespace(**vars(native._engine()))
    real = module.cpu_run
    module.cpu_run = lambda *arguments: [used.append(arguments[-2]), real(*arguments)][1]
    backend, schedule = cpu.Cpu(module), Schedule.trm(1, 2)
    nets = {"L": make_net()}
    x, carry = make_inputs(schedule, batch=2)
    flops = 2 * x.shape[0] * x.shape[1] * 3 * sum(w.numel() for w in nets["L"].weights)
    torch.set_num_threads(2)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for limit in (flops, flops + 1):
        monkeypatch.setattr(plan, "LEAST_SPLIT", limit)
        run(backend, schedule, nets, x, carry, rope())
    assert used == [2, 1]


def test_empty_batch(native: cpu.Cpu) -> None:
    schedule = Schedule.trm(1, 1)
    x, carry = make_inputs(schedule, batch=0)
    out = run(native, schedule, {"L": make_net()}, x, carry, rope())
    assert all(state.shape == x.shape for state in out.values())


def test_no_call_gives_copies(native: cpu.Cpu) -> None:
    schedule = Schedule.trm(1, 1)
    x, carry = make_inputs(schedule)
    out = run(native, schedule, {"L": make_net()}, x, carry, rope(), 1, 1)
    for name, state in out.items():
        assert torch.equal(state, carry[name]) and state.data_ptr() != carry[name].data_ptr()


def test_callers_on_two_threads(native: cpu.Cpu) -> None:
    schedule = Schedule.trm(1, 2)
    nets, (x, carry) = {"L": make_net()}, make_inputs(schedule, batch=4)
    expected = run(native, schedule, nets, x, carry, rope())
    results: list[dict[str, Tensor]] = []

    def work() -> None:
        results.extend(run(native, schedule, nets, x, carry, rope()) for _ in range(20))

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 40
    assert all(torch.equal(got[name], expected[name]) for got in results for name in expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_runs(native: cpu.Cpu, threads: None) -> None:
    torch.set_num_threads(2)
    schedule = Schedule.trm(1, 1)
    nets, (x, carry) = {"L": make_net()}, make_inputs(schedule)
    tables = rope()
    expected = run(native, schedule, nets, x, carry, tables)["z_H"]

    def right() -> bool:  # no kernels of torch here: their own threads do not survive a fork
        got = run(native, schedule, nets, x, carry, tables)["z_H"]
        return np.array_equal(got.numpy(), expected.numpy())

    assert in_child(right, patience=60) == 0
    assert torch.equal(run(native, schedule, nets, x, carry, tables)["z_H"], expected)


@pytest.mark.parametrize(
    "setting, more", [({}, 0), ({"RECURX_CPU_THREADS": "own"}, 1), ({"OMP_THREAD_LIMIT": "1"}, 1)]
)
def test_pytorchs_threads_are_the_engines(
    native: cpu.Cpu, setting: dict[str, str], more: int
) -> None:
    """Threads of our own would wait for PyTorch's to stop spinning; they help where OpenMP is not
    asked, or gives too few."""
    if not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        pytest.skip("PyTorch has no OpenMP runtime that others may use here")
    code = """
import os, torch
from recurx import Schedule
from recurx.plan import cpu as plan
from tests.factories import make_inputs, make_net, rope
from tests.cpu.test_cpu_engine import cpu, run
plan.LEAST_SPLIT = 0
os.cpu_count = lambda: 2
nets, (x, carry) = {"L": make_net()}, make_inputs(Schedule.trm(1, 1))
torch.set_num_threads(1)
one = run(cpu.BACKEND, Schedule.trm(1, 1), nets, x, carry, rope())
torch.set_num_threads(2)
torch.ones(1 << 20).exp()
before = len(os.listdir("/proc/self/task"))
two = run(cpu.BACKEND, Schedule.trm(1, 1), nets, x, carry, rope())
assert all(torch.equal(one[name], two[name]) for name in one)
print(len(os.listdir("/proc/self/task")) - before)
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=build.ROOT,
        env={**os.environ, **setting},
    )  # fmt: skip
    assert out.stdout.split() == [str(more)], out.stderr


def test_scratch_stays_small() -> None:
    """Under 64 MB beyond weights and states at B=8, full size; in a fresh process."""
    code = """
import torch
from recurx import Schedule, _C
from tests.factories import make_inputs, make_net, rope
from tests.cpu.test_cpu_engine import cpu, run
torch.set_num_threads(2)
shape = dict(tokens=97, hidden=512)
for dtype in (torch.float32, torch.bfloat16):
    x, carry = make_inputs(Schedule.trm(1, 1), batch=8, dtype=dtype, **shape)
    for kind in ("attention", "token_mlp"):
        nets = {"L": make_net(kind, **shape, inner=1536, heads=8, token_inner=512)}
        run(cpu.BACKEND, Schedule.trm(1, 1), nets, x, carry, rope(**shape, heads=8))
print(_C.cpu_scratch_bytes())
"""
    if cpu.BACKEND.why_unavailable() is not None:
        pytest.skip(f"backend cpu {cpu.BACKEND.why_unavailable()}")
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=build.ROOT
    )
    assert out.returncode == 0, out.stderr
    assert 0 < int(out.stdout) < 64 << 20


# ---- refusals, profiling, the driver -------------------------------------------------------------


def test_an_unknown_instruction_set_is_refused(
    native: cpu.Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECURX_CPU_ISA", "avx1024")
    x, carry = make_inputs(ONE)
    with pytest.raises(BackendUnavailable, match=r"RECURX_CPU_ISA.*portable.*avx1024"):
        recurx.recurse(ONE, {"L": make_net()}, x, carry, backend="cpu", cos_sin=rope())


@pytest.mark.parametrize(
    ("net", "dtype", "reason"),
    [
        (make_net(hidden=48), torch.float32, "multiple of 32"),
        (make_net(hidden=64, heads=8), torch.float32, "head_dim"),
        (make_net(), torch.float64, "float64"),
    ],
    ids=["D=48", "head_dim=8", "fp64"],
)
def test_unsupported_problems_are_named(
    native: cpu.Cpu, net: Net, dtype: torch.dtype, reason: str
) -> None:
    x, _ = make_inputs(ONE, hidden=net.spec.hidden, dtype=dtype)
    answer = native.why_unsupported(problem_for(ONE, {"L": net}, x))
    assert answer is not None and reason in answer


def test_phase_times(native: cpu.Cpu) -> None:
    from recurx import _C

    x, carry = make_inputs(ONE)
    _C.cpu_profile(True)
    try:
        run(native, ONE, {"L": make_net()}, x, carry, rope())
        attention = _C.cpu_phase_times()
        run(native, ONE, {"L": make_net(TOKEN_MLP)}, x, carry)
        both = _C.cpu_phase_times()
    finally:
        _C.cpu_profile(False)
    assert all(attention[phase] > 0 for phase in ("qkv", "attention", "o", "gate_up", "down"))
    assert attention["token_mlp"] == 0 and both["token_mlp"] > 0
    run(native, ONE, {"L": make_net()}, x, carry, rope())
    assert sum(_C.cpu_phase_times().values()) == 0, "the clock runs although it is off"


def test_the_driver_without_python() -> None:
    """Every engine, emulated."""
    try:
        program = build.driver()
    except build.native_tools.NotFound as missing:
        pytest.skip(f"cannot build the emulated engines: {missing}")
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert {line.split()[0] for line in lines} == {*build.ISAS, "ok"}
