"""recurx.recurse: windows and detached carry, hand-over, tracing, autocast, refusals."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor

import recurx
from recurx import BackendUnavailable, InvalidArgument, Schedule, Step, api, ops, reference
from recurx.nets import ATTENTION, KINDS, TOKEN_MLP, Net
from recurx.problem import encode
from tests.factories import (
    HEADS,
    HIDDEN,
    TOKENS,
    make_inputs,
    make_net,
    problem_for,
    rope,
    runnable_backends,
)  # fmt: skip

SCHEDULE = Schedule.trm(3, 2)
BACKENDS = ["auto", *runnable_backends()]


def eager_gradients(
    schedule: Schedule, net: Net, x: Tensor, carry: dict[str, Tensor]
) -> list[Tensor]:
    """Plain autograd with the window cut by hand: what every backend must reproduce."""
    states = {name: state.detach() for name, state in carry.items()}
    with torch.no_grad():
        states = reference.run(schedule, {"L": net}, x, states, rope(), 0, schedule.grad_from)
    out = reference.run(schedule, {"L": net}, x, states, rope(), schedule.grad_from)
    return gradients(out, [x, *net.weights])


def gradients(carry: dict[str, Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Zeros where nothing flows: a window of one call never reads x."""
    return list(torch.autograd.grad(loss_of(carry), leaves, materialize_grads=True))


def loss_of(carry: dict[str, Tensor]) -> Tensor:
    ramp = torch.linspace(-1, 1, HIDDEN)
    return torch.stack([(s.float() * ramp).square().mean() for s in carry.values()]).sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [1, "cycle", 5, "full"])
@pytest.mark.parametrize("save", ["all", "block", "states"])
def test_gradients_of_every_window(backend: str, kind: str, window: int | str, save: str) -> None:
    schedule = Schedule.trm(3, 2, window=window)
    net = make_net(kind, requires_grad=True)
    x, carry = make_inputs(schedule)
    x.requires_grad_()
    expected = eager_gradients(schedule, net, x, carry)
    out = recurx.recurse(schedule, {"L": net}, x, carry, backend=backend, cos_sin=rope(), save=save)
    got = gradients(out, [x, *net.weights])
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        if not b.any():
            assert not a.any(), f"gradient {index} should be zero"
            continue
        cosine = torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)
        assert cosine > 0.9999, f"gradient {index}: cosine {cosine}"
        assert (a.norm() / b.norm() - 1).abs() < 1e-3, f"gradient {index}: norm"
        if backend == "eager" and save == "all":
            assert torch.equal(a, b), f"gradient {index} is not bit-identical"


def test_a_window_off_by_one_is_seen_by_the_gradients_only() -> None:
    net = make_net(requires_grad=True)
    x, carry = make_inputs(SCHEDULE)
    x.requires_grad_()
    right = recurx.recurse(SCHEDULE, {"L": net}, x, carry, cos_sin=rope(), backend="eager")
    off = SCHEDULE.with_window(SCHEDULE.window + 1)
    wrong = recurx.recurse(off, {"L": net}, x, carry, cos_sin=rope(), backend="eager")
    assert all(torch.equal(right[name], wrong[name]) for name in right)
    a, b = (torch.autograd.grad(loss_of(out), net.weights[0])[0] for out in (right, wrong))
    assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) < 0.9999


@pytest.mark.parametrize("backend", BACKENDS)
def test_carry_is_detached_on_entry_and_not_modified(backend: str) -> None:
    net = make_net(requires_grad=True)
    x, carry = make_inputs(SCHEDULE)
    leaves = {name: state.requires_grad_() for name, state in carry.items()}
    before = {name: state.detach().clone() for name, state in carry.items()}
    out = recurx.recurse(SCHEDULE, {"L": net}, x, leaves, cos_sin=rope(), backend=backend)
    grads = torch.autograd.grad(loss_of(out), list(leaves.values()), allow_unused=True)
    assert all(grad is None for grad in grads)
    assert all(torch.equal(carry[name], before[name]) for name in carry)


