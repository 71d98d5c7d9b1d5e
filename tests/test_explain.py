"""recurx.explain: who runs a recursion, who was refused, and what runs where."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import recurx
from recurx import InvalidArgument, Schedule, backends
from recurx.models import HRM, TRM, ACTLossHead, HRMConfig, TRMConfig, problem_of_model
from recurx.route import route
from tests import lookalike


@pytest.fixture
def no_cpu_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = type(backends.get("cpu"))
    monkeypatch.setattr(engine, "why_unavailable", lambda self: "needs a compiler")


def test_a_problem_names_the_chosen_backend_and_the_refusals(no_cpu_engine: None) -> None:
    problem = problem_of_model(TRM(TRMConfig.tiny(7, 9)).eval(), batch_size=5)
    text = recurx.explain(problem)
    assert "trm(3, 6), 21 calls, window 7; B=5 T=9 D=64 float32 on cpu" in text
    assert "backend 'auto' -> eager" in text
    assert "cpu: refused: needs a compiler" in text
    assert "without gradient: calls 0..20 on eager" in text
    assert "in training" not in text
    training = recurx.explain(dataclasses.replace(problem, needs_grad=True))
    assert "calls 0..13 on eager without gradient; window 14..20 on eager" in training


def test_an_explicit_backend_that_cannot_is_explained_not_raised(no_cpu_engine: None) -> None:
    text = recurx.explain(problem_of_model(TRM(TRMConfig.tiny(7, 9))), backend="cpu")
    assert "backend 'cpu' needs a compiler" in text
    assert "eager: can run it" in text
    assert "without gradient" not in text


def test_what_is_said_is_what_is_chosen() -> None:
    for dtype in ("float32", "bfloat16", "float64"):
        model = TRM(TRMConfig.tiny(7, 9, forward_dtype=dtype))
        chosen = route(problem_of_model(model)).backend
        text = recurx.explain(model)
        assert f"backend 'auto' -> {chosen}" in text
        assert f"calls 0..20 on {chosen}" in text
        assert f"calls 0..13 on {chosen} without gradient; window 14..20 on {chosen}" in text
        for name in backends.ORDER:
            reason = backends.why_not(name, problem_of_model(model))
            assert (f"{name}: refused: {reason}" in text) == (reason is not None)


def test_windows_of_other_schedules() -> None:
    hrm = HRM(HRMConfig.tiny(7, 9), backend="eager")
    assert "calls 0..3 on eager without gradient; window 4..5 on eager" in recurx.explain(hrm)
    full = TRM(TRMConfig.tiny(7, 9, grad_window="full"), backend="eager")
    assert "all calls are in the window; window 0..20 on eager" in recurx.explain(full)
    one = TRM(TRMConfig.tiny(7, 9, H_cycles=1, L_cycles=1, grad_window=1), backend="eager")
    assert "calls 0 on" in recurx.explain(one) and "window 1 on eager" in recurx.explain(one)


def test_wrapped_patched_and_unpatched_modules() -> None:
    own = ACTLossHead(TRM(TRMConfig.tiny(7, 9), backend="eager"))
    assert "model.inner (Inner): recurx's own model" in recurx.explain(torch.compile(own))
    model = lookalike.build()
    assert "model.inner (Inner): not patched, runs on PyTorch" in recurx.explain(model)
    handle = recurx.patch(model, backend="eager")
    text = recurx.explain(model)
    assert "model.inner (Inner): patched" in text and "backend 'eager' -> eager" in text
    assert str(handle.report) in recurx.explain(handle)
    assert "trm(2, 2), 6 calls, window 3" in recurx.explain(handle)
    handle.remove()
    assert "not patched" in recurx.explain(model)
    odd = lookalike.build(quirks=frozenset({"gain"}))
    text = recurx.explain(odd)
    assert "recurx.patch would refuse it" in text and "parameter `gain`" in text
    assert "no recursion that recurx knows" in recurx.explain(nn.Linear(2, 2))


def test_foreign_networks_run_on_pytorch() -> None:
    lucid = pytest.importorskip("tiny_recursive_model")
    model = lucid.TinyRecursiveModel(dim=8, num_tokens=4, network=nn.Linear(8, 8))
    text = recurx.explain(recurx.patch(model))
    assert "-> eager: net is foreign code" in text and "lucidrains(3, 6), 21 calls" in text


def test_other_things_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="model_or_problem"):
        recurx.explain(Schedule.trm(1, 1))
