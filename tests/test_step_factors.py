"""Steps that differ from those of TRM and HRM: numbers, learned factors and noise of a call."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

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
from recurx.specs import ATTENTION
from tests.test_variants import ONE
from tests.variants import TOKENS, WIDTH, net_of, spec_of


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
