"""The grid kernel in the emulator: right, clean under the race checker, and planted bugs found."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

import recurx
from emulator.build import EmulatorFault, load_kernels, unavailable
from recurx import Schedule, Step
from recurx.backends.cuda import Cuda
from recurx.nets import ATTENTION, KINDS, TOKEN_MLP, Net, NetSpec
from recurx.plan import DEVICES, cuda_grid
from tests.factories import make_inputs, make_net, problem_for, rope
from tests.test_numerics import SYSTEMS, teacher_forced

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
from emulator import bugs_grid  # noqa: E402
from emulator.grid import FILES, GridKernel, Plan  # noqa: E402
from emulator.owner import installed  # noqa: E402

BF16 = torch.bfloat16
ONE_CALL = Schedule((Step("L", "z_L", ("z_L",), ("z_H", "x")),))
SMALL = dict(tokens=17, hidden=64, inner=96, heads=2, token_inner=32)
LARGER = dict(tokens=33, hidden=128, inner=192, heads=2, token_inner=64)
# Down's depth is nine chunks of a ring that holds four; the tokens are nine units of a token-MLP,
# which two CTAs do in two passes and in one.
RINGS = dict(tokens=17, hidden=64, inner=544, heads=2, token_inner=32)
PASSES = dict(tokens=65, hidden=64, inner=32, heads=2, token_inner=32)
# Of gate_up's 20 units over six CTAs, the last cluster of two has a pass less than the others.
UNEVEN = dict(tokens=17, hidden=64, inner=160, heads=2, token_inner=32)
SPLIT = (1, 2, 4, 8)
WARPS = cuda_grid.WARPS


@pytest.fixture(scope="module")
def library():
    return load_kernels(FILES, checked=True)


@pytest.fixture(scope="module")
def plain():
    """Without the race checker: ten times faster, the same bits."""
    return load_kernels(FILES, checked=False)


@pytest.fixture(scope="module")
def buggy(tmp_path_factory):
    return bugs_grid.plant_all(tmp_path_factory.mktemp("grid") / "cuda")


def net_of(kind: str, seed: int = 0, **shape: int) -> Net:
    """A net of two blocks: of one kind, attention first and token-MLP second ("mixed"), or one
    whose sums over the inner width depend on their order ("cancelling")."""
    if kind == "cancelling":
        return cancelling_net(**shape)
    if kind != "mixed":
        return make_net(kind, seed=seed, **shape)
    first, second = (make_net(k, seed=seed + i, blocks=1, **shape) for i, k in enumerate(KINDS))
    return Net(NetSpec(first.spec.blocks + second.spec.blocks), first.weights + second.weights)


def cancelling_net(**shape: int) -> Net:
    """Of the four parts of each down product, the second and the third are huge and opposite: what
    was added before them is rounded coarsely, what comes after is not."""
    net = make_net(ATTENTION, **{**shape, "inner": 128})
    for block in range(2):
        _, _, gate_up, down = net.weights[4 * block : 4 * block + 4]
        halves = gate_up.unflatten(0, (2, 4, 32))
        halves[:, 2] = halves[:, 1]  # the same middle in both parts
        parts = down.unflatten(1, (4, 32))
        parts[:, 1] *= 2.0**18
        parts[:, 2] = -parts[:, 1]
    return net


def inputs_of(schedule: Schedule, batch: int, shape: dict):
    size = {k: shape[k] for k in ("tokens", "hidden")}
    x, carry = make_inputs(schedule, batch=batch, dtype=BF16, **size)
    return x, carry, rope(shape["tokens"], shape["hidden"], shape["heads"])


def assert_one_launch_is_its_calls(kernel: GridKernel, schedule: Schedule, nets, x, carry, rotary):
    """All calls in one launch give the bits of a launch for each."""
    whole = kernel.run(schedule, nets, x, carry, rotary)
    for k in range(len(schedule)):
        carry = kernel.run(schedule, nets, x, carry, rotary, k, k + 1)
    for name in schedule.states:
        assert torch.equal(whole[name], carry[name]), (
            f"calls in one launch differ from calls one by one: {name}"
        )
    return whole


CASES = [
    # kind, shape, batch, CTAs, row groups
    (ATTENTION, SMALL, 3, 3, (2, 3, 1, 3)),
    (TOKEN_MLP, SMALL, 2, 2, (1, 2, 2, 1)),
    ("mixed", SMALL, 1, 2, (1, 2, 2, 1)),
]


@pytest.mark.parametrize("kind, shape, batch, ctas, groups", CASES, ids=str)
def test_right_and_clean_under_ten_seeds(library, kind, shape, batch, ctas, groups):
    kernel = GridKernel(library, Plan(ctas, groups, SPLIT))
    nets = {"L": net_of(kind, **shape)}
    library.configure(seed=1)
    teacher_forced(kernel.run, ONE_CALL, nets, BF16, **shape)
    schedule = Schedule.single_z(1, 1)  # two calls
    x, carry, rotary = inputs_of(schedule, batch, shape)
    first = kernel.run(schedule, nets, x, carry, rotary)
    for seed in range(2, 11):
        library.configure(seed=seed)
        again = kernel.run(schedule, nets, x, carry, rotary)
        for name, state in first.items():
            assert torch.equal(state, again[name]), f"seed {seed} gave other bits of {name}"


@pytest.mark.parametrize("kind", KINDS)
def test_many_ctas_race_no_more_than_few(library, kind):
    """Eight CTAs, D=128: the checker's cost grows with the square of the threads, so one seed."""
    kernel = GridKernel(library, Plan(8, (2, 2, 4, 8), SPLIT))
    library.configure(seed=5)
    x, carry, rotary = inputs_of(ONE_CALL, 1, LARGER)
    nets = {"L": net_of(kind, blocks=1, **LARGER)}
    got = kernel.run(ONE_CALL, nets, x, carry, rotary)
    few = GridKernel(library, Plan(2, (1, 1, 1, 1), SPLIT)).run(ONE_CALL, nets, x, carry, rotary)
    assert torch.equal(got["z_L"], few["z_L"])


