"""Which GPU and which stream a launch meets, told by stand-ins: a second GPU is seldom here.

Triton launches on the current device, whatever its tensors say, and memory that one stream filled
must not be read by another.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from recurx import ops
from recurx.backends import graphs
from recurx.backends.cuda import Cuda
from recurx.bench.host import simulated
from recurx.operands import Operands
from recurx.plan import DEVICES
from tests.backends.test_second_call import StubLibrary, recursion
from tests.factories import make_net

pytest.importorskip("triton", reason="triton has no wheel for this platform")
from triton.runtime.jit import JITFunction

from recurx.backends import triton

# ---- the current device ------------------------------------------------------------------------


class Launches:
    """Kernels that were launched, each with the tensor whose device was current (None: nobody's);
    nothing runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[tuple[str, Any]] = []
        current: list[Any] = [None]

        @contextlib.contextmanager
        def device_of(tensor):
            current.append(tensor)
            yield
            current.pop()

        def launch(kernel, *_, **__):
            self.found.append((kernel.__name__, current[-1]))

        monkeypatch.setattr(torch.cuda, "device_of", device_of)
        monkeypatch.setattr(JITFunction, "run", launch)


def adam_atan2() -> None:
    from recurx.kernels.adam_atan2 import adam_atan2
    from recurx.kernels.multi_tensor import Tables

    lists = [[torch.ones(8)] for _ in range(4)]
    betas = 0.9, 0.99
    adam_atan2(*lists, [torch.ones(())], lr=1.0, betas=betas, weight_decay=0.0, tables=Tables())


def ema() -> None:
    from recurx.kernels.ema import ema
    from recurx.kernels.multi_tensor import Tables

    ema([torch.ones(8)], [torch.ones(8)], 0.5, tables=Tables())


def sign_sgd() -> None:
    from recurx.kernels.sign_sgd import sign_sgd

    ids = torch.tensor([1, 2])
    sign_sgd(torch.ones(4, 8), torch.ones(2, 8), ids, lr=1.0, weight_decay=0.0)


def stablemax() -> None:
    from recurx.kernels.stablemax_cross_entropy import stablemax_backward, stablemax_forward

    logits, labels = torch.ones(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    stablemax_forward(logits, labels, -100)
    stablemax_backward(torch.ones(2, 3), logits, labels, -100)


def act_halt() -> None:
    from recurx.kernels.act_halt import act_halt

    act_halt(torch.ones(3, dtype=torch.int32), torch.ones(3), None, torch.zeros(2).long(), 4, 0)


def queue_take() -> None:
    from recurx.kernels.queue_take import queue_take

    queue_take(torch.ones(3, dtype=torch.bool), torch.zeros((), dtype=torch.int64), 8)


def engine(kind: str) -> Callable[[], None]:
    def run() -> None:
        problem, operands, span = recursion(2, torch.bfloat16)
        with simulated(DEVICES["h100"], kinds=(kind,)):
            triton.BACKEND.run(problem, operands, span)

    run.__name__ = kind
    return run


def window() -> None:
    problem, operands, span = recursion(2, torch.bfloat16)
    span = span._replace(start=problem.schedule.grad_from)
    with simulated(DEVICES["h100"]):
        made = triton.BACKEND.window(problem)
        outs, kept = made.forward(problem, operands, span, "all")
        wants = [True] * (1 + len(operands.states) + len(operands.weights))
        made.backward(problem, operands, span, "all", outs, kept, outs, wants)


CASES = [adam_atan2, ema, sign_sgd, stablemax, act_halt, queue_take, window,
         engine("tiled"), engine("persistent")]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_kernel_is_launched_on_the_device_of_its_tensors(case, monkeypatch) -> None:
    launches = Launches(monkeypatch)
    case()
    assert launches.found
    assert [name for name, tensor in launches.found if not isinstance(tensor, torch.Tensor)] == []


def test_a_captured_step_is_made_on_the_device_of_its_queue(monkeypatch) -> None:
    """Its warm-up stream, its graph and the event after it are those of the current device."""
    from tests.train.guards import Tape
    from tests.train.test_captured import captured

    current, seen = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    class Noting(Tape):
        def warm(self, run):
            seen.append(list(current))
            super().warm(run)

        def capture(self, run):
            seen.append(list(current))
            return super().capture(run)

    run = captured("trm", Noting())
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(run.queue, "stepped", lambda: seen.append(list(current)))
    for _ in range(3):
        run.one_step()
    assert len(seen) == 6 and all(inside == [run.one_step.count] for inside in seen)


@pytest.fixture
def two_gpus(monkeypatch):
    """Of torch.cuda as much as `graphs` asks: the current device and stream, and which captures."""
    fake = types.SimpleNamespace(current=0, stream=7, capturing=1, streams=[], graphs=[])

    @contextlib.contextmanager
    def device(wanted):
        before, fake.current = fake.current, torch.device(wanted).index or 0
        yield
        fake.current = before

    @contextlib.contextmanager
    def graph(_, pool, stream, capture_error_mode=""):
        fake.graphs.append((fake.current, stream, pool))
        yield

    def stream(index):
        fake.streams.append(index)
        return f"stream {len(fake.streams)} of {index}"

    found = {
        "device": device, "graph": graph, "Stream": stream,
        "CUDAGraph": lambda: types.SimpleNamespace(replay=lambda: None),
        "current_device": lambda: fake.current,
        "current_stream": lambda device: types.SimpleNamespace(cuda_stream=fake.stream),
        "graph_pool_handle": lambda: f"pool {len(fake.streams)}",
        "is_current_stream_capturing": lambda: fake.current == fake.capturing,
    }  # fmt: skip
    for name, value in found.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    graphs._side_of.cache_clear()
    yield fake
    graphs._side_of.cache_clear()


def test_what_may_run_side_by_side_is_captured_apart(two_gpus) -> None:
    """By GPU and by stream of the caller: what is captured on one shares cuBLAS's workspace."""
    for index, stream in ((0, 7), (1, 7), (0, 8), (0, 7), (1, 7), (0, 8)):
        two_gpus.current, two_gpus.stream = index, stream
        graphs.cuda_capture(lambda: None)
    assert two_gpus.streams == [0, 1, 0]
    sides = [(0, "stream 1 of 0", "pool 1"), (1, "stream 2 of 1", "pool 2"),
             (0, "stream 3 of 0", "pool 3")]  # fmt: skip
    twice = [side for side in sides for _ in range(2)]  # with the graph that holds the pool
    assert two_gpus.graphs == [*twice, *sides]


def test_whether_a_graph_is_captured_is_asked_of_the_tensors_device(two_gpus) -> None:
    assert not graphs.captured_outside(torch.device("cuda", 0))
    assert graphs.captured_outside(torch.device("cuda", 1))
    assert two_gpus.current == 0
    assert not graphs.captured_outside(torch.device("cpu"))


# ---- torch.compile(mode="reduce-overhead") -----------------------------------------------------


def test_ops_that_keep_memory_stay_out_of_graphs() -> None:
    """What they allocate in a warm-up would lie in the graph's pool, which PyTorch refuses."""
    if not graphs.UNSAFE_IN_GRAPHS:
        pytest.skip("this torch has no such tag")
    for op in (ops.recurse_op, ops.window_op, ops.window_backward_op):
        assert torch.Tag.cudagraph_unsafe in op.tags
    assert torch.Tag.cudagraph_unsafe not in ops.recurse_backward_op.tags  # PyTorch's operators


def test_without_the_tag_a_warm_up_counts_as_a_capture(two_gpus, monkeypatch) -> None:
    state = types.SimpleNamespace(WARMUP="warm up", EXECUTION="execution")
    manager = types.SimpleNamespace(path_state=state.WARMUP)

    def get_manager(index, create):
        assert not create
        if index:
            raise AssertionError("this thread has none")
        return manager

    trees = types.SimpleNamespace(ExecutionState=state, get_manager=get_manager)
    monkeypatch.setitem(graphs.sys.modules, "torch._inductor.cudagraph_trees", trees)
    two_gpus.capturing = None
    here, there = torch.device("cuda", 0), torch.device("cuda", 1)
    monkeypatch.setattr(graphs, "UNSAFE_IN_GRAPHS", ("tag",))
    assert not graphs.captured_outside(here)
    monkeypatch.setattr(graphs, "UNSAFE_IN_GRAPHS", ())
    assert graphs.captured_outside(here) and not graphs.captured_outside(there)
    manager.path_state = state.EXECUTION
    assert not graphs.captured_outside(here)


# ---- streams -----------------------------------------------------------------------------------


def test_rounded_weights_and_recordings_are_of_one_stream(monkeypatch) -> None:
    """Each stream fills and reads buffers of its own, so none waits for what another one filled."""
    problem, operands, span = recursion(3, torch.bfloat16)
    stream = [1]
    monkeypatch.setattr(triton, "stream_of", lambda device: stream[0])
    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: None)
    with simulated(DEVICES["h100"], kinds=("tiled",)):
        backend = triton.BACKEND
        found = {}
        for stream[0] in (1, 2, 1, 2):
            backend.run(problem, operands, span)
            packed = backend.packed_nets(problem, operands.weights)
            assert found.setdefault(stream[0], packed) is packed
        assert found[1].buffer.data_ptr() != found[2].buffer.data_ptr()
        arenas = [r.buffers._arena.data_ptr() for r in backend.recordings._entries.values()]
        tables = [r.buffers._cos_sin[0].data_ptr() for r in backend.recordings._entries.values()]
        assert len(set(arenas)) == len(set(tables)) == 2


@pytest.mark.parametrize("kind", ["owner", "grid", "cluster"])
def test_tapes_are_of_one_stream(kind: str) -> None:
    import ctypes

    cuda, net = Cuda(StubLibrary(kind), DEVICES["h100"]), make_net(hidden=128)
    tapes = [
        cuda._tape(kind, net.spec, net.weights, 13, ctypes.c_void_p(stream), False)
        for stream in (1, 2, 1)
    ]
    assert tapes[0] is tapes[2] and tapes[0].data_ptr() != tapes[1].data_ptr()


# ---- memory ------------------------------------------------------------------------------------


def cut(operands: Operands, batch: int) -> Operands:
    states = tuple(state[:batch].clone() for state in operands.states)
    return operands._replace(x=operands.x[:batch].clone(), states=states)


def recordings_of_a_shrinking_batch(monkeypatch, frozen: bool) -> int:
    """How many graphs a batch asks for that loses its samples one by one."""
    import dataclasses

    from recurx.backends.weight_cache import frozen_weights

    problem, operands, span = recursion(40, torch.bfloat16)
    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: None)
    made = []
    get = graphs.RecordingCache.get
    monkeypatch.setattr(
        graphs.RecordingCache,
        "get",
        lambda self, key, make: get(self, key, lambda: made.append(key) or make()),
    )
    with (
        simulated(DEVICES["h100"], kinds=("tiled",), capture=lambda _: lambda: None),
        frozen_weights() if frozen else contextlib.nullcontext(),
    ):
        for batch in range(40, 0, -1):
            part = dataclasses.replace(problem, batch=batch)
            out = triton.BACKEND.run(part, cut(operands, batch), span)
            assert all(state.shape[0] == batch for state in out)
    return len(made)


