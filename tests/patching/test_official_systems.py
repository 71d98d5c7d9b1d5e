"""recurx.patch and recurx.recurse on the code of later systems itself, see tests/systems.py.

Results agree within 1e-5, gradients within 1e-4, in fp32; a wrong window gives 1e-2 or more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recurx
from recurx import UnsupportedModel
from recurx.nets import Net, rope_tables
from recurx.patching.handle import installed
from recurx.readings import read
from recurx.specs import ATTENTION, NORM, BlockSpec, NetSpec
from tests.systems import load

SIZES = dict(
    batch_size=4, seq_len=9, vocab_size=7, num_puzzle_identifiers=3, hidden_size=32, expansion=4,
    num_heads=2, H_cycles=3, L_cycles=2, forward_dtype="float32",
)  # fmt: skip
Step = Callable[[Any], dict[str, Tensor]]


def batch(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 7, (2, 4, 9), generator=generator, dtype=torch.int32)
    return {"inputs": tokens[0], "labels": tokens[1],
            "puzzle_identifiers": torch.tensor([0, 1, 2, 0], dtype=torch.int32)}  # fmt: skip


def urm(pos: str = "rope", **changes: Any) -> Any:
    more = dict(puzzle_emb_ndim=32, num_layers=2, loops=4, pos_encodings=pos)
    return load("urm")["URM"](SIZES | more | changes)


def eqr(pos: str, noise: float = 0.0, **changes: Any) -> Any:
    more = dict(H_layers=2, L_layers=2, halt_max_steps=4, halt_exploration_prob=0.1)
    more |= dict(pos_encodings=pos, mlp_t=pos == "none", noise_scale=noise)
    return load("eqr")["EqRModel"](SIZES | more | changes)


def rsm(pos: str, **changes: Any) -> Any:
    more = dict(L_layers=2, puzzle_emb_ndim=32, puzzle_emb_len=2, pos_encodings=pos)
    return load("rsm")["RSM"](SIZES | more | dict(mlp_t=pos == "none") | changes)


def sic(kind: str, **changes: Any) -> Any:
    code = load("sic")
    mlps = [code["SwiGLU"].Config(multiple_of=16) for _ in range(2)]
    if kind == "mixer":
        block = code["MLPMixerBlock"].Config(seq_len=9, attn=mlps[0], ffn=mlps[1])
        more = dict(num_register_tokens=0)
    else:
        attn = code["Attention"].Config(num_heads=2, muon_modified=True, qk_norm=True)
        block = code["TransformerBlock"].Config(attn=attn, ffn=mlps[0], prenorm=kind == "pre")
        more = dict(use_rope=True, num_heads=2)
    config = code["TRM3"].Config(
        vocab_size=7, puzzle_grid_shape=(3, 3), hidden_size=32, H_cycles=3, L_cycles=2, K_L=1,
        dtype=torch.float32, device="cpu", compile_core=False, block=block, **more | changes,
    )  # fmt: skip
    return config.make()


def fprm(**changes: Any) -> Any:
    """FPRM, by default without factors inside the blocks."""
    more = dict(H_layers=0, L_layers=2, halt_max_steps=4, halt_exploration_prob=0.0, max_iter=6)
    more |= dict(pos_encodings="rope", puzzle_emb_ndim=32, puzzle_emb_len=2, n_backwards_L=3)
    more |= dict(norm_type="pre-norm", residual_scale="input-independent", outer_only=True)
    more |= dict(max_iter_dist="det", conv_type="conv1d", stepsize=0.9, decay_patience=1)
    found = load("fprm")["FixedPointReasoningModel_ACTV1"](SIZES | more | changes)
    found.set_num_iters()
    return found


def iterated(model: Any, seed: int) -> dict[str, Tensor]:
    """Steps of FPRM's: the answer and the solver's state; gradient of those inside each step."""
    torch.manual_seed(seed)
    carry, found = model.initial_carry(batch(seed)), {}
    for step in range(3):
        carry, outputs = model(carry, batch(seed))
        found |= {f"{name} {step}": value for name, value in outputs.items()}
        state = carry.inner_carry.z_L_state
        found |= {f"{n} {step}": v for n, v in state.items() if v.is_floating_point()}
    return found


def stepped(model: Any, seed: int) -> dict[str, Tensor]:
    """Two supervision steps of code with a carry."""
    carry, found = model.initial_carry(batch(seed)), {}
    for step in range(2):
        carry, outputs = model(carry, batch(seed))
        found |= {f"{name} {step}": value for name, value in outputs.items()}
    inner = getattr(carry, "inner_carry", carry)
    states = {n: z for n, z in vars(inner).items() if isinstance(z, Tensor) and z.ndim == 3}
    return found | states


def cycled(model: Any, seed: int) -> dict[str, Tensor]:
    """SIC's forward on random states."""
    generator = torch.Generator().manual_seed(seed)
    tokens = batch(seed)["inputs"].long()
    shape = len(tokens), model.config.total_seq_len, 32
    found = model(tokens, *(torch.randn(shape, generator=generator) for _ in range(2)))
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


