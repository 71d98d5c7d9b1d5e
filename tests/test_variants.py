"""Blocks that differ from those of TRM and HRM: the reference and its backward.

PyTorch's own transformer layer is the oracle of the usual ones; the others are written out here, or
held against what the field leaves the same.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recurx
from recurx import (
    BlockSpec,
    InvalidArgument,
    Schedule,
    Step,
    reference,
)
from recurx.problem import decode, encode
from recurx.specs import ATTENTION, NO_MIXER, NORM, VARIANT, NetSpec
from tests.variants import TOKENS, VARIANTS, WIDTH, net_of, spec_of, tables_of

ONE = Schedule((Step("L", "z", ("z",)),))
NAMES = sorted(VARIANTS)


def one_call(spec: BlockSpec, h: Tensor, weights: list[Tensor], rope: bool = True) -> Tensor:
    return reference.block(h, spec, weights, tables_of(spec) if rope else None)


@pytest.mark.parametrize("name", NAMES)
def test_key_and_slots(name: str) -> None:
    spec = spec_of(name)
    assert BlockSpec.from_key(spec.key) == spec
    assert spec.changed and set(spec.changed) <= {"kind", *VARIANT}
    net = NetSpec((spec, BlockSpec(ATTENTION, WIDTH, 48, 4)))
    schedule, nets = decode(encode(ONE, [("L", net)]))
    assert (schedule, dict(nets)) == (ONE, {"L": net})
    shapes = [shape for _, shape in spec.slots]
    assert [len(part) for _, part in net.by_block(range(net.num_weights))] == [len(shapes), 4]


@pytest.mark.parametrize("name", NAMES)
def test_every_field_counts(name: str) -> None:
    """With a field put back to TRM's value the answer is another one, or the weights do not fit."""
    spec = spec_of(name)
    net, h = net_of(spec), torch.randn(2, TOKENS, WIDTH)
    want = one_call(spec, h, net.weights)
    by_name = dict(zip([name for name, _ in spec.slots], net.weights, strict=True))
    for field in spec.changed:
        if field in ("kind", "head_size"):
            continue
        try:
            other = dataclasses.replace(spec, **{field: VARIANT[field]})
        except InvalidArgument:  # another field needs this one
            continue
        if [slot for slot in other.slots if slot[0] in by_name and slot not in spec.slots]:
            continue  # matrices of other sizes
        weights = [by_name.get(slot, torch.zeros(shape)) for slot, shape in other.slots]
        assert (one_call(other, h, weights) - want).abs().max() > 1e-3, field


