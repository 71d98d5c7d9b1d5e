"""Who runs blocks that differ, who names the field that it does not run, and what no block is."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import recurx
from recurx import (
    BlockSpec,
    InvalidArgument,
    backends,
    reference,
)
from recurx.specs import ATTENTION, KINDS, NO_MIXER, TOKEN_MLP, NetSpec
from tests.test_variants import NAMES, ONE
from tests.variants import TOKENS, WIDTH, net_of, spec_of, tables_of


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