MODELS: dict[str, tuple[Callable[[], Any], Any]] = {
    "urm": (urm, stepped),
    "urm, convolution in fp32": (lambda: urm().float(), stepped),
    "eqr, rope": (lambda: eqr("rope"), stepped),
    "eqr, token MLP": (lambda: eqr("none", lambda_=0.7), stepped),
    "rsm, rope": (lambda: rsm("rope"), stepped),
    "rsm, token MLP": (lambda: rsm("none"), stepped),
    "fprm, conv1d": (fprm, iterated),
    "fprm, conv2d, norms in and out": (
        lambda: fprm(
            conv_type="conv2d",
            conv_kernel_size=3,
            norm_type="peri-norm",
            norm_placement="output",
            normalize_input_injection=True,
            fixed_init=True,
        ),
        iterated,
    ),
    "fprm, token MLP": (
        lambda: fprm(
            mlp_t=True,
            pos_encodings="none",
            residual_scale="none",
            conv_type="none",
            norm_type="post-norm",
            weight_dropout=0.2,
        ),
        iterated,
    ),
    "fprm, causal": (
        lambda: fprm(
            causal=True,
            pos_encodings="none",
            residual_scale="input-dependent",
            norm_placement="input",
            variational_dropout=0.1,
        ),
        iterated,
    ),
    "fprm, as published for Sudoku": (
        lambda: fprm(
            outer_only=False,
            conv_type="conv2d",
            conv_kernel_size=3,
            init_std=6.0,
            stepsize=1.0,
            alpha_1_init=0.75,
            alpha_2_init=0.25,
        ),
        iterated,
    ),
    "fprm, as published for Maze": (
        lambda: fprm(outer_only=False, norm_placement="output", init_std=6.0, stepsize=1.0),
        iterated,
    ),
    "fprm, fixed factors, sandwich": (
        lambda: fprm(outer_only=False, residual_scale="fixed", norm_type="peri-norm"),
        iterated,
    ),
    "fprm, a factor a channel, post-norm, causal": (
        lambda: fprm(
            outer_only=False,
            norm_type="post-norm",
            causal=True,
            pos_encodings="none",
            weight_dropout=0.2,
        ),
        iterated,
    ),
    "sic, mixer": (lambda: sic("mixer"), cycled),
    "sic, attention": (lambda: sic("post", core_damping=0.3), cycled),
    "sic, pre-norm": (lambda: sic("pre"), cycled),
}


def measured(model: Any, run: Any, seed: int) -> dict[str, Tensor]:
    """Results, and the gradients of a loss over them, in training or evaluation as it stands."""
    model.zero_grad()
    torch.manual_seed(seed)
    found = run(model, seed)
    answers = [value for value in found.values() if value.requires_grad]
    torch.stack([(a.float() - 0.1).square().mean() for a in answers]).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in found.items()} | {
        f"gradient of {name}": grad.clone() for name, grad in grads.items()
    }


