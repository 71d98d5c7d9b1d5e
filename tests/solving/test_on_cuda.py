"""recurx.solve(backend="cuda"): queue, heads, halting and noise inside the owner kernel (emulated).

The yardstick is the loop on the host over the same kernels, one launch a step: whatever differs
then comes from the solving itself.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest
import torch

import recurx
from emulator import asleep
from emulator.build import EmulatorFault, unavailable
from emulator.owner import emulate, installed
from recurx.backends import cuda_abi
from recurx.errors import CudaError
from recurx.models import HRM, TRM
from recurx.models.config import HRMConfig, TRMConfig
from recurx.solving import noise, on_cuda
from tests.small_solvers import MODELS, SMALL, TOKENS, VOCAB

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


@pytest.fixture(scope="module")
def cuda():
    return emulate(((64, 2), (64, 4)))


@pytest.fixture
def engine(cuda):
    cuda.emulated.configure(seed=1)
    with installed(cuda):
        yield cuda
    cuda.emulated.unwatch_all()


def make(**changes):
    """A model of which some samples halt at their first step and others do not."""
    torch.manual_seed(3)
    config = {**SMALL, "forward_dtype": "bfloat16", **changes}
    model = HRM(HRMConfig(**config)) if config.get("variant") == "hrm" else TRM(TRMConfig(**config))
    with torch.no_grad():
        model.inner.q_head.weight.normal_(std=0.3)
        model.inner.q_head.bias.zero_()
        if config.get("puzzle_emb_ndim"):
            model.inner.puzzle_emb.weights.normal_()
        # The limit goes into the widest gap between the q of samples: no rounding crosses it.
        q = recurx.solve(model, puzzles(7, rows=3), max_steps=1, backend="eager").q.sort().values
        gap = int(q.diff().argmax())
        model.inner.q_head.bias[0] -= (q[gap] + q[gap + 1]) / 2
        model.inner.q_head.weight[1].zero_()  # q_continue, which HRM compares with
        model.inner.q_head.bias[1] = 2
        if not model.config.no_ACT_continue:
            model.inner.q_head.bias[0] += 2
    return model.eval()


def puzzles(count, rows=1):
    generator = torch.Generator().manual_seed(5)
    return {
        "inputs": torch.randint(0, VOCAB, (count, TOKENS), generator=generator, dtype=torch.int32),
        "puzzle_identifiers": torch.arange(count, dtype=torch.int32) % rows,
    }


def both(model, batch, **arguments):
    """(the kernel's answers, those of the loop on the host over the same kernels)."""
    inside = recurx.solve(model, batch, backend="cuda", **arguments)
    model.backend = "cuda"
    try:
        return inside, recurx.solve(model, batch, **arguments)
    finally:
        model.backend = "auto"


def assert_same(inside, loop):
    for name in ("predictions", "steps", "halted", "rollout_steps"):
        got, want = getattr(inside, name), getattr(loop, name)
        assert got.dtype == want.dtype and torch.equal(got, want), name
    # One bf16 rounding of another order of additions.
    torch.testing.assert_close(inside.q, loop.q, rtol=2**-7, atol=1e-2)
    assert inside.q.dtype == loop.q.dtype


FIELDS = "residual_scale:0.5,activation:gelu,kv_heads:1,biases:qkv+down"
QUEUED = {**MODELS, "fields of blocks": dict(block=FIELDS)}


@pytest.mark.parametrize("changes", QUEUED.values(), ids=QUEUED)
def test_queue_and_halting_give_the_answers_of_the_loop(engine, changes, monkeypatch):
    model = make(**changes)
    monkeypatch.setattr(engine, "_device", dataclasses.replace(engine._device, units=2))
    batch = puzzles(7, rows=3)  # seven samples for two owners
    inside, loop = both(model, batch, max_steps=4)
    assert_same(inside, loop)
    assert len(set(inside.steps.tolist())) > 1, "all took the same steps: nothing was queued"
    assert inside.histogram() == loop.histogram()


def test_fixed_budget_logits_and_trace_are_those_of_the_loop(engine):
    inside, loop = both(make(), puzzles(3), max_steps=3, halt=None, logits=True, trace=True)
    assert_same(inside, loop)
    assert not inside.halted.any() and (inside.steps == 3).all()
    assert torch.equal(inside.trace, loop.trace)
    torch.testing.assert_close(inside.logits, loop.logits, rtol=2**-7, atol=1e-2)
    assert torch.equal(inside.logits.float().argmax(-1), inside.predictions)


def test_a_trace_keeps_the_answer_of_a_sample_that_halted(engine):
    inside, loop = both(make(), puzzles(6), max_steps=4, trace=True)
    assert torch.equal(inside.trace[: len(loop.trace)], loop.trace)
    assert torch.equal(inside.trace[-1], inside.predictions)


def an_even_sum(inputs, answers):
    return answers.sum(-1) % 2 == 0


@pytest.mark.parametrize("select", ["q", "vote", an_even_sum])
def test_rollouts_are_entries_with_noise_of_their_own(engine, select):
    model, batch = make(), puzzles(2)
    arguments = dict(max_steps=2, rollouts=3, sigma=0.5, seed=11, select=select)
    inside, loop = both(model, batch, **arguments)
    made = loop.rollout_steps > 0  # under a check the loop makes no more tries than it needs
    steps = torch.where(made, inside.rollout_steps, 0)
    assert_same(dataclasses.replace(inside, rollout_steps=steps), loop)
    assert callable(select) or made.all()
    again = recurx.solve(model, batch, backend="cuda", **arguments)
    assert torch.equal(again.predictions, inside.predictions) and torch.equal(again.q, inside.q)
    other = recurx.solve(model, batch, backend="cuda", **{**arguments, "seed": 12})
    assert not torch.equal(other.q, inside.q)


def test_the_kernels_noise_is_that_of_pytorch(engine):
    """Through the start state: a net whose output is its input's sign would hide it, logits not."""
    seeds = torch.arange(3)
    drawn = noise.normals(seeds, 1, (TOKENS, 64), seed=(7 << 32) + 9)
    assert torch.equal(drawn[1], noise.normals(seeds[1:2], 1, (TOKENS, 64), seed=(7 << 32) + 9)[0])
    assert abs(float(drawn.mean())) < 0.05 and abs(float(drawn.std()) - 1) < 0.05
    zeros = [torch.zeros(1, dtype=torch.int64)] * 4  # published answers of Philox 4x32-10
    assert [int(w) for w in noise.philox(zeros, 0)] == [
        0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8,
    ]  # fmt: skip
    pi = [torch.tensor([w]) for w in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)]
    assert [int(w) for w in noise.philox(pi, 0x299F31D0A4093822)] == [
        0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1,
    ]  # fmt: skip


