"""backend="triton" in the interpreter: numerics, shapes, hand-over, and planted bugs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")
from mutants import planted
from simulate import KINDS as ALL_KINDS
from simulate import triton_on_cpu

import recurx
from recurx import Schedule, Step, backends, reference
from recurx.errors import BackendUnavailable
from recurx.nets import ATTENTION, TOKEN_MLP, Net, NetSpec
from recurx.operands import Span
from recurx.route import route
from tests.factories import make_inputs, make_net, problem_for, rope
from tests.test_numerics import teacher_forced

KINDS = [kind for kind in ALL_KINDS if kind != "graph"]  # that runs what these do not
DTYPES = (torch.bfloat16, torch.float32)
ONE_CALL = Schedule((Step("L", "z_L", ("z_L",), ("z_H", "x")),))
CUSTOM = Schedule(
    (
        Step("L", "a", ("x", "b"), ("a", "b")),
        Step("H", "b", ("a",)),
        Step("L", "a", ("b", "a", "x")),
    )
)
SMALL = dict(tokens=5, hidden=32)
SMALL_NET = dict(heads=1, inner=32, token_inner=16, blocks=1, **SMALL)
TABLES = rope(heads=1, **SMALL)
SYSTEMS = {
    "trm": Schedule.trm(2, 2),
    "hrm": Schedule.hrm(1, 1),
    "single_z": Schedule.single_z(1, 1),
    "hier": Schedule.hier(2, 1),
    "custom": CUSTOM,
}


def run(*arguments, **keywords):
    return recurx.recurse(*arguments, backend="triton", **keywords)


def nets_of(schedule, kind, **shape):
    return {name: make_net(kind, seed=n, **shape) for n, name in enumerate(schedule.nets)}


@pytest.mark.parametrize("plan", KINDS)
@pytest.mark.parametrize("kind", [ATTENTION, TOKEN_MLP])
@pytest.mark.parametrize(
    "system, dtype",
    # fp32 differs from bf16 within a call only, and "custom" has every sort of call.
    [*((system, torch.bfloat16) for system in SYSTEMS), ("custom", torch.float32)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_every_call_teacher_forced(system, dtype, kind, plan):
    schedule = SYSTEMS[system]
    with triton_on_cpu(plan):
        teacher_forced(run, schedule, nets_of(schedule, kind, blocks=1), dtype)


@pytest.mark.parametrize("plan", KINDS)
def test_both_kinds_of_block_in_one_net(plan):
    both = [make_net(kind, blocks=1, seed=n) for n, kind in enumerate((ATTENTION, TOKEN_MLP))]
    spec = NetSpec(tuple(block for net in both for block in net.spec.blocks))
    net = Net(spec, [weight for one in both for weight in one.weights])
    with triton_on_cpu(plan):
        teacher_forced(run, ONE_CALL, {"L": net}, torch.bfloat16)


SHAPES = {
    "one token": dict(tokens=1),
    "T=97": dict(tokens=97, hidden=64, inner=64, heads=1, token_inner=40),
    "head_dim 128": dict(tokens=5, hidden=128, inner=96, heads=1),
    "D=384": dict(tokens=5, hidden=384, inner=64, heads=3),
    "D=768": dict(tokens=3, hidden=768, inner=64, heads=6),
    "T=300": dict(tokens=300, hidden=64, inner=64, heads=1),
}


@pytest.mark.parametrize("kind", [ATTENTION, TOKEN_MLP])
@pytest.mark.parametrize(
    "shape, dtype",
    [*((name, torch.bfloat16) for name in SHAPES), ("T=97", torch.float32)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_shapes(shape, dtype, kind):
    shape = SHAPES[shape]
    with triton_on_cpu("tiled"):
        teacher_forced(run, ONE_CALL, {"L": make_net(kind, blocks=1, **shape)}, dtype, **shape)


@pytest.mark.parametrize("plan", KINDS)
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("kind", [ATTENTION, TOKEN_MLP])
def test_batches_and_strides(kind, batch, plan):
    """Any B, and inputs with any strides, give the bits of each sample alone."""
    schedule = Schedule.trm(1, 1)
    nets = nets_of(schedule, kind, **SMALL_NET)
    x, carry = make_inputs(schedule, batch=batch, dtype=torch.bfloat16, **SMALL)
    strided = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert batch < 2 or not strided.is_contiguous()
    with triton_on_cpu(plan):
        together = run(schedule, nets, strided, carry, cos_sin=TABLES)
        for n in range(batch):
            one = {name: state[n : n + 1] for name, state in carry.items()}
            alone = run(schedule, nets, x[n : n + 1], one, cos_sin=TABLES)
            assert all(torch.equal(together[name][n : n + 1], alone[name]) for name in carry)
    for name in carry:
        assert together[name].shape == x.shape and together[name].is_contiguous()


@pytest.mark.parametrize("plan", KINDS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_calls_together_have_the_bits_of_calls_one_by_one(system, plan):
    """Hand-over at every call; sums that a run of calls shares are formed once, with equal bits."""
    schedule = SYSTEMS[system]
    nets = nets_of(schedule, ATTENTION, **SMALL_NET)
    x, start = make_inputs(schedule, batch=1, dtype=torch.bfloat16, **SMALL)
    with triton_on_cpu(plan):
        together = run(schedule, nets, x, start, cos_sin=TABLES)
        again = run(schedule, nets, x, start, cos_sin=TABLES)
        carry = start
        for k in range(len(schedule)):
            carry = run(schedule, nets, x, carry, cos_sin=TABLES, start_from=k, stop_after=k + 1)
    for name in schedule.states:
        assert torch.equal(together[name], carry[name])
        assert torch.equal(together[name], again[name])
        assert together[name].data_ptr() != again[name].data_ptr()


def test_a_stale_sum_is_rejected(monkeypatch):
    """z_H + x kept over the call that writes z_H: the check above must see it."""
    from recurx.kernels import tiled

    from recurx import program

    def stale(schedule, span):
        lowered = program.lower(schedule, span)
        first = next((call for call in lowered.calls if call.forms), None)
        calls = [call._replace(forms=call is first) for call in lowered.calls]
        return program.Program(tuple(calls), lowered.states)

    monkeypatch.setattr(tiled, "lower", stale)
    with pytest.raises(AssertionError):
        test_calls_together_have_the_bits_of_calls_one_by_one("trm", "tiled")


# ---- planted bugs in the kernels: the same numerics must reject each of them ---------------------

BUGS = {
    "gate and up swapped": (
        "linear", "gate_up_swiglu", "first * tl.sigmoid(first) * second",
        "second * tl.sigmoid(second) * first", (ATTENTION, TOKEN_MLP),
    ),
    "rope dropped": (
        "block", "run_block", "cos_sin=cos_sin, out=mixed", "cos_sin=None, out=mixed", (ATTENTION,),
    ),
    "no mask at T": (
        "attention", "attention", 'scores = tl.where(keys[None, :] < T, scores, float("-inf"))',
        "scores = scores + 0", (ATTENTION,),
    ),
    "residual is not added": (
        "linear", "linear_residual", "other=0.0).to(tl.float32)",
        "other=0.0).to(tl.float32) * 0.0", (ATTENTION, TOKEN_MLP),
    ),
    "padding counts in the mean": (
        "linear", "linear_residual_rms", "/ N + EPS", "/ (2 * COLS) + EPS", (TOKEN_MLP,),
    ),
    "the middle is not scaled": (
        "block", "run_block", "gate_up, squares=mid_squares", "gate_up, squares=None", (ATTENTION,),
    ),
    "squares of the block before": (
        "block", "run_block", "gate_up, squares=mid_squares",
        "gate_up, squares=mid_squares if squares is None else squares", (ATTENTION,),
    ),
    "the next block takes raw rows as they are": (
        "block", "run_call", "squares = scratch.squares", "squares = None", (ATTENTION, TOKEN_MLP),
    ),
    "library: gate and up swapped": (
        "pointwise", "swiglu", "activated(gate, ACT)\n    if GATED:\n        middle = middle * up",
        "activated(up, ACT)\n    if GATED:\n        middle = middle * gate", (ATTENTION, TOKEN_MLP),
    ),
    "library: residual is not added": (
        "pointwise", "add_norm", "x = _load(residual", "x = 0 * _load(residual",
        (ATTENTION, TOKEN_MLP),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "bug, kind", [(bug, kind) for bug, (*_, kinds) in BUGS.items() for kind in kinds]
)
def test_planted_bugs_are_rejected(bug, kind, dtype, monkeypatch, tmp_path):
    from recurx.kernels import block, sublayers, tiled

    module, name, old, new, _ = BUGS[bug]
    mutant, way = planted(module, old, new, tmp_path), "tiled"
    if module == "block":
        monkeypatch.setattr(tiled, "run_call", mutant.run_call)
    elif module == "pointwise":
        way = "library"
        monkeypatch.setattr(sublayers, name, getattr(mutant, name))
    else:
        monkeypatch.setattr(block, name, getattr(mutant, name))
    net = make_net(kind, blocks=2 if module == "block" else 1)
    with triton_on_cpu(way), pytest.raises(AssertionError, match="relative error"):
        teacher_forced(run, ONE_CALL, {"L": net}, dtype)


LEFT_RAW = {
    "a raw state is summed as it is": (
        "inject", "form_call_input", "value = tl.where(slot == raw, normed, value)",
        "value = tl.where(slot < 0, normed, value)",
    ),
    "a raw state stays raw": ("inject", "form_call_input", "if raw != write:", "if raw < 0:"),
    "the last state stays raw": ("tiled", "normalise", "", ""),
}  # fmt: skip


@pytest.mark.parametrize("bug", LEFT_RAW)
def test_states_that_are_left_raw_are_rejected(bug, monkeypatch, tmp_path):
    """Within a run of calls only: one call alone forms its input of states that are normalised."""
    from recurx.kernels import tiled

    module, name, old, new = LEFT_RAW[bug]
    if module == "tiled":
        monkeypatch.setattr(tiled, "normalise", lambda *_, **__: None)
    else:
        monkeypatch.setattr(tiled, name, getattr(planted(module, old, new, tmp_path), name))
    schedule = SYSTEMS["trm"]
    net = make_net(ATTENTION, **SMALL_NET)
    x, carry = make_inputs(schedule, batch=1, dtype=torch.float32, **SMALL)
    want = reference.run(schedule, {"L": net}, x, carry, TABLES)
    with triton_on_cpu("tiled"):
        got = run(schedule, {"L": net}, x, carry, cos_sin=TABLES)
    assert any((got[name] - want[name]).norm() > 0.01 * want[name].norm() for name in want)


# ---- what a call reads -------------------------------------------------------------------------


def call_inputs(form, schedule, dtype):
    """The input of each call by `form` beside the reference's, from the same states."""
    from recurx.kernels.arena import rows_of
    from recurx.kernels.call_table import call_table

    from recurx.program import lower

    x, carry = make_inputs(schedule, batch=2, tokens=7, dtype=dtype)
    for k, step in enumerate(schedule.steps):
        program = lower(schedule, Span(k, k + 1))
        words = call_table(program, dict.fromkeys(schedule.nets, (0, 1)))
        words = torch.tensor(words, dtype=torch.int32)
        arena = torch.stack([x, *(carry[name] for name in schedule.states)])
        form(arena, words, len(rows_of(program)) - 1)
        yield arena[rows_of(program)[-1].write], reference.call_input(step, {"x": x, **carry}, {})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("system", SYSTEMS)
