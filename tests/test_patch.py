"""recurx.patch on code of the official layout: swap, restore, copies, compile, refusals."""

from __future__ import annotations

import copy
import io
import pickle
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recurx
from recurx import BackendUnavailable, InvalidArgument, RecurxError, UnsupportedModel
from recurx.models import TRM, TRMConfig
from recurx.patch import PatchHandle, probe
from recurx.patch.handle import installed
from tests import lookalike

VARIANTS = [
    ("trm", {}), ("trm", {"mlp_t": True}), ("single_z", {}), ("hier6", {"L_cycles": 6}),
    ("hier6", {"L_cycles": 4}), ("hrm", {}), ("hrm", {"H_cycles": 1, "L_cycles": 1}),
]  # fmt: skip
EVERY_VARIANT = pytest.mark.parametrize(
    "variant,fields", VARIANTS, ids=[f"{v}-{f}" for v, f in VARIANTS]
)


def step(model: nn.Module) -> dict[str, Tensor]:
    """Everything that one training step gives: logits, carry, loss and every gradient."""
    carry, batch = lookalike.inputs(model)
    model.zero_grad()
    new, logits, loss = model(carry, batch)
    loss.backward()
    out = {"logits": logits, "loss": loss, **vars(new)}
    out |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.detach().clone() for name, tensor in out.items()}


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), f"{name}: {(got[name] - tensor).abs().max()}"


def inner_of(model: nn.Module) -> lookalike.Inner:
    return next(m for m in model.modules() if isinstance(m, lookalike.Inner))


