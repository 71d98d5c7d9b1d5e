"""recurx.patch on code of nano-trm's layout: the adapter, and what a watched class does."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import pytest
import torch

import recurx
from recurx import UnsupportedModel
from recurx.patching.handle import installed
from tests import lookalike_nano
from tests.lookalike_nano import Nano, build, train


@pytest.mark.parametrize("fields", [{}, {"use_mlp_t": True}, {"H_cycles": 3, "L_cycles": 1}])
def test_patched_training_has_the_same_bits(fields: dict[str, Any]) -> None:
    want = train(build(**fields))
    model = build(**fields)
    with recurx.patch(model, backend="eager") as handle:
        assert "bit-identical" in str(handle.report) and "1 patched" in str(handle.report)
        for got, value in zip(train(model), want, strict=True):
            assert torch.equal(got, value)
    assert "inner_forward" not in vars(model)


def test_other_backends_copies_and_cycles_that_change() -> None:
    want, model = train(build(L_cycles=3)), build()
    recurx.patch(model)
    model.hparams.L_cycles = 3  # the schedule follows
    clone = copy.deepcopy(model)
    for trained in (model, clone):
        for got, value in zip(train(trained), want, strict=True):
            torch.testing.assert_close(got, value, rtol=1e-3, atol=1e-4)


def _replaced(model: Any) -> None:
    model.inner_forward = torch.no_grad()(model.inner_forward)


def _no_carry(model: Any) -> None:
    model.empty_carry = MethodType(lambda self, batch_size, device: None, model)


@pytest.mark.parametrize(
    "fields,change,message",
    [
        ({"twist": "window"}, None, "computes something else: gradient of"),
        ({"twist": "residual"}, None, "computes something else|not known|differ"),
        ({}, _replaced, r"`inner_forward` was replaced .* patch first"),
        ({}, _no_carry, "cannot be read: TypeError"),
    ],
)
def test_code_that_differs_is_refused_with_what_to_do(
    fields: dict[str, Any], change: Any, message: str
) -> None:
    model = build(**fields)
    if change:
        change(model)
    with pytest.raises(UnsupportedModel, match=message) as error:
        recurx.patch(model)
    assert "What to do" in str(error.value)
    assert installed(model, "inner_forward") is None


def test_a_watched_class_patches_or_warns_and_never_breaks_a_constructor() -> None:
    with recurx.patch(Nano) as handle:
        assert "0 patched, 0 refused, 1 classes watched" in str(handle.report)
        assert installed(build(), "inner_forward") is not None
        with pytest.warns(UserWarning, match="computes something else(.|\n)*runs as before"):
            odd = build(twist="window")
        assert installed(odd, "inner_forward") is None
        assert "1 patched, 1 refused, 1 classes watched" in str(handle.report)
    for got, value in zip(train(odd), train(build(twist="window")), strict=True):
        assert torch.equal(got, value)


def test_profile_explain_and_solve_know_it() -> None:
    model = build()
    profile = recurx.profile(model, batch_size=2, seconds=0.1, compare=False, halting_steps=2)
    assert "QKV product" in str(profile) and "cycle 1, net L: 3 x" in str(profile)
    assert "trm(2, 2)" in recurx.explain(model)
    with pytest.raises(recurx.InvalidArgument, match=r"run=lambda: model.training_step"):
        recurx.profile(model, train=True)
    with pytest.raises(recurx.InvalidArgument, match="nano-trm"):
        recurx.solve(model, {"inputs": lookalike_nano.batch()["input"]})
