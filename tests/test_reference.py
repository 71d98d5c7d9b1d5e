"""The specification checked against itself: fp64 gradcheck, written-out backward, hand values."""

from __future__ import annotations

import math

import pytest
import torch

from recurx import Schedule, Step, reference, reference_backward
from recurx.nets import ATTENTION, KINDS, TOKEN_MLP
from recurx.operands import Operands, Span
from tests.factories import make_inputs, make_net, problem_for, rope

SMALL = dict(tokens=3, hidden=8, inner=6, heads=2, token_inner=4)
COS_SIN = tuple(table.double() for table in rope(3, 8, 2))


def test_rms_norm_by_hand() -> None:
    x = torch.tensor([3.0, 4.0])
    expected = x / math.sqrt(12.5 + 1e-5)
    assert torch.equal(reference.rms_norm(x, 1e-5), expected)


def test_rope_rotates_the_pair_by_position() -> None:
    cos, sin = rope(tokens=5, hidden=4, heads=1)
    x = torch.zeros(1, 5, 1, 4)
    x[..., 0] = 1.0  # pair (0, 2) turns by `position` radians, pair (1, 3) by position / 100
    turned = reference.rope_rotate(x, cos, sin)[0, :, 0]
    position = torch.arange(5.0)
    assert torch.allclose(turned[:, 0], position.cos()) and torch.allclose(
        turned[:, 2], position.sin()
    )


def test_attention_is_softmax_of_scaled_products() -> None:
    h = torch.randn(2, 3, 8, dtype=torch.float64)
    net = make_net(ATTENTION, **SMALL, dtype=torch.float64)
    qkv, o = net.weights[:2]
    q, k, v = (h @ qkv.T).view(2, 3, 3, 2, 4).permute(2, 0, 3, 1, 4)
    p = torch.softmax(q @ k.transpose(-1, -2) / 2.0, dim=-1)
    expected = (p @ v).transpose(1, 2).reshape(2, 3, 8) @ o.T
    torch.testing.assert_close(reference.attention(h, qkv, o, 2, None), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_in_fp64(kind: str) -> None:
    schedule = Schedule.trm(1, 2)
    net = make_net(kind, **SMALL, blocks=1, dtype=torch.float64, requires_grad=True)
    x, carry = make_inputs(schedule, batch=1, tokens=3, hidden=8, dtype=torch.float64)
    x.requires_grad_()

    def run(x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        nets = {"L": type(net)(net.spec, weights)}
        return tuple(reference.run(schedule, nets, x, carry, COS_SIN).values())

    assert torch.autograd.gradcheck(run, (x, *net.weights), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "schedule",
    [
        Schedule.trm(1, 2, window="full"),
        Schedule.hier(3, 1, window="full"),
        Schedule.single_z(2, 2, window="full"),
        Schedule((Step("L", "a", ("x", "b", "b"), ("a", "x")), Step("L", "b", ("a", "a")))),
    ],
    ids=lambda s: s.name,
)
def test_written_out_backward_equals_autograd(kind: str, schedule: Schedule) -> None:
    net = make_net(kind, **SMALL, dtype=torch.float64, requires_grad=True)
    x, carry = make_inputs(schedule, batch=2, tokens=3, hidden=8, dtype=torch.float64)
    leaves = [x.requires_grad_(), *(state.requires_grad_() for state in carry.values())]
    out = reference.run(schedule, {"L": net}, x, carry, COS_SIN)
    d_out = [torch.randn_like(state) for state in out.values()]
    expected = torch.autograd.grad(
        list(out.values()), [*leaves, *net.weights], d_out, materialize_grads=True
    )
    problem = problem_for(schedule, {"L": net}, x)
    with torch.no_grad():
        operands = Operands(x, tuple(carry.values()), net.weights, COS_SIN)
        got = reference_backward.run(problem, operands, Span(0, len(schedule)), d_out)
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=f"gradient {index}")


def test_backward_check_notices_a_wrong_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_backward, "rope_backward", lambda d, cos, sin: d)
    with pytest.raises(AssertionError):
        test_written_out_backward_equals_autograd(ATTENTION, Schedule.trm(1, 2, window="full"))


def test_addition_order_is_part_of_the_contract() -> None:
    """z_L + (z_H + x) and (z_L + z_H) + x differ in bf16, so a backend may not choose."""
    nested = Schedule((Step("L", "z_L", ("z_L",), ("z_H", "x")),))
    flat = Schedule((Step("L", "z_L", ("z_L", "z_H", "x")),))
    x, carry = make_inputs(nested, dtype=torch.bfloat16)
    net = {"L": make_net(TOKEN_MLP)}
    a, b = (reference.run(s, net, x, carry)["z_L"] for s in (nested, flat))
    assert not torch.equal(a, b)
