"""recurx.patch: code that differs is refused with what differs, and the probe that finds it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import recurx
from recurx import BackendUnavailable, InvalidArgument, UnsupportedModel
from recurx.models import TRM, TRMConfig
from recurx.patching import probe
from recurx.patching.handle import installed
from recurx.patching.official import Official
from tests import lookalike
from tests.patching.test_patch import inner_of, same, step


@pytest.mark.parametrize(
    "quirk,message",
    [
        ("gain", r"`L_level` has a parameter `gain`"),
        ("scaled residual", "its output is off by 0.* names and weights tell in training mode"),
        ("flat sum", "computes something else: .* differs"),
        ("window", "computes something else: gradient of"),
    ],
)
def test_code_that_differs_is_refused_with_what_differs(
    quirk: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rounding alone tells a flat sum; elsewhere it is allowed for other attention kernels.
    monkeypatch.setitem(probe._TOLERANCE, torch.float32, 1e-6 if quirk == "flat sum" else 1e-3)
    fields = {"H_cycles": 5, "L_cycles": 6} if quirk == "flat sum" else {}
    model = lookalike.build(quirks=frozenset({quirk}), **fields)
    want = step(model)
    with pytest.raises(UnsupportedModel, match=message) as error:
        recurx.patch(model)
    assert "model.inner (Inner)" in str(error.value)
    assert "forward" not in vars(inner_of(model))
    same(step(model), want)


def _rename(inner: Any) -> None:
    inner.K_init = inner._buffers.pop("H_init")


def _hook(inner: Any) -> None:
    inner.L_level.layers[0].mlp.register_forward_hook(lambda *_: None)


def _foreign_forward(inner: Any) -> None:
    inner.forward = lambda carry, batch: None


def _missing(inner: Any) -> None:
    del inner.L_level


def _kv_heads(inner: Any) -> None:
    inner.L_level.layers[1].self_attn.num_key_value_heads = 1


def _parametrized(inner: Any) -> None:
    torch.nn.utils.parametrizations.spectral_norm(inner.L_level.layers[0].mlp.down_proj)


def _signature(inner: Any) -> None:
    class Other(lookalike.Inner):
        def forward(self, carry: Any, batch: Any, mask: Any = None) -> Any:
            return super().forward(carry, batch)

    inner.__class__ = Other


@pytest.mark.parametrize(
    "change,message",
    [
        (_rename, "recurx fails with TypeError: .*z_H"),
        (_hook, r"L_level\.layers\.0\.mlp` has hooks"),
        (_foreign_forward, "`forward` was replaced"),
        (_missing, "it has no `L_level`"),
        (_kv_heads, r"\(block 1, o\).: expected a floating"),
        (_parametrized, r"mlp\.down_proj` changes with each use"),
        (_signature, r"`forward` takes \(carry, batch, mask\), expected \(carry, batch\)"),
    ],
)
def test_changed_instances_are_refused(change: Any, message: str) -> None:
    model = lookalike.build()
    change(inner_of(model))
    with pytest.raises(UnsupportedModel, match=message):
        recurx.patch(model)


@pytest.mark.parametrize("quirk", ["bias", "causal"])
def test_what_a_block_can_spell_is_patched(quirk: str) -> None:
    model, own = (lookalike.build(quirks=frozenset({quirk})) for _ in range(2))
    with torch.no_grad():
        for weight, other in zip(model.parameters(), own.parameters(), strict=True):
            weight += 0.1
            other += 0.1  # biases begin at zero
    assert len(recurx.patch(model).report.patched) == 1
    (new, logits, _), (want, wanted, _) = (m(*lookalike.inputs(m)) for m in (model, own))
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vars(new), vars(want), rtol=1e-4, atol=1e-4)


def test_one_refused_among_two_is_reported() -> None:
    good, bad = lookalike.build(), lookalike.build(quirks=frozenset({"gain"}))
    report = recurx.patch(nn.ModuleList([good, bad])).report
    assert [entry.where for entry in report.patched] == ["0.model.inner"]
    assert [entry.where for entry in report.refused] == ["1.model.inner"]
    assert "NOT patched" in str(report) and "a parameter `gain`" in str(report)


def test_backends_and_own_models() -> None:
    model = lookalike.build(forward_dtype="float16")
    with pytest.raises(InvalidArgument, match="one of auto"):
        recurx.patch(model, backend="fast")
    if recurx.backends.why_not("cpu", _float16_problem(model)) is not None:
        with pytest.raises(BackendUnavailable, match="'cpu'"):
            recurx.patch(model, backend="cpu")
        assert installed(inner_of(model), "forward") is None
    with pytest.raises(UnsupportedModel, match="recurx's own model"):
        recurx.patch(TRM(TRMConfig.tiny(7, 9)))


def _float16_problem(model: nn.Module) -> Any:
    adapter, inner = Official(), inner_of(model)
    return adapter.problem(inner, adapter.recipe(inner, "cpu"))


@pytest.mark.parametrize("variant", ["trm", "hrm", "single_z"])
def test_cycles_that_change_after_the_patch_are_followed(variant: str) -> None:
    model, plain = lookalike.build(variant), lookalike.build(variant)
    recurx.patch(model, backend="eager")
    for cycles in ((2, 3), (3, 1), (2, 2)):
        for each in (model, plain):
            config = inner_of(each).config
            config.H_cycles, config.L_cycles = cycles
        same(step(model), step(plain))


def test_a_second_patch_replaces_the_first() -> None:
    model = lookalike.build()
    first = recurx.patch(model, backend="eager")
    second = recurx.patch(model)
    first.remove()
    assert installed(inner_of(model), "forward") is not None
    second.remove()
    assert installed(inner_of(model), "forward") is None


# ---- the probe -----------------------------------------------------------------------------


def test_large_models_are_probed_with_few_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lookalike.build(forward_dtype="bfloat16", H_cycles=4, L_cycles=3)
    with recurx.patch(model) as handle:
        assert "(4 x 3 cycles, B=2, float32): logits and carry bit-identical" in str(handle.report)
    monkeypatch.setattr(probe, "_FULL_PROBE_FLOP", 0.0)
    with recurx.patch(model) as handle:
        assert "(2 x 2 cycles, B=1, float32): logits and carry bit-identical" in str(handle.report)
    config = inner_of(model).config
    assert (config.H_cycles, config.L_cycles) == (4, 3)
    with pytest.raises(UnsupportedModel, match="computes something else"):
        recurx.patch(lookalike.build(H_cycles=4, L_cycles=3, quirks={"window"}))
    with recurx.patch(model, probe=False) as handle:
        assert "not probed, as asked" in str(handle.report)


def test_frozen_models_are_probed_without_gradient() -> None:
    model = lookalike.build().requires_grad_(False)
    with torch.inference_mode():
        report = str(recurx.patch(model).report)
    assert "logits and carry bit-identical" in report and "gradients" not in report


def test_meta_models_are_patched_unprobed() -> None:
    with torch.device("meta"):
        model = lookalike.build()
    assert "not probed: the weights are on the meta device" in str(recurx.patch(model).report)
