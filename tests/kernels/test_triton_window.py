"""The window on Triton kernels, forward and backward, through `recurx.recurse`, in the interpreter.

Gradients are judged against eager autograd (window_gradients.py).
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")
from simulate import triton_on_cpu
from window_gradients import (
    assert_close,
    autograd,
    gradients_of,
    kept_by_autograd,
    loss_of,
    on_triton,
)

import recurx
from recurx import Schedule, Step, backends, ops, route
from recurx.nets import ATTENTION, KINDS, TOKEN_MLP, Net
from recurx.problem import encode
from tests.factories import make_inputs, make_net, problem_for, rope, rounded

SAVE = ("all", "block", "states")
WAYS = ("triton/tiled", "triton/library")
ways = pytest.mark.parametrize("way", WAYS)
SYSTEMS = {
    "trm": Schedule.trm(2, 1),
    "hrm": Schedule.hrm(2, 1),
    "single_z": Schedule.single_z(2, 1),
    "hier": Schedule.hier(2, 2),
    "full": Schedule.trm(1, 2, window="full"),
}
ONE_CALL = Schedule((Step("L", "z", ("z",), ("x",)),))
SMALL = dict(tokens=9, inner=48, token_inner=32, blocks=1)


def problem(system="trm", kind=ATTENTION, dtype=torch.float32, batch=2, **shape):
    schedule = SYSTEMS[system] if isinstance(system, str) else system
    nets = {
        name: rounded(make_net(kind, seed=n, **shape), dtype, torch.float32)
        for n, name in enumerate(schedule.nets)
    }
    sizes = {k: shape[k] for k in ("tokens", "hidden") if k in shape}
    x, carry = make_inputs(schedule, batch=batch, dtype=dtype, **sizes)
    cos_sin = rope(**{k: shape[k] for k in ("tokens", "hidden", "heads") if k in shape})
    return schedule, nets, x, carry, cos_sin


BF16, FP32 = torch.bfloat16, torch.float32


@ways
@pytest.mark.parametrize(
    "system, kind, blocks, dtype",
    [
        ("trm", ATTENTION, 2, FP32), ("trm", TOKEN_MLP, 2, FP32),
        ("trm", ATTENTION, 1, BF16), ("trm", TOKEN_MLP, 2, BF16),
        ("hrm", ATTENTION, 1, FP32), ("hrm", TOKEN_MLP, 1, FP32),
        ("single_z", TOKEN_MLP, 1, FP32), ("hier", ATTENTION, 1, FP32),
        ("full", ATTENTION, 1, FP32), ("full", TOKEN_MLP, 1, BF16),
    ],
)  # fmt: skip
def test_gradients_of_every_system(system, kind, blocks, dtype, way):
    batch = 6 if dtype == BF16 else 2  # the error of two samples scatters by more than a quarter
    *given, cos_sin = problem(system, kind, dtype, batch, **{**SMALL, "blocks": blocks})
    with triton_on_cpu():
        got = gradients_of(on_triton(cos_sin, way=way), *given)
    assert all(g.dtype == torch.float32 for name, g in got.items() if name != "x")
    assert_close(got, *given, cos_sin)


@ways
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_changes_no_bit_and_neither_does_a_rerun(kind, way):
    blocks, dtype = (2, FP32) if kind == ATTENTION else (1, BF16)
    *given, cos_sin = problem(Schedule.trm(1, 1), kind, dtype, **{**SMALL, "blocks": blocks})
    saves = SAVE[1:] if kind == ATTENTION else SAVE  # one rerun is enough
    with triton_on_cpu():
        first = gradients_of(on_triton(cos_sin, "all", way), *given)
        others = [gradients_of(on_triton(cos_sin, save, way), *given) for save in saves]
    for other, save in zip(others, saves, strict=True):
        for name in first:
            assert torch.equal(first[name], other[name]), f"save={save!r}: gradient of {name}"


@ways
@pytest.mark.parametrize("save", ["all", "states"])
def test_gradient_flows_into_the_carry_when_asked(save, way):
    """Full back-propagation: the states that enter have a gradient, of every read and of none."""
    steps = (Step("L", "a", ("a", "a"), ("x",)), Step("L", "b", ("a",)))
    schedule = Schedule((*steps, Step("L", "a", ("c",))), detach_carry=False)
    *given, cos_sin = problem(schedule, **SMALL)
    with triton_on_cpu():
        got = gradients_of(on_triton(cos_sin, save, way), *given, into_carry=True)
    assert not got["b"].any() and got["a"].any() and got["c"].any()
    assert_close(got, *given, cos_sin, into_carry=True)


@ways
@pytest.mark.parametrize(
    "kind, shape, batch, dtype",
    [
        (ATTENTION, dict(tokens=5, hidden=384, heads=6, inner=64), 1, BF16),
        # Three tokens would do, but a channel of three small ones decides the error of a draw.
        (TOKEN_MLP, dict(tokens=7, hidden=768, inner=32, token_inner=16), 1, BF16),
        (TOKEN_MLP, dict(tokens=33, hidden=128, inner=32, token_inner=16), 3, FP32),
        (ATTENTION, dict(tokens=1), 1, FP32),
        (ATTENTION, {}, 0, FP32),
        (TOKEN_MLP, {}, 0, FP32),
    ],
)
def test_shapes_and_strides(kind, shape, batch, dtype, way):
    given = problem(ONE_CALL, kind, dtype, batch=batch, **{**SMALL, **shape})
    schedule, nets, x, carry, cos_sin = given
    x = x.transpose(0, 2).contiguous().transpose(0, 2)
    nets = {  # weights with strides of their own
        name: Net(net.spec, [w.T.contiguous().T for w in net.weights]) for name, net in nets.items()
    }
    with triton_on_cpu():
        got = gradients_of(on_triton(cos_sin, way=way), schedule, nets, x, carry)
    assert got["x"].shape == x.shape
    assert_close(got, schedule, nets, x, carry, cos_sin)


def test_rows_that_no_tile_holds():
    """D beyond the tiled kernels': by name, and what backend triton has for it."""
    given = problem(ONE_CALL, ATTENTION, FP32, tokens=3, hidden=1152, heads=9, inner=32, blocks=1)
    *given, cos_sin = given
    with triton_on_cpu():
        got = gradients_of(on_triton(cos_sin), *given)
        with pytest.raises(recurx.BackendUnavailable, match="rows of at most 1024"):
            gradients_of(on_triton(cos_sin, way="triton/tiled"), *given)
    assert_close(got, *given, cos_sin)


