"""The networks that TinyRecursiveModel is used with, as nets: the packages' own, from PyPI.

Results agree within 1e-5 and gradients within 1e-4 in fp32; each planted bug gives more.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recurx
from recurx.experiments.systems import foreign
from recurx.experiments.systems.usual_nets import usual_net
from recurx.nets import Net
from recurx.patching.handle import installed
from recurx.route import has_fused
from tests import lucidrains

lucid = pytest.importorskip("tiny_recursive_model")
x_transformers = pytest.importorskip("x_transformers")

TOKENS, WIDTH, IDS = 12, 32, 8


def mixer(**more: Any) -> nn.Module:
    return lucid.MLPMixer1D(dim=WIDTH, depth=2, seq_len=TOKENS, **more)


def encoder(**more: Any) -> nn.Module:
    return x_transformers.Encoder(dim=WIDTH, depth=2, heads=2, **more)


def decoder(**more: Any) -> nn.Module:
    return x_transformers.Decoder(dim=WIDTH, depth=2, heads=2, **more)


NETS: dict[str, Callable[[], nn.Module]] = {
    "mixer": mixer,
    "encoder": encoder,
    "decoder": decoder,
    "encoder, flash": lambda: encoder(attn_flash=True),
    "encoder, K/V heads": lambda: encoder(attn_kv_heads=1, attn_dim_head=16),
    "decoder, SiLU without biases": lambda: decoder(ff_swish=True, ff_no_bias=True),
    "encoder, scaled residuals": lambda: encoder(scale_residual=True, scale_residual_constant=0.5),
    "decoder, a constant": lambda: decoder(scale_residual_constant=0.5),
}


def build(network: nn.Module) -> Any:
    torch.manual_seed(0)
    model = lucid.TinyRecursiveModel(
        dim=WIDTH, num_tokens=IDS, network=network, num_refinement_blocks=3,
        num_latent_refinements=4,
    )  # fmt: skip
    with torch.no_grad():  # what starts at zero or one would hide a fault
        model.to_halt_pred[1].weight.normal_()
        for weight in network.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def puzzles() -> Tensor:
    return torch.randint(0, IDS, (5, TOKENS), generator=torch.Generator().manual_seed(1))


def two_steps(model: Any) -> dict[str, Tensor]:
    return lucidrains.two_steps(model, puzzles())


def agree(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Relative to its norm; a gradient that a norm takes away again, to the largest one."""
    assert got.keys() == want.keys()
    largest = max(float(v.norm()) for name, v in want.items() if name.startswith("gradient"))
    for name, value in want.items():
        gradient = name.startswith("gradient")
        floor = 1e-3 * largest if gradient else 1e-3
        error = float((got[name] - value).norm() / value.norm().clamp_min(floor))
        assert error <= (1e-4 if gradient else 1e-5), f"{name} differs by {error:.2g}"


def spelled(network: nn.Module) -> Any:
    return foreign.net_of(network, "network", usual_net, lambda own, h, _: own(h))


@pytest.mark.parametrize("backend", ["auto", "eager", "cpu"])
@pytest.mark.parametrize("name", NETS)
def test_patched_and_not(name: str, backend: str) -> None:
    if backend == "cpu" and not has_fused("cpu"):
        pytest.skip("the CPU engine is not compiled here")
    model = build(NETS[name]())
    own, names = copy.deepcopy(model), list(model.state_dict())
    handle = recurx.patch(model, backend=backend)
    assert "and the network (" in str(handle.report), handle.report
    if backend == "auto" and has_fused("cpu"):
        assert "auto -> cpu" in str(handle.report)
    for training in (False, True):
        model.train(training)
        own.train(training)
        agree(two_steps(model), two_steps(own))
    with torch.no_grad():
        agree({"gradient": model(puzzles(), *model.get_initial())[2]},
              {"gradient": own(puzzles(), *own.get_initial())[2]})  # fmt: skip
    assert list(model.state_dict()) == names
    pred, steps = model.predict(puzzles())
    want, want_steps = own.predict(puzzles())
    assert torch.equal(pred, want) and torch.equal(steps, want_steps)


@pytest.mark.parametrize("name", ["mixer", "encoder"])
def test_a_state_dict_loads_unchanged_on_either_side(name: str) -> None:
    trained, fresh = build(NETS[name]()), build(NETS[name]())
    with torch.no_grad():
        for weight in trained.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    recurx.patch(fresh)
    fresh.load_state_dict(trained.state_dict())  # strict
    agree(two_steps(fresh), two_steps(trained))
    back = build(NETS[name]())
    back.load_state_dict(fresh.state_dict())
    agree(two_steps(back), two_steps(trained))