CLUSTERS = [  # kind, shape, CTAs, row groups, a cluster, seeds
    pytest.param(ATTENTION, RINGS, 2, (1, 1, 1, 1), 2, 4),
    pytest.param("mixed", SMALL, 2, (1, 1, 1, 1), 2, 4),
    pytest.param(TOKEN_MLP, PASSES, 2, (1, 1, 1, 1), 2, 1),
    pytest.param(ATTENTION, RINGS, 4, (1, 1, 1, 1), 4, 1),
    pytest.param(ATTENTION, RINGS, 4, (2, 1, 2, 1), 2, 3, marks=pytest.mark.slow),
    pytest.param(TOKEN_MLP, SMALL, 4, (2, 1, 2, 1), 2, 3, marks=pytest.mark.slow),
    pytest.param("mixed", SMALL, 4, (1, 1, 1, 1), 4, 3, marks=pytest.mark.slow),
    pytest.param(ATTENTION, UNEVEN, 6, (1, 1, 1, 1), 2, 1, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kind, shape, ctas, groups, cluster, seeds", CLUSTERS, ids=str)
def test_clusters_are_clean_and_change_no_bit(library, kind, shape, ctas, groups, cluster, seeds):
    nets, splits = {"L": net_of(kind, **shape)}, (1, 2, 4, 1)
    schedule = Schedule.single_z(1, 1)
    x, carry, rotary = inputs_of(schedule, 1, shape)
    alone = GridKernel(library, Plan(2, (1, 1, 1, 1), splits))
    wanted = alone.run(schedule, nets, x, carry, rotary)
    together = GridKernel(library, Plan(ctas, groups, splits, cluster=cluster))
    for seed in range(1, seeds + 1):
        library.configure(seed=seed)
        got = together.run(schedule, nets, x, carry, rotary)
        for name in got:
            assert torch.equal(got[name], wanted[name]), f"a cluster gave other bits of {name}"


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_call_of_every_system(plain, system, kind):
    """Teacher-forced against fp64; and one launch of all calls is one launch for each."""
    schedule = SYSTEMS[system]
    nets = {name: make_net(kind, seed=seed) for seed, name in enumerate(schedule.nets)}
    kernel = GridKernel(plain, Plan(4, (1, 2, 1, 1), (8, 4, 2, 1)))
    teacher_forced(kernel.run, schedule, nets, BF16)
    x, carry = make_inputs(schedule, batch=1, dtype=BF16)
    assert_one_launch_is_its_calls(kernel, schedule, nets, x, carry, rope())


@pytest.mark.parametrize("shape", [SMALL, LARGER], ids=["small", "larger"])
@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
def test_one_call_of_several_shapes(plain, kind, shape):
    for ctas, groups in ((1, (1, 1, 1, 1)), (6, (2, 3, 2, 4))):
        kernel = GridKernel(plain, Plan(ctas, groups, SPLIT))
        teacher_forced(kernel.run, ONE_CALL, {"L": net_of(kind, **shape)}, BF16, **shape)


@pytest.mark.parametrize("kind", [*KINDS, "mixed", "cancelling"])
def test_the_plan_does_not_change_a_bit(plain, kind):
    """CTAs, row groups and what stays in shared memory decide who computes, not what."""
    schedule, nets = Schedule.trm(1, 2), {"L": net_of(kind, **SMALL)}
    x, carry, rotary = inputs_of(schedule, 2, SMALL)
    wanted = None
    for ctas, groups, shared, cluster in [
        (1, (1, 1, 1, 1), 227, 1),
        (2, (1, 1, 1, 1), 60, 1),
        (5, (2, 1, 5, 2), 99, 1),
        (7, (3, 7, 1, 4), 50, 1),
        (4, (2, 1, 1, 2), 227, 2),
        (12, (1, 2, 3, 2), 110, 4),  # two CTAs of some clusters have units of O, two have none
        (8, (1, 1, 1, 1), 99, 8),
    ]:
        kernel = GridKernel(plain, Plan(ctas, groups, SPLIT, shared * 1024, cluster=cluster))
        got = kernel.run(schedule, nets, x, carry, rotary)
        wanted = wanted or got
        for name in got:
            assert torch.equal(got[name], wanted[name]), f"another plan gave other bits of {name}"


def test_without_rotary_tables(plain):
    schedule, nets = Schedule.trm(1, 1), {"L": net_of(ATTENTION, **SMALL)}
    x, carry, _ = inputs_of(schedule, 2, SMALL)
    from recurx import reference

    kernel = GridKernel(plain, Plan(3))
    got = kernel.run(schedule, nets, x, carry)["z_H"].float()
    wanted = reference.run(schedule, nets, x, carry)["z_H"].float()
    turned = reference.run(schedule, nets, x, carry, rope(17, 64, 2))["z_H"].float()
    assert (got - wanted).norm() < 0.1 * (turned - wanted).norm()


def test_no_calls_hand_the_states_through(plain):
    schedule = Schedule.trm(1, 1)
    x, carry, _ = inputs_of(schedule, 2, SMALL)
    nets = {"L": net_of(ATTENTION, **SMALL)}
    got = GridKernel(plain).run(schedule, nets, x, carry, None, 0, 0)
    assert all(torch.equal(got[name], carry[name]) for name in carry)


@pytest.mark.parametrize("gpu, clusters", [("a100", {1}), ("h100", {2, 4})])
@pytest.mark.parametrize("kind", KINDS)
def test_the_picked_plan_is_what_runs(plain, kind, gpu, clusters):
    """Sizes that recurx/plan/cuda_grid.py reckons are those of the kernel, and the first row tile
    has seen every unit of every product once."""
    schedule = Schedule.trm(1, 2)
    nets = {"L": make_net(kind, **LARGER)}
    device = DEVICES[gpu]
    device = replace(device, units=6, l2_gbs=device.l2_gbs * 6 / device.units)
    x, carry, rotary = inputs_of(schedule, 2, LARGER)
    problem = replace(problem_for(schedule, nets, x), device_type="cuda")
    (plan,) = cuda_grid.grid_plans(problem, device)
    assert plan["cluster"] in clusters
    kernel = GridKernel(plain, Plan.of(plan))
    blocks = [cuda_grid.products_of(block, 2, 33) for block in nets["L"].spec.blocks]
    cut = kernel.plan.ctas, kernel.plan.cluster
    fixed = cuda_grid.fixed_shared_bytes(blocks, cut, kernel.plan.row_groups)
    assert kernel.fixed_shared_bytes(2, 33, nets) == fixed
    kernel.run(schedule, nets, x, carry, rotary)
    calls = len(schedule)
    done = WARPS * calls  # to enter
    for number, (block, products) in enumerate(zip(nets["L"].spec.blocks, blocks, strict=True)):
        own = slice(0, 4) if block.kind == ATTENTION else slice(2, 4)  # others are rows of h^T
        done += calls * sum(product.units for product in products[own])
        done += calls * WARPS * (block.num_heads if block.kind == ATTENTION else number > 0)
    assert kernel.progress == done


@pytest.mark.parametrize("kind", KINDS)
def test_through_recurse(plain, kind):
    """backend="cuda" with this kernel alone: the picked plan, packed once, the kernel's bits."""
    schedule, nets = Schedule.trm(1, 2), {"L": make_net(kind, **LARGER)}
    cuda = Cuda(plain.library, replace(DEVICES["a100"], units=4))
    x, carry, rotary = inputs_of(schedule, 2, LARGER)
    with installed(cuda):
        got = recurx.recurse(schedule, nets, x, carry, backend="cuda", cos_sin=rotary)
        again = recurx.recurse(schedule, nets, x, carry, backend="cuda", cos_sin=rotary)
    assert len(cuda.tapes) == 1
    problem = replace(problem_for(schedule, nets, x), device_type="cuda")
    plan = cuda.plan(problem)
    assert plan.kind == "grid"
    want = GridKernel(plain, Plan.of(plan)).run(schedule, nets, x, carry, rotary)
    for name in schedule.states:
        assert torch.equal(got[name], want[name]) and torch.equal(again[name], want[name])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_call_of_the_published_size(plain, kind):
    """T=97, D=512 on eight CTAs, alone and in clusters."""
    shape = dict(tokens=97, hidden=512, inner=1536, heads=8, token_inner=512)
    splits, nets = (1, 2, 4, 2), {"L": make_net(kind, **shape)}
    kernel = GridKernel(plain, Plan(8, (1, 2, 4, 8), splits))
    teacher_forced(kernel.run, ONE_CALL, nets, BF16, **shape)
    x, carry, rotary = inputs_of(ONE_CALL, 1, shape)
    wanted = kernel.run(ONE_CALL, nets, x, carry, rotary)["z_L"]
    for cluster, groups in ((2, (1, 2, 4, 4)), (4, (1, 2, 2, 1)), (8, (1, 1, 1, 1))):
        together = GridKernel(plain, Plan(8, groups, splits, 200 * 1024, cluster=cluster))
        assert torch.equal(together.run(ONE_CALL, nets, x, carry, rotary)["z_L"], wanted)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(tokens=129), r"T=129; 1 to 128 tokens"),
        (dict(hidden=544, heads=17), r"D=544; multiples of 32 up to 512"),
        (dict(hidden=256, heads=1), r"1 heads of D=256; the width of a head must be 16"),
    ],
)
def test_bad_shapes_are_refused(plain, change, message):
    shape = {**SMALL, **change}
    x, carry, rotary = inputs_of(ONE_CALL, 1, shape)
    with pytest.raises(EmulatorFault, match=f"grid_sm80: {message}"):
        GridKernel(plain).run(ONE_CALL, {"L": make_net(**shape)}, x, carry, rotary)


