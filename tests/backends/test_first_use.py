"""`auto` compares a GPU kernel with the reference before it relies on it: here with CPU doubles."""

import warnings

import pytest
import torch

from recurx import backends, reference
from recurx.backends import Backend, first_use
from recurx.backends.first_use import FirstUse, UntrustedKernel
from recurx.nets import ATTENTION, BlockSpec, NetSpec, rope_tables
from recurx.problem import Problem
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
        tables = None if self.fault == "rope" else operands.rope
        values = reference.run(problem.schedule, nets, operands.x, carry, tables, *span)
        out = list(values.values())
        if self.fault == "nan":
            out = [state * float("nan") for state in out]
        if self.fault == "swap":
            out = out[::-1]
        return out


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def inputs(request):
    """A problem on the CPU, and the tensors of `FirstUse.choose`."""
    block = BlockSpec(ATTENTION, 64, 128, num_heads=2)
    problem = Problem(
        Schedule.trm(2, 2), (("L", NetSpec((block, block))),), 3, 17, 64, request.param, "cpu",
        rope=True,
    )  # fmt: skip
    weights = [torch.randn(shape) / shape[1] ** 0.5 for shape in block.weight_shapes * 2]
    x, *states = (torch.randn(3, 17, 64).to(request.param) for _ in range(3))
    return problem, x, states, weights, *rope_tables(17, 32)


def use(monkeypatch, double):
    monkeypatch.setattr(backends, "ranked", lambda problem: ["double", "eager"])
    eager = backends.get("eager")
    monkeypatch.setattr(backends, "get", {"double": double, "eager": eager}.__getitem__)
    return FirstUse()


def test_a_right_backend_is_compared_once_and_then_used(monkeypatch, inputs):
    double = Double()
    verdicts = use(monkeypatch, double)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verdicts.choose(*inputs) is double
        assert verdicts.choose(*inputs) is double
    assert double.runs == 1
    verdicts.forget()
    assert verdicts.choose(*inputs) is double and double.runs == 2


@pytest.mark.parametrize("fault", ["rope", "nan", "raise", "compile", "swap"])
def test_a_wrong_backend_is_left_with_a_warning(monkeypatch, inputs, fault):
    double = Double(fault)
    verdicts = use(monkeypatch, double)
    with pytest.warns(UntrustedKernel, match=r"'double'.*`auto` goes on without it"):
        assert verdicts.choose(*inputs).name == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verdicts.choose(*inputs).name == "eager"  # remembered, and warned of once
    assert double.runs == 1


def test_too_little_memory_is_no_verdict(monkeypatch, inputs):
    double = Double("memory")
    verdicts = use(monkeypatch, double)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verdicts.choose(*inputs).name == "eager"
        double.fault = None
        assert verdicts.choose(*inputs) is double


def test_nothing_is_compared_nor_relied_on_inside_a_capture(monkeypatch, inputs):
    double = Double()
    verdicts = use(monkeypatch, double)
    monkeypatch.setattr(first_use, "_capturing", lambda x: True)
    assert verdicts.choose(*inputs).name == "eager"
    monkeypatch.setattr(first_use, "_capturing", lambda x: False)
    assert verdicts.choose(*inputs) is double
    monkeypatch.setattr(first_use, "_capturing", lambda x: True)
    assert verdicts.choose(*inputs) is double  # known by now


def test_ranked_follows_the_predicted_times_of_several_fused_backends(monkeypatch, inputs):
    problem = inputs[0]
    monkeypatch.setattr(backends, "ORDER", ("slow", "fast", "eager"))
    monkeypatch.setattr(backends, "auto_may_take", lambda name, device: True)
    monkeypatch.setattr(backends, "why_not", lambda name, problem: None)
    monkeypatch.setattr(backends, "_predicted", lambda name, p: {"slow": 2.0, "fast": 1.0}[name])
    assert backends.ranked(problem) == ["fast", "slow", "eager"]
    monkeypatch.setattr(backends, "why_not", lambda name, p: "no" if name == "fast" else None)
    assert backends.ranked(problem) == ["slow", "eager"]