def test_a_batch_that_shrinks_in_solve_asks_for_few_graphs(monkeypatch) -> None:
    assert recordings_of_a_shrinking_batch(monkeypatch, frozen=True) <= 7  # 64, 32, ... 1
    assert recordings_of_a_shrinking_batch(monkeypatch, frozen=False) > 20


def test_a_captured_step_keeps_no_buffers_twice(monkeypatch) -> None:
    """What its warm-up left in the engine's caches goes before the capture, which has its own."""
    from recurx import backends
    from recurx.train import Trainer
    from tests.train.test_train import tiny

    def kept() -> int:
        buffers = [r.buffers for r in triton.BACKEND.recordings._entries.values()]
        packed = [entry.made.buffer for entry in triton.BACKEND.tapes._entries.values()]
        return sum(b._arena.nbytes for b in buffers) + sum(b.nbytes for b in packed)

    held: dict[str, int] = {}

    class Captures:
        warm_steps = 1

        def warm(self, run):
            run()
            held["warm"] = kept()

        def capture(self, run):
            held["capture"] = kept()
            with monkeypatch.context() as inside:
                inside.setattr(triton, "captured_outside", lambda device: True)
                run()
            return lambda: None

    with simulated(DEVICES["h100"], kinds=("tiled",)):
        monkeypatch.setattr(JITFunction, "run", lambda *_, **__: None)
        config = tiny(batch_size=2, model={"hidden_size": 32, "H_cycles": 2, "L_cycles": 1})
        run = Trainer(config, backend="triton")
        run.one_step.capturer = Captures()
        for _ in range(2):
            run.one_step()
        assert held["warm"] > 0 and held["capture"] == 0 and kept() == 0
        assert backends.get("triton") is triton.BACKEND


def test_a_slice_is_no_larger_than_a_recording_should_be() -> None:
    import dataclasses

    from recurx.plan.triton import MAX_SLICE, candidates

    problem, _, _ = recursion(1, torch.bfloat16)
    for batch in (64, 129, 768, 4096):
        large = dataclasses.replace(problem, batch=batch, device_type="cuda")
        sizes = [p["slice"] for p in candidates(large, DEVICES["h100"]) if p.kind == "tiled"]
        assert sizes and max(sizes) <= min(batch, MAX_SLICE)


def test_a_queue_asks_the_stream_of_its_own_device(monkeypatch) -> None:
    """What a step took is known when that stream is so far, whichever device is current."""
    from recurx.train import SampleQueue

    recorded = []
    event = types.SimpleNamespace(record=lambda stream: recorded.append(stream))
    queue = SampleQueue(lambda n: {"x": torch.zeros(n)}, slots=2)
    queue.device, empty = torch.device("cuda", 1), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *s, pin_memory, **how: empty(*s, **how))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    queue.stepped()
    assert recorded == ["stream of cuda:1"]
