"""recurx.solve(backend="cuda") by the cluster kernel (emulated): one queue for many clusters.

The yardstick is the loop on the host over the same kernel. A cluster of 4 CTAs has two slots, which
take their steps together; its prefix of 60 tokens puts the answers into both CTAs of a sample. With
a prefix of 12 tokens two samples share two CTAs: a cluster of 4 has four slots.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re

import pytest
import torch

import recurx
from emulator import asleep
from emulator.build import KERNELS, Emulated, EmulatorFault, build, unavailable
from emulator.cluster_recursion import FILES
from emulator.owner import EmulatedCuda, installed
from recurx.backends.cuda_abi import RxClusterPlan, RxSolve
from recurx.backends.cuda_launch import describe
from recurx.errors import CudaError
from recurx.nets import KINDS
from recurx.operands import Span
from recurx.plan import DEVICES, cuda, cuda_cluster
from recurx.schedule import Schedule, Step
from recurx.solving.reasoner import reasoner
from tests.factories import make_net, problem_for
from tests.small_solvers import MODELS, VOCAB
from tests.solving.test_on_cuda import assert_same, both, make, puzzles

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

WIDE = dict(hidden_size=128, inner_multiple=64, L_cycles=1)
SPLIT = dict(puzzle_emb_ndim=128, puzzle_emb_len=60, num_puzzle_identifiers=3, **WIDE)
PACKED = {**SPLIT, "puzzle_emb_len": 12}
ONE_WIDTH = "-DRX_CLUSTER_WIDTHS(X)=X(128)"


class Clusters(EmulatedCuda):
    """The backend over the cluster kernel alone: `places` clusters of `size` CTAs at once."""

    size, places = 4, 1

    def queue_plan(self, problem, device):
        h100 = dataclasses.replace(self._device, clusters=((128, self.size, self.places),))
        plans = cuda_cluster.cluster_plans(problem, h100)
        return next(plan for plan in plans if plan["cluster"] == self.size)


def emulate(sources=None, checked=True):
    files = [(sources or KERNELS) / FILES[0], *(KERNELS / name for name in FILES[1:])]
    path = build(files, checked, (ONE_WIDTH,))
    return Clusters(Emulated(path, checked), (), DEVICES["h100"])


@pytest.fixture(scope="module")
def plain():
    return emulate(checked=False)


@pytest.fixture(scope="module")
def checked():
    return emulate()


@contextlib.contextmanager
def ready(clusters):
    clusters.emulated.configure(seed=1)
    clusters.size, clusters.places = 4, 1
    with installed(clusters):
        yield clusters
    clusters.emulated.unwatch_all()


@pytest.fixture
def engine(plain):
    """Without the race checker, which takes ten times as long."""
    with ready(plain):
        yield plain


@pytest.fixture
def watched(checked):
    with ready(checked):
        yield checked


@pytest.mark.parametrize("name", ["prefix", "tokens", "single-z", "hier6", "hrm", "damped"])
def test_queue_and_halting_give_the_answers_of_the_loop(engine, name):
    """Seven samples for two slots of one cluster."""
    changes = dict(damping=0.7, scale=0.9) if name == "damped" else MODELS[name]
    compare_with_the_loop(engine, {**changes, **SPLIT})


@pytest.mark.parametrize("name", ["prefix", "single-z", "hier6", "hrm"])
def test_packed_samples_get_the_answers_of_the_loop(engine, name):
    """Seven samples for the two slots of two CTAs."""
    engine.size = 2
    compare_with_the_loop(engine, {**MODELS[name], **PACKED})


def compare_with_the_loop(engine, changes):
    inside, loop = both(make(**changes), puzzles(7, rows=3), max_steps=4)
    assert_same(inside, loop)
    assert len(set(inside.steps.tolist())) > 1, "all took the same steps: nothing was queued"


@pytest.mark.parametrize("size, places", [(2, 3), (4, 2), (8, 1)])
@pytest.mark.parametrize("model, count", [(SPLIT, 5), (PACKED, 7)], ids=["split", "packed"])
def test_any_number_of_slots_gives_the_same_answers(engine, size, places, model, count):
    """Of packed samples, too, whichever half of the rows a slot has."""
    model, batch = make(**model), puzzles(count, rows=3)
    found = recurx.solve(model, batch, backend="cuda", max_steps=3)
    engine.size, engine.places = size, places
    other = recurx.solve(model, batch, backend="cuda", max_steps=3)
    for name in ("predictions", "steps", "q", "halted"):
        assert torch.equal(getattr(other, name), getattr(found, name)), name


@pytest.mark.parametrize("model", [SPLIT, PACKED], ids=["split", "packed"])
def test_rollouts_logits_and_trace_are_those_of_the_loop(engine, model):
    arguments = dict(max_steps=2, rollouts=3, sigma=0.5, seed=11, logits=True, trace=True)
    inside, loop = both(make(**model), puzzles(2), **arguments)
    assert_same(inside, loop)
    assert torch.equal(inside.trace[: len(loop.trace)], loop.trace)
    torch.testing.assert_close(inside.logits, loop.logits, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("model, size", [(SPLIT, 4), (PACKED, 2)], ids=["split", "packed"])
def test_nothing_races_while_slots_are_refilled(watched, model, size):
    watched.size = size
    inside, loop = both(make(**model), puzzles(5, rows=3), max_steps=3)
    assert_same(inside, loop)


@pytest.mark.slow
@pytest.mark.parametrize("model, size", [(SPLIT, 4), (PACKED, 2)], ids=["split", "packed"])
def test_ten_schedules_of_the_threads_give_the_same_bits(watched, model, size):
    watched.size = size
    model, batch = make(**model), puzzles(size + 1, rows=3)
    first = None
    for seed in range(1, 11):
        watched.emulated.configure(seed=seed)
        found = recurx.solve(model, batch, backend="cuda", max_steps=1, sigma=0.1)
        first = first or found
        for name in ("predictions", "steps", "q", "halted"):
            assert torch.equal(getattr(found, name), getattr(first, name)), (seed, name)


def test_a_plan_has_a_slot_for_each_sample_it_holds(engine):
    library, r = engine.library(), describe(one_call(KINDS[0], 71), Span(0, 1))
    r.batch, solve = 3, RxSolve(5, 1, 1, 0, 0, 0, VOCAB)
    with pytest.raises(CudaError, match="batch is 3; it must be the number of slots, 4"):
        library.call("rx_cluster_sm90a_solve", r, RxClusterPlan(4), solve, None)
    with pytest.raises(CudaError, match="cluster is 0; 2, 4 or 8"):
        library.call("rx_cluster_sm90a_solve", r, RxClusterPlan(0), solve, None)
    r.tokens = 64
    with pytest.raises(CudaError, match="batch is 3; it must be the number of slots, 4"):
        library.call("rx_cluster_sm90a_solve", r, RxClusterPlan(2), solve, None)
    r.batch, r.tokens, solve.prefix = 4, 71, 128
    with pytest.raises(CudaError, match="a prefix of 128 leaves no answer in 71 tokens"):
        library.call("rx_cluster_sm90a_solve", r, RxClusterPlan(4), solve, None)


@pytest.mark.parametrize("kind", KINDS)
def test_plan_and_kernel_pack_as_many_samples(engine, kind):
    """The kernel says how many by the slots of a cluster."""
    library, solve = engine.library(), RxSolve(5, 1, 1, 0, 0, 0, VOCAB)
    for tokens in range(1, 129):
        problem = one_call(kind, tokens)
        r = describe(problem, Span(0, 1))
        each = cuda_cluster.samples_together(problem)
        slots = f"must be the number of slots, {2 * each} "
        with pytest.raises(CudaError, match=slots):
            library.call("rx_cluster_sm90a_solve", r, RxClusterPlan(4), solve, None)
        plan = cuda_cluster.cluster_plans(problem, DEVICES["h100"])[0]
        assert (plan["samples"], cuda.slots(plan)) == (each, each)


def one_call(kind, tokens):
    schedule = Schedule((Step("L", "z", ("z",), ("x",)),))
    net = make_net(kind, blocks=1, tokens=tokens, hidden=128, heads=2, inner=128, token_inner=64)
    x = torch.zeros(1, tokens, 128, dtype=torch.bfloat16)
    return dataclasses.replace(problem_for(schedule, {"L": net}, x), device_type="cuda")


def test_the_queue_runs_on_the_faster_kernel():
    """On an H100 two CTAs a sample, on an A100 the owner; both say how many slots they have."""
    model = make(**SPLIT)
    fresh = {name: s[0] for name, s in model.inner.initial_states(1).items()}
    problem = dataclasses.replace(reasoner(model, fresh).problem(1000, "cpu"), device_type="cuda")
    for name, kind, slots in (("h100", "cluster", 60), ("a100", "owner", 108)):
        device = DEVICES[name]
        found = cuda.candidates(problem, device, kinds=cuda.QUEUES)
        plan = min(found, key=lambda plan: plan.order(device))
        assert plan.kind == kind and cuda.slots(plan) == slots, plan


@dataclasses.dataclass(frozen=True)
class Bug:
    name: str
    old: str
    new: str
    file: str = "cluster_sm90a/solve.cuh"
    found: str = ""  # in the report

    @property
    def shown_by(self) -> str:
        return "packed" if "packed" in self.name else "split"


# Of Queue::end_step.
ANSWERS = """\
    const int warp = int(rx::opaque(threadIdx.x) - kProducers) / 32, first = int(at.half()) * kRows;