@ways
@pytest.mark.parametrize("kind", KINDS)
def test_a_window_keeps_what_its_knob_says(kind, way):
    """Bytes that autograd holds between forward and backward, beside x, carry and weights."""
    schedule, nets, x, carry, cos_sin = problem(kind=kind, dtype=BF16, **SMALL)
    x.requires_grad_()
    ours = x, *carry.values(), *cos_sin, *(w for net in nets.values() for w in net.weights)
    held = {}
    with triton_on_cpu():
        for save in SAVE:
            with kept_by_autograd(*ours) as seen:
                out = recurx.recurse(
                    schedule, nets, x, carry, backend=way, cos_sin=cos_sin, save=save
                )
            held[save] = sum(seen.values()), out
    rows = x.nbytes  # [B, T, D] once
    entering = 2 * rows  # the states as the calls before the window left them
    assert held["states"][0] <= entering
    # Two calls of one block: h of each and both outs, which leave as states here.
    assert held["block"][0] < entering + 4.5 * rows
    assert held["states"][0] < held["block"][0] < held["all"][0]
    with triton_on_cpu():  # an op that says less than it keeps would be found here
        loss_of(held["states"][1]).backward()


@pytest.mark.slow
def test_traces_whole_and_keeps_a_dynamic_batch():
    torch._dynamo.reset()
    schedule, nets, x, carry, cos_sin = problem(Schedule.single_z(1, 1), **SMALL)
    weights = [w.requires_grad_() for w in nets["L"].weights]

    def step(x, z):
        net = {"L": Net(nets["L"].spec, weights)}
        out = recurx.recurse(schedule, net, x, {"z": z}, backend="triton", cos_sin=cos_sin)
        return out["z"].square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    with triton_on_cpu():
        for batch in (2, 3):
            x, carry = make_inputs(schedule, batch=batch, tokens=9)
            x.requires_grad_()
            got, want = (
                torch.autograd.grad(f(x, carry["z"]), [x, *weights]) for f in (compiled, step)
            )
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("save", ["block", "states"])
def test_opcheck(save):
    schedule, nets, x, carry, cos_sin = problem(ONE_CALL, **SMALL)
    weights = [w.requires_grad_() for w in nets["L"].weights]
    key = encode(schedule, [("L", nets["L"].spec)])
    states = [state.requires_grad_() for state in carry.values()]
    how = (None, None, key, "triton", "triton", 0, 1, save)
    inputs = (x.requires_grad_(), states, weights, *cos_sin, *how)
    with triton_on_cpu():
        torch.library.opcheck(
            ops.window_op, inputs, test_utils=("test_schema", "test_autograd_registration",
                                              "test_faketensor"),
        )  # fmt: skip


