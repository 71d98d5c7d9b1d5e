"""Blocks and steps that differ from those of TRM and HRM in the CPU engine, field by field.

Each instruction set of this machine; fp64 is the judge, by the error that plain PyTorch makes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import recurx
from recurx import BlockSpec, Net, NetSpec, Schedule, Step, backends, reference
from recurx.backends import cpu
from recurx.nets import numbers_of
from recurx.operands import Operands, Span
from recurx.plan import cpu as plan
from recurx.route import route
from recurx.specs import ATTENTION, TOKEN_MLP, VARIANT
from tests.cpu import build
from tests.factories import make_inputs, problem_for, rounded, wide
from tests.kernels.compare import assert_as_exact, relative_error
from tests.variants import VARIANTS as SYSTEMS
from tests.variants import net_of, tables_of

TOKENS, WIDTH = 12, 64
_ATTENTION: dict[str, Any] = dict(kind=ATTENTION, hidden=WIDTH, inner=48, num_heads=4)
_TOKENS: dict[str, Any] = dict(
    kind=TOKEN_MLP, hidden=WIDTH, inner=48, tokens=TOKENS, token_inner=20, inner_norm="rms",
    inner_norm_weight=True, inner_norm_tokens=True,
)  # fmt: skip
EVERYTHING: dict[str, Any] = dict(
    _ATTENTION, norm="layer", norm_weight=True, norm_bias=True, placement="sandwich",
    residual_scale=0.5, learned_scale="channel", skip_scale=0.8, learned_skip="channel",
    kv_heads=2, head_size=6, mask="prefix", prefix=2, window=3, qk_norm="layer",
    qk_norm_weight=True, attn_gate=True, attn_norm="layer", attn_norm_weight=True,
    activation="gelu", inner_norm="layer", inner_norm_weight=True, conv=4,
    biases=("qkv", "o", "gate_up", "down", "attn_gate"),
)  # fmt: skip
VARIANTS = {
    **SYSTEMS,
    "token MLP with inner norms": dict(_TOKENS, placement="sandwich"),
    "token MLP, norms of products": dict(
        _TOKENS, inner_norm_of="product", learned_scale="scalar", learned_skip="scalar"
    ),
    "everything, columns": dict(EVERYTHING, axial=(4, 3, 0)),
    "everything, before the gate": dict(
        EVERYTHING, conv_of="gate_up", activation="silu", inner_norm_of="product", mask="causal",
        prefix=0,
    ),
}  # fmt: skip
ONE = Schedule((Step("L", "z", ("z",), ("x",)),))
DTYPES = [torch.float32, torch.bfloat16]
ISAS = build.usable()

pytestmark = pytest.mark.skipif(not ISAS, reason="recurx._C is not built")


def spec_of(name: str, **more: Any) -> BlockSpec:
    """At a width that the engine takes, with an inner width that fills no vector."""
    fields = {**VARIANTS[name], "hidden": WIDTH, **more}
    fields["inner"] = fields["inner"] and 84
    if "head_size" in fields:
        fields["head_size"] = 48
    return BlockSpec(**fields)


@pytest.fixture(autouse=True)
def small_work_is_split_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(plan, "LEAST_SPLIT", 0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def engine(
    schedule: Schedule, net: Net, x: Tensor, carry: dict[str, Tensor], cos_sin: Any,
    seed: Tensor | None = None, start: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    problem = problem_for(schedule, {"L": net}, x)
    assert backends.unknown_fields(cpu.BACKEND, problem) is None
    assert cpu.BACKEND.why_unsupported(problem) is None
    operands = Operands(x, tuple(carry.values()), tuple(net.weights), cos_sin, seed)
    out = cpu.BACKEND.run(problem, operands, Span(start, len(schedule)))
    return dict(zip(schedule.states, out, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("isa", ISAS)
def test_one_call_against_fp64(
    isa: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECURX_CPU_ISA", isa)
    spec = spec_of(name)
    net, cos_sin = net_of(spec, seed=1), tables_of(spec)
    x, carry = make_inputs(ONE, batch=3, tokens=TOKENS, hidden=WIDTH, dtype=dtype)
    exact_net, plain_net = (rounded(net, dtype, to) for to in (torch.float64, torch.float32))
    exact = reference.run(ONE, {"L": exact_net}, x.double(), wide(carry), cos_sin)["z"]
    plain = reference.run(ONE, {"L": plain_net}, x, carry, cos_sin)["z"]
    got = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        got.append(engine(ONE, plain_net, x, carry, cos_sin)["z"])
        # Scratch is NaN before each rerun: a read of what nobody wrote would show.
        engine(ONE, plain_net, x * torch.nan, carry, cos_sin)
    assert_as_exact(got[0], plain, exact)
    assert torch.equal(got[0], got[1]) and torch.equal(got[1], got[2])
    if dtype is torch.float32:
        assert (got[0] - plain).abs().max() < 1e-5
    alone = engine(ONE, plain_net, x[1:2], {"z": carry["z"][1:2]}, cos_sin)["z"]  # split by columns
    assert torch.equal(alone, got[0][1:2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_wider_than_a_chunk_of_the_depth(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """544 and 1,060 columns, 33 tokens: ragged tiles, several chunks, heads wider than D / H."""
    monkeypatch.setenv("RECURX_CPU_ISA", isa)
    changes = dict(hidden=544, inner=1060, num_heads=6, kv_heads=3, head_size=80, window=9)
    net = net_of(BlockSpec(**{**EVERYTHING, **changes}), seed=1)
    x, carry = make_inputs(ONE, batch=2, tokens=33, hidden=544, dtype=dtype)
    cos_sin = recurx.rope_tables(33, 80)
    exact_net, plain_net = (rounded(net, dtype, to) for to in (torch.float64, torch.float32))
    exact = reference.run(ONE, {"L": exact_net}, x.double(), wide(carry), cos_sin)["z"]
    plain = reference.run(ONE, {"L": plain_net}, x, carry, cos_sin)["z"]
    assert_as_exact(engine(ONE, plain_net, x, carry, cos_sin)["z"], plain, exact)


def without(spec: BlockSpec, net: Net, field: str) -> Net | None:
    """The net with one field as in TRM and the weights that are left; None where none fits."""
    try:
        other = dataclasses.replace(spec, **{field: VARIANT[field]})
    except recurx.InvalidArgument:  # another field needs this one
        return None
    by_slot = dict(zip(spec.slots, net.weights, strict=True))
    if not set(other.slots) <= set(by_slot):
        return None  # matrices of other sizes
    return Net(NetSpec((other,)), [by_slot[slot] for slot in other.slots])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_field_that_is_ignored_is_seen(name: str) -> None:
    """The test above fails where the engine is told TRM's value of any field."""
    spec, dtype = spec_of(name), torch.bfloat16  # whose tolerance is the widest
    net, cos_sin = rounded(net_of(spec, seed=1), dtype, torch.float32), tables_of(spec)
    x, carry = make_inputs(ONE, batch=3, tokens=TOKENS, hidden=WIDTH, dtype=dtype)
    exact = reference.run(ONE, {"L": rounded(net, dtype, torch.float64)}, x.double(), wide(carry),
                          cos_sin)["z"]  # fmt: skip
    plain = reference.run(ONE, {"L": net}, x, carry, cos_sin)["z"]
    for field in spec.changed:
        if field == "kind" or (other := without(spec, net, field)) is None:
            continue
        got = engine(ONE, other, x, carry, cos_sin)["z"]
        assert relative_error(got, exact) > 1.25 * relative_error(plain, exact), field


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_steps_with_factors_and_mixed_nets(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each factor of a step, over blocks of TRM and others in turn; a range of the calls too."""
    monkeypatch.setenv("RECURX_CPU_ISA", isa)
    classic = BlockSpec(ATTENTION, WIDTH, 84, num_heads=4)
    net = net_of(classic, spec_of("pre-LayerNorm, ReLU"), classic, spec_of("norm weights"))
    factors = dict(damping=0.7, scale=1.3, noise=0.2)
    schedule = Schedule.trm(1, 2).with_factors(**factors)
    x, carry = make_inputs(schedule, batch=3, tokens=TOKENS, hidden=WIDTH, dtype=dtype)
    cos_sin, seed = recurx.rope_tables(TOKENS, 16), torch.tensor([2**40 + 5, 3])
    net = rounded(net, dtype, torch.float32)
    exact_net = rounded(net, dtype, torch.float64)

    def judged(got: dict[str, Tensor], start: int) -> None:
        span = dict(start=start, seed=seed)
        exact = reference.run(schedule, {"L": exact_net}, x.double(), wide(carry), cos_sin, **span)
        plain = reference.run(schedule, {"L": net}, x, carry, cos_sin, **span)
        for state in carry:
            assert_as_exact(got[state], plain[state], exact[state])

    for start in (0, 1):
        got = engine(schedule, net, x, carry, cos_sin, seed, start)
        judged(got, start)
        torch.set_num_threads(1)
        again = engine(schedule, net, x, carry, cos_sin, seed, start)
        assert all(torch.equal(got[state], again[state]) for state in got)
    plain_steps = {"damping": 1.0, "scale": 1.0, "noise": 0.0}
    for name, value in plain_steps.items():  # the tolerance bites
        other = Schedule.trm(1, 2).with_factors(**{**factors, name: value})
        with pytest.raises(AssertionError, match="relative error"):
            judged(engine(other, net, x, carry, cos_sin, seed), 0)
    for other in ([1, 0], [0, 1]):  # another seed; the number of another first sample
        with pytest.raises(AssertionError, match="relative error"):
            judged(engine(schedule, net, x, carry, cos_sin, seed + torch.tensor(other)), 0)


def test_through_the_front_door() -> None:
    """Forward and gradient, the calls before the window and those in it."""
    net = net_of(spec_of("ConvSwiGLU"), spec_of("grouped heads, gate, prefix"))
    schedule = Schedule.trm(2, 1).with_factors(damping=0.9, noise=0.01)
    x, carry = make_inputs(schedule, batch=2, tokens=TOKENS, hidden=WIDTH)
    weights = [w.requires_grad_() for w in net.weights]
    how = dict(cos_sin=recurx.rope_tables(TOKENS, 16), seed=7)
    grads = {}
    for backend in ("cpu", "eager"):
        out = recurx.recurse(schedule, {"L": net}, x, carry, backend=backend, **how)["z_H"]
        grads[backend] = [out, *torch.autograd.grad(out.square().sum(), weights)]
    for got, want in zip(grads["cpu"], grads["eager"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("save", ["all", "block", "states"])
def test_window_of_steps_with_factors(save: str, dtype: torch.dtype) -> None:
    """Blocks of TRM in damped, scaled and noisy steps: the engine's own backward, against fp64."""
    net = net_of(*[BlockSpec(ATTENTION, WIDTH, 84, num_heads=4)] * 2)
    factors = dict(damping=0.6, scale=1.4, noise=0.1)
    x, carry = make_inputs(Schedule.trm(1, 2), batch=3, tokens=TOKENS, hidden=WIDTH, dtype=dtype)
    cos_sin, seed = recurx.rope_tables(TOKENS, 16), torch.tensor([11, 5])

    def gradients(backend: str, to: torch.dtype | None = None, **other: float) -> list[Tensor]:
        schedule = dataclasses.replace(
            Schedule.trm(1, 2, window="full").with_factors(**{**factors, **other}),
            detach_carry=False,
        )
        held = rounded(net, dtype, to or torch.float32)
        leaves = [w.requires_grad_() for w in held.weights]
        inputs = [t.to(to or dtype).requires_grad_() for t in (x, *carry.values())]
        states = dict(zip(carry, inputs[1:], strict=True))
        how = dict(cos_sin=cos_sin, seed=seed, save=save, backend=backend)
        out = recurx.recurse(schedule, {"L": Net(net.spec, leaves)}, inputs[0], states, **how)
        wider = torch.promote_types(to or dtype, torch.float32)
        loss = sum((s.to(wider) ** 2 * (i + 1)).sum() for i, s in enumerate(out.values()))
        return [*torch.autograd.grad(loss, [*inputs, *leaves]), out["z_H"].detach()]

    exact, plain = gradients("eager", torch.float64), gradients("eager")
    got = gradients("cpu")
    for each in zip(got, plain, exact, strict=True):
        assert_as_exact(*each, ratio=1.5)
    if save == "all":  # the tolerance bites
        for name, value in (("damping", 1.0), ("scale", 1.0), ("noise", 1e-4)):
            other = gradients("cpu", **{name: value})
            with pytest.raises(AssertionError, match="relative error"):
                assert_as_exact(other[0], plain[0], exact[0], ratio=1.5)


def test_auto_weighs_every_variant() -> None:
    """Both plans have a price; a larger one where there is more to do."""
    for name in VARIANTS:
        spec = spec_of(name)
        problem = problem_for(ONE, {"L": net_of(spec)}, torch.zeros(8, TOKENS, WIDTH))
        prices = {each.backend: each.predicted for each in route(problem).considered}
        assert (prices["cpu"] or 0) > 0 and (prices["eager"] or 0) > 0, name
        twice = problem_for(ONE, {"L": net_of(spec, spec)}, torch.zeros(8, TOKENS, WIDTH))
        more = {each.backend: each.predicted for each in route(twice).considered}
        assert more["cpu"] > prices["cpu"] and more["eager"] > prices["eager"], name


def test_weights_of_any_layout_and_age() -> None:
    """A bias is seen when it changes, and read where it lies apart in memory."""
    spec = spec_of("post-LayerNorm, GELU")
    net, cos_sin = net_of(spec), tables_of(spec)
    x, carry = make_inputs(ONE, tokens=TOKENS, hidden=WIDTH)
    slots = [name for name, _ in spec.slots]
    first = engine(ONE, net, x, carry, cos_sin)["z"]
    bias = net.weights[slots.index("down_bias")]
    bias.data[3] += 0.5
    second = engine(ONE, net, x, carry, cos_sin)["z"]
    assert (second - first).abs().max() > 1e-3
    apart = torch.stack([bias, torch.zeros_like(bias)], dim=1)[:, 0]
    assert not apart.is_contiguous()
    weights = [apart if name == "down_bias" else w
               for name, w in zip(slots, net.weights, strict=True)]  # fmt: skip
    assert torch.equal(engine(ONE, Net(net.spec, weights), x, carry, cos_sin)["z"], second)


def test_refused_by_name() -> None:
    spec = spec_of("ConvSwiGLU", conv_dtype="bfloat16")
    x, carry = make_inputs(ONE, tokens=TOKENS, hidden=WIDTH)
    with pytest.raises(recurx.BackendUnavailable, match="states' dtype, not bfloat16"):
        recurx.recurse(ONE, {"L": net_of(spec)}, x, carry, backend="cpu")
    module = cpu._load()[0]
    for fields, message in (
        ({"no_such_field": 1}, "the field of a block 'no_such_field'"),
        ({"activation": "swish"}, "activation 'swish'"),
    ):
        with pytest.raises(ValueError, match=message):
            module.cpu_pack([numbers_of(spec)], [], False, "portable", [], [(fields, [])])
    with pytest.raises(ValueError, match="the matrices that a block has"):
        module.cpu_pack([cpu.numbers_of(spec)], [], False, "portable", [], [({"conv": 2}, [])])