def test_ten_schedules_of_the_threads_give_the_same_bits(engine):
    model, batch = make(), puzzles(3)
    first = None
    for seed in range(1, 11):
        engine.emulated.configure(seed=seed)
        found = recurx.solve(model, batch, backend="cuda", max_steps=2, sigma=0.1)
        first = first or found
        for name in ("predictions", "steps", "q", "halted"):
            assert torch.equal(getattr(found, name), getattr(first, name)), (seed, name)


def test_several_samples_share_an_owner(engine, monkeypatch):
    """Two samples of 11 tokens in 32 rows; an idle slot beside a busy one harms nobody."""
    model, batch = make(), puzzles(5)
    who = on_cuda.reasoner(model, {n: s[0] for n, s in model.inner.initial_states(1).items()})
    plan = engine.queue_plan(who.problem(5, "cpu"), torch.device("cpu"))
    settings = (("owners", 1), ("samples", 2), ("tiles", 2), ("in_scratch", 0))
    one = dataclasses.replace(plan, settings=settings)
    monkeypatch.setattr(engine, "queue_plan", lambda *_: one)
    inside, loop = both(model, batch, max_steps=3)
    assert_same(inside, loop)


def test_refusals_say_why(engine):
    with pytest.raises(recurx.BackendUnavailable, match="bfloat16"):
        recurx.solve(make(forward_dtype="float32"), puzzles(2), backend="cuda")
    with pytest.raises(recurx.InvalidArgument, match="backend"):
        recurx.solve(make(), puzzles(2), backend="cuba")
    empty = recurx.solve(make(), puzzles(0), backend="cuda")
    assert len(empty) == 0
    library = engine.library()
    p, plan = cuda_abi.RxRecursion(), cuda_abi.RxOwnerPlan(1, 1, 2)
    with pytest.raises(CudaError, match="entries, rollouts, max_steps and vocab"):
        library.call("rx_owner_sm80_solve", p, plan, cuda_abi.RxSolve(), None)


