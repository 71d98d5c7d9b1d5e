"""Every backend through the same numerics, and planted bugs that the same checks reject.

Free-running bf16 is chaotic, so nothing here compares long rollouts entry by entry: (a) one call
against fp64, with the error of plain PyTorch in the same dtype as the yardstick; (b) each call of
a recursion from the reference's own states (teacher-forced); (c) a free rollout against the drift
that PyTorch's own bf16 shows. Weights are rounded first: their rounding is no backend's error.
"""

from __future__ import annotations

import platform
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import recurx
from recurx import Schedule, Step, reference
from recurx.measure import engine_isa
from recurx.nets import ATTENTION, KINDS, TOKEN_MLP, Net
from tests.factories import make_inputs, make_net, rope, rounded, runnable_backends, wide
from tests.kernels.compare import ERROR_RATIO, assert_as_exact, relative_error

Run = Callable[..., dict[str, Tensor]]
BACKENDS = runnable_backends()
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = {
    "toy": {},
    "wide": dict(tokens=33, hidden=128, inner=256, heads=4, token_inner=64),
    "published": dict(tokens=97, hidden=512, inner=1536, heads=8, token_inner=512),
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def on(backend: str) -> Run:
    def run(*args: object, **kwargs: object) -> dict[str, Tensor]:
        return recurx.recurse(*args, backend=backend, **kwargs)

    return run


def linear_without_fma(x: Tensor, weight: Tensor) -> Tensor:
    """`reference.linear`, each product rounded before it is added, as a CPU without FMA does it."""
    sums = x.new_zeros(*x.shape[:-1], weight.shape[0])
    for column, factors in zip(x.split(1, dim=-1), weight.to(x.dtype).T, strict=True):
        sums += column * factors
    return sums


def without_fma(*args: object) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reference, "linear", linear_without_fma)
        return reference.run(*args)


