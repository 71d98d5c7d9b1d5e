"""backend="cuda", the owner kernel, in the emulator with its race checker: right and clean."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools

import pytest
import torch

import recurx
from emulator.build import unavailable
from emulator.owner import EmulatedCuda, emulate, installed
from recurx import BackendUnavailable, Schedule, Step
from recurx.backends import cuda as backend
from recurx.backends import cuda_abi, cuda_launch
from recurx.errors import CudaError, InvalidArgument
from recurx.nets import ATTENTION, KINDS, TOKEN_MLP
from recurx.operands import Operands, Span
from recurx.plan import DEVICES, cuda_owner
from recurx.plan import cuda as plan
from tests.factories import make_inputs, make_net, problem_for, rope
from tests.test_numerics import SYSTEMS, teacher_forced

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

SMALL = ((64, 2), (64, 4), (128, 3))
ONE_CALL = Schedule((Step("L", "z_L", ("z_L",), ("z_H", "x")),))
BF16 = torch.bfloat16
OWNER = ("owner",)


@pytest.fixture(scope="module")
def small() -> EmulatedCuda:
    return emulate(SMALL)


@pytest.fixture
def checked(small: EmulatedCuda) -> EmulatedCuda:
    small.emulated.configure(seed=1)
    return small


# ---- right and clean -----------------------------------------------------------------------

# one call: kind, tokens, hidden, heads, inner, token_inner, blocks, and fields of variants
CASES = {
    "one head": (ATTENTION, 17, 64, 1, 96, 0, 2),
    "two heads of 32": (ATTENTION, 13, 64, 2, 256, 0, 1),
    "no padding": (ATTENTION, 32, 64, 1, 96, 0, 1),
    "last rows not stored": (ATTENTION, 33, 128, 2, 160, 0, 2),
    "head of 128": (ATTENTION, 33, 128, 1, 96, 0, 1),
    "head of 128, biases": (ATTENTION, 33, 128, 1, 96, 0, 1, dict(biases=("qkv", "o"))),
    "four heads of 32 on two": (ATTENTION, 17, 128, 4, 96, 0, 1, dict(kv_heads=2)),
    "tokens": (TOKEN_MLP, 17, 64, 0, 96, 40, 2),
    "more tokens": (TOKEN_MLP, 33, 128, 0, 96, 32, 1),
}
# Races show in the order of accesses, which the checker sees under any seed: the planted ones are
# found under each of three. Ten for one case of each kind.
TEN_SEEDS = (CASES["last rows not stored"], CASES["tokens"])


def seeds_of(case: tuple) -> range:
    return range(1, 11 if case in TEN_SEEDS else 4)


def sizes(case: tuple) -> dict[str, int]:
    tokens, hidden, heads, inner, token_inner, blocks = case[1:7]
    return dict(
        tokens=tokens, hidden=hidden, heads=heads or 1, inner=inner, token_inner=token_inner,
        blocks=blocks,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_call_is_right_and_clean_under_all_seeds(checked: EmulatedCuda, case: tuple) -> None:
    size = sizes(case)
    nets = {"L": make_net(case[0], **size, **dict(*case[7:]))}
    teacher_forced(checked, ONE_CALL, nets, BF16, **size)
    x, carry = make_inputs(
        ONE_CALL, batch=2, tokens=size["tokens"], hidden=size["hidden"], dtype=BF16
    )
    outs = []
    for seed in seeds_of(case):
        checked.emulated.configure(seed=seed)
        cos_sin = rope(size["tokens"], size["hidden"], size["heads"])
        outs.append(checked(ONE_CALL, nets, x, carry, cos_sin)["z_L"])
    assert all(torch.equal(out, outs[0]) for out in outs), "another schedule gave other bits"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_call_teacher_forced(checked: EmulatedCuda, system: str, kind: str) -> None:
    schedule = SYSTEMS[system]
    nets = {name: make_net(kind, seed=seed) for seed, name in enumerate(schedule.nets)}
    teacher_forced(checked, schedule, nets, BF16)


CUSTOM = Schedule(
    (
        Step("L", "a", ("a",), ("b", "x")),
        Step("L", "a", ("a",), ("b", "x")),  # resident, and the sum b + x is kept
        Step("H", "b", ("b", "a"), ("a",)),  # reads what the call before left on chip
        Step("L", "a", ("a",), ("b", "x")),  # the kept sum is stale: b was written
        Step("L", "a", ("a", "a"), ("c",)),  # resident, but read twice
        Step("H", "b", ("x",), ()),
    )
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "schedule",
    [Schedule.trm(2, 2), Schedule.hrm(2, 2), Schedule.single_z(2, 2), Schedule.hier(6, 1), CUSTOM],
    ids=["trm", "hrm", "single_z", "hier6", "custom"],
)
def test_a_launch_of_many_calls_is_many_launches_of_one(
    checked: EmulatedCuda, schedule: Schedule, kind: str
) -> None:
    """Bit by bit: what stays on chip between calls is what a hand-over would have stored."""
    nets = {name: make_net(kind, blocks=1, seed=seed) for seed, name in enumerate(schedule.nets)}
    x, carry = make_inputs(schedule, batch=2, dtype=BF16)
    whole = checked(schedule, nets, x, carry, rope())
    for k in range(len(schedule)):
        carry = checked(schedule, nets, x, carry, rope(), start_from=k, stop_after=k + 1)
    for name in schedule.states:
        assert torch.equal(whole[name], carry[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_several_samples_a_cta_and_several_groups(checked: EmulatedCuda, kind: str) -> None:
    """Seven samples, two or three a CTA, the last group not full: the bits of single samples."""
    schedule = Schedule.trm(1, 1)
    nets = {"L": make_net(kind, blocks=1)}
    x, carry = make_inputs(schedule, batch=7, dtype=BF16)
    alone = [
        checked(schedule, nets, x[i : i + 1], {n: s[i : i + 1] for n, s in carry.items()}, rope())
        for i in range(7)
    ]
    few = dataclasses.replace(DEVICES["a100"], units=2)
    for samples in (1, 2, 3):
        stacked = emulate(SMALL, device=few)
        problem = dataclasses.replace(problem_for(schedule, nets, x), dtype=BF16)
        plans = plan.candidates(problem, few, SMALL, OWNER)
        (chosen,) = [p for p in plans if p["samples"] == samples]
        assert chosen["owners"] == 2
        stacked.plan = lambda *_, chosen=chosen: chosen  # type: ignore[method-assign]
        got = stacked(schedule, nets, x, carry, rope())
        for name in schedule.states:
            want = torch.cat([out[name] for out in alone])
            assert torch.equal(got[name], want), f"{samples} samples a CTA: {name}"


def test_without_rotary_tables(checked: EmulatedCuda) -> None:
    nets = {"L": make_net()}
    x, carry = make_inputs(ONE_CALL, batch=1, dtype=BF16)
    got = checked(ONE_CALL, nets, x, carry, None)
    zero_angle = (torch.ones(13, 32), torch.zeros(13, 32))
    assert torch.equal(got["z_L"], checked(ONE_CALL, nets, x, carry, zero_angle)["z_L"])
    assert not torch.equal(got["z_L"], checked(ONE_CALL, nets, x, carry, rope())["z_L"])


@pytest.mark.slow
def test_full_size_and_384() -> None:
    """A call of the published nets at T=97, D=512, and D=384, which takes other paths."""
    plain = emulate(((512, 7), (384, 2)), checked=False)
    for kind, tokens, hidden, heads, inner, token_inner in (
        (ATTENTION, 97, 512, 8, 1536, 0),
        (TOKEN_MLP, 97, 512, 8, 1536, 512),
        (ATTENTION, 17, 384, 6, 256, 0),
        (TOKEN_MLP, 17, 384, 6, 256, 64),
    ):
        size = dict(tokens=tokens, hidden=hidden, heads=heads, inner=inner, token_inner=token_inner)
        teacher_forced(plain, ONE_CALL, {"L": make_net(kind, **size)}, BF16, **size)


# ---- memory: conflicts and sizes -------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_ldmatrix_has_no_bank_conflicts(checked: EmulatedCuda, kind: str) -> None:
    nets = {"L": make_net(kind, blocks=1)}
    x, carry = make_inputs(ONE_CALL, batch=1, dtype=BF16)
    checked.emulated.reset_stats()
    checked(ONE_CALL, nets, x, carry, rope())
    assert checked.emulated.stat("ldmatrix") > 100
    assert checked.emulated.stat("ldmatrix_conflicts") == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples, tokens, tiles", [(1, 17, 2), (1, 33, 3), (2, 17, 4), (1, 97, 7)])
def test_plans_know_the_compiled_sizes(
    checked: EmulatedCuda, kind: str, samples: int, tokens: int, tiles: int
) -> None:
    net = make_net(kind, tokens=tokens, hidden=512, heads=8)
    x, _ = make_inputs(ONE_CALL, batch=1, tokens=tokens, hidden=512, dtype=BF16)
    p = cuda_abi.RxRecursion(1, tokens, 512, 2, 1, 1)
    p.nets[0].num_blocks = 2
    p.nets[0].blocks[:2] = cuda_launch.blocks(net.spec)
    library = checked.library()
    assert library is not None
    sizes = cuda_abi.RxOwnerPlan(1, samples, tiles)
    want = library.bytes_of("rx_owner_sm80_shared_bytes", p, sizes)
    problem = problem_for(ONE_CALL, {"L": net}, x)
    assert cuda_owner.shared_bytes(problem, samples, tiles) == want


# ---- through the backend, and what it refuses -------------------------------------------------


def test_through_recurse_and_explain(checked: EmulatedCuda) -> None:
    schedule = Schedule.trm(2, 2)
    nets = {"L": make_net(requires_grad=True)}
    x, carry = make_inputs(schedule, batch=1, dtype=BF16)
    with installed(checked):
        got = recurx.recurse(schedule, nets, x, carry, backend="cuda", cos_sin=rope())
        # In training it runs the calls before the window: gradient reaches the weights.
        got["z_H"].float().sum().backward()
        assert all(w.grad is not None for w in nets["L"].weights)
        with torch.no_grad():
            whole = recurx.recurse(schedule, nets, x, carry, backend="cuda", cos_sin=rope())
            assert torch.equal(whole["z_L"], checked(schedule, nets, x, carry, rope())["z_L"])
        text = recurx.explain(problem_for(schedule, nets, x), backend="cuda")
        assert "backend 'cuda' -> cuda" in text
        with pytest.raises(BackendUnavailable, match="runs bfloat16 states"):
            recurx.recurse(
                schedule, nets, x.float(), {n: s.float() for n, s in carry.items()},
                backend="cuda", cos_sin=rope(),
            )  # fmt: skip


def test_weights_are_packed_again_when_they_change(checked: EmulatedCuda) -> None:
    nets = {"L": make_net()}
    x, carry = make_inputs(ONE_CALL, batch=1, dtype=BF16)
    first = checked(ONE_CALL, nets, x, carry, rope())
    packed = len(checked.tapes)
    assert torch.equal(checked(ONE_CALL, nets, x, carry, rope())["z_L"], first["z_L"])
    assert len(checked.tapes) == packed
    with torch.no_grad():
        nets["L"].weights[0].mul_(1.5)
    assert not torch.equal(checked(ONE_CALL, nets, x, carry, rope())["z_L"], first["z_L"])


def test_a_capture_packs_for_itself_and_leaves_nothing(
    checked: EmulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    nets = {"L": make_net()}
    x, carry = make_inputs(ONE_CALL, batch=1, dtype=BF16)
    launched: list[str] = []
    call = cuda_abi.Library.call
    monkeypatch.setattr(
        cuda_abi.Library,
        "call",
        lambda self, name, *a: launched.append(name) or call(self, name, *a),
    )
    first = checked(ONE_CALL, nets, x, carry, rope())["z_L"]  # packs, and keeps the tape
    kept = len(checked.tapes)
    launched.clear()
    monkeypatch.setattr(backend, "captured_outside", lambda device: True)
    assert torch.equal(checked(ONE_CALL, nets, x, carry, rope())["z_L"], first)
    # A replay must find the weights of its time, so packing is one of the captured launches.
    assert launched == ["rx_owner_sm80_pack", "rx_owner_sm80_run"]
    other = {"L": make_net(seed=1)}
    checked(ONE_CALL, other, x, carry, rope())
    assert len(checked.tapes) == kept  # what a capture made is empty until its first replay


def test_states_that_are_not_as_said_never_reach_the_kernel(checked: EmulatedCuda) -> None:
    net = make_net()
    x, carry = make_inputs(ONE_CALL, batch=1, dtype=BF16)
    p = problem_for(ONE_CALL, {"L": net}, x)
    z_L, z_H = carry["z_L"], carry["z_H"]
    for bad, words in (
        ([z_L.float(), z_H], "argument `z_L`: expected bfloat16"),
        ([z_L, z_H[:, :5]], "argument `z_H`: expected bfloat16"),
        ([z_L], "argument `carry`: expected 2 states, got 1"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            checked.run(p, Operands(x, bad, net.weights, None), Span(0, 1))


def test_the_kernel_refuses_what_its_plan_does_not_fit(checked: EmulatedCuda) -> None:
    library = checked.library()
    assert library is not None
    p = cuda_abi.RxRecursion(1, 40, 64, 1, 1, 1)
    p.nets[0].num_blocks = 1
    p.nets[0].blocks[0] = cuda_abi.RxBlock(0, 64, 1, 0, 1e-5)
    for sizes, words in (
        ((1, 1, 2), "1 samples of 40 tokens need more than 2 row tiles"),
        ((1, 1, 4), "scratch has 0 bytes"),
        ((0, 1, 4), "owners and samples must be positive"),
    ):
        with pytest.raises(CudaError, match=rf"owner_sm80: {words}.*invalid shape"):
            library.call("rx_owner_sm80_run", p, cuda_abi.RxOwnerPlan(*sizes), None)
    p.scratch_bytes = 1 << 30
    with pytest.raises(CudaError, match="no kernel is compiled for hidden 64 and 5 row tiles"):
        library.call("rx_owner_sm80_run", p, cuda_abi.RxOwnerPlan(1, 1, 5), None)
    for heads, words in (
        (3, "3 heads of D=64; it must be a multiple of them"),
        (4, "4 heads of D=64; the width of a head must be 32, 64 or 128"),
    ):
        p.nets[0].blocks[0].heads = heads
        with pytest.raises(CudaError, match=words):
            library.call("rx_owner_sm80_run", p, cuda_abi.RxOwnerPlan(1, 1, 4), None)


def test_a_build_with_other_structs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shorter = type("Shorter", (ctypes.Structure,), {"_fields_": [("net", ctypes.c_int32)]})
    mirrored = (shorter, *cuda_abi._MIRRORED[1:])
    monkeypatch.setattr(cuda_abi, "_MIRRORED", mirrored)
    fresh = emulate(SMALL)
    assert "structs of" in str(fresh.why_unavailable()) and "rebuild" in str(
        fresh.why_unavailable()
    )


# ---- the in-kernel timeline --------------------------------------------------------------------


TIMED = ((64, 2), (64, 2, 1))


@pytest.mark.parametrize("shape", TIMED, ids=["h in shared memory", "h in scratch"])
def test_the_timeline_names_every_phase_in_order(shape: tuple[int, ...]) -> None:
    recording = emulate(TIMED, checked=False, flags=("-DRX_TIMELINE=1",))
    recording.owner_plans = (shape,)
    schedule = Schedule.trm(1, 2)
    nets = {"L": make_net(tokens=17)}
    x, carry = make_inputs(schedule, batch=3, tokens=17, dtype=BF16)
    few = dataclasses.replace(DEVICES["a100"], units=2)
    recording._device = few
    with recording.timeline() as timeline:
        recorded = recording(schedule, nets, x, carry, rope(17))
        assert recording.plan(problem_for(schedule, nets, x))["in_scratch"] == (len(shape) == 3)
    events = timeline.events
    halves = ["qkv", "attention", "o", "gate_up", "down"]
    call = ["input", *halves, *halves]
    # The state stays on chip after the first call: nothing is stored there.
    phases = [*call, *call, "store", *call, "store"]
    assert [e["phase"] for e in events if e["owner"] == 1] == phases
    assert [e["phase"] for e in events if e["owner"] == 0] == phases * 2  # samples 0 and 2
    assert {e["sample"] for e in events if e["owner"] == 0} == {0, 2}
    for owner in (0, 1):
        own = [e for e in events if e["owner"] == owner]
        for before, after in itertools.pairwise(own):
            assert before["start_ns"] < before["end_ns"] <= after["start_ns"]
        assert [e["call"] for e in own[: len(phases)]] == [0] * 11 + [1] * 12 + [2] * 12
        assert [e["block"] for e in own if e["call"] == 0 and e["phase"] == "o"][:2] == [0, 1]
    assert {e["phase"] for e in events} == {*halves, "input", "store"}
    # What is recorded is the same recursion.
    assert torch.equal(recorded["z_H"], recording(schedule, nets, x, carry, rope(17))["z_H"])


def test_a_short_timeline_buffer_is_not_overrun() -> None:
    recording = emulate(TIMED, checked=False, flags=("-DRX_TIMELINE=1",))
    recording.owner_plans = TIMED[:1]
    x, carry = make_inputs(ONE_CALL, batch=2, dtype=BF16)
    with recording.timeline(events_per_owner=4) as timeline:
        recording(ONE_CALL, {"L": make_net()}, x, carry, rope())
    assert [e["owner"] for e in timeline.events] == [0] * 4 + [1] * 4


def test_without_the_switch_the_timeline_says_how_to_build_it(checked: EmulatedCuda) -> None:
    with (
        pytest.raises(CudaError, match="RECURX_TIMELINE=1 python csrc/native_build"),
        checked.timeline(),
    ):
        pass
