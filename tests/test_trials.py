"""`auto` compares before it relies on a backend: here with doubles on the CPU."""

from __future__ import annotations

import warnings

import pytest
import torch

from recurx import backends, choices, trials
from recurx.comparing import UntrustedKernel
from recurx.route import Request, route
from tests import doubles
from tests.doubles import Double, Windowed, use

inputs, nothing_known = doubles.inputs, doubles.nothing_known


def test_a_right_backend_is_compared_once_and_then_used(monkeypatch, inputs):
    double = Double()
    choose = use(monkeypatch, double)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(*inputs) is double
        assert choose(*inputs) is double
    assert double.runs == 1
    trials.forget()
    assert choose(*inputs) is double and double.runs == 2


@pytest.mark.parametrize("fault", ["rope", "nan", "raise", "compile", "swap"])
def test_a_wrong_backend_is_left_with_a_warning(monkeypatch, inputs, fault):
    double = Double(fault)
    choose = use(monkeypatch, double)
    with pytest.warns(UntrustedKernel, match=r"'double'.*`auto` goes on without it"):
        assert choose(*inputs).name == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(*inputs).name == "eager"  # remembered, and warned of once
    assert double.runs == 1


def test_too_little_memory_is_no_verdict(monkeypatch, inputs):
    double = Double("memory")
    choose = use(monkeypatch, double)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(*inputs).name == "eager"
        double.fault = None
        assert choose(*inputs) is double


def test_nothing_is_compared_nor_relied_on_inside_a_capture(monkeypatch, inputs):
    double = Double()
    choose = use(monkeypatch, double)
    monkeypatch.setattr(trials, "captured_outside", lambda device: True)
    assert choose(*inputs).name == "eager"
    monkeypatch.setattr(trials, "captured_outside", lambda device: False)
    assert choose(*inputs) is double
    monkeypatch.setattr(trials, "captured_outside", lambda device: True)
    assert choose(*inputs) is double  # known by now


def test_the_order_follows_the_predicted_times_of_several_fused_backends(monkeypatch, inputs):
    problem = inputs[0]
    monkeypatch.setattr(backends, "ORDER", ("slow", "fast", "eager"))
    monkeypatch.setattr(backends, "auto_may_take", lambda name, device: True)
    monkeypatch.setattr(backends, "entrants", lambda name: (name,))
    monkeypatch.setattr(backends, "why_not", lambda name, problem: None)
    times = {"slow": 2.0, "fast": 1.0}
    monkeypatch.setattr(choices, "predicted", lambda name, p, device: times[name])
    assert choices.fused_for(problem, torch.device("cpu")) == ["fast", "slow"]
    monkeypatch.setattr(backends, "why_not", lambda name, p: "no" if name == "fast" else None)
    assert choices.fused_for(problem, torch.device("cpu")) == ["slow"]


# ---- the window's backward is compared too ------------------------------------------------------


def settled(inputs, **request):
    return trials.settled(inputs[0], Request(grad=True, **request), inputs[1])


def test_a_right_backward_is_compared_once(monkeypatch, inputs):
    use(monkeypatch, Windowed())
    compared = []
    real = trials.right
    monkeypatch.setattr(
        trials, "right", lambda half, *given: compared.append(half) or real(half, *given)
    )
    for _ in range(2):
        found = settled(inputs)
        assert (found.backend, found.forward, found.backward) == ("double", "double", "double")
    assert compared == ["calls", "window save=all"]
    assert "window 3..5 on double, forward and backward" in str(found)


@pytest.mark.parametrize("fault", ["x", "weight", "raise backward"])
def test_a_wrong_backward_leaves_the_window_to_pytorch(monkeypatch, inputs, fault):
    use(monkeypatch, Windowed(fault))
    with pytest.warns(UntrustedKernel, match=r"'double'.*the gradients of one call"):
        found = settled(inputs)
    assert (found.backend, found.forward, found.backward) == ("double", "eager", "autograd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert settled(inputs).backward == "autograd"
    assert settled(inputs, save="block").backward == "recompute"
    states = settled(inputs, save="states")
    assert (states.forward, states.backward) == ("double", "reference")


def test_inputs_that_are_not_finite_are_no_verdict(monkeypatch, inputs):
    problem, operands = inputs
    choose = use(monkeypatch, Double())
    assert "compared and measured at its first use" in str(route(problem))
    broken = operands._replace(x=operands.x * float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(problem, broken).name == "eager"
        assert choose(problem, operands).name == "double"
    assert "first use" not in str(route(problem))