def agree(
    got: dict[str, Tensor], want: dict[str, Tensor], nudged: dict[str, Tensor] | None = None
) -> None:
    """Within 1e-5, gradients within 1e-4; or within four times of what `nudged` weights change."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        allowed = 1e-4 if name.startswith("gradient") else 1e-5
        if nudged is not None:
            allowed = max(allowed, 4 * relative(nudged[name], value))
        error = relative(got[name], value)
        assert error <= allowed, f"{name} differs by {error:.2g}, allowed {allowed:.2g}"


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-3))


def nudge(model: Any) -> Any:
    """A copy whose weights are rounded otherwise. Nets of a token MLP with random weights multiply
    such a difference by hundreds, and so the difference of two engines on some processors."""
    torch.manual_seed(1)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for weight in copied.parameters():
            weight.mul_(1 + 6e-8 * torch.randn_like(weight))
    return copied


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_patched_and_not(name: str, backend: str) -> None:
    build, run = MODELS[name]
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():  # heads that start at zero would hide a fault
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    own = copy.deepcopy(model)
    nudged = nudge(model) if "token MLP" in name else None
    with recurx.patch(model, backend=backend) as handle:
        assert len(handle.report.patched) == 1, handle.report
        for training in (False, True):
            for seed in range(2 if training else 1):  # of RSM both windows in training
                for each in filter(None, (model, own, nudged)):
                    each.train(training)
                spread = measured(nudged, run, seed) if nudged else None
                agree(measured(model, run, seed), measured(own, run, seed), spread)


def test_urm_in_its_own_dtypes() -> None:
    """bf16 states with a bf16 convolution run; an fp32 convolution widens states: its own code."""
    model = urm(forward_dtype="bfloat16")
    own = copy.deepcopy(model)
    recurx.patch(model)
    net = read(model.inner.layers, True)
    assert net is not None and net[0].blocks[0].conv_dtype == "bfloat16"
    for given in (model, own):
        given.eval()
    got, want = (stepped(given, 0) for given in (model, own))
    assert all(
        (got[n].float() - want[n].float()).norm() <= 0.02 * want[n].float().norm() for n in want
    )
    for given in (model, own):
        for layer in given.inner.layers:
            layer.mlp.dwconv.float()
    with pytest.warns(UserWarning, match="turns its states into fp32"):
        got, want = (stepped(given, 0) for given in (model, own))
    assert torch.equal(got["logits 0"], want["logits 0"])
    agree(got, want)  # the states that enter the second step are in fp32: recurx runs it


def test_noise_is_said_and_other_settings_follow() -> None:
    model = eqr("rope", noise=0.5)
    handle = recurx.patch(model)
    assert "noise of 0.5: drawn by recurx" in str(handle.report)
    model.eval()
    one, other = (stepped(model, 0)["logits 1"] for _ in range(2))
    assert not torch.equal(one, other) and (one - other).norm() < 2 * one.norm()
    torch.manual_seed(3)
    one = stepped(model, 0)["logits 1"]
    torch.manual_seed(3)
    assert torch.equal(one, stepped(model, 0)["logits 1"]), (
        "the seed comes from PyTorch's generator"
    )
    own = eqr("rope")
    own.load_state_dict(model.state_dict(), strict=False)
    for given in (model, own):  # a schedule of damping, say
        given.eval()
        level = given.inner.L_level
        level.noise_scale, level.lambda_ = 0.0, 0.5
    agree(measured(model, stepped, 1), measured(own, stepped, 1))
    model.inner.L_level.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="`L_level` has hooks"):
        stepped(model, 0)


@pytest.mark.parametrize(
    "build,message",
    [
        (lambda: eqr("rope2d"), "turn halves of a head apart"),
        (lambda: sic("mixer", anchor_seq_index=0), "anchor_seq_index"),
        (
            lambda: fprm(outer_only=False, residual_scale="input-dependent"),
            "follow from the states",
        ),
        (lambda: fprm(outer_only=False, mlp_t=True, pos_encodings="none"), "a factor a channel"),
        (lambda: fprm(softmax_temp=2.0), "temperature of 2.0"),
        (lambda: _noisier(eqr("rope", noise=0.1)), "no torch.randn times `noise_scale`"),
    ],
)
def test_what_has_no_spelling_is_refused(build: Callable[[], Any], message: str) -> None:
    model = build()
    with pytest.raises(UnsupportedModel, match=message):
        recurx.patch(model)
    assert installed(model, "forward") is None and installed(model, "_z_step") is None


def test_masks_of_weights_of_fprm() -> None:
    """DropConnect's masks count in training, drawn anew or not."""
    model = fprm(weight_dropout=0.5)
    own = copy.deepcopy(model)
    recurx.patch(model)
    for draw in range(2):
        for given in (model, own):
            given.train()
            torch.manual_seed(draw)
            for part in given.modules():
                if hasattr(part, "reset_mask"):
                    part.reset_mask()
        agree(measured(model, iterated, 1), measured(own, iterated, 1))


def _noisier(model: Any) -> Any:
    kind = type(model.inner.L_level)

    class Noisier(kind):  # type: ignore[valid-type,misc]
        def forward(self, hidden_states: Tensor, input_injection: Tensor, **more: Any) -> Tensor:
            out = super().forward(hidden_states, input_injection, **more)
            return out + self.noise_scale * torch.randn_like(out)

    model.inner.L_level.__class__ = Noisier
    return model