def test_call_inputs_have_the_bits_of_the_reference(system, dtype, triton_device):
    from recurx.kernels.inject import form_call_input

    for got, want in call_inputs(form_call_input, SYSTEMS[system], dtype):
        assert torch.equal(got, want)


def test_another_order_of_the_sums_is_rejected(triton_device, tmp_path):
    """(z_L + z_H) + x in the place of z_L + (z_H + x)."""
    old = """        inject = read_sum(arena, table, at, injects,"""
    new = """        at -= states
        h = read_sum(arena, table, at, states + injects, slot_stride, offset, mask, raw, factor)
        inject = 0 * read_sum(arena, table, at + states, injects,"""
    form = planted("inject", old, new, tmp_path).form_call_input
    for dtype in DTYPES:
        pairs = call_inputs(form, SYSTEMS["trm"], dtype)
        assert not all(torch.equal(got, want) for got, want in pairs)


# ---- refusals ----------------------------------------------------------------------------------


def refusal(net, schedule=ONE_CALL, dtype=torch.float32, **shape):
    x, _ = make_inputs(schedule, batch=1, dtype=dtype, **shape)
    with triton_on_cpu():
        return backends.why_not("triton", problem_for(schedule, {"L": net}, x))


def test_what_it_cannot_run_is_said_in_one_sentence():
    assert "head_dim" in refusal(make_net(heads=4))
    assert "float16" in refusal(make_net(), dtype=torch.float16)
    assert "T=1024" in refusal(make_net(), tokens=1025)
    assert "D=4096" in refusal(make_net(hidden=4160, inner=1, heads=65), hidden=4160)
    assert refusal(make_net(hidden=1088, inner=32, heads=17), hidden=1088) is None  # the library
    assert refusal(make_net()) is None


