"""The captured step: no host in it, static addresses, replays equal to running, resumable."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from recurx.errors import InvalidArgument, RecurxError
from recurx.models import ACTLossHead
from recurx.train import Average, CapturedStep, CudaGraphs, SampleQueue, Trainer
from recurx.train.captured import tensors_of
from tests.train.guards import HostSync, Tape, formula_alone, no_host_sync
from tests.train.test_train import tiny

VARIANTS = {
    "trm": {"puzzle_emb_ndim": 16},
    "attention": {"mlp_t": False, "pos_encodings": "rope"},
    "hrm with q-learning": {"variant": "hrm", "H_layers": 1, "no_ACT_continue": False},
}


def trainer(name: str = "trm", **changes) -> Trainer:
    return Trainer(tiny(model=VARIANTS[name], loss="fused_stablemax_cross_entropy", **changes))


def captured(name: str, tape: Tape) -> Trainer:
    made = trainer(name)
    made.one_step.capturer = tape
    return made


def differing(a: Trainer, b: Trainer) -> list[int]:
    pairs = zip(a.one_step.static_tensors(), b.one_step.static_tensors(), strict=True)
    return [n for n, (x, y) in enumerate(pairs) if not torch.equal(x, y)]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_replayed_step_is_the_uncaptured_one_to_the_bit(name: str, monkeypatch) -> None:
    """Ten steps, of which the last seven are replays that repeat no Python."""
    formula_alone(monkeypatch)
    tape = Tape()
    plain, replayed = trainer(name), captured(name, tape)
    losses = []
    for step in range(10):
        first, second = plain.train_step(), replayed.train_step()
        assert first.sums == second.sums, step
        assert differing(plain, replayed) == [], step
        losses.append(first.loss)
    assert tape.warmed == 2 and tape.operations > 100 and replayed.one_step.captured
    assert len(set(losses)) == 10 and plain.average.updates == 10
    assert int(plain.queue.cursor) > 12  # samples were replaced


@pytest.mark.parametrize("name", VARIANTS)
def test_no_host_sync_and_no_address_moves(name: str) -> None:
    run = trainer(name)
    run.train_step()  # makes gradients, states, metrics
    addresses = [t.data_ptr() for t in run.one_step.static_tensors()]
    run.queue.refill()
    for _ in range(4):
        with no_host_sync():
            run.one_step._step()
        run.queue.stepped()
        run.queue.refill()
        assert [t.data_ptr() for t in run.one_step.static_tensors()] == addresses


SYNCS = {
    "item": lambda t: t.sum().item(),
    "bool": lambda t: bool(t.any()),
    "nonzero": lambda t: t.nonzero(),
    "unique": lambda t: t.unique(),
    "mask": lambda t: t[t > 0],
    "mask written": lambda t: t.clone().__setitem__(t > 0, 0),
    "masked_select": lambda t: t.masked_select(t > 0),
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
    "float": lambda t: float(t.sum()),
    "alpha": lambda t: t.add(t, alpha=t.sum()),
}


@pytest.mark.parametrize("kind", SYNCS)
def test_the_guard_sees_every_kind_of_sync(kind: str) -> None:
    with pytest.raises(HostSync), no_host_sync():
        SYNCS[kind](torch.arange(4.0))


def test_the_guard_rejects_the_parts_that_a_step_replaces() -> None:
    """AdamW that is not capturable reads its step counts."""
    run = trainer()
    adamw = torch.optim.AdamW(run.model.parameters())
    step = CapturedStep(run.one_step.head, [adamw], run.queue)
    step()
    with pytest.raises(HostSync, match=r"_local_scalar_dense|item"), no_host_sync():
        step._step()


def _bake_lr(run: Trainer) -> None:
    step, original = run.one_step, run.one_step._set_rates
    done = [0]

    def on_the_host() -> None:
        original()
        done[0] += 1
        for group in step._groups():
            group["lr"].fill_(0.01 * done[0])

    step._set_rates = on_the_host


def _bake_count(run: Trainer) -> None:
    update, done = run.average.update, [0]

    def on_the_host(model: nn.Module) -> None:
        run.average.updates = done[0]
        done[0] += 1
        update(model)

    run.average.update = on_the_host


def _bake_sampling(run: Trainer) -> None:
    take = run.queue.take

    def on_the_host(halted: torch.Tensor) -> dict[str, torch.Tensor]:
        run.queue.cursor.fill_(int(run.queue.cursor))
        return take(halted)

    run.queue.take = on_the_host


HOST_NUMBERS = {"lr": _bake_lr, "count": _bake_count, "sampling": _bake_sampling}


@pytest.mark.parametrize("bug", HOST_NUMBERS)
def test_the_tape_notices_a_number_of_the_host(bug: str) -> None:
    """Planted bugs: each is right when run, and stale when replayed."""
    plain, replayed = trainer(), captured("trm", Tape())
    for run in (plain, replayed):
        HOST_NUMBERS[bug](run)
    found: list[int] = []
    for _ in range(9):
        plain.train_step()
        replayed.train_step()
        found += differing(plain, replayed)
    assert found


def test_a_moved_tensor_is_refused() -> None:
    run = captured("trm", Tape(warm_steps=1))
    for _ in range(3):
        run.train_step()
    state = run.optimizer.state[next(run.model.parameters())]
    state["exp_avg"] = state["exp_avg"].clone()
    with pytest.raises(RecurxError, match="moved since the capture"):
        run.train_step()


def test_what_cannot_be_captured_is_refused() -> None:
    run = trainer()
    with pytest.raises(InvalidArgument, match="CUDA device"):
        CapturedStep(run.one_step.head, [], run.queue, capture=True)
    adamw = torch.optim.AdamW(run.model.parameters())
    with pytest.raises(InvalidArgument, match="capturable=True"):
        CapturedStep(run.one_step.head, [adamw], run.queue, capture=Tape())


def test_metrics_add_up_on_the_device() -> None:
    run = trainer()
    sums = [run.train_step().sums for _ in range(8)]
    totals = run.one_step.read_totals()
    assert totals["count"] == sum(s["count"] for s in sums) > 0
    assert totals["loss"] == pytest.approx(sum(s["loss"] for s in sums))
    assert run.one_step.read_totals()["count"] == 0
    assert run.one_step.metrics() == sums[-1]


def test_the_schedule_is_followed_on_the_device() -> None:
    run = trainer(warmup=4, lr=0.5)
    seen = []
    for _ in range(6):
        run.train_step()
        seen.append(run.optimizer.param_groups[0]["lr"].item())
    assert seen == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5])


def test_gradients_are_handed_to_synchronize_before_the_optimiser() -> None:
    run = trainer()
    step, before = run.one_step, [w.clone() for w in run.model.parameters()]
    step.synchronize = torch._foreach_zero_  # as if another rank had the opposite gradient
    run.train_step()
    rate = step.optimizers[0].param_groups[0]["lr"] * run.config.weight_decay
    for now, then in zip(run.model.parameters(), before, strict=True):
        torch.testing.assert_close(now, then * (1 - rate))  # only the decay


def test_cuda_graphs_warm_up_aside_and_register_generators(monkeypatch) -> None:
    """The calls that a GPU would get, in order; `tests/device` has the real ones."""
    said: list[str] = []

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            said.append(f"{self.name} waits for {other.name}")

    class Graph:
        def register_generator_state(self, generator: torch.Generator) -> None:
            said.append("generator registered")

        def replay(self) -> None:
            said.append("replayed")

    @contextmanager
    def noted(kind: str, what: object):
        said.append(f"enter {kind} {getattr(what, 'name', '')}".strip())
        yield
        said.append(f"leave {kind}")

    main = Stream("main")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: noted("stream", stream))

    def recording(graph: Graph, stream: Stream, capture_error_mode: str):
        return noted(f"{capture_error_mode} graph on", stream)

    monkeypatch.setattr(torch.cuda, "graph", recording)
    capturer = CudaGraphs(warm_steps=1, generators=[torch.Generator()])
    capturer.warm(lambda: said.append("step"))
    assert said == [
        "side waits for main", "enter stream side", "step", "leave stream", "main waits for side"
    ]  # fmt: skip
    said.clear()
    replay = capturer.capture(lambda: said.append("step"))
    recorded = ["enter thread_local graph on side", "step", "leave thread_local graph on"]
    assert said == ["generator registered", *recorded]
    replay()
    assert said[-1] == "replayed"


# ---- the queue ----------------------------------------------------------------------------------


def numbers() -> tuple[list[int], SampleQueue]:
    drawn: list[int] = []

    def draw(count: int) -> dict[str, torch.Tensor]:
        first = sum(drawn)
        drawn.append(count)
        return {"n": torch.arange(first, first + count)}

    return drawn, SampleQueue(draw, slots=5)


def test_samples_come_in_the_order_of_the_stream_whatever_was_known() -> None:
    drawn, queue = numbers()
    taken: list[int] = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        queue.refill()
        halted = torch.rand(5, generator=generator) < 0.5
        taken += queue.take(halted)["n"][halted].tolist()
        queue.stepped()
    assert taken == list(range(len(taken))) and len(taken) > 50
    assert set(drawn) == {5}  # chunks of one size, so a stream does not depend on timing


def test_a_saved_queue_goes_on_where_it_was() -> None:
    _, queue = numbers()
    for _ in range(7):
        queue.refill()
        queue.take(torch.tensor([True, False, True, True, False]))
        queue.stepped()
    waiting = queue.tensors()
    assert waiting["n"].tolist() == list(range(21, queue.put))
    other = SampleQueue(queue.draw, slots=5)  # the same stream, as a resumed run has it
    other.load(waiting)
    other.refill()
    everything = torch.ones(5, dtype=torch.bool)
    assert other.take(everything)["n"].tolist() == [21, 22, 23, 24, 25]
    with pytest.raises(InvalidArgument, match="at least 2"):
        SampleQueue(lambda count: {}, slots=5, chunks=1)


class Late:
    """An event that has not happened until somebody waits for it."""

    def __init__(self) -> None:
        self.waited = False

    def query(self) -> bool:
        return self.waited

    def synchronize(self) -> None:
        self.waited = True


def test_the_host_waits_only_when_the_ring_could_run_dry(monkeypatch) -> None:
    _, queue = numbers()
    queue = SampleQueue(queue.draw, slots=5, chunks=4)
    events: list[Late] = []

    def stepped() -> None:
        events.append(Late())
        queue._news.append((queue.cursor.clone(), events[-1]))

    monkeypatch.setattr(queue, "stepped", stepped)
    taken: list[int] = []
    for _ in range(12):
        queue.refill()
        halted = torch.tensor([True, False, False, True, True])
        taken += queue.take(halted)["n"][halted].tolist()
        queue.stepped()
    assert taken == list(range(36))
    assert [e.waited for e in events[:9]] == [True] * 9 and not events[-1].waited


# ---- foreign heads ------------------------------------------------------------------------------


def test_another_head_with_a_plain_optimizer_runs_too() -> None:
    """The contract is the call, not the class: a head like the official one, SGD, no average."""

    class Head(nn.Module):
        def __init__(self, head: ACTLossHead) -> None:
            super().__init__()
            self.inner_head = head

        def initial_carry(self, batch):
            return self.inner_head.initial_carry(batch)

        def forward(self, return_keys, **kwargs):
            return self.inner_head(return_keys, **kwargs)

    run = trainer()
    head = Head(run.one_step.head)
    queue = SampleQueue(run.data.draw, 6)
    sgd = torch.optim.SGD(head.parameters(), lr=0.1)
    step = CapturedStep(head, [sgd], queue, average=Average(head), capture=False)
    before = [w.clone() for w in head.parameters()]
    for _ in range(3):
        step()
    assert not step.captured and len(tensors_of(step.carry)) == 7
    assert any(not torch.equal(a, b) for a, b in zip(before, head.parameters(), strict=True))