def test_double_backward_is_refused_clearly():
    schedule, nets, x, carry, cos_sin = problem(ONE_CALL, **SMALL)
    x.requires_grad_()
    with triton_on_cpu():
        out = recurx.recurse(schedule, nets, x, carry, backend="triton", cos_sin=cos_sin)
        with pytest.raises(recurx.RecurxError, match="double backward"):
            (grad,) = torch.autograd.grad(loss_of(out), x, create_graph=True)
            torch.autograd.grad(grad.square().sum(), x)


def test_autocast_trains_in_its_dtype_with_fp32_weight_gradients():
    schedule, nets, x, carry, cos_sin = problem(ONE_CALL, **SMALL)

    def autocast(schedule, nets, x, carry):
        with torch.autocast("cpu", dtype=BF16):
            return on_triton(cos_sin)(schedule, nets, x, carry)

    def by_hand(schedule, nets, x, carry):
        half = {name: state.to(BF16) for name, state in carry.items()}
        out = on_triton(cos_sin)(schedule, nets, x.to(BF16), half)
        return {name: state.float() for name, state in out.items()}

    with triton_on_cpu():
        got, want = (gradients_of(f, schedule, nets, x, carry) for f in (autocast, by_hand))
    for name in want:
        assert got[name].dtype == torch.float32 and torch.equal(got[name], want[name]), name


@ways
def test_only_what_is_asked_for_is_computed(way):
    """With frozen weights no weight gradient is launched, and x alone is as in the full run."""
    schedule, nets, x, carry, cos_sin = problem(ONE_CALL, **SMALL)
    x.requires_grad_()
    with triton_on_cpu():
        out = recurx.recurse(schedule, nets, x, carry, backend=way, cos_sin=cos_sin)
        with (
            mock.patch("recurx.kernels.block_training.wgrad", side_effect=AssertionError),
            mock.patch("recurx.kernels.library.product_in_fp32", side_effect=AssertionError),
        ):
            (got,) = torch.autograd.grad(loss_of(out), x)
        want = gradients_of(on_triton(cos_sin, way=way), schedule, nets, x, carry)["x"]
    assert torch.equal(got, want)


# ---- planted bugs: the judgement above must reject each of them ---------------------------------
def without_residual(real):
    return lambda d_out, weight, residual=None, out=None: real(d_out, weight, out=out)