def recursions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the schedules that `recurx.recurse` is called with from now on."""
    calls: list[str] = []
    module = __import__("recurx.patch.official", fromlist=["recurse"])
    original = module.recurse

    def counting(schedule: recurx.Schedule, *args: Any, **kwargs: Any) -> Any:
        calls.append(schedule.name)
        return original(schedule, *args, **kwargs)

    monkeypatch.setattr(module, "recurse", counting)
    return calls


@EVERY_VARIANT
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_patched_code_gives_the_same_bits(
    variant: str, fields: dict[str, Any], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lookalike.build(variant, forward_dtype=dtype, **fields)
    want, names = step(model), list(model.state_dict())
    handle = recurx.patch(model, backend="eager")
    calls = recursions(monkeypatch)
    same(step(model), want)
    assert len(calls) == 1, "the patched model must recurse through recurx"
    assert list(model.state_dict()) == names
    text = str(handle.report)
    assert "1 patched, 0 refused" in text and "bit-identical" in text
    assert "model.inner (Inner)" in text and "stays PyTorch: input embedding" in text
    handle.remove()
    same(step(model), want)
    assert len(calls) == 1
    assert "forward" not in vars(inner_of(model))
    handle.remove()


def test_the_fused_backend_of_auto_serves_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lookalike.build().eval()
    carry, batch = lookalike.inputs(model)
    with torch.no_grad():
        want = model(carry, batch)[1]
        with recurx.patch(model) as handle:
            assert isinstance(handle, PatchHandle)
            got = model(carry, batch)[1]
        assert installed(inner_of(model), "forward") is None
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant,fields", [("trm", {}), ("trm", {"mlp_t": True}), ("hrm", {})])
def test_training_on_the_backend_of_auto_has_the_same_gradients(
    variant: str, fields: dict[str, Any]
) -> None:
    model = lookalike.build(variant, hidden_size=64, **fields)
    want = step(model)
    recurx.patch(model)
    got = step(model)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_patching_changes_nothing_else() -> None:
    model = lookalike.build().train()
    inner_of(model).lm_head.eval()
    flags = [m.training for m in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    recurx.patch(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == flags
    assert all(p.grad is None for p in model.parameters())
    same(dict(model.state_dict()), before)


@pytest.mark.parametrize("where", ["root", "head", "list", "inner"])
def test_the_recursion_is_found_anywhere(where: str) -> None:
    head = lookalike.build()
    outer = {
        "root": head, "head": nn.Sequential(head), "list": nn.ModuleList([nn.Linear(2, 2), head]),
        "inner": head.model.inner,
    }[where]  # fmt: skip
    path = {"root": "model.inner", "head": "0.model.inner", "list": "1.model.inner", "inner": ""}
    handle = recurx.patch(outer)
    assert [entry.where for entry in handle.report.patched] == [path[where]]


# ---- copies, pickles, compile --------------------------------------------------------------


def test_an_ema_copy_runs_its_own_weights() -> None:
    model = lookalike.build()
    handle = recurx.patch(model, backend="eager")
    ema = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in ema.parameters():
            parameter.mul_(0.9)
    reference = lookalike.build()
    reference.load_state_dict(ema.state_dict())
    want_copy, want = step(reference), step(lookalike.build())
    assert installed(inner_of(ema), "forward") is not None
    same(step(ema), want_copy)
    same(step(model), want)
    handle.remove()
    same(step(ema), want_copy)  # copies stay as they were made
    recurx.patch(ema, backend="eager").remove()
    assert installed(inner_of(ema), "forward") is None


def test_a_pickle_holds_the_unpatched_model() -> None:
    model = lookalike.build()
    want = step(model)
    model.zero_grad()
    recurx.patch(model, backend="eager")
    loaded = pickle.loads(pickle.dumps(model))
    same(step(loaded), want)
    assert b"recurx" not in pickle.dumps(model).replace(b"recurx_plan", b"")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    same(step(torch.load(buffer, weights_only=False)), want)
    recurx.patch(loaded, backend="eager")  # a loaded model can be patched again
    same(step(loaded), want)


@pytest.mark.parametrize(
    "variant,order",
    [
        ("trm", "patch, compile"),
        ("trm", "compile, patch"),
        ("trm", "compile, run, patch"),
        ("single_z", "compile, run, patch"),
        ("hrm", "compile, run, patch"),
    ],
)
def test_under_torch_compile(variant: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    model = lookalike.build(variant, L_cycles=1, L_layers=1)
    want = step(model)
    compiled: Any = model
    if order.startswith("patch"):
        recurx.patch(model, backend="eager")
        compiled = torch.compile(model, fullgraph=True, backend="eager")
    else:
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        if "run" in order:
            step(compiled)
        handle = recurx.patch(compiled, backend="eager")
    calls = recursions(monkeypatch)
    got = {name.replace("_orig_mod.", ""): tensor for name, tensor in step(compiled).items()}
    assert calls, "compiled code from before the patch must not be used"
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    if not order.startswith("patch"):
        handle.remove()
        calls.clear()
        step(compiled)
        assert not calls, "compiled code of the patch must not be used after remove()"


def test_the_fused_op_is_in_the_compiled_graph() -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = lookalike.build().eval()
    recurx.patch(model)
    carry, batch = lookalike.inputs(model)
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True, backend=keep)(carry, batch)[1]
        want = model(carry, batch)[1]
    if recurx.backends.has_fused("cpu"):
        assert any("recurx.recurse" in str(node.target) for node in graphs[0].graph.nodes)
    torch.testing.assert_close(got, want)


# ---- classes and modules -------------------------------------------------------------------


def test_a_class_patches_its_instances_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    existing, want = lookalike.build(), step(lookalike.build())
    handle = recurx.patch(lookalike.Inner, backend="eager")
    built = lookalike.build()
    calls = recursions(monkeypatch)
    same(step(built), want)
    assert len(calls) == 1
    assert installed(inner_of(existing), "forward") is None
    assert [entry.kind for entry in handle.report.patched] == ["class", "Inner"]
    handle.remove()
    assert installed(inner_of(built), "forward") is None
    assert installed(inner_of(lookalike.build()), "forward") is None


def test_wrapper_classes_and_imported_modules() -> None:
    for target in (lookalike, lookalike.Wrapper):
        with recurx.patch(target, backend="eager"):
            assert installed(inner_of(lookalike.build()), "forward") is not None
        assert installed(inner_of(lookalike.build()), "forward") is None


def test_a_subclass_of_a_patched_class_is_left_alone() -> None:
    class Other(lookalike.Inner):
        pass

    with recurx.patch(lookalike.Inner):
        assert installed(Other(lookalike.Config()), "forward") is None


def test_unknown_targets_are_refused() -> None:
    for target in (nn.Linear(2, 2), nn.Linear, ModuleType("empty"), torch.nn, 3, "model"):
        with pytest.raises(UnsupportedModel, match=r"recurx\.patch"):
            recurx.patch(target)


# ---- refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quirk,message",
    [
        ("bias", r"L_level\.layers\.0\.mlp\.gate_up_proj\.bias` is not known"),
        ("causal", r"L_level\.layers\.1\.self_attn` is causal"),
        ("gain", r"L_level\.gain` is not known"),
        ("scaled residual", "computes something else: .* differs"),
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
    torch.nn.utils.parametrizations.weight_norm(inner.L_level.layers[0].mlp.down_proj)


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
        (_kv_heads, "1 K/V heads for 2 heads"),
        (_parametrized, r"down_proj\.weight` is missing"),
        (_signature, r"`forward` takes \(carry, batch, mask\), expected \(carry, batch\)"),
    ],
)
def test_changed_instances_are_refused(change: Any, message: str) -> None:
    model = lookalike.build()
    change(inner_of(model))
    with pytest.raises(UnsupportedModel, match=message):
        recurx.patch(model)


def test_one_refused_among_two_is_reported() -> None:
    good, bad = lookalike.build(), lookalike.build(quirks=frozenset({"causal"}))
    report = recurx.patch(nn.ModuleList([good, bad])).report
    assert [entry.where for entry in report.patched] == ["0.model.inner"]
    assert [entry.where for entry in report.refused] == ["1.model.inner"]
    assert "NOT patched" in str(report) and "is causal" in str(report)


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
    from recurx.patch.official import Official

    adapter, inner = Official(), inner_of(model)
    return adapter.problem(inner, adapter.plan(inner, "cpu"))


def test_cycles_that_change_after_the_patch_are_noticed() -> None:
    model = lookalike.build()
    recurx.patch(model)
    inner_of(model).config.L_cycles = 3
    with pytest.raises(RecurxError, match="changed since the patch"):
        step(model)


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
    for quirk in ("scaled residual", "window"):
        with pytest.raises(UnsupportedModel, match="computes something else"):
            recurx.patch(lookalike.build(H_cycles=4, L_cycles=3, quirks={quirk}))
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