@pytest.mark.parametrize("prenorm", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("kind", ["attention", "mixer"])
def test_priml_blocks_as_nets(kind: str, prenorm: bool) -> None:
    code = load("priml")
    norm = code["RMSNorm"].Config
    mlp = lambda: code["SwiGLU"].Config(norm=norm(), round_to=16)  # noqa: E731
    if kind == "mixer":
        block = code["MLPMixerBlock"].Config(
            channels_in=32, seq_len=9, prenorm=prenorm, token_mixer=mlp(), channel_mixer=mlp()
        )
    else:
        attn = code["SelfAttention"].Config(
            heads=4, num_heads_kv=2, norm_qk=norm(), norm_out=norm()
        )
        block = code["TransformerBlock"].Config(
            channels_in=32, prenorm=prenorm, attn=attn, ffn=code["SwiGLU"].Config(round_to=16)
        )
    torch.manual_seed(0)
    net = code["Sequential"].Config(block, repeat=2).make()
    cos, sin = rope_tables(9, 8)
    half = (cos[:, None, :4], sin[:, None, :4])
    compare_nets(net, lambda h: net(h, cos_sin=half), None if kind == "mixer" else (cos, sin))
    found = read(net, kind != "mixer")
    assert found is not None, "it is proved, so that it runs fused where an engine takes it"


def compare_nets(net: Any, own: Callable[[Tensor], Tensor], tables: Any) -> None:
    """`recurse` over a net, and over its own forward called by us."""
    schedule = recurx.Schedule.trm(2, 2)
    x, z_H, z_L = torch.randn(3, 3, 9, 32, generator=torch.Generator().manual_seed(1))
    found = []
    weights = [p for p in (net.weights if isinstance(net, Net) else net.parameters())]
    for run in (net, own):
        x = x.detach().requires_grad_()
        states = recurx.recurse(schedule, {"L": run}, x, {"z_H": z_H, "z_L": z_L}, cos_sin=tables)
        grads = torch.autograd.grad(
            states["z_H"].square().mean() + states["z_L"].mean(), [x, *weights]
        )
        values = {**states, **{f"gradient {n}": grad for n, grad in enumerate(grads)}}
        found.append({name: value.detach() for name, value in values.items()})
    agree(*found)


def hrm_text_net(module: Any, norm_type: str, **mask: Any) -> Net:
    """A Transformer of HRM-Text as a net: `gqkv_proj` holds the gate's rows before q, k and v."""
    blocks, weights = [], []
    for layer in module.layers:
        attn, mlp = layer.attn, layer.mlp
        gate = attn.num_heads * attn.head_dim
        down, packed = mlp.down_proj.weight, attn.gqkv_proj.weight
        kv = attn.num_key_value_heads
        blocks.append(
            BlockSpec(
                ATTENTION, *down.shape, num_heads=attn.num_heads, eps=1e-6, attn_gate=True,
                kv_heads=0 if kv == attn.num_heads else kv,
                placement=norm_type, **mask,
            )
        )  # fmt: skip
        weights += [packed[gate:], attn.o_proj.weight, mlp.gate_up_proj.weight, down, packed[:gate]]
    if norm_type == "pre":
        blocks.append(BlockSpec(NORM, module.layers[0].mlp.down_proj.weight.shape[0], 0, eps=1e-6))
    return Net(NetSpec(tuple(blocks)), weights)


@pytest.mark.parametrize("norm_type", ["post", "pre"])
@pytest.mark.parametrize("mask", [{"mask": "causal"}, {"mask": "prefix", "prefix": 4}], ids=str)
def test_hrm_text_blocks_as_nets(norm_type: str, mask: dict[str, Any]) -> None:
    code = load("hrm_text")
    config = code["TransformerConfig"](
        max_seq_len=9, n_layers=2, hidden_size=32, num_heads=4, expansion=1, norm_type=norm_type,
        attn_type="causal" if mask["mask"] == "causal" else "prefixlm", init_type="lecun_normal",
        norm_eps=1e-6, pos_emb_type="rope", rope_theta=10000.0,
    )  # fmt: skip
    torch.manual_seed(0)
    module = code["Transformer"](config)
    for layer in module.layers:  # their Transformer always has as many; their Attention need not
        layer.attn = code["Attention"](32, 8, 4, 2, config.attn_type)
    prefix = {"prefix": torch.tensor(mask.get("prefix", 0))}
    net = hrm_text_net(module, norm_type, **mask)
    parameters = list(module.parameters())

    class Own(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return module(h, **prefix)

    schedule = recurx.Schedule.hrm(2, 2)
    x, z_H, z_L = torch.randn(3, 3, 9, 32, generator=torch.Generator().manual_seed(1))
    found = []
    for run, tables in ((net, rope_tables(9, 8)), (lambda h: Own()(h), None)):
        states = recurx.recurse(
            schedule, {"L": run, "H": run}, x, {"z_H": z_H, "z_L": z_L}, cos_sin=tables
        )
        grads = torch.autograd.grad(states["z_H"].square().mean(), parameters)
        values = {**states, **{f"gradient {n}": grad for n, grad in enumerate(grads)}}
        found.append({name: value.detach() for name, value in values.items()})
    agree(*found)