def yardsticks(backend: str, dtype: torch.dtype) -> tuple[Run, ...]:
    """Plain PyTorch, and for x86's portable engine also as it is on a CPU without FMA.

    PyTorch uses FMA wherever the processor has it; that engine does not, and rounds twice as often
    in fp32. A product of two bf16 numbers is exact in fp32 either way.
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    portable = backend == "cpu" and x86 and engine_isa() == "portable"
    return (reference.run, without_fma) if portable and dtype == torch.float32 else (reference.run,)


def teacher_forced(
    run: Run,
    schedule: Schedule,
    nets: dict[str, Net],
    dtype: torch.dtype,
    plain_runs: tuple[Run, ...] = (reference.run,),
    seed: int | None = None,
    **shape: int,
) -> None:
    """Each call k from the fp64 states before it, rounded once; error judged against fp64.

    The yardstick is plain PyTorch in the same dtype, by that of `plain_runs` which errs most.
    `seed` is that of the noise of steps that have some.
    """
    size = {k: shape[k] for k in ("tokens", "hidden") if k in shape}
    cos_sin = rope(**{k: shape[k] for k in ("tokens", "hidden", "heads") if k in shape})
    x, carry = make_inputs(schedule, dtype=dtype, batch=2, **size)
    exact_nets = {name: rounded(net, dtype, torch.float64) for name, net in nets.items()}
    nets = {name: rounded(net, dtype, torch.float32) for name, net in nets.items()}
    for k, step in enumerate(schedule.steps):
        one = dict(cos_sin=cos_sin, start_from=k, stop_after=k + 1)
        span = (cos_sin, k, k + 1)
        if seed is not None:
            one["seed"], span = seed, (*span, torch.tensor([seed, 0]))
        exact = reference.run(schedule, exact_nets, x.double(), wide(carry), *span)
        plain = max(
            (by(schedule, nets, x, carry, *span)[step.write] for by in plain_runs),
            key=lambda state: relative_error(state, exact[step.write]),
        )
        got = run(schedule, nets, x, carry, **one)
        for name in schedule.states:
            if name != step.write:
                assert torch.equal(got[name], carry[name]), f"call {k} changed {name}"
        try:
            assert_as_exact(got[step.write], plain, exact[step.write])
        except AssertionError as error:
            raise AssertionError(f"call {k} ({step}): {error}") from None
        carry = {name: state.to(dtype) for name, state in exact.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_one_call_against_fp64(backend: str, kind: str, dtype: torch.dtype, shape: dict) -> None:
    schedule = Schedule((Step("L", "z_L", ("z_L",), ("z_H", "x")),))
    plain = yardsticks(backend, dtype)
    teacher_forced(on(backend), schedule, {"L": make_net(kind, **shape)}, dtype, plain, **shape)


SYSTEMS = {
    "trm": Schedule.trm(3, 6),
    "hrm": Schedule.hrm(2, 2),
    "single_z": Schedule.single_z(2, 3),
    "hier6": Schedule.hier(6, 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_call_teacher_forced(
    backend: str, system: str, kind: str, dtype: torch.dtype
) -> None:
    schedule = SYSTEMS[system]
    nets = {name: make_net(kind, seed=seed) for seed, name in enumerate(schedule.nets)}
    teacher_forced(on(backend), schedule, nets, dtype, yardsticks(backend, dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_free_rollout_drifts_no_more_than_plain_bf16(backend: str, kind: str) -> None:
    schedule = Schedule.trm(3, 6)
    x, carry = make_inputs(schedule, batch=8)
    nets = {"L": make_net(kind)}
    exact = reference.run(schedule, nets, x, carry, rope())["z_H"].double()
    half = {name: state.bfloat16() for name, state in carry.items()}
    plain = reference.run(schedule, nets, x.bfloat16(), half, rope())["z_H"]
    got = on(backend)(schedule, nets, x.bfloat16(), half, cos_sin=rope())["z_H"]
    # One draw of a chaotic drift, hence a factor of 2; the planted bugs land far beyond it.
    assert relative_error(got, exact) < 2 * relative_error(plain, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_reruns_are_bit_equal(backend: str, kind: str, dtype: torch.dtype) -> None:
    schedule = Schedule.trm(2, 2)
    nets, (x, carry) = {"L": make_net(kind)}, make_inputs(schedule, batch=5, dtype=dtype)
    first = on(backend)(schedule, nets, x, carry, cos_sin=rope())
    for _ in range(5):
        again = on(backend)(schedule, nets, x, carry, cos_sin=rope())
        assert all(torch.equal(first[name], again[name]) for name in first)


# ---- planted bugs: the same checks must reject each of them -----------------------------------


def swap_gate_and_up(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    up, gate = reference.linear(x, gate_up).chunk(2, dim=-1)
    return reference.linear(torch.nn.functional.silu(gate) * up, down)


def mask_last_token(h: Tensor, qkv: Tensor, o: Tensor, heads: int, cos_sin: object) -> Tensor:
    """Attention whose key mask is one token short."""
    batch, tokens, hidden = h.shape
    q, k, v = reference.linear(h, qkv).view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    if cos_sin is not None:
        q, k = (reference.rope_rotate(t.transpose(1, 2), *cos_sin).transpose(1, 2) for t in (q, k))
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k[..., :-1, :], v[..., :-1, :])
    return reference.linear(mixed.transpose(1, 2).reshape(batch, tokens, hidden), o)


def skip_last_column_of_norm(x: Tensor, eps: float) -> Tensor:
    scale = torch.rsqrt(x[..., :-1].float().square().mean(-1, keepdim=True) + eps)
    return (x.float() * scale).to(x.dtype)


PLANTED = {
    "gate and up swapped": ("swiglu", swap_gate_and_up, KINDS),
    "rope dropped": ("rope_rotate", lambda x, cos, sin: x, (ATTENTION,)),
    "rope turns backwards": (
        "rope_rotate",
        lambda x, cos, sin, rotate=reference.rope_rotate: rotate(x, cos, -sin),
        (ATTENTION,),
    ),
    "key mask one short": ("attention", mask_last_token, (ATTENTION,)),
    "norm misses a column": ("rms_norm", skip_last_column_of_norm, KINDS),
}


def buggy_run(function: str, replacement: Callable, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The reference with one function replaced, in the backend's place only."""

    def run(schedule, nets, x, carry, cos_sin=None, start_from=0, stop_after=None):  # type: ignore[no-untyped-def]
        with monkeypatch.context() as patched:
            patched.setattr(reference, function, replacement)
            return reference.run(schedule, nets, x, carry, cos_sin, start_from, stop_after)

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("bug", "kind"), [(bug, kind) for bug, (_, _, kinds) in PLANTED.items() for kind in kinds]
)
def test_planted_bugs_are_rejected(
    bug: str, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, replacement, _ = PLANTED[bug]
    schedule = Schedule((Step("L", "z_L", ("z_L",), ("z_H", "x")),))
    run = buggy_run(function, replacement, monkeypatch)
    with pytest.raises(AssertionError, match="relative error"):
        teacher_forced(run, schedule, {"L": make_net(kind)}, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_stale_state_is_rejected(dtype: torch.dtype) -> None:
    """A backend that hoists z_H + x but forgets to form it anew when z_H is written."""
    schedule = Schedule.trm(2, 2)

    def run(schedule, nets, x, carry, cos_sin=None, start_from=0, stop_after=None):  # type: ignore[no-untyped-def]
        step = schedule.steps[start_from]
        seen = dict(carry) if step.write == "z_H" or start_from < 3 else {**carry, "z_H": stale}
        out = reference.run(schedule, nets, x, seen, cos_sin, start_from, stop_after)
        return {name: out[name] if name == step.write else carry[name] for name in carry}

    stale = make_inputs(schedule, dtype=dtype, batch=2)[1]["z_H"]
    with pytest.raises(AssertionError, match=r"call 3 .*relative error"):
        teacher_forced(run, schedule, {"L": make_net(TOKEN_MLP)}, dtype)


def test_the_yardstick_is_not_slack() -> None:
    """One more rounding of the result to bf16's neighbour dtype is already too much."""
    exact = torch.randn(64, 64, dtype=torch.float64)
    plain = exact.float()
    assert_as_exact(plain, plain, exact)
    with pytest.raises(AssertionError, match="relative error"):
        assert_as_exact(plain * (1 + 2 * ERROR_RATIO * relative_error(plain, exact)), plain, exact)


def test_the_yardstick_without_fma_is_not_slack_either() -> None:
    x, weight = torch.randn(64, 96), torch.randn(32, 96)
    exact = reference.linear(x.double(), weight.double())
    apart = relative_error(linear_without_fma(x, weight), exact)
    assert apart < ERROR_RATIO * relative_error(reference.linear(x, weight), exact)


# ---- fuzz ------------------------------------------------------------------------------------

states = st.sampled_from(["a", "b", "c"])
reads = st.lists(st.sampled_from(["x", "a", "b", "c"]), max_size=3).map(tuple)
steps = st.builds(
    Step, net=st.sampled_from(["L", "H"]), write=states, state=reads.filter(bool), inject=reads
)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "eager"])
@settings(max_examples=25, deadline=None)
@given(
    calls=st.lists(steps, min_size=1, max_size=5),
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    batch=st.integers(0, 4),
    tokens=st.integers(1, 40),
    heads=st.sampled_from([1, 2]),
    width=st.sampled_from([32, 64, 96]),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
)
def test_fuzzed_schedules_shapes_and_strides(
    backend: str,
    calls: list[Step],
    kinds: tuple[str, str],
    batch: int,
    tokens: int,
    heads: int,
    width: int,
    dtype: torch.dtype,
    transposed: bool,
) -> None:
    schedule = Schedule(tuple(calls))
    size = dict(tokens=tokens, hidden=width, heads=heads, blocks=1)
    nets = {
        name: make_net(kind, **size, seed=seed)
        for seed, (name, kind) in enumerate(zip(("L", "H"), kinds, strict=True))
        if name in schedule.nets
    }
    cos_sin = rope(tokens, width, heads)
    x, carry = make_inputs(schedule, batch=batch, tokens=tokens, hidden=width, dtype=dtype)
    if transposed:
        x = x.transpose(0, 2).contiguous().transpose(0, 2)
    got = recurx.recurse(schedule, nets, x, carry, backend=backend, cos_sin=cos_sin)
    exact_nets = {name: rounded(net, dtype, torch.float64) for name, net in nets.items()}
    exact = reference.run(schedule, exact_nets, x.double(), wide(carry), cos_sin)
    plain = reference.run(schedule, nets, x, carry, cos_sin)
    for name in schedule.states:
        # A few calls from the same start: not yet chaotic, but small samples scatter; factor 2.
        floor = torch.finfo(dtype).eps
        allowed = max(2 * relative_error(plain[name], exact[name]), floor) if batch else 0
        error = relative_error(got[name], exact[name]) if batch else 0
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
