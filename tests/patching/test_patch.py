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
from recurx import UnsupportedModel
from recurx.patching import PatchHandle
from recurx.patching.handle import installed
from recurx.route import has_fused
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
    module = __import__("recurx.patching.sharded", fromlist=["recurse"])
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


@pytest.mark.parametrize("save", ["block", "states"])
def test_what_the_window_keeps_can_be_chosen(save: str) -> None:
    model = lookalike.build("trm", hidden_size=64)
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    def run(save: str) -> tuple[int, dict[str, Tensor]]:
        kept.clear()
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with recurx.patch(model, backend="eager", save=save), hooks:
            out = step(model)
        return sum(kept), out

    (most, want), (fewer, got) = run("all"), run(save)
    assert fewer < most, (fewer, most)
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    with pytest.raises(recurx.InvalidArgument, match="save"):
        recurx.patch(model, save="some")


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
    assert b"recurx" not in pickle.dumps(model).replace(b"recurx_recipe", b"")
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
    if has_fused("cpu"):
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