@pytest.mark.parametrize("save", ["all", "block", "states"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_however_they_are_kept(name: str, save: str) -> None:
    """fp64: autograd's, and finite differences of the whole."""
    spec = spec_of(name)
    net = net_of(spec, dtype=torch.float64)
    schedule = Schedule.trm(1, 1).with_factors(damping=0.8, scale=0.7, noise=0.1)
    generator = torch.Generator().manual_seed(1)
    x, z_l, z_h = torch.randn(3, 2, TOKENS, WIDTH, dtype=torch.float64, generator=generator)
    carry = {"z_L": z_l, "z_H": z_h}

    def run(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        nets = {"L": recurx.Net(net.spec, weights)}
        how = dict(cos_sin=tables_of(spec), seed=3, save=save)
        return tuple(recurx.recurse(schedule, nets, x, carry, **how).values())

    leaves = [tensor.requires_grad_() for tensor in (x, *net.weights)]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("pre", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_pytorchs_transformer_layer(pre: bool, activation: str) -> None:
    layer = nn.TransformerEncoderLayer(
        WIDTH, 4, 48, 0.0, activation, norm_first=pre, batch_first=True, dtype=torch.float64
    )
    for weight in layer.parameters():
        nn.init.normal_(weight, std=0.3)
    spec = spec_of("pre-LayerNorm, ReLU")
    placement = "pre" if pre else "post"
    spec = dataclasses.replace(spec, placement=placement, activation=activation)
    own = layer.self_attn
    weights = [
        own.in_proj_weight, own.out_proj.weight, layer.linear1.weight, layer.linear2.weight,
        own.in_proj_bias, own.out_proj.bias, layer.linear1.bias, layer.linear2.bias,
        layer.norm1.weight, layer.norm1.bias, layer.norm2.weight, layer.norm2.bias,
    ]  # fmt: skip
    h = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(one_call(spec, h, weights, rope=False), layer(h))


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-5)


def test_a_convolution_reads_the_token_before() -> None:
    spec = dataclasses.replace(spec_of("ConvSwiGLU"), kind=NO_MIXER, num_heads=0)
    weights = net_of(spec, dtype=torch.float64).weights
    gate_up, down, conv, bias = weights
    h = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    gate, up = (h @ gate_up.T).chunk(2, -1)
    middle = F.silu(gate) * up
    before = F.pad(middle, (0, 0, 1, 0))[:, :-1]
    convolved = conv[:, 0, 0] * before + conv[:, 0, 1] * middle + bias
    want = rms(h + F.silu(convolved) @ down.T)
    torch.testing.assert_close(one_call(spec, h, weights), want)


def test_who_sees_whom() -> None:
    """Changing a token changes exactly those that see it."""
    for name in ("grouped heads, gate, prefix", "causal window, QK-norm", "plain QK-norm, window"):
        spec = spec_of(name)
        weights = net_of(spec).weights
        h = torch.randn(1, TOKENS, WIDTH)
        want = one_call(spec, h, weights)
        for token in range(TOKENS):
            other = h.clone()
            other[:, token] += 1
            moved = (one_call(spec, other, weights) - want).abs().amax((0, 2)) > 1e-6
            sees = [
                (j <= i or j < spec.prefix or not spec.mask)
                and (not spec.window or abs(i - j) < spec.window)
                for i, j in ((i, token) for i in range(TOKENS))
            ]
            assert moved.tolist() == sees, (name, token)


def test_grouped_heads_gate_and_norms_written_out() -> None:
    spec = BlockSpec(
        ATTENTION, WIDTH, 48, 4, kv_heads=2, head_size=6, qk_norm="rms", qk_norm_weight=True,
        attn_gate=True, attn_norm="rms", attn_norm_weight=True, placement="pre",
    )  # fmt: skip
    weights = net_of(spec, dtype=torch.float64).weights
    qkv, o, gate_up, down, gate, q_norm, k_norm, attn_norm = weights
    h = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    x = rms(h)
    q, k, v = (x @ qkv.T).split((24, 12, 12), -1)
    q, k, v = (t.view(2, TOKENS, -1, 6).transpose(1, 2) for t in (q, k, v))
    q, k = rms(q) * q_norm, rms(k) * k_norm
    mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    mixed = mixed.transpose(1, 2).flatten(2) * torch.sigmoid(x @ gate.T)
    h1 = h + (rms(mixed) * attn_norm) @ o.T
    g, u = (rms(h1) @ gate_up.T).chunk(2, -1)
    want = h1 + (F.silu(g) * u) @ down.T
    torch.testing.assert_close(one_call(spec, h, weights, rope=False), want)


def test_axial_attention_keeps_to_its_lines() -> None:
    for axis, name in enumerate(("axial, columns", "axial, rows")):
        spec = spec_of(name)
        weights = net_of(spec).weights
        h = torch.randn(1, TOKENS, WIDTH)
        moved = one_call(spec, h + F.one_hot(torch.tensor(5), TOKENS)[:, None], weights)
        lines = (moved - one_call(spec, h, weights)).abs().amax((0, 2)).view(3, 4) > 1e-6
        want = torch.zeros(3, 4, dtype=torch.bool)
        want.select(1 - axis, (5 % 4, 5 // 4)[axis]).fill_(True)
        assert torch.equal(lines, want)


def test_norms_scales_and_the_product() -> None:
    spec = BlockSpec(
        NO_MIXER, WIDTH, 48, inner_norm="rms", inner_norm_of="product", placement="sandwich",
        norm_weight=True, learned_scale="scalar", residual_scale=0.5,
    )  # fmt: skip
    weights = net_of(spec, dtype=torch.float64).weights
    gate_up, down, norm2, out_norm2, scale = weights
    h = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    g, u = ((rms(h) * norm2) @ gate_up.T).chunk(2, -1)
    want = h + rms((torch.sigmoid(g) * rms(g * u)) @ down.T) * out_norm2 * 0.5 * scale
    torch.testing.assert_close(one_call(spec, h, weights), want)
    alone = BlockSpec(NORM, WIDTH, 0, norm="layer")
    torch.testing.assert_close(one_call(alone, h, []), F.layer_norm(h, (WIDTH,)))


@pytest.mark.parametrize("placement", ["post", "pre", "sandwich"])
def test_factors_of_h_and_of_the_branch(placement: str) -> None:
    """a h + s f: FPRM's alpha_1 and beta_1 (`"channel"`), x-transformers' constant."""
    spec = BlockSpec(
        NO_MIXER, WIDTH, 48, placement=placement, learned_scale="scalar", residual_scale=0.5,
        learned_skip="channel", skip_scale=0.7,
    )  # fmt: skip
    weights = net_of(spec, dtype=torch.float64).weights
    gate_up, down, s, a = weights
    assert [name for name, _ in spec.slots[2:]] == ["scale2", "skip2"] and a.shape == (WIDTH,)
    h = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    gate, up = ((h if placement == "post" else rms(h)) @ gate_up.T).chunk(2, -1)
    out = (F.silu(gate) * up) @ down.T
    out = rms(out) if placement == "sandwich" else out
    total = 0.7 * a * h + 0.5 * s * out
    want = rms(total) if placement == "post" else total
    torch.testing.assert_close(one_call(spec, h, weights), want)
    plain = dataclasses.replace(spec, skip_scale=1.0, learned_skip="")
    assert "skip" not in plain.key + str(plain.slots), "what is not there changes no key"


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch(name: str) -> None:
    spec = spec_of(name)
    weights = [weight.requires_grad_() for weight in net_of(spec).weights]
    x, nets = torch.randn(0, TOKENS, WIDTH), {"L": recurx.Net(NetSpec((spec,)), weights)}
    out = recurx.recurse(ONE, nets, x, {"z": x}, backend="eager", cos_sin=tables_of(spec))["z"]
    assert out.shape == x.shape
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), weights))


def test_an_axial_net_wants_its_grid() -> None:
    net, x = net_of(spec_of("axial, rows")), torch.randn(1, TOKENS + 1, WIDTH)
    with pytest.raises(InvalidArgument, match="3 x 4"):
        recurx.recurse(ONE, {"L": net}, x, {"z": x})