@pytest.mark.parametrize("save", ["all", "block", "states"])
def test_gradient_flows_into_the_carry_when_asked(save: str) -> None:
    schedule = Schedule(SCHEDULE.steps, detach_carry=False)
    net, (x, carry) = make_net(), make_inputs(schedule)
    leaves = {name: state.requires_grad_() for name, state in carry.items()}
    out = recurx.recurse(schedule, {"L": net}, x, leaves, cos_sin=rope(), save=save)
    got = torch.autograd.grad(loss_of(out), list(leaves.values()))
    direct = reference.run(schedule, {"L": net}, x, leaves, rope())
    expected = torch.autograd.grad(loss_of(direct), list(leaves.values()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_block_keeps_each_blocks_input_and_no_more() -> None:
    """On PyTorch: bytes that autograd holds between forward and backward, and the same states."""
    net, (x, carry) = make_net(), make_inputs(SCHEDULE)
    x.requires_grad_()
    held, outs = {}, {}
    for save in ("all", "block", "states"):
        seen: dict[int, int] = {}

        def pack(tensor: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outs[save] = recurx.recurse(
                SCHEDULE, {"L": net}, x, carry, backend="eager", cos_sin=rope(), save=save
            )
        held[save] = sum(n for p, n in seen.items() if p not in {w.data_ptr() for w in net.weights})
    assert held["states"] < held["block"] < held["all"] / 4
    for name in carry:
        assert torch.equal(outs["block"][name], outs["all"][name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hand_over_at_any_call_is_seamless(backend: str, dtype: torch.dtype) -> None:
    net, (x, carry) = make_net(), make_inputs(SCHEDULE, dtype=dtype)
    arguments = dict(cos_sin=rope(), backend=backend)
    whole = recurx.recurse(SCHEDULE, {"L": net}, x, carry, **arguments)
    for cut in range(len(SCHEDULE) + 1):
        first = recurx.recurse(SCHEDULE, {"L": net}, x, carry, stop_after=cut, **arguments)
        second = recurx.recurse(SCHEDULE, {"L": net}, x, first, start_from=cut, **arguments)
        for name in whole:
            # States leave rounded to their dtype, inside a fused call they may stay wider.
            torch.testing.assert_close(
                second[name], whole[name], rtol=0, atol=1e-4 if dtype == torch.float32 else 0.15
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_sizes_and_strides(backend: str) -> None:
    net, (x, carry) = make_net(), make_inputs(SCHEDULE, batch=4)
    arguments = dict(cos_sin=rope(), backend=backend)
    whole = recurx.recurse(SCHEDULE, {"L": net}, x, carry, **arguments)
    one = {name: state[1:2] for name, state in carry.items()}
    single = recurx.recurse(SCHEDULE, {"L": net}, x[1:2], one, **arguments)
    none = {name: state[:0] for name, state in carry.items()}
    empty = recurx.recurse(SCHEDULE, {"L": net}, x[:0], none, **arguments)
    odd = {n: s.transpose(0, 1).contiguous().transpose(0, 1) for n, s in carry.items()}
    strided = recurx.recurse(
        SCHEDULE, {"L": net}, x.expand(2, 4, TOKENS, HIDDEN)[1], odd, **arguments
    )
    for name in whole:
        assert empty[name].shape == (0, TOKENS, HIDDEN)
        torch.testing.assert_close(single[name], whole[name][1:2], rtol=0, atol=1e-4)
        torch.testing.assert_close(strided[name], whole[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", runnable_backends())
def test_the_first_call_does_not_import_the_compiler(backend: str) -> None:
    code = (
        "import sys, torch, recurx; from tests.factories import *; s = recurx.Schedule.trm(1, 1);"
        "x, carry = make_inputs(s); net = {'L': make_net(requires_grad=True)};"
        f"recurx.recurse(s, net, x, carry, backend='{backend}')['z_H'].sum().backward();"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def sample_arguments(batch: int = 2) -> tuple:
    net = make_net(requires_grad=True)
    x, carry = make_inputs(SCHEDULE, batch=batch)
    states = [state.requires_grad_() for state in carry.values()]
    key = encode(SCHEDULE, [("L", net.spec)])
    return x.requires_grad_(), states, net.weights, *rope(), None, None, key


@pytest.mark.parametrize("backend", runnable_backends())
def test_opcheck(backend: str) -> None:
    torch.library.opcheck(ops.recurse_op, (*sample_arguments(), backend, 1, 4))


class Blocks(torch.nn.Module):
    """One attention block under the official attribute names, as a traced model would hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Module()])
        layer, d = self.layers[0], HIDDEN
        layer.self_attn, layer.mlp, layer.norm_eps = torch.nn.Module(), torch.nn.Module(), 1e-5
        layer.self_attn.num_heads = layer.self_attn.num_key_value_heads = HEADS
        layer.self_attn.causal = False
        layer.self_attn.qkv_proj = torch.nn.Linear(d, 3 * d, bias=False)
        layer.self_attn.o_proj = torch.nn.Linear(d, d, bias=False)
        layer.mlp.gate_up_proj = torch.nn.Linear(d, 2 * d, bias=False)
        layer.mlp.down_proj = torch.nn.Linear(d, d, bias=False)


@pytest.mark.parametrize(
    ("backend", "dynamic"), [*((name, None) for name in BACKENDS), ("auto", True)]
)
@pytest.mark.parametrize("save", ["all", "states"])  # "block" is "all" while compiling
def test_traces_whole_with_dynamic_batch(backend: str, save: str, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    net, schedule = Blocks(), Schedule.trm(2, 1)

    def step(x: Tensor, z_H: Tensor, z_L: Tensor) -> Tensor:
        carry = {"z_H": z_H, "z_L": z_L}
        out = recurx.recurse(
            schedule, {"L": net}, x, carry, backend=backend, cos_sin=rope(), save=save
        )
        return loss_of(out)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3, 5):
        x, carry = make_inputs(schedule, batch=batch)
        x.requires_grad_()
        got, expected = (f(x, carry["z_H"], carry["z_L"]) for f in (compiled, step))
        torch.testing.assert_close(got, expected)
        grads = [torch.autograd.grad(value, x)[0] for value in (got, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("save", ["all", "block", "states"])
def test_double_backward_is_refused_clearly(save: str) -> None:
    net, (x, carry) = make_net(), make_inputs(SCHEDULE)
    x.requires_grad_()
    out = recurx.recurse(SCHEDULE, {"L": net}, x, carry, cos_sin=rope(), save=save)
    with pytest.raises(recurx.RecurxError, match="double backward"):
        (grad,) = torch.autograd.grad(loss_of(out), x, create_graph=True)
        torch.autograd.grad(grad.square().sum(), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_runs_in_its_dtype_and_returns_the_callers(backend: str) -> None:
    net, (x, carry) = make_net(), make_inputs(SCHEDULE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = recurx.recurse(SCHEDULE, {"L": net}, x, carry, cos_sin=rope(), backend=backend)
    half = {name: state.bfloat16() for name, state in carry.items()}
    direct = recurx.recurse(
        SCHEDULE, {"L": net}, x.bfloat16(), half, cos_sin=rope(), backend=backend
    )
    for name, state in out.items():
        assert state.dtype == torch.float32
        assert torch.equal(state, direct[name].float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nothing = recurx.recurse(SCHEDULE, {"L": net}, x, carry, cos_sin=rope(), stop_after=0)
        first = recurx.recurse(SCHEDULE, {"L": net}, x, carry, cos_sin=rope(), stop_after=1)
    changed = [name for name, state in first.items() if not torch.equal(state, carry[name])]
    assert changed == [SCHEDULE.steps[0].write]  # what no call writes is not rounded
    assert all(torch.equal(state, carry[name]) for name, state in nothing.items())


def test_autocast_in_float16_says_that_pytorch_runs_it() -> None:
    """It is the default of autocast on CUDA, and `auto` would otherwise be PyTorch in silence."""
    net, (x, carry) = make_net(), make_inputs(SCHEDULE)
    given = SCHEDULE, {"L": net}, x, carry
    api._tell_of_float16.cache_clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with torch.autocast("cpu", dtype=torch.float16):
            for backend in ("eager", "auto", "auto"):
                out = recurx.recurse(*given, cos_sin=rope(), backend=backend)
                assert len(told) == (backend == "auto"), backend
            assert "under this autocast in float16" in recurx.explain(problem_for(*given[:3]))
        recurx.recurse(*given, cos_sin=rope())
    assert "float16, which no fused backend runs" in str(told[0].message)
    assert told[0].filename == __file__ and len(told) == 1
    assert out["z_H"].dtype == torch.float32
    assert "under this autocast" not in recurx.explain(problem_for(*given[:3]))


def test_any_callable_runs_on_eager_only() -> None:
    net = torch.nn.Linear(HIDDEN, HIDDEN)
    x, carry = make_inputs(SCHEDULE)
    out = recurx.recurse(SCHEDULE, {"L": net}, x, carry)
    loss_of(out).backward()
    assert net.weight.grad is not None
    with pytest.raises(InvalidArgument, match="plain callable"):
        recurx.recurse(SCHEDULE, {"L": net}, x, carry, backend="cpu")


def test_explicit_backend_never_falls_back() -> None:
    net, (x, carry) = make_net(), make_inputs(SCHEDULE, dtype=torch.float64)
    with pytest.raises(BackendUnavailable, match=r"cpu.*float64"):
        recurx.recurse(SCHEDULE, {"L": net}, x, carry, backend="cpu")
    assert recurx.recurse(SCHEDULE, {"L": net}, x, carry)["z_H"].dtype == torch.float64


GOOD = dict(schedule=SCHEDULE, nets={"L": make_net()}, cos_sin=rope())
X, CARRY = make_inputs(SCHEDULE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(schedule="trm"), ["schedule", "recurx.Schedule", "str"]),
        (dict(nets={}), ["nets", "['L']", "[]"]),
        (dict(nets={"L": make_net(), "H": make_net()}), ["nets", "['H', 'L']"]),
        (dict(nets={"L": 3}), ["nets['L']", "int"]),
        (dict(nets={"L": make_net(hidden=32)}), ["x", "D=32", "D=64"]),
        (dict(nets={"L": make_net(TOKEN_MLP, tokens=7)}), ["x", "T=7", f"T={TOKENS}"]),
        (dict(x=X[0]), ["x", "[B, T, D]", "[13, 64]"]),
        (dict(x=X.long()), ["x", "int64"]),
        (dict(carry={"z_H": X}), ["carry", "z_L"]),
        (dict(carry={**CARRY, "z_Q": X}), ["carry", "z_Q"]),
        (dict(carry={**CARRY, "z_H": X[:2]}), ["carry['z_H']", "[2, 13, 64]", "[3, 13, 64]"]),
        (dict(carry={**CARRY, "z_H": X.bfloat16()}), ["carry['z_H']", "bfloat16"]),
        (dict(carry={**CARRY, "z_H": X.to("meta")}), ["carry['z_H']", "meta"]),
        (dict(cos_sin=rope(TOKENS + 1)), ["cos_sin", "[13, 32]", "[14, 32]"]),
        (dict(backend="cuda9"), ["backend", "cuda9", "eager"]),
        (dict(start_from=8, stop_after=3), ["stop_after", "8", "3"]),
        (dict(stop_after=10), ["stop_after", "10"]),
        (dict(start_from=-1), ["start_from", "-1"]),
        (dict(save="none"), ["save", "none", "block"]),
        (dict(save="block", nets={"L": torch.nn.Identity()}), ["nets['L']", "plain callable"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_by_name(change: dict, words: list[str]) -> None:
    arguments = {**GOOD, "x": X, "carry": CARRY, **change}
    with pytest.raises(InvalidArgument) as error:
        recurx.recurse(**arguments)
    assert all(word in str(error.value) for word in ["recurx.recurse", *words]), str(error.value)


def test_step_may_sum_the_input_among_the_states() -> None:
    """The order of lucidrains' loop, (outputs + latents) + inputs, is a schedule like any other."""
    schedule = Schedule((Step("L", "z_L", ("z_H", "z_L", "x")), Step("L", "z_H", ("z_H", "z_L"))))
    net, (x, carry) = make_net(ATTENTION), make_inputs(schedule)
    outs = [
        recurx.recurse(schedule, {"L": net}, x, carry, cos_sin=rope(), backend=backend)
        for backend in runnable_backends()
    ]
    for out in outs:
        for name in out:
            torch.testing.assert_close(out[name], outs[-1][name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("save", ["all", "block", "states"])
def test_learned_tables_have_a_gradient_or_are_refused(backend: str, save: str) -> None:
    """Engines have none for them, and must not leave them untrained without a word."""
    if backend not in runnable_backends():
        pytest.skip(f"no {backend} here")
    schedule, net = Schedule.single_z(1, 1), make_net()
    x, carry = make_inputs(schedule)
    tables = tuple(table.requires_grad_() for table in rope())

    def run() -> torch.Tensor:
        how = dict(cos_sin=tables, backend=backend, save=save)
        return recurx.recurse(schedule, {"L": net}, x, carry, **how)["z"]

    with torch.no_grad():
        assert run().isfinite().all()
    if (backend, save) == ("eager", "all"):
        assert all(grad.any() for grad in torch.autograd.grad(run().sum(), tables))
        return
    with pytest.raises(recurx.InvalidArgument, match=r"cos_sin.*learned.*detach"):
        run()
