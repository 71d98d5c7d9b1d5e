"""The probe of the proof: code is run, and differs where its arithmetic does."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import recurx
from recurx import probing, proof
from tests import lookalike
from tests.hostile import models as twisted
from tests.proving import difference, is_known, stack
from tests.proving import nothing_known as nothing_known
from tests.test_recurse_cost import watched


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
