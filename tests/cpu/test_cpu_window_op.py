"""Windows of the CPU engine through `recurse`: autograd, tracing, routes, dtypes of masters."""

from __future__ import annotations

import pytest
import torch

import recurx
from recurx import Schedule, Step, ops, route
from recurx.nets import Net
from recurx.problem import encode
from tests.cpu.windows import ONE, SAVE, case
from tests.cpu.windows import small_work_is_split_too as small_work_is_split_too
from tests.factories import make_inputs, problem_for
from tests.kernels.window_gradients import assert_close, gradients_of, loss_of


@pytest.mark.parametrize("save", SAVE)
def test_gradient_flows_into_the_carry_when_asked(native, save) -> None:
    steps = (Step("L", "a", ("a", "a"), ("x",)), Step("L", "b", ("a",)))
    schedule = Schedule((*steps, Step("L", "a", ("c",))), detach_carry=False)
    *given, tables = case(schedule)

    def run(schedule, nets, x, carry):
        options = dict(backend="cpu", cos_sin=tables, save=save)
        return recurx.recurse(schedule, nets, x, carry, **options)

    got = gradients_of(run, *given, into_carry=True)
    assert not got["b"].any() and got["a"].any() and got["c"].any()
    assert_close(got, *given, tables, into_carry=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_gradients_have_the_masters_dtype_and_strides_do_not_matter(native, dtype) -> None:
    schedule, nets, x, carry, tables = case(ONE)
    masters = [w.to(dtype).T.contiguous().T for w in nets["L"].weights]
    x = x.transpose(0, 2).contiguous().transpose(0, 2)
    given = schedule, {"L": Net(nets["L"].spec, masters)}, x, carry

    def run(schedule, nets, x, carry):
        return recurx.recurse(schedule, nets, x, carry, backend="cpu", cos_sin=tables)

    got = gradients_of(run, *given)
    assert all(g.dtype == dtype for name, g in got.items() if name != "x")
    plain = [w.to(dtype).float() for w in nets["L"].weights]
    want = gradients_of(run, schedule, {"L": Net(nets["L"].spec, plain)}, x.contiguous(), carry)
    assert all(torch.equal(got[name], want[name].to(got[name].dtype)) for name in want)


@pytest.mark.parametrize("save", SAVE)
def test_opcheck(native, save) -> None:
    schedule, nets, x, carry, tables = case(ONE)
    weights = [w.requires_grad_() for w in nets["L"].weights]
    key = encode(schedule, [("L", nets["L"].spec)])
    states = [state.requires_grad_() for state in carry.values()]
    how = (None, None, key, "cpu", "cpu", 0, 1, save)
    inputs = (x.requires_grad_(), states, weights, *tables, *how)
    torch.library.opcheck(
        ops.window_op, inputs,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip


def test_double_backward_is_refused_clearly(native) -> None:
    schedule, nets, x, carry, tables = case(ONE)
    x.requires_grad_()
    out = recurx.recurse(schedule, nets, x, carry, backend="cpu", cos_sin=tables)
    with pytest.raises(recurx.RecurxError, match="double backward"):
        (grad,) = torch.autograd.grad(loss_of(out), x, create_graph=True)
        torch.autograd.grad(grad.square().sum(), x)


@pytest.mark.slow
def test_traces_whole_and_keeps_a_dynamic_batch(native) -> None:
    torch._dynamo.reset()
    schedule, nets, x, carry, tables = case(Schedule.single_z(1, 1))
    weights = [w.requires_grad_() for w in nets["L"].weights]

    def step(x, z):
        net = {"L": Net(nets["L"].spec, weights)}
        out = recurx.recurse(schedule, net, x, {"z": z}, backend="cpu", cos_sin=tables)
        return out["z"].square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        x, carry = make_inputs(schedule, batch=batch)
        x.requires_grad_()
        got, want = (torch.autograd.grad(f(x, carry["z"]), [x, *weights]) for f in (compiled, step))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("save", SAVE)
def test_the_route_names_the_engines_window(native, save) -> None:
    schedule, nets, x, _, _ = case(Schedule.trm(2, 1))
    problem = problem_for(schedule, nets, x)
    found = route.route(problem, None, route.Request("cpu", save, grad=True))
    assert (found.forward, found.backward, found.split) == ("cpu", "cpu", 2)
    assert 'window 2..3 on cpu, forward and backward (save="all", "block" or "states")' in str(
        found
    )
