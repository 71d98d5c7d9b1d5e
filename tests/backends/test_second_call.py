"""After the first call of its kind a backend plans, lowers and encodes nothing any more."""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import recurx
from recurx import Schedule, ops
from recurx.backends import cuda_abi
from recurx.backends.cuda import Cuda
from recurx.backends.weight_cache import frozen_weights
from recurx.bench.host import simulated
from recurx.operands import Operands, Span
from recurx.plan import DEVICES
from recurx.plan.cuda import KINDS
from recurx.problem import encode
from tests.factories import make_inputs, make_net, problem_for, rope

ROOT = Path(recurx.__file__).parent
# What is decided once for a problem is decided in these files; hashing and looking up is elsewhere.
DECIDING = ("plan", "program.py", "schedule.py", "nets.py", "problem.py")
# Two products and a comparison of what may change from call to call; a setting of a plan.
ALLOWED = {"engine_threads", "__getitem__"}
SCHEDULE = Schedule.trm(3, 6)
SHAPE = dict(tokens=19, hidden=128)  # of no other test: nothing is remembered from one


def decisions(call: Callable[[], object]) -> set[str]:
    """Names of the Python functions of `DECIDING` that a call enters."""
    entered = set()

    def note(frame, event, _):
        if event == "call":
            path = Path(frame.f_code.co_filename)
            if ROOT in path.parents and path.relative_to(ROOT).parts[0] in DECIDING:
                entered.add(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


def assert_decided_once(run: Callable[[Operands], object], operands: Operands) -> None:
    """The first run decides, and the second, on other tensors of the same shapes, does not."""
    assert decisions(lambda: run(operands)) - ALLOWED
    states = tuple(state.clone() for state in operands.states)
    again = operands._replace(x=operands.x.clone(), states=states)
    assert decisions(lambda: run(again)) <= ALLOWED


def recursion(batch: int, dtype: torch.dtype) -> tuple[recurx.Problem, Operands, Span]:
    nets = {"L": make_net(**SHAPE)}
    x, carry = make_inputs(SCHEDULE, batch=batch, dtype=dtype, **SHAPE)
    weights = tuple(nets["L"].weights)
    operands = Operands(x, tuple(carry.values()), weights, rope(**SHAPE))
    return problem_for(SCHEDULE, nets, x), operands, Span(0, len(SCHEDULE))


class Launches(TorchDispatchMode):
    """Operators of PyTorch that launch something: neither views nor allocations."""

    QUIET = ("detach", "empty", "new_empty", "empty_like", "slice", "select", "view", "alias",
             "split", "transpose", "unbind", "unsqueeze")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ not in self.QUIET:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class StubLibrary:
    """The entries of a CUDA build with one kind of kernel, which do nothing but count."""

    def __init__(self, kind: str) -> None:
        self.kind, self.launches = kind, 0
        self._entries = [self._entry(*entry) for entry in self._described()]

    def _described(self):
        yield "rx_cuda_last_error", ctypes.c_char_p, [], lambda: b""
        yield "rx_cuda_error_name", ctypes.c_char_p, [ctypes.c_int32], lambda code: b""
        yield "rx_timeline_compiled", ctypes.c_int32, [], lambda: 0
        sizes = ctypes.POINTER(ctypes.c_int32)
        yield "rx_struct_sizes", None, [sizes], self._sizes
        for name, types in cuda_abi._CODES.items():
            if not name.endswith("_run") or cuda_abi.FAMILIES[self.kind] in name:
                yield name, ctypes.c_int32, types, self._launch
        for name, types in cuda_abi._BYTES.items():
            yield name, ctypes.c_int64, types, lambda *_: 1024

    def _entry(self, name, result, types, function):
        return name, ctypes.CFUNCTYPE(result, *types)(function)

    def _sizes(self, sizes) -> None:
        for i, mirrored in enumerate(cuda_abi._MIRRORED):
            sizes[i] = ctypes.sizeof(mirrored)

    def _launch(self, *_) -> int:
        self.launches += 1
        return 0

    def cuda_entries(self) -> dict[str, int]:
        return {name: ctypes.cast(f, ctypes.c_void_p).value for name, f in self._entries}


def test_cpu(native) -> None:
    problem, operands, span = recursion(5, torch.float32)
    assert_decided_once(lambda given: native.run(problem, given, span), operands)


@pytest.mark.parametrize("kind", KINDS)
def test_cuda(kind: str) -> None:
    library = StubLibrary(kind)
    cuda = Cuda(library, DEVICES["h100"])
    problem, operands, span = recursion(5, torch.bfloat16)
    problem = dataclasses.replace(problem, device_type="cuda")

    def run(given: Operands) -> object:
        assert cuda.why_unsupported(problem) is None
        return cuda.run(problem, given, span)

    assert_decided_once(run, operands)
    assert cuda.plan(problem).kind == kind
    assert library.launches == (2 if kind == "grid" else 4)  # the others pack by a kernel


@pytest.mark.parametrize("kind", ["tiled", "persistent"])
def test_triton(kind: str) -> None:
    jit = pytest.importorskip("triton.runtime.jit", reason="triton has no wheel for this platform")
    from recurx.backends import triton

    problem, operands, span = recursion(6, torch.bfloat16)
    launches = []
    with (
        simulated(DEVICES["h100"], kinds=(kind,), capture=lambda _: lambda: None),
        mock.patch.object(jit.JITFunction, "run", lambda *_, **__: launches.append(1)),
    ):
        assert_decided_once(lambda given: triton.BACKEND.run(problem, given, span), operands)
    triton.BACKEND.free()
    assert launches


# ---- launches of a supervision step ------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_cuda_kernels_is_one_launch(kind: str) -> None:
    """All 21 calls are one launch: two before it pack weights, unless these are frozen."""
    library = StubLibrary(kind)
    cuda = Cuda(library, DEVICES["h100"])
    problem, operands, span = recursion(1, torch.bfloat16)
    problem = dataclasses.replace(problem, device_type="cuda")
    plan = cuda.plan(problem)
    assert plan.work.launches == (2 if kind == "grid" else 1)  # a memset of the grid barrier
    cuda.run(problem, operands, span)
    with frozen_weights():
        cuda.run(problem, operands, span)
        library.launches = 0
        with Launches() as seen:
            cuda.run(problem, operands, span)
    assert (library.launches, seen.names) == (1, [])
    library.launches = 0
    with Launches() as seen:
        cuda.run(problem, operands, span)
    packing = ["_foreach_copy_", "index_select"] if kind == "grid" else ["_foreach_copy_"]
    assert seen.names == packing and library.launches + len(seen.names) == 3


@pytest.mark.parametrize("kind, batch", [("tiled", 1), ("tiled", 7), ("persistent", 3)])
def test_triton_launches_as_many_kernels_as_its_plan_says(kind: str, batch: int) -> None:
    """Kernels in a slice's graph and copies around it; and one that rounds the weights."""
    jit = pytest.importorskip("triton.runtime.jit", reason="triton has no wheel for this platform")
    from recurx.backends import triton

    problem, operands, span = recursion(batch, torch.bfloat16)
    kernels: list[int] = []
    with (
        simulated(DEVICES["h100"], kinds=(kind,)),
        mock.patch.object(jit.JITFunction, "run", lambda *_, **__: kernels.append(1)),
    ):
        triton.BACKEND.run(problem, operands, span)
        kernels.clear()
        with Launches() as seen:
            triton.BACKEND.run(problem, operands, span)
        plan = triton.BACKEND.plan(problem, operands.x.device)
    slices = -(-batch // plan["slice"]) if kind == "tiled" else 1
    copies = [name for name in seen.names if name == "_foreach_copy_"]
    tables = 1 if kind == "tiled" else 0  # rotary tables into the graph's own
    assert len(seen.names) == len(copies) == 1 + tables + 2 * slices
    assert len(kernels) + 2 * slices == plan.work.launches


def test_the_op_makes_one_problem(native) -> None:
    problem, operands, span = recursion(7, torch.float32)
    key = encode(problem.schedule, problem.nets)

    def run(given: Operands) -> object:
        return ops.recurse_op(*given.flat(), key, "cpu", *span)

    assert {"decode", "from_key"} <= decisions(lambda: run(operands))
    assert not decisions(lambda: run(operands)) & {"decode", "from_key", "__init__", "lower"}