@pytest.mark.parametrize(
    "settings, message",
    [
        (Plan(ctas=0), "the plan has 0 CTAs"),
        (Plan(2, (1, 3, 1, 1)), "3 row groups for 2 CTAs"),
        (Plan(4, (1, 4, 1, 1), cluster=2), "4 row groups for 4 CTAs"),
        (Plan(3, cluster=2), "the plan has 3 CTAs in clusters of 2"),
        (Plan(6, cluster=3), "cluster is 3; 1, 2, 4 and 8"),
        (Plan(k_splits=(1, 3, 1, 1)), "k_splits is 3; 1, 2, 4 and 8"),
        (
            Plan(shared_bytes=1000),
            r"the plan has 1000 bytes of shared memory; \d+ to 232448 are possible",
        ),
    ],
)
def test_bad_plans_are_refused(plain, settings, message):
    x, carry, rotary = inputs_of(ONE_CALL, 1, SMALL)
    with pytest.raises(EmulatorFault, match=f"grid_sm80: {message}"):
        GridKernel(plain, settings).run(
            ONE_CALL, {"L": net_of(ATTENTION, **SMALL)}, x, carry, rotary
        )


# ---- planted bugs ------------------------------------------------------------------------------


def judge(library, kind: str, seed: int, cluster: int = 1) -> str:
    """What the checks of this file say of a library: "right", or what was found."""
    library.configure(seed=seed, max_switches=3e6)
    if cluster > 1:
        return judge_cluster(library, kind, cluster)
    schedule, nets = Schedule.trm(1, 2), {"L": net_of(kind, **SMALL)}
    x, carry, rotary = inputs_of(schedule, 2, SMALL)
    splits = (4, 8, 4, 4)
    kernel = GridKernel(library, Plan(3, (1, 2, 3, 1), splits))
    # Here each CTA keeps to one tile of a sample, and hears of the others only where it must.
    few = 4 if kind == "token_mlp" else 2
    other = GridKernel(library, Plan(few, (few,) * 4, splits, 60 * 1024))
    try:
        if kind == "cancelling":
            whole, again = (k.run(schedule, nets, x, carry, rotary) for k in (kernel, other))
        else:
            teacher_forced(kernel.run, ONE_CALL, nets, BF16, **SMALL)
            whole = assert_one_launch_is_its_calls(kernel, schedule, nets, x, carry, rotary)
            again = other.run(schedule, nets, x, carry, rotary)
        for name in whole:
            assert torch.equal(whole[name], again[name]), "another plan gave other bits"
    except (AssertionError, EmulatorFault) as found:
        return str(found)
    return "right"


