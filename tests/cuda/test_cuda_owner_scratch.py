"""The owner kernel with h in scratch, for devices of 99 KB: the bits of h in shared memory."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from emulator import bugs_owner_scratch as bugs
from emulator.build import source_lines, unavailable
from emulator.owner import EmulatedCuda, emulate, installed
from recurx import Schedule, reference
from recurx.backends import cuda_abi, cuda_launch
from recurx.errors import CudaError
from recurx.nets import ATTENTION, KINDS, TOKEN_MLP
from recurx.plan import DEVICES, cuda_owner
from recurx.plan import cuda as plan
from tests.cuda.test_cuda_owner import CASES, ONE_CALL, seeds_of, sizes
from tests.factories import make_inputs, make_net, problem_for, rope, rounded, wide
from tests.kernels.compare import assert_as_exact
from tests.solving.test_on_cuda import assert_same, both, make, puzzles
from tests.test_numerics import SYSTEMS, teacher_forced

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

SHARED = ((64, 2), (128, 3))
SCRATCH = tuple((*shape, 1) for shape in SHARED)
BF16 = torch.bfloat16
# Two owners, so that a queue is longer than they are.
DEVICE = dataclasses.replace(DEVICES["l4"], units=2)


@pytest.fixture(scope="module")
def places() -> tuple[EmulatedCuda, EmulatedCuda]:
    """The backend with h in shared memory and in scratch, over one build."""
    shared = emulate((*SHARED, *SCRATCH), device=DEVICE)
    shared.owner_plans = SHARED
    return shared, EmulatedCuda(shared.emulated, SCRATCH, DEVICE)


@pytest.fixture
def scratch(places: tuple[EmulatedCuda, EmulatedCuda]) -> EmulatedCuda:
    places[1].emulated.configure(seed=1)
    return places[1]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_bits_of_shared_memory_under_all_seeds(places, case) -> None:
    shared, scratch = places
    size = sizes(case)
    nets = {"L": make_net(case[0], **size)}
    x, carry = make_inputs(
        ONE_CALL, batch=2, tokens=size["tokens"], hidden=size["hidden"], dtype=BF16
    )
    cos_sin = rope(size["tokens"], size["hidden"], size["heads"])
    want = shared(ONE_CALL, nets, x, carry, cos_sin)["z_L"]
    for seed in seeds_of(case):
        scratch.emulated.configure(seed=seed)
        assert torch.equal(scratch(ONE_CALL, nets, x, carry, cos_sin)["z_L"], want), seed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_call_teacher_forced(scratch, system: str, kind: str) -> None:
    schedule = SYSTEMS[system]
    nets = {name: make_net(kind, seed=seed) for seed, name in enumerate(schedule.nets)}
    teacher_forced(scratch, schedule, nets, BF16)


def stack(cuda: EmulatedCuda, schedule: Schedule, nets, x) -> EmulatedCuda:
    """The backend with three samples in the rows of a CTA, h in scratch."""
    places = ((x.shape[2], 3, 1),)
    stacked = EmulatedCuda(cuda.emulated, places, DEVICE)
    problem = dataclasses.replace(problem_for(schedule, nets, x), dtype=BF16)
    found = plan.candidates(problem, DEVICE, places, ("owner",))
    (chosen,) = [p for p in found if p["samples"] == 3]
    stacked.plan = lambda *_: chosen
    return stacked


@pytest.mark.parametrize("kind", KINDS)
def test_a_launch_of_many_calls_with_stacked_samples(places, kind: str) -> None:
    """Three samples of 11 tokens in rows of one CTA, as h in shared memory has them."""
    shared, _ = places
    schedule = Schedule.trm(2, 1)
    size = dict(tokens=11, hidden=128, heads=2)
    nets = {"L": make_net(kind, blocks=2, **size)}
    x, carry = make_inputs(schedule, batch=5, tokens=11, hidden=128, dtype=BF16)
    scratch = stack(shared, schedule, nets, x)
    got = scratch(schedule, nets, x, carry, rope(**size))
    want = shared(schedule, nets, x, carry, rope(**size))
    for name in schedule.states:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("arguments", [{"max_steps": 4}, {"max_steps": 2, "rollouts": 3}], ids=str)
def test_solve_gives_the_answers_of_the_loop(scratch, arguments) -> None:
    """Seven samples for two owners, which run interleaved and are checked against each other."""
    scratch.emulated.configure(together=1)
    model = make()
    try:
        with installed(scratch):
            if "rollouts" in arguments:
                arguments = {**arguments, "sigma": 0.5, "seed": 11}
            inside, loop = both(model, puzzles(7, rows=3), **arguments)
        assert_same(inside, loop)
        assert len(set(inside.steps.tolist())) > 1, "all took the same steps: nothing was queued"
    finally:
        scratch.emulated.configure(together=0)
        scratch.emulated.unwatch_all()


@pytest.mark.slow
@pytest.mark.parametrize("kind, heads, token_inner", [(ATTENTION, 8, 0), (TOKEN_MLP, 8, 512)])
def test_full_size(kind: str, heads: int, token_inner: int) -> None:
    plain = emulate(((512, 7, 1),), checked=False, device=DEVICES["rtx4090"])
    size = dict(tokens=97, hidden=512, heads=heads, inner=1536, token_inner=token_inner)
    teacher_forced(plain, ONE_CALL, {"L": make_net(kind, **size)}, BF16, **size)


# ---- plans ------------------------------------------------------------------------------------


def full_size(kind: str, tokens: int = 97, batch: int = 128):
    net = make_net(kind, tokens=tokens, hidden=512, heads=8, inner=1536, token_inner=512)
    x, _ = make_inputs(ONE_CALL, batch=batch, tokens=tokens, hidden=512, dtype=BF16)
    return dataclasses.replace(problem_for(ONE_CALL, {"L": net}, x), device_type="cuda")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DEVICES)
def test_h_goes_to_scratch_where_shared_memory_is_too_small(name: str, kind: str) -> None:
    device = DEVICES[name]
    found = plan.candidates(full_size(kind), device, kinds=("owner",))
    assert found
    for chosen in found:
        assert chosen["in_scratch"] == (device.shared_bytes <= 101376)
        assert chosen["shared_bytes"] <= device.shared_bytes
        assert ("scratch" in chosen.why) == bool(chosen["in_scratch"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples, tokens, tiles", [(1, 17, 2), (1, 33, 3), (2, 17, 4), (1, 97, 7)])
def test_plans_know_the_compiled_sizes(scratch, kind, samples, tokens, tiles) -> None:
    problem = full_size(kind, tokens, 1)
    p = cuda_abi.RxRecursion(1, tokens, 512, 2, 1, 1)
    spec = problem.nets[0][1]
    p.nets[0].num_blocks = len(spec.blocks)
    p.nets[0].blocks[: len(spec.blocks)] = cuda_launch.blocks(spec)
    sizes_ = cuda_abi.RxOwnerPlan(1, samples, tiles, 1)
    want = scratch.library().bytes_of("rx_owner_sm80_shared_bytes", p, sizes_)
    assert cuda_owner.shared_bytes(problem, samples, tiles, 1) == want


# ---- planted bugs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> EmulatedCuda:
    return bugs.plant_all(tmp_path_factory.mktemp("bugs"))


def outcome(cuda: EmulatedCuda, bug: bugs.Bug, seed: int) -> str:
    """Two CTAs, a sample or three each, run interleaved: 'right', or what was found."""
    batch, tokens = (6, 11) if bug.stacked else (2, 33)
    size = dict(tokens=tokens, hidden=64, heads=2)
    net = make_net(bug.kind, **size, blocks=2)
    x, carry = make_inputs(ONE_CALL, batch=batch, tokens=tokens, hidden=64, dtype=BF16)
    exact_net = rounded(net, BF16, torch.float64)
    exact = reference.run(ONE_CALL, {"L": exact_net}, x.double(), wide(carry), rope(**size))
    plain = reference.run(ONE_CALL, {"L": net}, x, carry, rope(**size))
    if bug.stacked:
        cuda = stack(cuda, ONE_CALL, {"L": net}, x)
    cuda.emulated.configure(seed=seed, together=1)
    try:
        got = cuda(ONE_CALL, {"L": net}, x, carry, rope(**size))
        assert_as_exact(got["z_L"], plain["z_L"], exact["z_L"])
    except (CudaError, AssertionError) as error:
        return source_lines(str(error))
    return "right"


@pytest.mark.slow
@pytest.mark.parametrize("bug", bugs.BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_found(planted: EmulatedCuda, bug: bugs.Bug) -> None:
    bugs.wake(planted, bug)
    try:
        for seed in range(1, 4 if "race" in bug.found else 2):
            found = outcome(planted, bug, seed)
            assert re.search(bug.found, found), f"seed {seed}: {found}"
    finally:
        bugs.wake(planted, None)


@pytest.mark.slow
def test_with_all_bugs_asleep_it_is_right(planted: EmulatedCuda) -> None:
    for bug in {(bug.kind, bug.stacked): bug for bug in bugs.BUGS}.values():
        assert {outcome(planted, bug, seed) for seed in range(1, 4)} == {"right"}