#pragma unroll 1
    for (int row = first + warp; row < first + kRows; row += kWarps) {
      const int sample = sample_of(p, row), token = token_of(p, row);
      const rx::Slot now = slot(mine() + sample);
      if (now.entry < 0 || token < p.solve.prefix || token >= p.r.tokens) continue;
      rx::answer_token(p.r, p.solve, rx::answer_rows(p.r, p.solve, place(sample)), now, token);
    }
"""

BUGS = [
    # First: it spans lines that others change.
    Bug("heads read before the state is written",
        "    sync_cluster();  // the states are written\n" + ANSWERS,
        "    if (BUG) rx::cluster_arrive();\n    else sync_cluster();\n" + ANSWERS
        + "    if (BUG) rx::cluster_wait();\n", found="race: .*memory of the backend"),
    Bug("a peer reads its slot before it has come",
        "      tell(i, now);\n    }\n    __syncwarp();\n    sync_cluster();  // the slots have",
        "      if (BUG) slot(mine() + i) = now;\n      else tell(i, now);\n    }\n"
        "    __syncwarp();\n    sync_cluster();\n    if (BUG && leads() && threadIdx.x % 32 == 0)\n"
        "      for (int i = 0; i < p.samples; i++) tell(i, slot(mine() + i));  //"),
    Bug("a slot is refilled before the peer has read it",
        "    sync_cluster();  // all have read the slots and the answers\n",
        "    if (BUG && leads() && threadIdx.x % 32 == 0 && slot(mine()).entry >= 0)\n"
        "      tell(0, rx::fresh_slot(p.solve));\n    sync_cluster();\n"),
    Bug("the next sample is told to the own CTA alone",
        "rx::mapa(to, uint32_t(cta))", "(BUG ? to : rx::mapa(to, uint32_t(cta)))"),
    Bug("every CTA takes an entry of its own",
        "return at.half() == 0 && rx", "return (BUG || at.half() == 0) && rx"),
    Bug("the first slots are not waited for",
        "    sync_cluster();  // the slots have come\n  }\n\n",
        "    if (!BUG) sync_cluster();\n  }\n\n", "cluster_sm90a/kernel.cuh"),
    Bug("a cluster ends with its first idle slot",
        "any |= slot(i).entry >= 0;",
        "any = (BUG ? i == 0 || any : true) && (slot(i).entry >= 0 || (!BUG && any));"),
    Bug("stale state: a fresh entry goes on from the old states",
        "now, int(offset / 8) - first);",
        "BUG ? rx::Slot{now.entry, 1, 0.f, 0.f} : now, int(offset / 8) - first);"),
    Bug("the second CTA begins a row too early",
        ", now, token);", ", now, token - (BUG && first && token > p.solve.prefix));"),
    Bug("a packed sample's answers are its neighbour's",
        "rx::answer_rows(p.r, p.solve, place(sample))",
        "rx::answer_rows(p.r, p.solve, place(BUG ? 0 : sample))"),
    Bug("a packed sample halts by its neighbour's q",
        "p.solve, place(i))", "p.solve, place(i * !BUG))"),
    Bug("a packed sample begins as its neighbour",
        "slot(mine() + sample);\n      if (!", "slot(mine() + sample * !BUG);\n      if (!"),
]  # fmt: skip


@pytest.fixture(scope="module")
def buggy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("queue") / "cuda"
    asleep.plant(folder, BUGS, "cluster_sm90a")
    return emulate(folder)


@pytest.fixture(scope="module")
def answered(plain):
    """Models, six samples, and the answers of the loop."""
    found, batch = {}, puzzles(6, rows=3)
    for name, changes in (("split", SPLIT), ("packed", PACKED)):
        model = make(**changes)
        with ready(plain):
            model.backend = "cuda"
            found[name] = model, batch, recurx.solve(model, batch, max_steps=3)
            model.backend = "auto"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("bug", [None, *BUGS], ids=lambda bug: bug.name if bug else "none awake")
def test_planted_bugs_are_found(buggy, answered, bug):
    asleep.wake(buggy.emulated.library, BUGS, bug)
    model, batch, loop = answered[bug.shown_by if bug else "packed"]
    try:
        with ready(buggy):
            for seed in range(1, 4 if bug else 2):
                buggy.emulated.configure(seed=seed)
                assert_same(recurx.solve(model, batch, backend="cuda", max_steps=3), loop)
    except (AssertionError, CudaError, EmulatorFault) as error:
        assert bug is not None and re.search(bug.found, str(error)), error
        return
    finally:
        buggy.emulated.unwatch_all()
    assert bug is None, f"nothing was wrong with: {bug.name}"
