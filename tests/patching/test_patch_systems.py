"""recurx.patch on code of the layout of URM, EqR, RSM and SIC, and the readers of their blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recurx
from recurx import UnsupportedModel
from recurx.experiments.systems import fprm
from recurx.readings import read
from tests import lookalike_systems as alike
from tests.lookalike import Config

CONFIG = dict(vocab_size=7, seq_len=alike.TOKENS, hidden_size=32, num_heads=2)


def config(mlp_t: bool = False) -> Config:
    return Config(mlp_t=mlp_t, H_cycles=3, L_cycles=2, **CONFIG)  # type: ignore[arg-type]


MODELS: dict[str, Callable[[str], Any]] = {
    "urm": lambda twist: alike.Urm(config(), twist),
    "eqr": lambda twist: alike.EqR(config(), twist),
    "rsm": lambda twist: alike.RSM(config(), twist),
    "rsm, token MLP": lambda twist: alike.RSM(config(mlp_t=True), twist),
    "fprm": lambda twist: alike.Fprm(config(), twist),
    "fprm, a factor a channel": lambda twist: alike.Fprm(config(), twist, "input-independent"),
    "fprm, fixed factors": lambda twist: alike.Fprm(config(), twist, "fixed"),
    "sic": lambda twist: alike.Sic("attention", twist),
    "sic, mixer": lambda twist: alike.Sic("mixer", twist),
    "sic, pre-norm": lambda twist: alike.Sic("mixer", twist, prenorm=True),
}
FIELDS = {
    "urm": {"conv", "conv_dtype"}, "rsm, token MLP": {"token_norm"},
    "sic": {"norm", "norm_weight", "norm_bias", "qk_norm", "qk_norm_weight", "attn_norm",
            "inner_norm", "inner_norm_of", "inner_norm_weight"},
}  # fmt: skip


def build(name: str, twist: str = "") -> Any:
    torch.manual_seed(0)
    return MODELS[name](twist)


def results(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """Answers, new states, and gradients of a loss over them, from states and noise of one seed."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 7, (3, alike.TOKENS), generator=generator, dtype=torch.int32)
    batch = {"inputs": tokens, "puzzle_identifiers": torch.arange(3, dtype=torch.int32)}
    length = alike.TOKENS + isinstance(model, alike.Urm)
    x, z_H, z_L = torch.randn(3, 3, length, 32, generator=generator)
    torch.manual_seed(seed)
    model.zero_grad()
    if isinstance(model, alike.Sic):
        z_H.requires_grad_()
        found = dict(zip("abcd", model.core(x, z_H, z_L, model._get_cos_sin("cpu")), strict=True))
    elif isinstance(model, alike.Fprm):
        logits, state = model(z_H.requires_grad_(), tokens)
        found = {"logits": logits, **state}
    elif isinstance(model, alike.RSM):
        found = model(alike.Data(batch), batch)[1]
    else:
        one = isinstance(model, alike.Urm)
        carry = alike.OneState(z_H, steps=tokens) if one else alike.TwoStates(z_H, z_L)
        new, logits, q = model(carry, batch)
        assert not one or new.steps is tokens, "what else a carry holds stays in it"
        found = {"logits": logits, "q": torch.stack(q) if one else q, **vars(new)}
        found.pop("steps", None)
    loss = torch.stack([v.square().mean() + v.mean() for v in found.values() if v.requires_grad])
    loss.sum().backward()
    found = {name: value.detach() for name, value in found.items()}
    if z_H.grad is not None:
        found["gradient of a state"] = z_H.grad
    return found | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def agree(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("name", MODELS)
def test_patched_and_not(name: str) -> None:
    model, net = build(name), {"urm": "layers", "eqr": "L_level.layers"}.get(name)
    own = copy.deepcopy(model)
    if name == "eqr":
        model.L_level.noise_scale = own.L_level.noise_scale = 0.0
    handle = recurx.patch(model)
    assert len(handle.report.patched) == 1, handle.report
    for training in (False, True):
        for seed in range(3 if training else 1):  # of RSM both windows
            model.train(training)
            own.train(training)
            agree(results(model, seed), results(own, seed))
    if not name.startswith("fprm"):  # which has a proof of its own
        found = read(model.get_submodule(net or ("core" if "rsm" in name else "reasoning")), True)
        assert found is not None and FIELDS.get(name, set()) <= set(found[0].changed)
    clone = copy.deepcopy(model)
    handle.remove()
    agree(results(clone, 4), results(model, 4))


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize(
    "name,twist",
    [
        ("urm", "window"), ("eqr", "damps the sum"), ("eqr", "noise"), ("rsm", "never joined"),
        ("sic", "injected again"), ("fprm", "injected again"), ("fprm", "grows"),
        ("fprm", "keeps all of h once"),
        ("fprm, a factor a channel", "one factor for all channels"),
    ],
)  # fmt: skip
def test_another_recursion_is_refused(name: str, twist: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"something else|no torch.randn|is off by"):
        recurx.patch(build(name, twist))


def test_noise_is_ours_and_said() -> None:
    model = build("eqr")
    assert "noise of 0.1: drawn by recurx" in str(recurx.patch(model).report)
    first, same, other = results(model), results(model), results(model, 1)
    agree(same, first)
    assert not torch.equal(first["logits"], other["logits"])


def test_damping_follows_and_hooks_send_it_back() -> None:
    model = build("eqr")
    own = copy.deepcopy(model)
    recurx.patch(model)
    for given in (model, own):
        given.L_level.lambda_, given.L_level.noise_scale = 0.4, 0.0
    agree(results(model), results(own))
    for given in (model, own):
        given.L_level.register_forward_hook(lambda module, given, out: 2 * out)
    with pytest.warns(UserWarning, match="`L_level` has hooks"):
        agree(results(model), results(own))


def test_an_edit_of_the_level_sends_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("eqr")
    model.L_level.noise_scale = 0.0
    recurx.patch(model)
    monkeypatch.setattr(alike.Level, "forward", lambda self, h, i, **_: h + i)
    with pytest.warns(UserWarning, match="`forward`, which its `forward` reads"):
        results(model)


def test_what_fprm_does_around_its_layers_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks, step sizes and the convolution are followed; hooks and edits send it back."""
    model = build("fprm")
    handle = recurx.patch(model)
    assert "on recurx: the 2 layers of `L_level`" in str(handle.report)
    own = build("fprm")
    own.load_state_dict(model.state_dict())
    for given in (model, own):
        torch.manual_seed(2)
        for part in given.modules():
            if isinstance(part, alike.Masked):
                part.mask.bernoulli_(0.5)
        with torch.no_grad():
            given.L_level.conv.weight.mul_(2)
    for training in (True, False):
        model.train(training)
        own.train(training)
        agree(results(model), results(own))
    for given in (model, own):
        hook = given.L_level.register_forward_hook(lambda module, given, out: 2 * out)
    with pytest.warns(UserWarning, match="`L_level` has hooks"):
        agree(results(model), results(own))
    hook.remove()
    refused = build("fprm")
    refused.L_level.outer_only, refused.L_level.residual_scale = False, "input-dependent"
    with pytest.raises(UnsupportedModel, match="factors of its residuals follow from the states"):
        recurx.patch(refused)
    other = build("fprm")
    recurx.patch(other)
    monkeypatch.setattr(alike.FprmLevel, "forward", lambda self, h, x, **_: h + x)
    with pytest.warns(UserWarning, match="`forward`, which its `forward` reads"):
        results(other)


@pytest.mark.filterwarnings("ignore:.*`outer_only`")
@pytest.mark.parametrize("scale", ["input-independent", "fixed"])
def test_factors_of_fprm_are_those_of_the_moment(scale: str) -> None:
    """New values count at the next call, with gradient or without, and the same ones pack once."""
    torch.manual_seed(0)
    model = alike.Fprm(config(), scale=scale)
    own = copy.deepcopy(model)
    recurx.patch(model)
    level, seen = model.L_level, []
    for step in range(3):
        for given in (model, own):
            with torch.no_grad():
                given.L_level.alpha_1_param.add_(0.5)
        agree(results(model), results(own))
        with torch.inference_mode() if step == 1 else torch.no_grad():
            got, want = _one_iteration(model), _one_iteration(own)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        seen.append([factor.data_ptr() for factor in fprm._steady[level]])
    assert seen[0] == seen[1] == seen[2]
    net = fprm._net_of(model, True)
    kind = "scalar" if scale == "fixed" else "channel"
    assert {b.learned_skip for b in net.spec.blocks[:2]} == {kind}
    level.outer_only = own.L_level.outer_only = True  # a change of code's settings: its own code
    assert not {"learned_skip", "learned_scale"} & set(fprm._net_of(model, True).spec.changed)
    agree(results(model), results(own))


def test_fprm_that_cannot_run_in_fp32_is_refused() -> None:
    model = build("fprm")
    model.L_level.conv.bfloat16()
    with pytest.raises(recurx.UnsupportedModel, match="an iteration in fp32 fails: "):
        recurx.patch(model)


def _one_iteration(model: Any) -> Tensor:
    y, x = torch.randn(2, 3, alike.TOKENS, 32, generator=torch.Generator().manual_seed(3))
    state = model.L_optimizer.reset(None, y.shape, y.dtype, y.device, None) | {"y": y}
    info = {"cos_sin": model.rotary_emb(), "puzzle_emb_len": 0}
    found: Tensor = model._z_step(state, x, torch.ones_like(y), info)["y"]
    return found


def test_the_dtype_of_a_convolution_is_watched() -> None:
    model = build("urm")
    for layer in model.layers:
        layer.mlp.dwconv.bfloat16()
    own = copy.deepcopy(model)
    recurx.patch(model)
    agree(results(model), results(own))
    for given in (model, own):
        for layer in given.layers:
            layer.mlp.dwconv.float()
    agree(results(model), results(own))
    net, x = model.layers, torch.randn(2, 10, 32).bfloat16()
    with pytest.raises(recurx.InvalidArgument, match="is in fp32 and would turn the states"):
        schedule = recurx.Schedule.single_z(1, 1)
        recurx.recurse(schedule, {"L": net}, x, {"z": x}, cos_sin=recurx.rope_tables(10, 16))


def test_tables_that_such_code_cannot_take() -> None:
    """Code of SIC's layout that is not proved runs itself, and takes one half of a table."""
    net = build("sic").reasoning
    net[0].__class__ = type("Odd", (alike.SicLayer,), {"forward": lambda self, x, cos_sin=None: -x})
    tables = recurx.rope_tables(alike.TOKENS, 16)
    x = torch.randn(2, alike.TOKENS, 32)
    schedule = recurx.Schedule.single_z(1, 1)
    want = net(net(x + x, [t[:, None, :8] for t in tables]), [t[:, None, :8] for t in tables])
    got = recurx.recurse(schedule, {"L": net}, x, {"z": x}, cos_sin=tables)["z"]
    torch.testing.assert_close(got, want)
    other = tuple(torch.cat((t[:, :8], -t[:, 8:]), -1) for t in tables)
    with pytest.raises(UnsupportedModel, match="other values in its second half"):
        recurx.recurse(schedule, {"L": net}, x, {"z": x}, cos_sin=other)


def test_compiled_code_runs_a_spelled_net() -> None:
    torch._dynamo.reset()
    net, x = build("sic").reasoning, torch.randn(2, alike.TOKENS, 32)
    tables = recurx.rope_tables(alike.TOKENS, 16)

    def run(x: Tensor) -> Any:
        schedule = recurx.Schedule.single_z(1, 2)
        return recurx.recurse(schedule, {"L": net}, x, {"z": x}, cos_sin=tables)["z"]

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(run, backend="eager")(x), run(x))


def test_a_parameter_beside_its_norms_is_refused() -> None:
    model = build("sic")
    model.reasoning[1].mlp.gain = nn.Parameter(torch.ones(1))
    with pytest.raises(UnsupportedModel, match=r"`reasoning\.1\.mlp` has a parameter `gain`"):
        recurx.patch(model)
