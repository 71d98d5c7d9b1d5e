"""A patched model whose code changes runs its own code and says so; copies run their weights."""

from __future__ import annotations

import copy
import pickle
import warnings
from random import Random
from typing import Any

import pytest
import torch
from torch import nn

import recurx
from recurx import UnsupportedModel
from recurx.errors import RecurxWarning
from recurx.patching import handle as handles
from recurx.patching.handle import installed
from tests import lookalike
from tests.hostile import models as twisted
from tests.hostile.edits import EDITS
from tests.patching.test_patch import inner_of, recursions, same, step


@pytest.fixture(autouse=True)
def told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "_told", set())


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize(
    "edit", ["forward_hook", "lora_inside", "backward_pre_hook", "net_replaced"]
)
def test_changed_code_runs_as_it_is_and_says_so_once(
    edit: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, twin = twisted.model(), twisted.model()
    handle = recurx.patch(model, backend=backend)
    for each in (model, twin):
        EDITS[edit](each, Random(2))
    calls = recursions(monkeypatch)
    with pytest.warns(RecurxWarning, match=r"changed after the patch: .*handle\.refresh\(\)"):
        got = step(model)
    same(got, step(twin))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model)
    assert not calls
    text = recurx.explain(model)
    assert "its code changed; it runs on PyTorch as it is" in text and "handle.refresh()" in text
    report = handle.refresh()
    assert len(report.refused) == 1 and not report.patched
    assert installed(inner_of(model), "forward") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(step(model), step(twin))


def test_a_change_that_a_block_can_spell_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = twisted.model(), twisted.model()
    recurx.patch(model)
    step(model)
    for each in (model, twin):
        EDITS["biased"](each, Random(2))
    calls, want = recursions(monkeypatch), step(twin)
    for name, got in step(model).items():
        torch.testing.assert_close(got, want[name], rtol=1e-3, atol=1e-4, msg=name)
    assert calls, "no fall back: a bias is a field of the block"


def test_a_backend_asked_for_by_name_never_falls_back(native: Any) -> None:
    model = twisted.model()
    recurx.patch(model, backend="cpu")
    EDITS["forward_hook"](model, Random(2))
    with pytest.raises(UnsupportedModel, match=r"L_level.* has hooks.*'cpu' never falls back"):
        step(model)


def test_refresh_patches_again_what_became_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lookalike.build()
    handle = recurx.patch(model, backend="eager")
    layer = inner_of(model).L_level.layers[0]
    hook = layer.register_forward_hook(lambda *_: None)
    assert not handle.refresh().patched
    hook.remove()
    assert len(handle.refresh().patched) == 1
    calls = recursions(monkeypatch)
    same(step(model), step(lookalike.build()))
    assert len(calls) == 1
    handle.remove()
    assert type(inner_of(model)) is lookalike.Inner


def test_refresh_of_a_patched_class() -> None:
    handle = recurx.patch(lookalike.Inner, backend="eager")
    with handle:
        model = lookalike.build()
        inner_of(model).L_level.layers[0].mlp.register_forward_hook(lambda *_: None)
        report = handle.refresh()
        assert [entry.kind for entry in report.patched] == ["class"]
        assert installed(inner_of(model), "forward") is None
        assert installed(inner_of(lookalike.build()), "forward") is not None
    assert installed(inner_of(lookalike.build()), "forward") is None


def test_a_class_whose_forward_is_replaced_after_the_patch(monkeypatch: Any) -> None:
    model = lookalike.build()
    recurx.patch(model, backend="eager")
    own = lookalike.Inner.forward

    def halved(self: Any, carry: Any, batch: Any) -> Any:
        new, logits, q = own(self, carry, batch)
        return new, 0.5 * logits, q

    want = step(lookalike.build())["logits"]
    monkeypatch.setattr(lookalike.Inner, "forward", halved)
    with pytest.warns(RecurxWarning, match="of its class was replaced"):
        assert torch.equal(step(model)["logits"], 0.5 * want)


# ---- copies --------------------------------------------------------------------------------------


def reweighted(inner: Any) -> Any:
    inner._modules = dict(inner._modules)
    inner.lm_head = copy.deepcopy(inner.lm_head)
    inner.L_level = copy.deepcopy(inner.L_level)
    with torch.no_grad():
        for parameter in (*inner.lm_head.parameters(), *inner.L_level.parameters()):
            parameter.mul_(0.5)
    return inner