def judge_cluster(library, kind: str, cluster: int) -> str:
    uneven = kind == "uneven"
    shape = UNEVEN if uneven else PASSES if kind == TOKEN_MLP else RINGS
    nets = {"L": net_of(ATTENTION if uneven else kind, **shape)}
    schedule, ctas = Schedule.single_z(1, 1), 6 if uneven else cluster
    kernel = GridKernel(library, Plan(ctas, (1, 1, 1, 1), (1, 2, 4, 1), cluster=cluster))
    # Two clusters with rows of their own.
    other = replace(kernel.plan, ctas=2 * cluster, row_groups=(2, 2, 1, 2))
    x, carry, rotary = inputs_of(schedule, 1, shape)
    try:
        whole = assert_one_launch_is_its_calls(kernel, schedule, nets, x, carry, rotary)
        if kind != TOKEN_MLP and not uneven:
            kernel.plan = other
            again = kernel.run(schedule, nets, x, carry, rotary)
            assert torch.equal(whole["z"], again["z"]), "another plan gave other bits"
    except (AssertionError, EmulatorFault) as found:
        return str(found)
    return "right"


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("kind", [*KINDS, "mixed", "cancelling"])
def test_with_all_bugs_asleep_it_is_right(buggy, kind, cluster):
    bugs_grid.wake(buggy, None)
    assert judge(buggy, kind, 1, cluster) == "right"


@pytest.mark.parametrize("bug", bugs_grid.BUGS, ids=lambda bug: bug.name)
def test_planted_bugs_are_found(buggy, bug):
    bugs_grid.wake(buggy, bug)
    found = judge(buggy, bug.net, 1 + bugs_grid.BUGS.index(bug), bug.cluster)
    assert re.search(bug.found, found), found
