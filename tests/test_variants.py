"""Blocks and steps that differ from those of TRM and HRM: the reference, its backward, refusals.

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
    backends,
    reference,
)
from recurx.comparing import right
from recurx.noise import CALLS, normals
from recurx.operands import Operands
from recurx.problem import decode, encode
from recurx.specs import ATTENTION, KINDS, NO_MIXER, NORM, TOKEN_MLP, VARIANT, NetSpec
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


# ---- steps ---------------------------------------------------------------------------------------


def test_factors_of_a_step() -> None:
    spec = spec_of("ConvSwiGLU")
    net = net_of(spec)
    step = Step("L", "a", ("a", "b"), ("x",), damping=0.75, scale=0.5, noise=0.25)
    x, a, b = torch.randn(3, 2, TOKENS, WIDTH)
    out = recurx.recurse(Schedule((step, step)), {"L": net}, x, {"a": a, "b": b}, seed=11)
    for call in range(2):
        fresh = reference.call(0.5 * (a + b) + x, net, None)
        noise = normals(torch.arange(2), call, (TOKENS, WIDTH), 11, use=CALLS)
        a = 0.25 * a + 0.75 * fresh + 0.25 * noise
    torch.testing.assert_close(out["a"], a)
    assert str(step) == "a <- 0.25 * a + 0.75 * L(0.5 * (a + b) + (x)) + 0.25 * noise"


def test_noise_is_drawn_and_repeated() -> None:
    net = net_of(BlockSpec(ATTENTION, WIDTH, 48, 4))
    schedule = Schedule.trm(2, 2).with_factors(noise=0.5)
    x, z_l, z_h = torch.randn(3, 3, TOKENS, WIDTH)

    def answer(count: int = 3, **how: object) -> Tensor:
        carry = {"z_L": z_l[:count], "z_H": z_h[:count]}
        return recurx.recurse(schedule, {"L": net}, x[:count], carry, **how)["z_H"]

    assert torch.equal(answer(seed=1), answer(seed=torch.tensor(1)))
    torch.testing.assert_close(answer(seed=1)[:2], answer(2, seed=1))  # whatever the batch
    assert not torch.allclose(answer(seed=1), answer(seed=2))
    assert not torch.allclose(answer(), answer())
    torch.manual_seed(0)
    first = answer()
    torch.manual_seed(0)
    assert torch.equal(first, answer())
    assert normals(torch.arange(2), 0, (0, 4), 7).shape == (2, 0, 4)
    halves = [normals(torch.arange(2), 0, (4000,), 7, use=use) for use in (0, CALLS)]
    assert abs(torch.corrcoef(torch.stack([h.flatten() for h in halves]))[0, 1]) < 0.05
    with pytest.raises(InvalidArgument, match="seed"):
        recurx.recurse(Schedule.trm(1, 1), {"L": net}, x, {"z_L": z_l, "z_H": z_h}, seed=1)
    for wrong in (-1, 2**63, 1.5, True, torch.tensor(1.0)):
        with pytest.raises(InvalidArgument, match="seed"):
            answer(seed=wrong)


def test_factors_in_the_window_differ_from_the_plain_ones() -> None:
    schedule = Schedule.hrm(2, 2)
    damped = schedule.with_factors(damping=0.9)
    assert Schedule.from_key(damped.key) == damped != schedule
    assert damped.with_window(3).steps == damped.steps and damped.changed == ("damping",)
    for wrong in (dict(damping=float("nan")), dict(noise=-1), dict(scale=True), dict(scale="1")):
        with pytest.raises(InvalidArgument, match=next(iter(wrong))):
            Step("L", "z", ("z",), **wrong)


def test_a_comparison_keeps_the_numbers_of_samples() -> None:
    """What `auto` compares on some samples of a batch is noise of those samples."""
    net = net_of(spec_of("ConvSwiGLU"))
    x, z = torch.randn(2, 5, TOKENS, WIDTH)
    noisy, nets = ONE.with_factors(noise=0.5), (("L", net.spec),)
    problem = recurx.Problem(noisy, nets, 5, TOKENS, WIDTH, torch.float32, "cpu")
    given = Operands(x, (z,), tuple(net.weights), None, torch.tensor([1, 0]))
    assert right("calls", backends.get("eager"), problem, given)


LEARNED = Schedule((
    Step("L", "a", ("a", "b"), ("x",), damping="alpha", scale="beta"),
    Step("L", "b", ("b",), ("a",), damping="alpha"),
))  # fmt: skip


@pytest.mark.parametrize("shape", [(), (WIDTH,)], ids=str)
@pytest.mark.parametrize("save", ["all", "block", "states"])
def test_learned_factors(save: str, shape: tuple[int, ...]) -> None:
    """As numbers do, and with gradients; one name is one parameter, however often it is read."""
    net = net_of(spec_of("ConvSwiGLU"), dtype=torch.float64)
    x, a, b = torch.randn(3, 2, TOKENS, WIDTH, dtype=torch.float64)

    def run(alpha: Tensor, beta: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        nets = {"L": recurx.Net(net.spec, weights), "alpha": alpha, "beta": beta}
        return tuple(recurx.recurse(LEARNED, nets, x, {"a": a, "b": b}, save=save).values())

    factors = [torch.full(shape, value, dtype=torch.float64) for value in (0.7, 1.3)]
    steps = [
        dataclasses.replace(step, damping=0.7, scale=1.3 if step.scale == "beta" else 1.0)
        for step in LEARNED.steps
    ]
    want = recurx.recurse(Schedule(tuple(steps)), {"L": net}, x, {"a": a, "b": b})
    for got, state in zip(run(*factors, *net.weights), "ab", strict=True):
        torch.testing.assert_close(got, want[state])
    leaves = [t.requires_grad_() for t in (*factors, *net.weights)]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_learned_factors_in_bf16_are_read_in_fp32() -> None:
    net = net_of(spec_of("ConvSwiGLU"), dtype=torch.bfloat16)
    x, a, b = torch.randn(3, 2, TOKENS, WIDTH).bfloat16()
    grads = []
    for save in ("all", "block", "states"):
        alpha, beta = (torch.tensor(v, requires_grad=True) for v in (0.9, 1.1))
        nets = {"L": net, "alpha": alpha, "beta": beta}
        out = recurx.recurse(LEARNED, nets, x, {"a": a, "b": b}, save=save)
        assert out["a"].dtype is torch.bfloat16
        loss = out["b"].float().square().sum()
        grads.append(torch.stack(torch.autograd.grad(loss, (alpha, beta))))
    assert all(((g - grads[0]) / grads[0]).abs().max() < 0.02 for g in grads)


def test_names_of_learned_factors() -> None:
    assert LEARNED.nets == ("L", "alpha", "beta") and "learned factors" in LEARNED.changed
    assert Schedule.from_key(LEARNED.key) == LEARNED
    assert str(LEARNED.steps[0]) == "a <- (1 - alpha) * a + alpha * L(beta * (a + b) + (x))"
    net = net_of(spec_of("ConvSwiGLU"))
    x = torch.randn(1, TOKENS, WIDTH)
    for wrong in (0.5, torch.ones(3), torch.tensor(1), net):
        nets = {"L": net, "alpha": wrong, "beta": torch.tensor(1.0)}
        with pytest.raises(InvalidArgument, match="alpha"):
            recurx.recurse(LEARNED, nets, x, {"a": x, "b": x})
    with pytest.raises(InvalidArgument, match="unlike nets"):
        Schedule((Step("L", "z", ("z",), damping="L"),))
    with pytest.raises(InvalidArgument, match="noise"):
        Step("L", "z", ("z",), noise="sigma")
    problem = recurx.Problem(LEARNED, (("L", net.spec),), 1, TOKENS, WIDTH, torch.float32, "cpu")
    for name in backends.ORDER:
        said = backends.unknown_fields(backends.get(name), problem)
        assert (said is None) == (name in ("eager", "cpu", "triton"))
        assert said is None or "learned factors" in said or "conv" in said


def test_a_learned_factor_planted_wrong_bites(monkeypatch: pytest.MonkeyPatch) -> None:
    """The factor of another step in the forward, and its gradient under another name."""
    swapped = {"alpha": "beta", "beta": "alpha"}
    right, names = reference.factor, Step.learned.fget
    wrong = lambda value, *rest: right(swapped.get(value, value), *rest)  # noqa: E731
    with monkeypatch.context() as patched, pytest.raises(AssertionError):
        patched.setattr(reference, "factor", wrong)
        test_learned_factors("all", ())
    misled = property(lambda self: {field: swapped[name] for field, name in names(self).items()})
    with monkeypatch.context() as patched, pytest.raises(AssertionError):
        patched.setattr(Step, "learned", misled)
        test_learned_factors_in_bf16_are_read_in_fp32()


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


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", backends.ORDER)
def test_a_backend_names_the_field_that_it_does_not_run(name: str) -> None:
    backend = backends.get(name)
    for spec in map(spec_of, NAMES):
        problem = recurx.Problem(
            ONE, (("L", NetSpec((spec,))),), 1, TOKENS, WIDTH, torch.float32, "cpu"
        )
        unknown = [field for field in spec.changed if field not in backend.fields]
        said = backends.unknown_fields(backend, problem)
        assert (said is None) == (not unknown)
        assert said is None or f"{unknown[0]}=" in said
    for kind in KINDS:
        sizes = dict(num_heads=4) if kind == ATTENTION else dict(tokens=TOKENS, token_inner=8)
        net = (("L", NetSpec((BlockSpec(kind, WIDTH, 48, **sizes),))),)
        plain = recurx.Problem(ONE, net, 1, TOKENS, WIDTH, torch.float32, "cpu")
        assert backends.unknown_fields(backend, plain) is None
        damped = dataclasses.replace(plain, schedule=ONE.with_factors(damping=0.5))
        said = backends.unknown_fields(backend, damped)
        assert said is None if "damping" in backend.fields else "damping" in said


@pytest.mark.parametrize("name", NAMES)
def test_auto_and_compiled_run_every_variant(name: str) -> None:
    """In bf16 too, and with save="block"; what no engine runs, PyTorch does."""
    spec = spec_of(name)
    net = net_of(spec, spec)
    x, z = torch.randn(2, 2, TOKENS, WIDTH)
    want = reference.run(ONE, {"L": net}, x, {"z": z}, tables_of(spec))["z"]
    got = recurx.recurse(ONE, {"L": net}, x, {"z": z}, cos_sin=tables_of(spec))["z"]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    low = recurx.recurse(
        ONE, {"L": net}, x.bfloat16(), {"z": z.bfloat16()}, cos_sin=tables_of(spec)
    )["z"]
    assert ((low.float() - want).norm() / want.norm()) < 0.05


_OVER_TOKENS = dict(kind=TOKEN_MLP, tokens=TOKENS, token_inner=8)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dict(kind="mamba"), "kind"),
        (dict(norm="batch"), "norm"),
        (dict(kv_heads=3), "kv_heads"),
        (dict(biases=("q",)), "biases"),
        (dict(qk_norm_weight=True), "qk_norm_weight"),
        (dict(conv=-1), "conv"),
        (dict(window=2.0), "window"),
        (dict(residual_scale=float("inf")), "residual_scale"),
        (dict(skip_scale=float("nan")), "skip_scale"),
        (dict(learned_skip="row"), "learned_skip"),
        (dict(axial=(3, 4)), "axial"),
        (dict(inner_norm="rms", inner_norm_of="product", activation="relu"), "inner_norm_of"),
        (dict(kind=NO_MIXER, mask="causal"), "mask"),
        (dict(_OVER_TOKENS, learned_scale="channel"), "learned_scale"),
        (dict(_OVER_TOKENS, learned_skip="channel"), "learned_skip"),
        (dict(norm_weight=1), "norm_weight"),
        (dict(mask="causal", prefix=3), "mask='prefix'"),
        (dict(biases=3), "biases"),
        (dict(axial=3), "axial"),
        (dict(axial=("3", 4, 0)), "axial"),
        (dict(axial=(3.0, 4, 0)), "axial"),
        (dict(inner_norm="rms", inner_norm_tokens=True), "inner_norm_tokens"),
        (dict(eps="1e-5"), "eps"),
        (dict(eps=-1e-5), "eps"),
        (dict(eps=float("nan")), "eps"),
        (dict(eps=True), "eps"),
    ],
)
def test_impossible_blocks_are_refused(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        BlockSpec(**{**dict(kind=ATTENTION, hidden=WIDTH, inner=48, num_heads=4), **wrong})


def test_numbers_and_lists_of_any_kind_are_one_value() -> None:
    """NumPy's numbers and arrays, tensors, lists: equal to Python's own, and with the same key."""
    numpy = pytest.importorskip("numpy")
    plain = dict(
        kv_heads=2, head_size=8, window=3, conv=2, residual_scale=0.5, attn_gate=True,
        axial=(3, 4, 0), biases=("qkv", "o"), dropout=0.5,
    )  # fmt: skip
    given = dict(
        kv_heads=numpy.int64(2), head_size=torch.tensor(8), window=numpy.int32(3),
        conv=numpy.uint8(2), residual_scale=numpy.float32(0.5), attn_gate=numpy.bool_(True),
        axial=numpy.array([3, 4, 0]), biases=["qkv", "o"], dropout=numpy.float64(0.5),
    )  # fmt: skip
    want = BlockSpec(ATTENTION, WIDTH, 48, 4, eps=0.25, **plain)
    got = BlockSpec(
        ATTENTION, numpy.int64(WIDTH), torch.tensor(48), 4, eps=numpy.float32(0.25), **given
    )
    assert (got, hash(got), got.key) == (want, hash(want), want.key)
    assert BlockSpec(ATTENTION, WIDTH, 48, 4, axial=[3, 4, 0]).key.endswith("axial:3+4+0")
    with pytest.raises(InvalidArgument, match="axial"):
        want.with_fields("axial:3+x")


def test_heads_that_do_not_divide_the_width() -> None:
    """Their width is a field of its own; operators, which take a spec as text, know it too."""
    spec = BlockSpec(ATTENTION, WIDTH, 48, 3, head_size=16)
    assert BlockSpec.from_key(spec.key) == spec
    net, (x, z) = net_of(spec), torch.randn(2, 2, TOKENS, WIDTH)
    leaves = [weight.requires_grad_() for weight in net.weights]
    for save in ("all", "block", "states"):
        out = recurx.recurse(ONE, {"L": net}, x, {"z": z}, save=save)["z"]
        want = reference.run(ONE, {"L": net}, x, {"z": z})["z"]
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
        got, true = (torch.autograd.grad(t.square().sum(), leaves) for t in (out, want))
        torch.testing.assert_close(got, true, rtol=1e-3, atol=1e-3)


def test_a_channel_scale_wants_channels() -> None:
    """Beside a token MLP that is normed over T it would be of tokens, even where D = T."""
    for tokens in (TOKENS, WIDTH):
        over = dict(_OVER_TOKENS, num_heads=0, tokens=tokens, learned_scale="channel")
        with pytest.raises(InvalidArgument, match="token_norm='hidden'"):
            BlockSpec(hidden=WIDTH, inner=48, **over)
        spec = BlockSpec(hidden=WIDTH, inner=48, **over, token_norm="hidden")
        h = torch.randn(2, tokens, WIDTH)
        assert reference.block(h, spec, net_of(spec).weights, None).shape == h.shape
