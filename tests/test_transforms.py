"""torch.func over `recurx.recurse`: right by PyTorch's operators, or refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jvp, vjp, vmap

import recurx
from recurx import Schedule
from recurx.models import TRM
from recurx.nets import KINDS, Net
from tests.factories import make_inputs, make_net, rope

# The first three calls lie before the window, and must have no derivative in either mode.
SCHEDULE = Schedule.trm(2, 2)
PLAIN = ("eager", "auto")


def losses(
    kind: str, schedule: Schedule = SCHEDULE
) -> tuple[Callable[..., Tensor], Tensor, tuple[Tensor, ...]]:
    """loss(x, weights, backend), x and weights, in fp64."""
    net = make_net(kind, dtype=torch.float64)
    x, carry = make_inputs(schedule, batch=2, dtype=torch.float64)
    tables = rope()

    def loss(x: Tensor, weights: tuple[Tensor, ...], backend: str = "eager") -> Tensor:
        nets = {"L": Net(net.spec, weights)}
        out = recurx.recurse(schedule, nets, x, carry, backend=backend, cos_sin=tables)
        return sum(state.sin().sum() for state in out.values())  # type: ignore[return-value]

    return loss, x, tuple(net.weights)


def ordinary(loss: Any, x: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients of PyTorch's own backward, of x and of each weight."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, *weights)]
    return torch.autograd.grad(loss(leaves[0], tuple(leaves[1:])), leaves)


def directions(x: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    draw = torch.Generator().manual_seed(3)
    v, *rest = (torch.randn(t.shape, generator=draw, dtype=t.dtype) for t in (x, *weights))
    return v, tuple(rest)


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_those_of_the_backward(kind: str, backend: str) -> None:
    loss, x, weights = losses(kind)
    want = ordinary(loss, x, weights)
    of_x, of_weights = grad(lambda x, w: loss(x, w, backend), argnums=(0, 1))(x, weights)
    torch.testing.assert_close((of_x, *of_weights), want)
    _, pull = vjp(lambda x: loss(x, weights, backend), x)
    torch.testing.assert_close(pull(torch.ones((), dtype=x.dtype))[0], want[0])
    tangents = directions(x, weights)
    _, slope = jvp(lambda x, w: loss(x, w, backend), (x, weights), tangents)
    pairs = zip(want, (tangents[0], *tangents[1]), strict=True)
    torch.testing.assert_close(slope, sum((g * v).sum() for g, v in pairs))


@pytest.mark.parametrize("backend", PLAIN)
def test_second_derivatives(backend: str) -> None:
    """Against differences of the first one along a line of x and the weights at once; of a window
    of all calls, for the states that enter another one move with x too."""
    loss, x, weights = losses(KINDS[0], dataclasses.replace(SCHEDULE, grad_from=0))
    v, ws = directions(x, weights)

    def along(a: Tensor) -> Tensor:
        return loss(x + a * v, tuple(w + a * d for w, d in zip(weights, ws, strict=True)), backend)

    def slope(a: float) -> Tensor:
        at = torch.tensor(a, dtype=x.dtype, requires_grad=True)
        return torch.autograd.grad(along(at), at)[0]

    zero, step = torch.zeros((), dtype=x.dtype), 1e-5
    second = hessian(along)(zero)
    torch.testing.assert_close(second, (slope(step) - slope(-step)) / (2 * step), rtol=1e-5, atol=0)
    torch.testing.assert_close(jacfwd(along)(zero), slope(0.0))


@pytest.mark.parametrize("backend", PLAIN)
def test_vmap_is_a_loop(backend: str) -> None:
    loss, x, weights = losses(KINDS[0])
    xs = torch.stack([x, -x, 2 * x])
    several = tuple(torch.stack([w, 0.5 * w, -w]) for w in weights)
    each = torch.stack([loss(x, w) for x, *w in zip(xs, *several, strict=True)])
    torch.testing.assert_close(vmap(lambda x, w: loss(x, w, backend))(xs, several), each)
    slopes = vmap(grad(lambda w, x: loss(x, w, backend)), (None, 0))(weights, xs)
    alone = torch.stack([ordinary(loss, x, weights)[1] for x in xs])
    torch.testing.assert_close(slopes[0], alone)


def test_a_model_with_other_weights() -> None:
    """Gradients of `functional_call` are those of the loss's own backward."""
    torch.manual_seed(0)
    model = TRM(
        hidden_size=32, num_heads=2, H_cycles=1, L_cycles=1, L_layers=1, seq_len=6, vocab_size=7,
        batch_size=2, num_puzzle_identifiers=1, puzzle_emb_ndim=0, forward_dtype="float32",
    ).eval()  # fmt: skip
    batch = {"inputs": torch.randint(7, (2, 6))}
    carry = model.initial_carry(batch)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        _, out = functional_call(model, parameters, (carry, batch))
        return out["logits"].float().square().sum()

    parameters = dict(model.named_parameters())
    for _ in range(2):  # as read for the first time, and as remembered
        got = grad(loss)({name: p.detach() for name, p in parameters.items()})
        want = torch.autograd.grad(loss(parameters), [*parameters.values()], allow_unused=True)
        for name, slope in zip(parameters, want, strict=True):
            want_of = torch.zeros_like(got[name]) if slope is None else slope
            # Under `grad` PyTorch runs it, else an engine may, whose sums round otherwise.
            far = float((got[name] - want_of).abs().max())
            assert far <= 1e-5 * max(1.0, float(want_of.abs().max())), (name, far)


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_engines_refuse_by_name(backend: str) -> None:
    loss, x, weights = losses(KINDS[0])
    calls: list[Callable[[], object]] = [
        lambda: grad(lambda x: loss(x, weights, backend))(x),
        lambda: grad(lambda w: loss(x, w, backend))(weights),
        lambda: vmap(lambda x: loss(x, weights, backend))(x[None]),
        lambda: jvp(lambda w: loss(x, w, backend), (weights,), (weights,)),
    ]
    for call in calls:
        with pytest.raises(recurx.RecurxError, match=rf"'{backend}'.*torch\.func.*eager"):
            call()
