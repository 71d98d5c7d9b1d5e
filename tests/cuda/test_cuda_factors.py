"""Damping, scale and noise of steps in the CUDA kernels, in the emulator with its race checker."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from emulator import asleep, cluster_recursion, grid
from emulator.build import KERNELS, Emulated, build, load_kernels, unavailable
from emulator.owner import EmulatedCuda, emulate
from recurx import BackendUnavailable, Problem, Schedule, Step, backends, reference
from recurx.backends.cuda import Cuda
from recurx.nets import ATTENTION, TOKEN_MLP
from recurx.plan import DEVICES
from recurx.plan.cuda import KINDS, candidates
from recurx.specs import BlockSpec, NetSpec
from tests.factories import make_inputs, make_net, problem_for, rope
from tests.test_numerics import teacher_forced

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

BF16 = torch.bfloat16
EQR = Schedule.trm(1, 2).with_factors(damping=0.95, scale=0.7, noise=0.1)
MIXED = Schedule(
    (
        Step("L", "a", ("a",), ("b", "x"), noise=0.3),
        Step("L", "a", ("a",), ("b", "x")),  # finds the noisy state on chip
        Step("L", "a", ("a",), ("b", "x"), damping=0.6),  # needs what it overwrites
        Step("H", "b", ("x",), ("a", "b"), scale=-1.5),
        Step("L", "a", ("b", "a", "x"), damping=1.5, noise=0.2),
        Step("L", "a", ("a",), scale=0.5),
    )
)
SYSTEMS = {"eqr": EQR, "mixed": MIXED}


def nets_of(schedule: Schedule, kind: str, **shape: int) -> dict:
    return {name: make_net(kind, seed=n, blocks=1, **shape) for n, name in enumerate(schedule.nets)}


@pytest.fixture(scope="module")
def owner() -> EmulatedCuda:
    return emulate(((64, 2), (64, 2, 1)))


# Two CTAs, so that row tiles have different ones.
GRID = replace(DEVICES["a100"], units=2)


def emulate_clusters(
    checked: bool = True, folder: Path = KERNELS, flags: tuple[str, ...] = ()
) -> EmulatedCuda:
    sources = [folder / cluster_recursion.FILES[0]]
    sources += [KERNELS / name for name in cluster_recursion.FILES[1:]]
    path = build(sources, checked, (*flags, "-DRX_CLUSTER_WIDTHS(X)=X(128)"))
    return EmulatedCuda(Emulated(path, checked), (), DEVICES["h100"])


def shape_of(cuda: EmulatedCuda) -> dict[str, int]:
    """Of a net that the kernels of a build run."""
    library = cuda.library()
    assert library is not None
    return dict(hidden=128, heads=2) if library.kinds == ("cluster",) else {}


PLACES = {"h in shared memory": ((64, 2),), "h in scratch": ((64, 2, 1),)}


@pytest.fixture(params=[*PLACES, "grid", "cluster"])
def checked(request: pytest.FixtureRequest) -> EmulatedCuda:
    if request.param == "grid":
        return EmulatedCuda(load_kernels(grid.FILES, checked=True), (), GRID)
    if request.param == "cluster":
        return emulate_clusters()
    owner: EmulatedCuda = request.getfixturevalue("owner")
    return EmulatedCuda(owner.emulated, PLACES[request.param], DEVICES["a100"])


@pytest.mark.parametrize("kind", [ATTENTION, TOKEN_MLP])
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_call_teacher_forced(checked: EmulatedCuda, system: str, kind: str) -> None:
    schedule, shape = SYSTEMS[system], shape_of(checked)
    checked.emulated.configure(seed=1)
    nets = nets_of(schedule, kind, **shape)
    teacher_forced(checked, schedule, nets, BF16, seed=2**40 + 3, **shape)


def test_a_part_of_a_batch_draws_what_all_of_it_would(checked: EmulatedCuda) -> None:
    """By the number of its first sample, which stands beside the seed."""
    schedule = SYSTEMS["eqr"]
    nets, x, start, tables = ragged(schedule, checked)
    whole = checked(schedule, nets, x, start, tables, seed=7)
    tail = {name: state[1:].clone() for name, state in start.items()}
    part = checked(schedule, nets, x[1:].clone(), tail, tables, seed=7, first_sample=1)
    assert all(torch.equal(part[name], whole[name][1:]) for name in schedule.states)


@pytest.mark.parametrize("system", SYSTEMS)
def test_one_launch_is_many_of_one_call_under_every_seed(
    checked: EmulatedCuda, system: str
) -> None:
    """Bit by bit, and no race: what is damped is found where the call before left it."""
    schedule = SYSTEMS[system]
    nets, x, start, tables = ragged(schedule, checked)
    wholes = []
    for seed in (1, 2):
        checked.emulated.configure(seed=seed)
        wholes.append(checked(schedule, nets, x, start, tables, seed=7))
    for k in range(len(schedule)):
        start = checked(schedule, nets, x, start, tables, k, k + 1, seed=7)
    for name in schedule.states:
        assert all(torch.equal(whole[name], start[name]) for whole in wholes), name


def ragged(schedule: Schedule, cuda: EmulatedCuda) -> tuple:
    """Nets, x, states and tables: three samples of 17 tokens."""
    shape = dict(tokens=17, **shape_of(cuda))
    size = {name: n for name, n in shape.items() if name != "heads"}
    x, start = make_inputs(schedule, batch=3, dtype=BF16, **size)
    return nets_of(schedule, ATTENTION, **shape), x, start, rope(**shape)


# ---- planted bugs --------------------------------------------------------------------------------

STATES, RECURSION, ROWS = "owner_sm80/states.cuh", "recursion.cuh", "grid_sm80/states.cuh"
CLUSTER = "cluster_sm90a/states.cuh"


class Bug(NamedTuple):
    name: str
    file: str
    old: str
    new: str


BUGS = [
    Bug("damps what was there before the launch", STATES,
        "rx::state_source(r, written, call.write)",
        "rx::state_source(r, BUG ? 0u : written, call.write)"),
    Bug("the noise of the call after", RECURSION,
        "uint32_t(call.number)", "uint32_t(call.number + (BUG ? 1 : 0))"),
    Bug("the noise of the first sample for all", RECURSION,
        "call_normals(pair, entry +", "call_normals(pair, (BUG ? 0u : entry) +"),
    Bug("the noise of the first row for all", STATES,
        "old, entry, pair)", "old, entry, BUG ? pair % (P::kHidden / 2) : pair)"),
    Bug("scale of the injected sum, too", STATES,
        "        x = rx::add_rounded(x, inject);",
        "        x = rx::add_rounded(x, BUG ? rx::scale_rounded(inject, call.scale) : inject);"),
    Bug("old and new are kept alike", RECURSION,
        "scale_bf16(value, call.damping)", "scale_bf16(value, BUG ? call.keep : call.damping)"),
    Bug("the rows keep their scales", STATES,
        "    store_vector(o, row, at, column, x);\n  });\n  reset_scales(o);\n}\n\n// states_out",
        "    store_vector(o, row, at, column, x);\n  });\n"
        "  if (!BUG) reset_scales(o);\n}\n\n// states_out"),
    Bug("the words change places", RECURSION,
        "x = make_uint4(x.y, x.z, x.w, word);",
        "x = make_uint4(x.y, x.z, BUG ? word : x.w, BUG ? x.w : word);"),
]  # fmt: skip


GRID_BUGS = [
    Bug("what the net left is what is written", ROWS,
        "if (finishes) finish_rows", "if (finishes && !BUG) finish_rows"),
    Bug("damps what was there before the launch", ROWS,
        "add_states(sum, &last->write, 1, r, written,",
        "add_states(sum, &last->write, 1, r, BUG ? 0u : written,"),
    Bug("the factors of the call that begins", ROWS,
        "finish_rows(fresh, sum, r, *last, tile, z)",
        "finish_rows(fresh, sum, r, BUG && call ? *call : *last, tile, z)"),
    Bug("the noise of the first sample for all", ROWS,
        "uint32_t(z.by_token_tiles.of(tile)),", "uint32_t(BUG ? 0 : z.by_token_tiles.of(tile)),"),
    Bug("the noise of the first row for all", ROWS,
        "uint32_t(token * z.width * 16 + column_of(t, i & 3)) / 2",
        "uint32_t((BUG ? 0 : token) * z.width * 16 + column_of(t, i & 3)) / 2"),
    Bug("no scale", ROWS, "if (call->scale != 1.f)", "if (!BUG && call->scale != 1.f)"),
    Bug("the words change places", ROWS,
        "    x[kRowWarpTiles - 1][3] = word;\n",
        "    x[kRowWarpTiles - 1][3] = word;\n    if (BUG) x[0][0] = old[0][1];\n"),
]  # fmt: skip
CLUSTER_BUGS = [
    Bug("what the net left is what is written", CLUSTER,
        "if (finishes) {", "if (finishes && !BUG) {"),
    Bug("damps what was there before the launch", CLUSTER,
        "rx::sum_states(p.r, written, &call.write, 1, offset),",
        "rx::sum_states(p.r, BUG ? 0u : written, &call.write, 1, offset),"),
    Bug("the noise of the call after", CLUSTER,
        "rx::finish_vector(p.r, call, x,",
        "rx::finish_vector(p.r, BUG ? (&call)[1] : call, x,"),
    Bug("the noise of the first sample for all", CLUSTER,
        "uint32_t(sample), uint32_t(offset", "uint32_t(BUG ? 0 : sample), uint32_t(offset"),
    Bug("the noise of either half for both", CLUSTER,
        "uint32_t(offset - first) / 2", "uint32_t(offset - first) / 2 - BUG * at.half() * 32"),
    Bug("h is taken for what was written", "cluster_sm90a/kernel.cuh",
        "&& !rx::finishes(p.r.calls[now.call])", "&& (BUG || !rx::finishes(p.r.calls[now.call]))"),
    Bug("no scale", CLUSTER, "if (call.scale != 1.f)", "if (!BUG && call.scale != 1.f)"),
]  # fmt: skip
FAMILIES = {"owner_sm80": BUGS, "grid_sm80": GRID_BUGS, "cluster_sm90a": CLUSTER_BUGS}
EACH = [
    pytest.param((family, bug), id=f"{family}: {bug.name}")
    for family, bugs in FAMILIES.items()
    for bug in bugs
]


@pytest.fixture(scope="module")
def buggy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], EmulatedCuda]:
    """A build of a family with all its bugs asleep, made when it is asked for."""

    @functools.cache
    def built(family: str) -> EmulatedCuda:
        folder = tmp_path_factory.mktemp(family) / "cuda"
        asleep.plant(folder, FAMILIES[family], family)
        flags = ("-O1", "-g0")
        if family == "owner_sm80":
            return emulate(((64, 2),), checked=False, folder=folder, flags=flags)
        if family == "cluster_sm90a":
            return emulate_clusters(checked=False, folder=folder, flags=flags)
        sources = [folder / name for name in grid.FILES]
        path = build(sources, False, (*flags, "-DRX_NO_FP8"))
        return EmulatedCuda(Emulated(path, False), (), GRID)

    return built


@pytest.mark.parametrize("planted", EACH)
def test_planted_bugs_are_found(
    buggy: Callable[[str], EmulatedCuda], planted: tuple[str, Bug]
) -> None:
    """By a launch of few calls against the reference in fp64."""
    family, bug = planted
    asleep.wake(buggy(family).emulated.library, FAMILIES[family], bug)
    assert not off(buggy(family)) <= 0.05  # NaN is found, too


@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_bugs_asleep_it_is_near(buggy: Callable[[str], EmulatedCuda], family: str) -> None:
    asleep.wake(buggy(family).emulated.library, FAMILIES[family], None)
    assert off(buggy(family)) < 0.03


def off(cuda: EmulatedCuda) -> float:
    """How far a launch of few calls is from the reference: chaos has not begun."""
    schedule = Schedule(MIXED.steps[:5])
    shape = shape_of(cuda)
    nets, tables = nets_of(schedule, ATTENTION, **shape), rope(**shape)
    x, carry = make_inputs(schedule, batch=2, dtype=BF16, hidden=tables[0].shape[1] * 2)
    got = cuda(schedule, nets, x, carry, tables, seed=7)
    exact = {name: reference.Net(net.spec, [w.bfloat16().double() for w in net.weights])
             for name, net in nets.items()}  # fmt: skip
    wide = {name: state.double() for name, state in carry.items()}
    want = reference.run(schedule, exact, x.double(), wide, tables, seed=torch.tensor([7, 0]))
    return max(float((got[n] - want[n]).norm() / want[n].norm()) for n in carry)


# ---- who runs it ---------------------------------------------------------------------------------


def test_each_kind_runs_factors_and_what_none_runs_is_named(owner: EmulatedCuda) -> None:
    nets = {"L": make_net(hidden=128, heads=2)}
    x, _ = make_inputs(EQR, batch=2, hidden=128, dtype=BF16)
    damped = problem_for(EQR, nets, x)
    convolved = NetSpec((BlockSpec(ATTENTION, 128, 128, 2, conv=2),))
    other = Problem(EQR, (("L", convolved),), 2, 13, 128, BF16, "cpu", True)
    cuda = Cuda(owner.emulated.library, DEVICES["h100"])
    assert backends.unknown_fields(cuda, damped) is None
    assert "conv=2" in str(backends.unknown_fields(cuda, other))
    assert {plan.kind for plan in candidates(damped, DEVICES["h100"])} == set(KINDS)
    noiseless = problem_for(Schedule.trm(1, 2).with_factors(damping=0.9), nets, x)
    assert cuda.queue_plan(noiseless, torch.device("cpu")).kind == "owner"
    with pytest.raises(BackendUnavailable, match="noise"):
        cuda.queue_plan(damped, torch.device("cpu"))
    with pytest.raises(BackendUnavailable, match="conv=2"):
        cuda.queue_plan(other, torch.device("cpu"))