def test_a_kind_of_plan_by_name_runs_or_refuses():
    net, (x, carry) = make_net(blocks=1), make_inputs(ONE_CALL, batch=1)
    wide = make_net(hidden=1088, inner=32, heads=17, blocks=1)
    with triton_on_cpu():
        for kind in KINDS:
            alone = backends.get(f"triton/{kind}")
            assert alone.name == f"triton/{kind}"
            assert alone.tapes is backends.get("triton").tapes
            assert alone.plan(problem_for(ONE_CALL, {"L": net}, x), x.device).kind == kind
        x, carry = make_inputs(ONE_CALL, batch=1, hidden=1088)
        for kind in ("tiled", "persistent"):
            with pytest.raises(BackendUnavailable, match=r"got .*1088"):
                recurx.recurse(ONE_CALL, {"L": wide}, x, carry, backend=f"triton/{kind}")
        with pytest.raises(recurx.InvalidArgument, match="triton/tiled, triton/library"):
            recurx.recurse(ONE_CALL, {"L": wide}, x, carry, backend="triton/best")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_and_auto_does_not_take_it():
    x, carry = make_inputs(ONE_CALL)
    with pytest.raises(BackendUnavailable, match="runs on cuda tensors, these are on cpu"):
        run(ONE_CALL, {"L": make_net()}, x, carry, cos_sin=rope())
    problem = problem_for(ONE_CALL, {"L": make_net(heads=4)}, x)
    assert "needs a GPU" in backends.get("triton").why_unavailable()
    with triton_on_cpu():
        assert route(problem).backend in ("cpu", "eager")