def test_what_runs_is_what_is_there_at_each_call() -> None:
    """New weights, a hook, another activation, the other mode: seen at the next call."""
    model = build(mixer())
    recurx.patch(model)
    own = copy.deepcopy(model.network)
    assert isinstance(spelled(model.network), Net)
    with torch.no_grad():
        for network in (model.network, own):
            network[0][0].fn[0].weight.mul_(1.5)
    net, h = spelled(model.network), torch.randn(2, TOKENS, WIDTH)
    torch.testing.assert_close(recurx.reference.call(h, net, None), own(h), atol=1e-5, rtol=1e-5)
    seen = []
    hook = model.network[0][1].register_forward_hook(lambda *_: seen.append(1))
    assert "has hooks" in spelled(model.network)
    two_steps(model)
    assert seen, "its own code runs, and the hook with it"
    hook.remove()
    assert isinstance(spelled(model.network), Net)
    model.network[1][0].fn[1] = nn.ReLU()
    assert "different activations" in spelled(model.network)
    two_steps(model)


def test_autocast_and_other_dtypes_run_its_own_code() -> None:
    model = build(encoder())
    own = copy.deepcopy(model)
    recurx.patch(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = two_steps(model), two_steps(own)
    assert all(torch.equal(got[name], want[name]) for name in want), "bit for bit, as it is"
    inputs = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    for given in (model, own):
        with pytest.raises(RuntimeError, match=r"dtype|type"):
            given.deep_refinement(inputs, *(t.double() for t in given.get_initial()))


class Tilted(nn.Module):
    """PreNormResidual with a bug."""

    def __init__(self, part: Any, bug: str) -> None:
        super().__init__()
        self.fn, self.norm, self.bug = part.fn, part.norm, bug

    def forward(self, x: Tensor) -> Tensor:
        given = x if self.bug == "no norm" else self.norm(x)
        return self.fn(given) * (1.001 if self.bug == "scaled" else 1) + (
            given if self.bug == "residual of the norm" else x
        )


def other_eps(network: Any) -> None:
    for part in network.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = 1e-6
    network[0][0].norm.eps = 1e-5


def tilt(bug: str) -> Callable[[Any], None]:
    def change(network: Any) -> None:
        network[1][0] = Tilted(network[1][0], bug)

    return change


@pytest.mark.parametrize(
    "change,message",
    [
        (tilt("scaled"), "off by"),
        (tilt("no norm"), "off by"),
        (tilt("residual of the norm"), "off by"),
        (lambda net: setattr(net[0][0].fn[0], "padding", (1,)), "fails in a probe|off by"),
        (other_eps, "norms of different eps"),
        (lambda net: net[0].register_buffer("kept", torch.ones(1)), "has a buffer `kept`"),
        (lambda net: net[0][1].register_parameter("gain", nn.Parameter(torch.ones(1))),
         "has a parameter `gain`"),
        (lambda net: setattr(net[0][0].fn[2], "p", 0.1), "draws random numbers"),
        (lambda net: setattr(net[0][0].fn, "1", nn.GELU("tanh")), "off by"),
    ],
)  # fmt: skip
def test_planted_bugs_are_told(change: Callable[[Any], None], message: str) -> None:
    network = mixer()
    change(network)
    said = spelled(network)
    assert isinstance(said, str) and re.search(message, said), said
    model = build(network)
    report = str(recurx.patch(model).report)
    assert "foreign code: " in report, "the loop still runs, over its own code"


@pytest.mark.parametrize(
    "options,message",
    [
        ({"scale_residual": True, "gate_residual": True}, "a parameter `weight_ih`"),
        ({"ff_glu": True}, "gate in its second half"),
        ({"use_rmsnorm": True}, "a norm of class RMSNorm"), ({"macaron": True}, "in turn"),
        ({"rotary_pos_emb": True}, "has a buffer `inv_freq`"), ({"attn_qk_norm": True}, "off by"),
        ({"residual_attn": True}, "off by"), ({"orthog_residual": True}, "off by"),
        ({"attn_softclamp_logits": True}, "off by"), ({"weight_tie_layers": True}, "off by"),
        ({"layer_dropout": 0.2}, "draws random numbers"), ({"pre_norm": False}, "none where"),
        ({"attn_num_mem_kv": 2}, "a parameter `mem_k`"), ({"sandwich_norm": True}, "sandwich_norm"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_options_that_have_no_spelling_are_named(options: dict[str, Any], message: str) -> None:
    said = spelled(encoder(**options))
    assert isinstance(said, str) and message in said, said


def test_the_loop_stays_patched_where_the_network_is_refused() -> None:
    model = build(encoder(ff_glu=True))
    own = copy.deepcopy(model)
    handle = recurx.patch(model)
    assert installed(model, "deep_refinement") is not None
    assert "gate in its second half" in str(handle.report)
    got, want = two_steps(model), two_steps(own)
    assert all(torch.equal(got[name], want[name]) for name in want)
