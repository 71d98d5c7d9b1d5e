"""Damping, scale and noise of steps in the Triton kernels, and planted bugs."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")
import triton
import triton.language as tl
from mutants import planted
from recurx.kernels.noise import normal_numbers
from simulate import KINDS as ALL_KINDS
from simulate import FakeGraphs, triton_on_cpu
from window_gradients import assert_close, gradients_of, on_triton

import recurx
from recurx import Schedule, Step, backends, noise, reference
from recurx.nets import KINDS as BLOCKS
from recurx.operands import Operands, Span
from recurx.specs import ATTENTION, NORM, BlockSpec, NetSpec
from tests.factories import make_inputs, make_net, problem_for, rope, rounded
from tests.test_numerics import teacher_forced
from tests.variants import net_of

KINDS = [kind for kind in ALL_KINDS if kind != "graph"]  # that is the reference
BF16 = torch.bfloat16
SMALL = dict(tokens=5, hidden=32)
SMALL_NET = dict(heads=1, inner=32, token_inner=16, blocks=1, **SMALL)
TABLES = rope(heads=1, **SMALL)
EQR = Schedule.trm(2, 2).with_factors(damping=0.95, scale=0.7, noise=0.1)
# Each factor alone, calls without any between, a target that is read elsewhere, a call that reads
# neither itself nor anything else that it could find in its place.
MIXED = Schedule(
    (
        Step("L", "a", ("a",), ("b", "x"), damping=0.6),
        Step("L", "a", ("a",), ("b", "x")),
        Step("H", "b", ("x",), ("a", "b"), noise=0.3),
        Step("L", "a", ("a",), scale=0.5),
        Step("H", "b", ("x",), damping=0.25, scale=-1.5, noise=0.2),
        Step("L", "a", ("b", "a", "x"), damping=1.5),
    )
)
SHORT = Schedule.trm(1, 1).with_factors(damping=0.95, scale=0.7, noise=0.1)
SYSTEMS = {"eqr": EQR, "mixed": MIXED}


def run(*arguments, **keywords):
    return recurx.recurse(*arguments, backend="triton", **keywords)


def nets_of(schedule: Schedule, kind: str = ATTENTION, **shape: int) -> dict:
    return {name: make_net(kind, seed=n, **shape) for n, name in enumerate(schedule.nets)}


@pytest.mark.parametrize("plan", KINDS)
@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize(
    "system, dtype", [("eqr", BF16), ("mixed", BF16), ("mixed", torch.float32)], ids=str
)
def test_every_call_teacher_forced(system, dtype, kind, plan):
    schedule = SYSTEMS[system]
    with triton_on_cpu(plan):
        teacher_forced(run, schedule, nets_of(schedule, kind, blocks=1), dtype, seed=2**40 + 3)


@pytest.mark.parametrize("plan", KINDS)
def test_a_part_of_a_batch_draws_what_all_of_it_would(plan):
    """By the number of its first sample, which stands beside the seed."""
    nets = nets_of(SHORT, **SMALL_NET)
    x, carry = make_inputs(SHORT, batch=3, dtype=BF16, **SMALL)
    with triton_on_cpu(plan):
        whole = run(SHORT, nets, x, carry, cos_sin=TABLES, seed=5)
        tail = {name: state[1:] for name, state in carry.items()}
        part = run(SHORT, nets, x[1:], tail, cos_sin=TABLES, seed=torch.tensor([5, 1]))
    assert all(torch.equal(part[name], whole[name][1:]) for name in SHORT.states)


@pytest.mark.parametrize("plan", KINDS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_calls_together_have_the_bits_of_calls_one_by_one(system, plan):
    schedule = SYSTEMS[system]
    nets = nets_of(schedule, **SMALL_NET)
    x, start = make_inputs(schedule, batch=3, dtype=BF16, **SMALL)
    with triton_on_cpu(plan):
        together = run(schedule, nets, x, start, cos_sin=TABLES, seed=5)
        again = run(schedule, nets, x, start, cos_sin=TABLES, seed=5)
        other = run(schedule, nets, x, start, cos_sin=TABLES, seed=6)
        carry = start
        for k in range(len(schedule)):
            carry = run(
                schedule, nets, x, carry, cos_sin=TABLES, start_from=k, stop_after=k + 1, seed=5
            )
    for name in schedule.states:
        assert torch.equal(together[name], carry[name])
        assert torch.equal(together[name], again[name])
        assert not torch.equal(together[name], other[name])


@pytest.mark.parametrize("plan", ["tiled", "library"])
def test_slices_and_replays_draw_the_noise_of_their_samples_and_seed(plan):
    """Three samples in slices of two, replayed under two seeds, against the reference."""
    nets = nets_of(SHORT, **SMALL_NET)
    x, carry = make_inputs(SHORT, batch=3, dtype=torch.float32, **SMALL)
    graphs = FakeGraphs(allocates=plan == "library")
    with triton_on_cpu(plan, slice=2, capture=graphs):
        for seed in (0, 1, 0):
            got = run(SHORT, nets, x, carry, cos_sin=TABLES, seed=seed)
            want = reference.run(SHORT, nets, x, carry, TABLES, seed=torch.tensor([seed, 0]))
            for name in carry:
                torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=1e-4)
    assert graphs.captures == 1 and graphs.replays == 5  # the first slice ran without a graph


@triton.jit
def _draw(out, seed, entry, number, N: tl.constexpr):
    e = tl.arange(0, N)
    first = tl.load(entry).to(tl.int32) + e * 0
    tl.store(out + e, normal_numbers(tl.load(seed), first, tl.load(number), e))


def test_the_noise_is_the_stream_of_the_library(triton_device):
    """Element by element, at the ends of what seeds, samples and calls may be."""
    for seed, entry, number in ((0, 0, 0), (2**63 - 1, 2**31 - 1, 2**31 - 1), (2**33 + 7, 5, 20)):
        given = torch.tensor(seed, device=triton_device)
        first = torch.tensor([entry], device=triton_device)
        calls = torch.tensor([number], dtype=torch.int32, device=triton_device)
        out = torch.empty(1 << 14, device=triton_device)
        _draw[(1,)](out, given, first, calls, N=len(out))
        want = noise.normals(first, number, (len(out),), given, use=noise.CALLS)[0]
        torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6)


# ---- planted bugs ------------------------------------------------------------------------------

BUGS = {
    "the old value is that of the place": (
        "finish", "value, tl.load(out + offset,", "value, tl.load(x + offset,"),
    "old and new change places": ("finish", "load_factor(table, row, 1)",
                                  "(1 - load_factor(table, row, 1))"),
    "the noise of the call before": (
        "finish", "load_number(table, row)", "load_number(table, row) - 1"),
    "the noise of the first sample for all": ("finish", "(rows // T)[:, None] +",
                                              "0 * rows[:, None] +"),
    "elements counted by row": ("finish", "(rows % T)[:, None] * D + cols",
                                "(rows % T)[:, None] + cols"),
    "scale of the injected sum, too": (
        "inject", "h = (h.to(tl.float32) + inject.to(tl.float32))",
        "h = (h.to(tl.float32) + load_factor(table, row, 0) * inject.to(tl.float32))"),
    "scale forgotten": ("inject", "    if SCALED:\n", "    if False:\n"),
    "the last factor first": ("call_table", "ends + len(factors)", "ends"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_rejected(bug, dtype, monkeypatch, tmp_path):
    from recurx.kernels import tiled

    module, old, new = BUGS[bug]
    name = {"finish": "finish_call", "inject": "form_call_input", "call_table": "call_table"}
    monkeypatch.setattr(
        tiled, name[module], getattr(planted(module, old, new, tmp_path), name[module])
    )
    schedule = MIXED if module == "call_table" else SHORT
    nets = nets_of(schedule, **SMALL_NET)
    with triton_on_cpu("tiled"), pytest.raises(AssertionError, match="relative error"):
        if module == "call_table":  # within a run of calls only
            x, carry = make_inputs(schedule, batch=2, dtype=dtype, **SMALL)
            got = run(schedule, nets, x, carry, cos_sin=TABLES, seed=1)
            want = reference.run(schedule, nets, x, carry, TABLES, seed=torch.tensor([1, 0]))
            off = max((got[n] - want[n]).norm() / want[n].norm() for n in carry)
            assert off < 0.05, f"relative error {off}"
        teacher_forced(run, schedule, nets, dtype, seed=1, heads=1, **SMALL)


PERSISTENT = {
    "the old value is that of the place": (
        "value, tl.load(out_g + offset,", "value, tl.load(h_g + offset,"),
    "written where it ran": ("own + tl.load(words + 7)", "own + tl.load(words + 2)"),
    "the noise of the sample before": ("first + row // T\n", "first + row // T - 1\n"),
    "the first rows alone": ("tl.range(0, ROWS, FINISHED,", "tl.range(0, FINISHED, FINISHED,"),
}  # fmt: skip


@pytest.mark.parametrize("bug", PERSISTENT)
def test_planted_bugs_of_the_persistent_kernel_are_rejected(bug, monkeypatch, tmp_path):
    from recurx.kernels import recursion

    shape = dict(tokens=17, hidden=32)
    mutant = planted("recursion", *PERSISTENT[bug], tmp_path)
    monkeypatch.setattr(recursion, "recursion", mutant.recursion)
    net = {"L": make_net(heads=1, inner=32, blocks=1, **shape)}
    with triton_on_cpu("persistent"), pytest.raises(AssertionError, match="relative error"):
        teacher_forced(run, SHORT, net, BF16, seed=1, heads=1, **shape)


# ---- who runs it ---------------------------------------------------------------------------------


def test_each_kind_says_what_it_does_not_run():
    x, _ = make_inputs(EQR, batch=2, **SMALL)
    damped = problem_for(EQR, nets_of(EQR, **SMALL_NET), x)
    dropping = NetSpec((BlockSpec(ATTENTION, 32, 32, 1, dropout=0.5),))
    other = recurx.Problem(EQR, (("L", dropping),), 2, 5, 32, torch.float32, "cpu", True)
    long = recurx.Problem(EQR, damped.nets, 2, 1025, 32, torch.float32, "cpu", True)
    with triton_on_cpu(*ALL_KINDS):
        for kind in ALL_KINDS:
            assert backends.why_not(f"triton/{kind}", damped) is None
        for kind in KINDS:
            assert kind == "library" or "dropout=0.5" in backends.why_not(f"triton/{kind}", other)
            assert "T=1024" in backends.why_not(f"triton/{kind}", long)
        assert backends.why_not("triton/library", other) is None
        assert backends.why_not("triton", long) is None
        assert backends.get("triton").plan(long, torch.device("cpu")).kind == "graph"


@pytest.mark.parametrize("way", ["tiled", "library"])
@pytest.mark.parametrize("save", ["all", "states"])
@pytest.mark.parametrize("system, dtype", [("eqr", BF16), ("mixed", torch.float32)], ids=str)
def test_gradients_through_factors(system, dtype, save, way):
    steps = SYSTEMS[system].steps if system == "mixed" else SHORT.steps
    schedule = Schedule(steps, detach_carry=False)
    nets = {
        n: rounded(net, dtype, torch.float32) for n, net in nets_of(schedule, **SMALL_NET).items()
    }
    given = schedule, nets, *make_inputs(schedule, batch=4, dtype=dtype, **SMALL)
    with triton_on_cpu():
        problem = problem_for(*given[:3])
        assert backends.get(f"triton/{way}").window(problem) is not None
        run = on_triton(TABLES, save, f"triton/{way}", seed=3)
        got = gradients_of(run, *given, into_carry=True)
    assert_close(got, *given, TABLES, into_carry=True, seed=3)


@pytest.mark.parametrize("factors", [{"scale": 0.5}, {"damping": 0.5}, {"noise": 0.5}], ids=str)
def test_states_that_leave_share_no_memory_with_what_is_kept(factors):
    schedule = Schedule((Step("L", "z", ("z",), ("x",), **factors),) * 2)
    nets = nets_of(schedule, **SMALL_NET)
    x, carry = make_inputs(schedule, batch=2, **SMALL)
    weights = [w for net in nets.values() for w in net.weights]
    seed = torch.tensor([3, 0]) if "noise" in factors else None
    operands = Operands(x, tuple(carry.values()), tuple(weights), TABLES, seed)
    with triton_on_cpu():
        problem = problem_for(schedule, nets, x)
        window = backends.get("triton").window(problem)
        outs, kept = window.forward(problem, operands, Span(0, 2), "all")
    memory = [t.untyped_storage().data_ptr() for t in (*outs, *kept, *operands.states, x)]
    assert len(set(memory)) == len(memory)


FACTOR_BUGS = {
    "damping": ("factors.damping * d_out", "1.0 * d_out"),
    "what was before": ("factors.keep * d_out", "0.0 * d_out"),
    "scale": ("else factors.scale * d_h", "else d_h"),
    "scale, forward": ("total * call.factors.scale", "total * 1.0"),
}


@pytest.mark.parametrize("bug", FACTOR_BUGS)
def test_gradients_through_wrong_factors_are_rejected(bug, monkeypatch, tmp_path):
    from recurx.backends import triton_window

    monkeypatch.setattr(triton_window, "TritonWindow", changed(triton_window, *FACTOR_BUGS[bug]))
    with pytest.raises(AssertionError, match="gradient"):
        test_gradients_through_factors("mixed", torch.float32, "states", "library")


def changed(module: ModuleType, old: str, new: str) -> type:
    """The window of that module with a bug in it."""
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{old!r}: adapt the planted bug"
    mutant = ModuleType(module.__name__)
    exec(compile(source.replace(old, new), module.__file__, "exec"), mutant.__dict__)
    return mutant.TritonWindow


def test_learned_factors_have_no_window():
    """Then PyTorch runs it."""
    schedule = Schedule((Step("L", "z", ("z",), ("x",), damping="alpha"),))
    nets = {"L": make_net(**SMALL_NET), "alpha": net_of(BlockSpec(NORM, 32, 0, norm_weight=True))}
    problem = problem_for(schedule, nets, make_inputs(schedule, batch=2, **SMALL)[0])
    with triton_on_cpu():
        for name in ("triton", "triton/tiled", "triton/library"):
            assert backends.get(name).window(problem) is None
