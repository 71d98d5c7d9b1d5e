"""Windows of the CPU engine, and the judgement of their gradients.

Over all gradients of a window together, the error against fp64 is at most 1.25 times that of eager
PyTorch in the same dtype; test_cpu_window_planted.py shows that this bites.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch

from recurx import Schedule, Step, comparing
from recurx.nets import ATTENTION
from recurx.operands import Operands, Span
from recurx.plan import cpu as plan
from tests.cpu import build
from tests.factories import make_inputs, make_net, problem_for, rope, rounded
from tests.kernels.compare import ERROR_RATIO, relative_error

SAVE = ("all", "block", "states")
FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = [FP32, BF16]
ONE = Schedule((Step("L", "z", ("z",), ("x",)),))
# On top of a test's other parameters, so that the engines come to each case in turn (`judged`).
each_engine = pytest.mark.parametrize("engine", build.ISAS, indirect=True)


@pytest.fixture(autouse=True)
def small_work_is_split_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "LEAST_SPLIT", 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def case(schedule, kind=ATTENTION, dtype=FP32, batch=3, seed=1, **shape):
    """(schedule, nets, x, carry, rope) with weights that the states' dtype holds exactly."""
    nets = {
        name: rounded(make_net(kind, seed=n, **shape), dtype, FP32)
        for n, name in enumerate(schedule.nets)
    }
    sizes = {k: shape[k] for k in ("tokens", "hidden") if k in shape}
    x, carry = make_inputs(schedule, batch=batch, dtype=dtype, seed=seed, **sizes)
    tables = rope(**{k: shape[k] for k in ("tokens", "hidden", "heads") if k in shape})
    return schedule, nets, x, carry, tables


def window_of(schedule, nets, x, carry, tables, *beside):
    """What a window takes: (problem, operands, span, gradients of what leaves)."""
    problem = problem_for(schedule, nets, x, needs_grad=True)
    weights = tuple(w for name in schedule.nets for w in nets[name].weights)
    operands = Operands(x, tuple(carry.values()), weights, tables, *beside)
    span = Span(schedule.grad_from, len(schedule))
    written = {step.write for step in schedule.steps[span.start :]}
    slope = torch.linspace(-1, 1, x.numel()).view_as(x).to(x.dtype)
    d_outs = [slope.roll(n) if s in written else None for n, s in enumerate(schedule.states)]
    return problem, operands, span, d_outs


def on_engine(engine, given, save="all"):
    problem, operands, span, d_outs = window_of(*given)
    return comparing.gradients(engine, problem, operands, span, save, d_outs)


def truth(given):
    """PyTorch's gradients, and those in fp64."""
    problem, operands, span, d_outs = window_of(*given)
    plain = comparing.gradients_by_autograd(problem, operands, span, d_outs)
    double = [tuple(t.double() for t in part) for part in (operands.states, operands.weights)]
    wide = Operands(operands.x.double(), *double, *operands[3:])
    d_wide = [None if d is None else d.double() for d in d_outs]
    return plain, comparing.gradients_by_autograd(problem, wide, span, d_wide)


@functools.lru_cache(maxsize=32)  # shared by the engines: fp64 takes most of the time
def judged(*args, **how):
    """A case and its truth."""
    given = case(*args, **how)
    return given, truth(given)


def errors(got, truths):
    """Of all gradients together, against fp64: the engine's and PyTorch's."""
    plain, exact = truths
    assert [g.dtype for g in got] == [g.dtype for g in plain]
    used = [i for i, g in enumerate(exact) if g.any()]
    assert all(not got[i].any() for i in range(len(exact)) if i not in used)
    return tuple(
        float(sum(relative_error(grads[i], exact[i]) ** 2 for i in used) ** 0.5)
        for grads in (got, plain)
    )


def assert_right(got, given, ratio=ERROR_RATIO, truths=None):
    ours, theirs = errors(got, truths or truth(given))
    assert ours <= ratio * theirs, f"gradients: error {ours:.3g}, PyTorch's {theirs:.3g}"