@pytest.mark.parametrize("kind", [copy.copy, lambda m: m._replicate_for_data_parallel()])
def test_a_shallow_copy_runs_its_own_weights(kind: Any, monkeypatch: Any) -> None:
    model, plain = lookalike.build(), lookalike.build()
    recurx.patch(model, backend="eager")
    carry, batch = lookalike.inputs(model)
    ours, theirs = (reweighted(kind(inner_of(each))) for each in (model, plain))
    calls = recursions(monkeypatch)
    got, want = (each(carry, batch)[1] for each in (ours, theirs))
    assert torch.equal(got, want) and len(calls) == 1
    assert not torch.equal(got, inner_of(model)(carry, batch)[1])


def test_what_a_patched_instance_is_to_others() -> None:
    model = lookalike.build()
    inner = inner_of(model)
    handle = recurx.patch(model)
    assert isinstance(inner, lookalike.Inner) and type(inner).__name__ == "Inner"
    assert type(inner).__module__ == lookalike.__name__ and "forward" not in vars(inner)
    assert handle.modules == [inner]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        loaded = pickle.loads(pickle.dumps(inner, protocol))
        assert type(loaded) is lookalike.Inner
    assert type(copy.deepcopy(inner)) is type(inner)

    class Derived(type(inner)):  # as FSDP2 does
        pass

    inner.__class__ = Derived
    handle.remove()
    assert installed(inner, "forward") is None and type(inner) is Derived


class Refusing(lookalike.Inner):
    """Copies itself in its own way."""

    def __deepcopy__(self, memo: Any) -> Any:
        new = lookalike.build().model.inner
        new.__class__ = type(self)
        new.load_state_dict(self.state_dict())
        return new


def test_a_copying_method_of_the_model_is_kept() -> None:
    model = lookalike.build()
    inner_of(model).__class__ = Refusing
    recurx.patch(model, backend="eager")
    copied = copy.deepcopy(model)
    assert installed(inner_of(copied), "forward") is not None
    same(step(copied), step(lookalike.build()))


# ---- training, compiled nets ---------------------------------------------------------------------


class Dropped(lookalike.Inner):
    rate = 0.01

    def forward(self, carry: Any, batch: Any) -> Any:
        new, logits, q = super().forward(carry, batch)
        if self.training:
            nn.functional.dropout(torch.ones(3), self.rate, True)  # drawn, whatever comes of it
        return new, logits, q


class FullGradient(lookalike.Inner):
    def forward(self, carry: Any, batch: Any) -> Any:
        if self.training:
            self.config.quirks = frozenset({"window"})
        try:
            return super().forward(carry, batch)
        finally:
            self.config.quirks = frozenset()


@pytest.mark.parametrize(
    "kind,why", [(Dropped, "draws random numbers .* training"), (FullGradient, "in training")]
)
def test_what_differs_in_training_only_is_refused(kind: type, why: str, monkeypatch: Any) -> None:
    model = lookalike.build().eval()
    inner_of(model).__class__ = kind
    with pytest.raises(UnsupportedModel, match=why):
        recurx.patch(model)
    assert not model.training
    probe = __import__("recurx.patching.probe", fromlist=["_both"])
    real = probe._both
    monkeypatch.setattr(  # planted: without training mode both pass
        probe, "_both", lambda module, *rest: real(module.eval(), *rest)
    )
    recurx.patch(model)


@pytest.mark.parametrize("variant", ["trm", "hrm"])
def test_nets_compiled_alone_are_taken(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    model, want = lookalike.build(variant), step(lookalike.build(variant))
    inner = inner_of(model)
    for name in ("L_level", "H_level")[: 1 + (variant == "hrm")]:
        setattr(inner, name, torch.compile(getattr(inner, name), backend="eager"))
    recurx.patch(model, backend="eager")
    calls = recursions(monkeypatch)
    got = {name.replace("_orig_mod.", ""): tensor for name, tensor in step(model).items()}
    same(got, want)
    assert len(calls) == 1


def test_cycles_follow_the_configuration_when_compiled() -> None:
    torch._dynamo.reset()
    model, plain = lookalike.build().eval(), lookalike.build().eval()
    recurx.patch(model, backend="eager")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    carry, batch = lookalike.inputs(model)
    for cycles in ((2, 2), (1, 3)):
        for each in (model, plain):
            inner_of(each).config.H_cycles, inner_of(each).config.L_cycles = cycles
        with torch.no_grad():
            torch.testing.assert_close(compiled(carry, batch)[1], plain(carry, batch)[1])
