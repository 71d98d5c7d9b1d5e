"""Doubles of a backend that run the reference, with faults and pauses to plant, for `auto`."""

from __future__ import annotations

import time

import pytest
import torch

from recurx import backends, reference, reference_backward, trials
from recurx.backends import Backend, Window
from recurx.nets import ATTENTION, BlockSpec, NetSpec, rope_tables
from recurx.operands import Operands
from recurx.problem import Problem
from recurx.route import Request
from recurx.schedule import Schedule


class OutOfResources(Exception):
    """As Triton's own: no RuntimeError."""


class Double(Backend):
    """The reference, with a fault to plant, and a count of its runs."""

    name = "double"
    device_types = ("cpu",)

    def __init__(self, fault=None):
        self.fault, self.runs = fault, 0

    def why_unavailable(self):
        return None

    def why_unsupported(self, problem):
        return None

    def run(self, problem, operands, span):
        self.runs += 1
        if self.fault == "compile":
            raise OutOfResources("out of resource: shared memory")
        if self.fault == "raise":
            raise RuntimeError("recurx._C: launch failed (cudaErrorInvalidValue)")
        if self.fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        carry = dict(zip(problem.schedule.states, operands.states, strict=True))
        nets = problem.bind(operands.weights)
        rope = None if self.fault == "rope" else operands.rope
        out = list(reference.run(problem.schedule, nets, operands.x, carry, rope, *span).values())
        if self.fault == "nan":
            out = [state * float("nan") for state in out]
        if self.fault == "swap":
            out = out[::-1]
        return out


class Windowed(Double):
    """A double with a window: autograd over the reference, with a fault to plant in a gradient."""

    def window(self, problem):
        return ReferenceWindow(self.fault)


class ReferenceWindow(Window):
    def __init__(self, fault=None, pause=0.0):
        self.fault, self.pause = fault, pause

    def kept(self, problem, span, save):
        return []

    def forward(self, problem, operands, span, save):
        return backends.get("eager").run(problem, operands, span), []

    def backward(self, problem, operands, span, save, outs, kept, d_outs, wants):
        flat = [torch.zeros_like(operands.x) if d is None else d for d in d_outs]
        grads = reference_backward.run(problem, operands, span, flat)
        if self.fault == "x":
            grads[0] = grads[0] * 1.1
        if self.fault == "weight":
            grads[-1] = grads[-1].flip(0)
        if self.fault == "raise backward":
            raise RuntimeError("an illegal instruction was encountered")
        time.sleep(self.pause)
        return [grad if want else None for grad, want in zip(grads, wants, strict=True)]


class Slow(Windowed):
    """Takes so many seconds a call more."""

    def __init__(self, pause, backward=0.0):
        super().__init__()
        self.pause, self.slow_backward = pause, backward

    def run(self, problem, operands, span):
        time.sleep(self.pause * (span.stop - span.start))
        return super().run(problem, operands, span)

    def window(self, problem):
        return ReferenceWindow(pause=self.slow_backward)


class Kinds(Windowed):
    """A double with several kinds of plan, each of them a double."""

    def __init__(self, **ways):
        super().__init__()
        self.ways, self.kinds = ways, tuple(ways)
        for kind, way in ways.items():
            way.kind, way.name = kind, f"double/{kind}"

    def restricted(self, kind):
        return self.ways[kind]


def a_problem(dtype=torch.bfloat16):
    block = BlockSpec(ATTENTION, 64, 128, num_heads=2)
    nets = (("L", NetSpec((block, block))),)
    return Problem(Schedule.trm(2, 2), nets, 3, 17, 64, dtype, "cpu", rope=True)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def inputs(request):
    """A problem on the CPU, and its tensors."""
    problem = a_problem(request.param)
    shapes = [shape for block in problem.nets[0][1].blocks for shape in block.weight_shapes]
    weights = [torch.randn(shape) / shape[1] ** 0.5 for shape in shapes]
    x, *states = (torch.randn(3, 17, 64).to(request.param) for _ in range(3))
    return problem, Operands(x, tuple(states), tuple(weights), rope_tables(17, 32))


def use(monkeypatch, double):
    """`auto` knows this double and PyTorch; returns what `auto` takes for (problem, operands)."""
    known = {"double": double, "eager": backends.get("eager")}
    known |= {f"double/{kind}": double.restricted(kind) for kind in double.kinds}
    monkeypatch.setattr(backends, "ORDER", ("double", "eager"))
    monkeypatch.setattr(backends, "get", known.__getitem__)
    trials.forget()

    def choose(problem, operands):
        return backends.get(trials.settled(problem, Request(), operands).backend)

    return choose


@pytest.fixture(autouse=True)
def nothing_known():
    trials.forget()
    yield
    trials.forget()