def without_projection(real):
    def scaled(y, scale, d_out, *, out=None):
        return torch.mul(d_out, scale[..., None].to(d_out.dtype), out=out)

    return scaled


def a_factor_late(real):
    return lambda y, scale, d_out, **out: real(y, scale.roll(1), d_out, **out)


def forget_what_was_added(real):
    return lambda d_out, x, partial, *, add: real(d_out, x, partial, add=False)


def swap_gate_and_up(real):
    def swiglu_backward(x, gate_up, down, d_out):
        d_gate_up, mid = real(x, gate_up, down, d_out)
        return torch.roll(d_gate_up, gate_up.shape[0] // 2, -1), mid

    return swiglu_backward


def without_rotation(real):
    return lambda qkv, out, lse, d_out, cos_sin, **how: real(qkv, out, lse, d_out, None, **how)


def without_product(real):
    return lambda y, scale, d_out, product, **over: real(y, scale, d_out, None, **over)


def swap_halves(real):
    def middle_backward(gate_up, rows, d_middle):
        real(gate_up, rows, d_middle)
        gate_up.copy_(torch.roll(gate_up, gate_up.shape[2] // 2, 2))

    return middle_backward


def keep_the_last(real):
    class Grads(real):
        def add(self, index, *given):
            self._partials.pop(index, None)
            super().add(index, *given)

    return Grads


PLANTED = {
    "residual path missing": ("dgrad", without_residual),
    "rms backward without its mean": ("rms_backward", without_projection),
    "factors of other rows": ("rms_backward", a_factor_late),
    "calls of the window overwrite each other's weight gradient": ("wgrad", forget_what_was_added),
    "gate and up swapped": ("swiglu_backward", swap_gate_and_up),
    "rope backward missing": ("attention_backward", without_rotation),
    "library: what came through the SwiGLU is lost": ("add_rms_backward", without_product),
    "library: gate and up swapped": ("middle_backward", swap_halves),
    "library: calls overwrite each other's weight gradient": ("WeightGrads", keep_the_last),
    "library: rope backward missing": ("attention_backward", without_rotation),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_rejected(bug):
    from recurx.kernels import block_training, library

    name, plant = PLANTED[bug]
    module = library if bug.startswith("library") else block_training
    *given, cos_sin = problem(Schedule.trm(1, 1), **SMALL)
    with triton_on_cpu(), mock.patch.object(module, name, plant(getattr(module, name))):
        got = gradients_of(on_triton(cos_sin, way=WAYS[module is library]), *given)
    with pytest.raises(AssertionError, match="gradient"):
        assert_close(got, *given, cos_sin)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_window_off_by_one_is_rejected(dtype):
    schedule, *given, cos_sin = problem(Schedule.trm(2, 2), dtype=dtype, **SMALL)
    assert_close(gradients_of(autograd(cos_sin), schedule, *given), schedule, *given, cos_sin)
    for off in (-1, 1):
        wrong = schedule.with_window(schedule.window + off)
        got = gradients_of(autograd(cos_sin), wrong, *given)
        with pytest.raises(AssertionError, match="gradient"):
            assert_close(got, schedule, *given, cos_sin)


def test_which_backend_takes_the_window():
    schedule, nets, x, *_ = problem(ONE_CALL, **SMALL)
    key = encode(schedule, [("L", nets["L"].spec)])
    arguments = (key, FP32, "cpu", True, 9)
    engine = None if backends.why_not("cpu", problem_for(schedule, nets, x)) else "cpu"
    assert route.window_backend("cpu", *arguments) == engine
    assert route.window_backend("auto", *arguments) in (None, engine)
    with triton_on_cpu():
        assert route.window_backend("triton", *arguments) == "triton"
        assert route.window_backend("triton", key, torch.float64, "cpu", True, 9) is None
        asked = problem_for(schedule, nets, x, needs_grad=True)
        assert "on triton, forward and backward" in recurx.explain(asked, backend="triton")