def test_asking_the_backend_does_not_import_triton():
    code = (
        "import sys, recurx; from recurx import backends\n"
        "backends.get('triton').why_unavailable()\n"
        "assert 'triton' not in sys.modules and 'torch._dynamo' not in sys.modules"
    )
    if torch.cuda.is_available():
        pytest.skip("with a GPU the question is answered by importing it")
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- inside models -----------------------------------------------------------------------------


@pytest.mark.slow
def test_under_torch_compile_fullgraph():
    schedule = Schedule.trm(1, 1)
    nets = nets_of(schedule, ATTENTION, blocks=1)
    x, carry = make_inputs(schedule, batch=2)

    def step(x, carry):
        out = run(schedule, nets, x * 2, carry, cos_sin=rope())
        return out["z_H"] + 1

    with triton_on_cpu(), torch.no_grad():
        want = step(x, carry)
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(x, carry)
    assert torch.equal(got, want)


def test_models_and_solve():
    """A whole model by `backend=`; halting asks for the same number of steps as on eager."""
    from recurx.models import TRM, TRMConfig

    torch.manual_seed(0)
    config = TRMConfig.tiny(7, 9, hidden_size=64, num_heads=2, H_cycles=1, L_cycles=1)
    model = TRM(config, backend="eager").eval()
    batch = {
        "inputs": torch.randint(1, 7, (3, 9)),
        "puzzle_identifiers": torch.zeros(3, dtype=torch.int32),
    }
    want = recurx.solve(model, batch, max_steps=2)
    model.inner.backend = "triton"
    with triton_on_cpu():
        assert "'triton' -> triton" in recurx.explain(model)
        got = recurx.solve(model, batch, max_steps=2)
    assert torch.equal(got.predictions, want.predictions)
    assert got.histogram() == want.histogram()
