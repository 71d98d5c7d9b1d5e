"""What the CPU engine reads beside h and the weights: counters of dropout, masks of keys, learned
factors of steps. Each instruction set, forward and gradients, against fp64 under the same draws."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch

import recurx
from recurx import BlockSpec, Net, NetSpec, Schedule, Step, backends, reference
from recurx.backends import cpu
from recurx.operands import Operands, Span
from recurx.solving import on_cpu
from recurx.specs import ATTENTION, NO_MIXER, NORM, TOKEN_MLP
from tests.cpu.test_cpu_variants import EVERYTHING, ISAS
from tests.cpu.windows import DTYPES, SAVE, errors, on_engine, truth
from tests.cpu.windows import small_work_is_split_too as small_work_is_split_too
from tests.factories import make_inputs, problem_for, rounded, wide
from tests.kernels.compare import ERROR_RATIO, assert_as_exact, relative_error
from tests.variants import net_of

WIDTH = 64
_ATTENTION: dict[str, Any] = dict(kind=ATTENTION, hidden=WIDTH, inner=84, num_heads=4)
_TOKENS: dict[str, Any] = dict(kind=TOKEN_MLP, hidden=WIDTH, inner=84, token_inner=20)
_DROPS: dict[str, Any] = dict(dropout=0.3, drop_path=0.3)
# 13 tokens: columns of h begin anywhere in a four of the counter's numbers.
SPECS = {
    "padding": (13, dict(_ATTENTION, key_padding=True)),
    "padding, causal window, shared K/V": (
        40, dict(_ATTENTION, key_padding=True, mask="causal", window=9, kv_heads=2)
    ),
    "dropout": (13, dict(_ATTENTION, dropout=0.25)),
    "paths, pre-norm": (
        13, dict(_ATTENTION, drop_path=0.5, placement="pre", learned_scale="channel")
    ),
    "over T": (13, dict(_TOKENS, **_DROPS, tokens=13, learned_scale="scalar")),
    "over T, sandwich": (
        13, dict(_TOKENS, **_DROPS, tokens=13, placement="sandwich", learned_scale="scalar",
                 residual_scale=0.5)
    ),
    "over T, normed over D": (13, dict(_TOKENS, **_DROPS, tokens=13, token_norm="hidden")),
    "no mixer": (13, dict(kind=NO_MIXER, hidden=WIDTH, inner=84, **_DROPS)),
    "everything, columns": (
        12, {**EVERYTHING, **_DROPS, "key_padding": True, "axial": (4, 3, 0), "inner": 84,
             "head_size": 48}
    ),
    "everything, rows": (
        12, {**EVERYTHING, **_DROPS, "key_padding": True, "axial": (3, 4, 1), "inner": 84,
             "head_size": 48, "placement": "post"}
    ),
}  # fmt: skip
CALLS = Schedule((Step("L", "z", ("z",), ("x",)),) * 2)
# The instruction sets come to each case in turn: they share its truth.
RUNS = [(isa, name) for name in SPECS for isa in ISAS]
pytestmark = pytest.mark.skipif(not ISAS, reason="recurx._C is not built")


def given_of(name: str, dtype: torch.dtype, seed: int = 1, batch: int = 5) -> tuple[Any, ...]:
    """(schedule, nets, x, carry, rope, seed, key mask): the case's block twice, behind one of TRM's
    where both have heads of one width, or none."""
    tokens, fields = SPECS[name]
    spec, plain = BlockSpec(**fields), BlockSpec(**_ATTENTION)
    blocks = (plain, spec, spec) if spec.head_dim == plain.head_dim else (spec, spec)
    net = rounded(net_of(*blocks, seed=seed), dtype, torch.float32)
    x, carry = make_inputs(CALLS, batch=batch, tokens=tokens, hidden=WIDTH, dtype=dtype, seed=seed)
    rope = recurx.rope_tables(spec.line(tokens), spec.head_dim or plain.head_dim)
    mask = None
    if spec.key_padding:
        left = torch.arange(tokens) >= torch.tensor([tokens, tokens // 2, 1, 0, tokens])[:, None]
        mask = left.roll(seed % 3, 1)[:batch]
        mask[4:] = torch.arange(tokens) % 3 == 0
    drawn = torch.tensor([2**40 + seed, 3]) if spec.dropout or spec.drop_path else None
    return CALLS, {"L": net}, x, carry, rope, drawn, mask


@functools.lru_cache(maxsize=32)
def draw_of(name: str, dtype: torch.dtype, seed: int) -> tuple[Any, Any]:
    given = given_of(name, dtype, seed)
    return given, truth(given)


def forward(given: tuple[Any, ...], start: int = 0) -> torch.Tensor:
    schedule, nets, x, carry, *beside = given
    problem = problem_for(schedule, nets, x)
    assert backends.why_not("cpu", problem) is None
    weights = tuple(w for name in schedule.nets for w in nets[name].weights)
    operands = Operands(x, tuple(carry.values()), weights, *beside)
    return cpu.BACKEND.run(problem, operands, Span(start, len(schedule)))[0]


def judged(got: torch.Tensor, given: tuple[Any, ...], start: int = 0) -> None:
    schedule, nets, x, carry, rope, seed, mask = given
    exact_nets = {n: Net(net.spec, [w.double() for w in net.weights]) for n, net in nets.items()}
    how = dict(start=start, seed=seed, key_mask=mask)
    exact = reference.run(schedule, exact_nets, x.double(), wide(carry), rope, **how)["z"]
    assert_as_exact(got, reference.run(schedule, nets, x, carry, rope, **how)["z"], exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("isa", "name"), RUNS)
def test_calls(isa, name, dtype, monkeypatch) -> None:
    """Any number of threads and any split of the batch have the same bits."""
    monkeypatch.setenv("RECURX_CPU_ISA", isa)
    given = given_of(name, dtype)
    got = forward(given)
    judged(got, given)
    judged(forward(given, 1), given, 1)
    schedule, nets, x, carry, rope, seed, mask = given
    forward((schedule, nets, x * torch.nan, *given[3:]))  # scratch is NaN now
    torch.set_num_threads(3)
    assert torch.equal(forward(given), got)
    for own in (slice(0, 1), slice(1, 5)):
        first = None if seed is None else seed + torch.tensor([0, own.start])
        part = {"z": carry["z"][own]}, rope, first, None if mask is None else mask[own]
        assert torch.equal(forward((schedule, nets, x[own], *part)), got[own])


@pytest.mark.parametrize("name", SPECS)
def test_other_draws_and_masks_are_seen(name: str) -> None:
    """The tolerance bites: another seed, first sample or call; one more key."""
    *given, seed, mask = given_of(name, torch.bfloat16)
    others = []
    if seed is not None:
        others += [(seed + torch.tensor(more), mask) for more in ([1, 0], [0, 1])]
    if mask is not None:
        others.append((seed, ~mask))
        one = mask.clone()
        one[0, 0] = True
        others.append((seed, one))
    for other in others:
        with pytest.raises(AssertionError, match="relative error"):
            judged(forward((*given, *other)), (*given, seed, mask))
    if seed is not None:  # the second call draws as the first of a run that begins with it
        late = forward((*given, seed, mask), 1)
        schedule = Schedule(CALLS.steps[:1])
        assert not torch.allclose(forward((schedule, *given[1:], seed, mask)), late, atol=0.05)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("isa", "name"), RUNS)
def test_gradients(isa, name, dtype, monkeypatch) -> None:
    """Whatever is kept, with the same bits; errors as in test_cpu_variant_window.py."""
    monkeypatch.setenv("RECURX_CPU_ISA", isa)
    both = []
    for seed in range(1, 13):
        given, truths = draw_of(name, dtype, seed)
        got = on_engine(cpu.BACKEND, given)
        both.append(errors(got, truths))
        right = math.prod(a / b for a, b in both) <= ERROR_RATIO ** len(both)
        if right and len(both) >= (3 if dtype is torch.float32 else 1):
            break
    else:
        raise AssertionError(both)
    schedule, nets, x, *rest = given
    for save, threads in zip((*SAVE, "all"), (1, 2, 3, 3), strict=True):
        torch.set_num_threads(threads)
        on_engine(cpu.BACKEND, (schedule, nets, x * torch.nan, *rest), save)
        other = on_engine(cpu.BACKEND, given, save)
        assert all(torch.equal(a, b) for a, b in zip(got, other, strict=True)), (save, threads)


@pytest.mark.parametrize("name", SPECS)
def test_gradients_of_other_draws_are_seen(name: str) -> None:
    *given, seed, mask = given_of(name, torch.bfloat16)
    truths = truth((*given, seed, mask))
    others = [] if seed is None else [(seed + torch.tensor([0, 1]), mask)]
    others += [] if mask is None else [(seed, ~mask)]
    for other in others:
        ours, theirs = errors(on_engine(cpu.BACKEND, (*given, *other)), truths)
        assert ours > 2 * theirs, (ours, theirs)


def test_slices_of_a_large_batch_draw_by_their_samples() -> None:
    """A window goes slice by slice: 150 samples of 13 tokens are three of them."""
    for name in ("dropout", "over T"):
        given = given_of(name, torch.float32, batch=150)
        ours, theirs = errors(on_engine(cpu.BACKEND, given), truth(given))
        assert ours < max(2 * theirs, 1e-5)


# ---- learned factors -----------------------------------------------------------------------------

LEARNED = Schedule(
    (
        Step("L", "z", ("z",), ("x",), damping="alpha", scale="beta"),
        Step("L", "y", ("z", "y"), damping="alpha", noise=0.1),
        Step("L", "z", ("z", "y"), scale="beta", damping=0.5),
    ),
    grad_from=1,
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["a number", "a channel"])
def test_learned_factors(kind: str, isa: str, dtype: torch.dtype, monkeypatch) -> None:
    """Read at every call."""
    monkeypatch.setenv("RECURX_CPU_ISA", isa)
    net = rounded(net_of(BlockSpec(**_ATTENTION), seed=1), dtype, torch.float32)
    x, carry = make_inputs(LEARNED, batch=3, tokens=13, hidden=WIDTH, dtype=dtype)
    rope, seed = recurx.rope_tables(13, 16), torch.tensor([5, 2])
    shape = () if kind == "a number" else (WIDTH,)
    alpha, beta = (a + 0.2 * torch.rand(shape) for a in (0.6, 1.2))
    factors = {"alpha": alpha, "beta": beta}

    def said(to: torch.dtype, backend: str = "eager") -> dict[str, torch.Tensor]:
        held = {"L": Net(net.spec, [w.to(to) for w in net.weights]), **factors}
        inputs = x.to(to), {name: state.to(to) for name, state in carry.items()}
        how = dict(cos_sin=rope, seed=seed, backend=backend)
        with torch.no_grad():
            return recurx.recurse(LEARNED, held, *inputs, **how)

    exact, plain, got = said(torch.float64), said(dtype), said(dtype, "cpu")
    for state in carry:
        assert_as_exact(got[state], plain[state], exact[state])
    alpha.add_(0.1)  # in place: nothing of it was kept
    for state in carry:
        with pytest.raises(AssertionError, match="relative error"):
            assert_as_exact(said(dtype, "cpu")[state], plain[state], exact[state])


def learned_given(dtype: torch.dtype, seed: int = 1, batch: int = 3) -> tuple[Any, ...]:
    """As `given_of`: three calls of which two have learned factors, one by one and both at once."""
    generator = torch.Generator().manual_seed(seed)
    spec = NetSpec((BlockSpec(NORM, WIDTH, 0, norm_weight=True),))
    values = [a + 0.2 * torch.rand(WIDTH, generator=generator) for a in (0.6, 1.2)]
    alpha, beta = (Net(spec, [value]) for value in values)
    net = rounded(net_of(BlockSpec(**_ATTENTION), seed=seed), dtype, torch.float32)
    given = make_inputs(LEARNED, batch=batch, tokens=13, hidden=WIDTH, dtype=dtype, seed=seed)
    nets = {"L": net, "alpha": alpha, "beta": beta}
    return LEARNED, nets, *given, recurx.rope_tables(13, 16), torch.tensor([seed, 2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_gradients_of_learned_factors(isa: str, dtype: torch.dtype, monkeypatch) -> None:
    """Of each factor by itself too; over several slices, whatever is kept, with the same bits."""
    monkeypatch.setenv("RECURX_CPU_ISA", isa)
    both = []
    for seed, batch in ((1, 3), (2, 3), (3, 150)):
        given = learned_given(dtype, seed, batch)
        got, truths = on_engine(cpu.BACKEND, given), truth(given)
        both.append(errors(got, truths))
        for own, plain, exact in zip(got[-2:], *(part[-2:] for part in truths), strict=True):
            assert relative_error(own, exact) <= 2 * relative_error(plain, exact) + 1e-6
    assert math.prod(a / b for a, b in both) <= ERROR_RATIO ** len(both), both
    for save, threads in zip((*SAVE, "all"), (1, 2, 3, 3), strict=True):
        torch.set_num_threads(threads)
        other = on_engine(cpu.BACKEND, given, save)
        assert all(torch.equal(a, b) for a, b in zip(got, other, strict=True)), (save, threads)


def test_factors_alone_may_want_a_gradient() -> None:
    """Through `recurse`, where neither weights nor states want one; and one factor of two."""
    schedule, nets, x, carry, rope, seed = learned_given(torch.float32)
    net = nets["L"]

    def grads(backend: str, *wanted: str) -> list[torch.Tensor]:
        leaves = {
            n: nets[n].weights[0].clone().requires_grad_(n in wanted) for n in nets if n != "L"
        }
        out = recurx.recurse(
            schedule, {"L": net, **leaves}, x, carry, cos_sin=rope, seed=seed, backend=backend
        )
        loss = sum(state.square().sum() for state in out.values())
        return list(torch.autograd.grad(loss, [leaves[name] for name in wanted]))

    for wanted in (("alpha", "beta"), ("alpha",), ("beta",)):
        for got, want in zip(grads("cpu", *wanted), grads("eager", *wanted), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_what_the_engine_refuses() -> None:
    given = given_of("padding", torch.float32)
    with pytest.raises(ValueError, match="a mask of the keys"):
        forward((*given[:-1], None))
    module = cpu._load()[0]
    for share in ({"dropout": 1.0}, {"drop_path": -0.5}):
        block = cpu.numbers_of(BlockSpec(**_ATTENTION))
        with pytest.raises(ValueError, match="a share that is dropped"):
            module.cpu_window_kept(block, share, 13, 0)


def test_a_solve_leaves_them_to_the_loop() -> None:
    """Its queue moves samples between slots, and it is given no mask."""
    spec = BlockSpec(**_ATTENTION, dropout=0.1)
    problem = problem_for(CALLS, {"L": net_of(spec)}, torch.zeros(2, 13, WIDTH))
    assert backends.why_not("cpu", problem) is None and not on_cpu._engine_runs(problem, "cpu")


# ---- what is odd about what is given -------------------------------------------------------------


@pytest.mark.parametrize("value", [2, 128, 255])
def test_a_key_is_unseen_whatever_its_byte_says(value: int) -> None:
    *given, mask = given_of("padding", torch.float32)
    odd = (mask.to(torch.uint8) * value).view(torch.bool)
    assert torch.equal(forward((*given, odd)), forward((*given, mask)))


@pytest.mark.parametrize("grad", [False, True])
def test_an_empty_batch_of_padded_samples(grad: bool) -> None:
    schedule, nets, x, carry, rope, _, mask = given_of("padding", torch.float32)
    x, z = x[:0].requires_grad_(grad), carry["z"][:0]
    how = dict(cos_sin=rope, key_mask=mask[:0], backend="cpu")
    assert recurx.recurse(schedule, nets, x, {"z": z}, **how)["z"].shape == z.shape


@pytest.mark.parametrize("first", [-5, 2**32 - 3, 2**32 + 1, 2**63 - 1])
@pytest.mark.parametrize("seed", [-1, 7])
def test_streams_count_modulo_their_words(first: int, seed: int) -> None:
    """Of noise too: the reference draws what the engine draws."""
    schedule, nets, x, carry, rope, *_ = given_of("dropout", torch.float32)
    schedule = schedule.with_factors(noise=0.1)
    how = dict(cos_sin=rope, seed=torch.tensor([seed, first]))
    with torch.no_grad():
        got, want = (
            recurx.recurse(schedule, nets, x, carry, backend=backend, **how)["z"]
            for backend in ("cpu", "eager")
        )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_mask_without_its_memory_is_refused() -> None:
    *given, mask = given_of("padding", torch.float32)
    schedule, nets, x, carry, rope, _ = given
    x = x.requires_grad_()  # through an op, which looks
    mask.untyped_storage().resize_(1)
    with pytest.raises(recurx.InvalidArgument, match="key_mask"):
        recurx.recurse(schedule, nets, x, carry, cos_sin=rope, key_mask=mask, backend="cpu")
