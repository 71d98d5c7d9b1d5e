"""A net runs fused only where its structure and a probe prove it, and only for as long."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import recurx
from recurx import BackendUnavailable, UnsupportedModel, probing, proof, readings, survey
from recurx.models import TRMConfig
from recurx.models.layers import ReasoningNet
from tests import lookalike
from tests.hostile import models as twisted
from tests.hostile.edits import EDITS, LINEARS
from tests.test_recurse_cost import watched

SCHEDULE = recurx.Schedule.trm(2, 2)
ROPE = recurx.rope_tables(10, 16)


def stack(token_mlp: bool = False, **fields: Any) -> Any:
    return lookalike.build(mlp_t=token_mlp, **fields).model.inner.L_level


def difference(net: Any, rope: bool = True) -> str:
    return proof.examine(net, "L", rope).difference or ""


def is_known(net: Any) -> bool:
    return readings.read(net, True) is not None


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_known", {})


# ---- structure -----------------------------------------------------------------------------------


def forward_hook(net: Any) -> None:
    net.layers[0].mlp.register_forward_hook(lambda *_: None)


def pre_hook(net: Any) -> None:
    net.layers[0].mlp.register_forward_pre_hook(lambda *_: None)


def backward_hook(net: Any) -> None:
    net.layers[0].mlp.register_full_backward_hook(lambda *_: None)


def backward_pre_hook(net: Any) -> None:
    net.layers[0].mlp.register_full_backward_pre_hook(lambda *_: None)


def old_weight_norm(net: Any) -> None:
    nn.utils.weight_norm(net.layers[0].mlp.down_proj)


def pruned(net: Any) -> None:
    nn.utils.prune.random_unstructured(net.layers[0].mlp.down_proj, "weight", amount=1)


def child(net: Any) -> None:
    net.layers[0].dropout = nn.Dropout(0.1)


def parameter(net: Any) -> None:
    net.layers[0].gain = nn.Parameter(torch.ones(1))


def buffer(net: Any) -> None:
    net.layers[0].self_attn.register_buffer("mask", torch.ones(1))


def tensor(net: Any) -> None:
    net.layers[0].mlp.mask = torch.ones(1)


def list_of_modules(net: Any) -> None:
    class Layers(nn.ModuleList):
        pass

    net.layers = Layers(net.layers)


def instance_forward(net: Any) -> None:
    net.layers[0].mlp.forward = net.layers[0].mlp.forward


def missing(net: Any) -> None:
    net.layers[0].mlp.down_proj.weight = None


def convolution(net: Any) -> None:
    net.layers[0].mlp.dwconv = nn.Conv1d(48, 48, 2, padding=1, groups=48, bias=False)


def half_convolution(net: Any) -> None:
    net.layers[0].mlp.dwconv = nn.Conv1d(48, 48, 2, padding=1, groups=48).half()


def other_eps(net: Any) -> None:
    net.layers[0].norm1, net.layers[0].norm2 = nn.RMSNorm(32, 1e-5), nn.RMSNorm(32, 1e-6)


def weight_of_one_norm(net: Any) -> None:
    net.layers[0].norm1 = nn.RMSNorm(32, 1e-5)


def replaced_linear(net: Any) -> None:
    net.layers[0].mlp.down_proj = nn.Identity()


STRUCTURES = {
    forward_hook: "layers.0.mlp` has hooks",
    pre_hook: "layers.0.mlp` has hooks",
    backward_hook: "layers.0.mlp` has hooks",
    backward_pre_hook: "layers.0.mlp` has hooks",
    old_weight_norm: "layers.0.mlp.down_proj` has a parameter `weight_g`",
    pruned: "layers.0.mlp.down_proj` has a parameter `weight_orig`",
    child: "layers.0` has a child `dropout` (Dropout)",
    parameter: "layers.0` has a parameter `gain`",
    buffer: "layers.0.self_attn` has a buffer `mask`",
    tensor: "layers.0.mlp` holds a Tensor `mask`",
    list_of_modules: "layers` is a Layers",
    instance_forward: "layers.0.mlp` has a `forward` of its own",
    missing: "layers.0.mlp.down_proj` has no plain parameter `weight`",
    convolution: "layers.0.mlp.dwconv` has no plain parameter `bias`",
    half_convolution: "layers.0` cannot be read: KeyError: torch.float16",
    other_eps: "layers.0` has norms of different eps: [1e-06, 1e-05]",
    weight_of_one_norm: "layers.0` has weights apart from its others: {'norm2'}",
    replaced_linear: "layers.0.mlp.down_proj` has no plain parameter `weight`",
}


@pytest.mark.parametrize("change", STRUCTURES, ids=lambda change: change.__name__)
def test_a_structure_that_differs_is_refused_by_name(change: Any) -> None:
    net = stack()
    assert difference(net) == ""
    change(net)
    assert not is_known(net), "the guard sees it"
    assert f"`L.{STRUCTURES[change]}" in difference(net)


@pytest.mark.parametrize("change", STRUCTURES, ids=lambda change: change.__name__)
def test_each_structure_needs_its_check(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: without the survey's word the structure alone stops none of them."""
    net = stack()
    change(net)
    monkeypatch.setattr(survey.Survey, "differs", lambda *_: None)
    said = difference(net)
    assert STRUCTURES[change] not in said


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_for_all_modules_count(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = stack()
    assert difference(net) == "" and is_known(net)
    name = f"register_module_{kind}_hook"
    handle = getattr(torch.nn.modules.module, name)(lambda *_: None)
    try:
        assert not is_known(net)
        assert "global module hooks" in difference(net)
        monkeypatch.setattr(survey, "_GLOBAL_HOOKS", ())
        assert difference(net) == ""
    finally:
        handle.remove()
    with FlopCounterMode(display=False):
        assert survey.foreign_hooks() is False  # these only take notes


# ---- the probe -----------------------------------------------------------------------------------


@pytest.mark.parametrize("token_mlp", [False, True], ids=["attention", "tokens"])
@pytest.mark.parametrize(
    "twist", [t for t in (*twisted.BEHAVIOUR, *twisted.TRAINING) if t not in twisted.SPELLED]
)
def test_code_that_differs_is_seen_by_the_probe(twist: str, token_mlp: bool) -> None:
    net = twisted.stack(twist, token_mlp)
    said = difference(net, not token_mlp)
    alike = token_mlp and (
        "rope" in twist
        or "queries" in twist
        or twist
        in (
            "windowed attention",
            "scores unscaled",
            "softmax off by one",
            "masked last token",
        )
    )  # fmt: skip  these concern attention alone
    assert bool(said) != alike, said
    if twist in twisted.TRAINING and said:
        assert "training" in said or "random" in said or "child `dropout`" in said
    assert difference(twisted.stack("", token_mlp), not token_mlp) == ""


@pytest.mark.parametrize("token_mlp", [False, True], ids=["attention", "tokens"])
@pytest.mark.parametrize("twist", twisted.SPELLED)
def test_what_a_block_can_spell_is_found(
    twist: str, token_mlp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = twisted.stack(twist, token_mlp)
    found, said = proof.examine(net, "L", not token_mlp)
    assert found is not None, said
    if not (token_mlp and twist in ("causal in code", "bias of qkv")):  # of attention alone
        assert twisted.SPELLED[twist] in found.spec.changed
        if not twist.startswith("bias"):  # what names tell needs no search
            monkeypatch.setattr(probing, "_known", {})
            monkeypatch.setattr(probing, "respelled", lambda spec: ())
            assert "off by" in difference(net, not token_mlp)


def test_grouped_heads_and_causal_attention_are_read() -> None:
    net = stack()
    for layer in net.layers:
        layer.self_attn.causal = True
    found = proof.examine(net, "L").net
    assert found is not None and found.spec.changed == ("mask",)
    net.layers[0].self_attn.num_key_value_heads = 1  # its weights are not of that shape
    assert "expected" in difference(net)


def test_code_without_weights_is_run_by_the_probe() -> None:
    """A child that is code alone is no difference by itself, and its settings count."""
    for kind, fine in ((nn.SiLU(), True), (nn.Hardswish(), False)):
        net = stack()
        for layer in net.layers:
            layer.mlp.__class__, layer.mlp.act = Acting, kind
        assert (difference(net) == "") is fine
    net.layers[0].mlp.act = net.layers[1].mlp.act = nn.GELU("tanh")
    found = proof.examine(net, "L").net
    assert found is not None and found.spec.blocks[0].activation == "gelu_tanh" and is_known(net)
    net.layers[0].mlp.act.approximate = "none"
    assert not is_known(net), "settings of such code are guarded"
    assert "off by" in difference(net) or net.layers[0].mlp.act is net.layers[1].mlp.act


class Acting(lookalike.Gated):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(self.act(gate) * up)


@pytest.mark.parametrize(
    "twist,plant",
    [
        ("scaled in training", {"_MODES": probing._MODES[1:]}),
        ("large values differ", {"ALLOWED": {torch.float32: 1e9, torch.bfloat16: 1e9}}),
        ("tokens beyond 7 differ", {"TOKENS": (5, 5)}),
        ("functional dropout", {"_MODES": probing._MODES[1:]}),
    ],
)
def test_each_part_of_the_probe_bites(
    twist: str, plant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert difference(twisted.stack(twist))
    monkeypatch.setattr(probing, "_known", {})
    for name, value in plant.items():
        monkeypatch.setattr(probing, name, value)
    assert difference(twisted.stack(twist)) == ""


class RareDropout(lookalike.Layer):
    def forward(self, cos_sin: Any, hidden_states: Tensor) -> Tensor:
        if self.training:
            torch.rand(1)  # nothing comes of it here, as of a dropout whose p is tiny
        return super().forward(cos_sin, hidden_states)


class HardEps(lookalike.Layer):
    def forward(self, cos_sin: Any, hidden_states: Tensor) -> Tensor:
        h = lookalike.normed(hidden_states + self.self_attn(cos_sin, hidden_states), 1e-5)
        return lookalike.normed(h + self.mlp(h), 1e-6)


class Clipped(lookalike.Layer):
    def forward(self, cos_sin: Any, hidden_states: Tensor) -> Tensor:
        return super().forward(cos_sin, hidden_states.clamp(-5, 5))


class OwnTables(lookalike.Layer):
    def forward(self, cos_sin: Any, hidden_states: Tensor) -> Tensor:
        tables = recurx.rope_tables(hidden_states.shape[1], 16)
        return super().forward(tables, hidden_states)


class EvenTokens(lookalike.Layer):
    def forward(self, cos_sin: Any, hidden_states: Tensor) -> Tensor:
        h = super().forward(cos_sin, hidden_states)
        return h if h.shape[1] % 2 else -h


class BatchMean(lookalike.Layer):
    def forward(self, cos_sin: Any, hidden_states: Tensor) -> Tensor:
        h = hidden_states + 1e-3 * hidden_states.mean(0, keepdim=True)
        return super().forward(cos_sin, h)


@pytest.mark.parametrize(
    "kind,plant",
    [
        (RareDropout, {"random_state": lambda device: 0}),
        (HardEps, {"SCALES": (1.0, 0.3)}),
        (Clipped, {"SCALES": (0.3, 0.1, 0.01, 1e-3, 1e-5)}),
        (OwnTables, {"rope_tables": lambda t, d, base, device: recurx.rope_tables(t, d)}),
        (EvenTokens, {"TOKENS": (5, 17)}),
        (BatchMean, {"SCALES": (1e-3,)}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_siblings_that_hide_better(
    kind: type, plant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = stack()
    net.layers[1].__class__ = kind
    assert difference(net)
    if kind is BatchMean:
        return  # any batch of more than one sample shows it
    monkeypatch.setattr(probing, "_known", {})
    for name, value in plant.items():
        monkeypatch.setattr(probing, name, value)
    assert difference(net) == ""


class Counting(lookalike.Layer):
    calls, after = 0, 10**9

    def forward(self, cos_sin: Any, hidden_states: Tensor) -> Tensor:
        self.calls += 1
        h = super().forward(cos_sin, hidden_states)
        return -h if self.calls > self.after else h


def test_a_counter_is_no_difference_unless_something_hangs_on_it() -> None:
    for after, fine in ((10**9, True), (1000, False)):
        net = stack()
        for layer in net.layers:
            layer.__class__, layer.calls, layer.after = Counting, 0, after
        assert (difference(net) == "") is fine
        assert [layer.calls for layer in net.layers] == [0, 0], "a copy is probed"


def test_the_probe_leaves_no_trace() -> None:
    net = stack().train()
    net.layers[1].eval()
    state, python = torch.get_rng_state(), random.getstate()
    weights = [p.clone() for p in net.parameters()]
    assert difference(net) == ""
    assert torch.equal(state, torch.get_rng_state()) and random.getstate() == python
    assert [layer.training for layer in net.layers] == [True, False] and net.training
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), weights, strict=True))


@pytest.mark.parametrize(
    "around",
    [
        lambda: torch.device("meta"), torch.inference_mode, torch.no_grad,
        lambda: torch.autocast("cpu", torch.bfloat16), FakeTensorMode,
        lambda: torch.random.fork_rng([]),
    ],
    ids=["device", "inference", "no_grad", "autocast", "fake", "fork"],
)  # fmt: skip
def test_the_probe_works_under_any_mode(around: Any) -> None:
    net, bad = stack(), twisted.stack("mish")
    with around():
        assert difference(net) == "" and "off by" in difference(bad)
    assert is_known(net)


def test_watchers_and_transforms_do_not_see_the_probe() -> None:
    assert watched(lambda: difference(stack())) == watched(stack)

    nets = [each.requires_grad_(False) for each in (stack(), twisted.stack("mish"))]

    def inside(x: Tensor) -> Tensor:
        assert difference(nets[0]) == "" and difference(nets[1])
        return x.sin()

    torch.func.vmap(torch.func.grad(inside))(torch.randn(3))
    probing._known.clear()
    assert "aten::mm" not in str(torch.jit.trace(lambda x: inside(x), torch.randn(3)).graph)


def test_meta_and_half_modules() -> None:
    with torch.device("meta"):
        net = stack()
    assert difference(net) == "" and not is_known(net), "taken by its structure, not remembered"
    assert difference(stack().bfloat16()) == ""
    assert difference(twisted.stack("mish").bfloat16())


def test_a_second_model_of_the_same_code_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    probes: list[Any] = []
    real = probing._differences
    monkeypatch.setattr(
        probing, "_differences", lambda *given: probes.append(given) or real(*given)
    )
    for seed in (0, 1):
        assert difference(stack(seed=seed)) == ""
    assert len(probes) == 1
    net = stack()
    net.layers[0].scale = 0.25  # of the code's settings
    assert "off by" in difference(net) and len(probes) == 2


def test_weights_in_rows_that_are_zero_hide_nothing() -> None:
    net = twisted.stack("mish")
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    assert "off by" in difference(net)


# ---- the guard -----------------------------------------------------------------------------------

UNSEEN = {
    "cycles_changed",
    "frozen",
    "written_by_copy",
    "written_by_data",
    "written_by_numpy",
    "written_by_pointer",
    "assigned",
    "parameter_replaced",
    "storage_replaced",
    "transposed_storage",
    "net_replaced",
}  # fmt: skip  the weights are read at every call; of another net the adapter knows


def helper_replaced(model: Any, dice: Random) -> None:
    lookalike.normed = lambda x, eps: x


def class_forward(model: Any, dice: Random) -> None:
    lookalike.Gated.forward = lambda self, x: x


def class_setting(model: Any, dice: Random) -> None:
    lookalike.Mixer.causal = True


@pytest.mark.parametrize("edit", [*EDITS.values(), helper_replaced, class_forward, class_setting])
def test_the_guard_sees_every_edit_of_the_code(edit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((lookalike, "normed"), (lookalike.Gated, "forward")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(lookalike.Mixer, "causal", False, raising=False)
    model = twisted.model() if edit.__name__ in EDITS else lookalike.build()
    net = model.model.inner.L_level
    assert difference(net) == "" and is_known(net)
    edit(model, Random(3))
    assert is_known(net) == (edit.__name__ in UNSEEN)


@pytest.mark.parametrize(
    "part,edit",
    [
        ("_hooks", EDITS["forward_hook"]), ("_lengths", EDITS["lora_inside"]),
        ("_flat", EDITS["eps_changed"]), ("_types", EDITS["class_changed"]),
        ("_globals", helper_replaced), ("_absent", EDITS["biased"]),
    ],
)  # fmt: skip
def test_each_part_of_the_guard_bites(
    part: str, edit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookalike, "normed", lookalike.normed)
    model = lookalike.build()
    if part == "_absent":  # nn.Linear keeps None among its parameters
        for layer in model.model.inner.L_level.layers:
            for where in LINEARS:
                old = layer.get_submodule(where)
                layer.set_submodule(where, nn.Linear(*old.weight.shape[::-1], bias=False))
    net = model.model.inner.L_level
    assert difference(net) == ""
    edit(model, Random(3))
    assert not is_known(net)
    reading = readings.remembered(net)
    assert reading is not None
    if part == "_flat":
        monkeypatch.setattr(readings, "is_", lambda a, b: True)
    elif part == "_lengths":
        reading._lengths = list(map(len, reading._counted))
    elif part == "_types":
        reading._types = [type(module) for module in reading._modules]
    else:
        setattr(reading, part, [])
    if part == "_lengths":
        monkeypatch.setattr(readings, "is_", lambda a, b: True)  # a new attribute shows in both
    assert is_known(net), "taken out, it is missed"


def test_modes_and_weights_trip_no_guard() -> None:
    net = stack()
    assert difference(net) == ""
    net.eval()
    assert difference(net) == ""  # once in each mode
    for training in (True, False, True):
        net.train(training)
        assert is_known(net)
    with torch.no_grad():
        net.layers[0].mlp.down_proj.weight.zero_()
    net.requires_grad_(False)
    assert is_known(net)
    copied = copy.deepcopy(net)
    assert not is_known(copied) and difference(copied) == "" and is_known(copied)


def test_nothing_keeps_a_module_alive() -> None:
    net = stack()
    assert difference(net) == "" and is_known(net)
    key, gone = id(net), weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None and key not in readings._readings


# ---- recurse -------------------------------------------------------------------------------------


def inputs() -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    x, z_H, z_L = torch.randn(3, 2, 10, 32)
    return x, {"z_H": z_H, "z_L": z_L}


class NeedsInjection(lookalike.Stack):
    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, input_injection: Tensor, **kwargs: Any
    ) -> Tensor:
        return 2 * super().forward(hidden_states, input_injection, **kwargs)


class Masked(lookalike.Stack):
    def forward(self, h: Tensor, mask: Tensor, cos_sin: Any) -> Tensor:  # type: ignore[override]
        return super().forward(h, cos_sin=cos_sin)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("kind", [lookalike.Stack, NeedsInjection])
def test_what_is_not_proved_runs_its_own_code(kind: type, backend: str) -> None:
    net = stack(quirks=frozenset({"scaled residual"}))
    net.__class__ = kind
    x, carry = inputs()
    zero = torch.zeros(1)
    own = recurx.recurse(
        SCHEDULE, {"L": lambda h: net(h, zero, cos_sin=ROPE)}, x, carry, backend="eager"
    )
    got = recurx.recurse(SCHEDULE, {"L": net}, x, carry, backend=backend, cos_sin=ROPE)
    assert torch.equal(got["z_H"], own["z_H"]) and torch.equal(got["z_L"], own["z_L"])


def test_a_fused_backend_refuses_what_is_not_proved_by_name() -> None:
    net = stack()
    parameter(net)
    x, carry = inputs()
    for more in ({"backend": "cpu"}, {"backend": "triton"}, {"save": "states"}):
        with pytest.raises(BackendUnavailable, match=r"L\.layers\.0` has a param") as error:
            recurx.recurse(SCHEDULE, {"L": net}, x, carry, cos_sin=ROPE, **more)
        assert 'backend="eager"' in str(error.value), "what to do next"


def test_what_cannot_be_called_is_refused() -> None:
    net = stack()
    net.__class__ = Masked
    x, carry = inputs()
    with pytest.raises(UnsupportedModel, match=r"takes other arguments.*lambda h: net\(h\)"):
        recurx.recurse(SCHEDULE, {"L": net}, x, carry, backend="eager", cos_sin=ROPE)


def test_own_nets_that_no_longer_are_themselves_are_refused() -> None:
    config = TRMConfig.tiny(vocab_size=7, seq_len=10, hidden_size=32, num_heads=2)
    for change in (forward_hook, pruned, child, parameter, instance_forward):
        net = ReasoningNet(config, num_layers=1)
        x, carry = inputs()
        recurx.recurse(SCHEDULE, {"L": net}, x, carry, backend="eager", cos_sin=ROPE)
        change(net)
        for backend in ("eager", "auto"):
            with pytest.raises(UnsupportedModel, match=r"layers\.0"):
                recurx.recurse(SCHEDULE, {"L": net}, x, carry, backend=backend, cos_sin=ROPE)


def test_rotary_tables_are_part_of_the_proof() -> None:
    """Code that turns by tables of its own where it is given none is no block without tables."""

    class Filled(lookalike.Layer):
        def forward(self, cos_sin: Any, hidden_states: Tensor) -> Tensor:
            tables = recurx.rope_tables(hidden_states.shape[1], 16) if cos_sin is None else cos_sin
            return super().forward(tables, hidden_states)

    net = stack()
    for layer in net.layers:
        layer.__class__ = Filled
    assert difference(net, rope=True) == "" and is_known(net)
    assert readings.read(net, False) is None
    assert "off by" in difference(net, rope=False)


def test_a_module_compiled_alone_is_looked_through() -> None:
    net = stack()
    compiled = torch.compile(net, backend="eager")
    x, carry = inputs()
    out = [
        recurx.recurse(SCHEDULE, {"L": each}, x, carry, backend="eager", cos_sin=ROPE)["z_H"]
        for each in (net, compiled)
    ]
    assert torch.equal(*out)
    compiled.register_forward_hook(lambda module, given, h: 2 * h)
    assert proof.without_compile(compiled) is compiled, "its hook would no longer run"


@pytest.mark.parametrize(
    "edit", ["twisted", "biased", "layer_wrapped", "eps_changed", "lora_inside"]
)
def test_compiled_code_is_compiled_anew_when_its_net_changes(edit: str) -> None:
    torch._dynamo.reset()
    model = twisted.model().eval()
    net, (x, carry) = model.model.inner.L_level, inputs()

    def run(z_H: Tensor) -> Tensor:
        states = {**carry, "z_H": z_H}
        return recurx.recurse(SCHEDULE, {"L": net}, x, states, cos_sin=ROPE)["z_H"]

    compiled = torch.compile(run, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(carry["z_H"]), run(carry["z_H"]))
        EDITS[edit](model, Random(5))
        torch.testing.assert_close(compiled(carry["z_H"]), run(carry["z_H"]))


def test_explain_says_what_differs() -> None:
    assert "may run fused" in recurx.explain(stack())
    assert "has a parameter `gain`" in recurx.explain(stack(quirks=frozenset({"gain"})))
    model = recurx.models.TRM(TRMConfig.tiny(vocab_size=7, seq_len=10))
    forward_hook(model.inner.L_level)
    assert "layers.0.mlp` has hooks" in recurx.explain(model)
    with pytest.raises(UnsupportedModel, match="has hooks"):
        recurx.solve(model, {"inputs": torch.zeros(1, 10, dtype=torch.int32)}, max_steps=1)