class Bug(NamedTuple):
    """BUG in `new` is true while this one is awake."""

    name: str
    file: str
    old: str
    new: str


QUEUE, OWNERS = "solve.cuh", "owner_sm80/solve.cuh"
WRITTEN, READ = "__syncthreads();  // the states are written", "__syncthreads();  // all have read"
ANSWER = "rx::answer_rows(p.r, s, int(blockIdx.x) * p.at.samples + i)"
BUGS = [
    Bug("a slot is not refilled", QUEUE,
        "  at = fresh_slot(s);", "  if (BUG)\n    at.entry = -1;\n  else\n  at = fresh_slot(s);"),
    Bug("steps go on counting", QUEUE,
        "  at = fresh_slot(s);",
        "  if (BUG)\n    at.entry = take_entry(s);\n  else\n    at = fresh_slot(s);"),
    Bug("halts below the limit", QUEUE,
        "at.q_halt > limit", "(BUG ? at.q_halt < limit : at.q_halt > limit)"),
    Bug("reads the neighbour's answer", OWNERS,
        ANSWER, ANSWER.replace("int(", "BUG ? 0 : int(")),
    Bug("the last of equal logits", QUEUE,
        "!(logit > best)", "!(BUG ? logit >= best : logit > best)"),
    Bug("noise of another step", QUEUE,
        "uint32_t(at.steps), 0};", "uint32_t(BUG ? 0 : at.steps), 0};"),
    Bug("rollouts mix puzzles", QUEUE,
        "at.entry / s.rollouts", "(BUG ? at.entry % s.rollouts : at.entry / s.rollouts)"),
    Bug("no barrier after the states", OWNERS, WRITTEN, f"if (!BUG) {WRITTEN}"),
    Bug("no barrier before the slots change", OWNERS, READ, f"if (!BUG) {READ}"),
]  # fmt: skip


@pytest.fixture(scope="module")
def buggy(tmp_path_factory):
    """A build with all bugs asleep, for two owners."""
    folder = tmp_path_factory.mktemp("queue") / "cuda"
    asleep.plant(folder, BUGS, "owner_sm80")
    broken = emulate(((64, 2),), folder=folder, flags=("-O1", "-g0"))
    broken._device = dataclasses.replace(broken._device, units=2)
    return broken


@pytest.mark.slow
@pytest.mark.parametrize("bug", [None, *BUGS], ids=lambda bug: bug.name if bug else "none awake")
def test_planted_bugs_are_found(buggy, bug):
    asleep.wake(buggy.emulated.library, BUGS, bug)
    model = make()
    with torch.no_grad():  # two equal rows of the head: ties
        model.inner.lm_head.weight[1] = model.inner.lm_head.weight[0]
    arguments = dict(max_steps=3, rollouts=2, sigma=0.5)
    with installed(buggy):
        try:
            for seed in range(1, 4):
                buggy.emulated.configure(seed=seed)
                inside, loop = both(model, puzzles(4), **arguments)
                assert_same(inside, loop)
        except (AssertionError, CudaError, EmulatorFault) as error:
            assert bug is not None, error
            return
        finally:
            buggy.emulated.unwatch_all()
    assert bug is None, f"nothing was wrong with: {bug.name}"
