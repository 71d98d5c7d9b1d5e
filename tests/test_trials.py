"""`auto` compares and times before it relies on a backend: here with doubles on the CPU."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

from recurx import backends, choices, reference, reference_backward, trials, verdicts
from recurx import route as routes
from recurx.backends import Backend, Window
from recurx.bench.problems import problem_of_config
from recurx.comparing import UntrustedKernel
from recurx.errors import BackendUnavailable, no_compiled_module
from recurx.models import TRMConfig
from recurx.nets import ATTENTION, BlockSpec, NetSpec, rope_tables
from recurx.operands import Operands
from recurx.plan import DEVICES
from recurx.problem import Problem
from recurx.route import Request, route
from recurx.schedule import Schedule


class OutOfResources(Exception):
    """As Triton's own: no RuntimeError."""


class Double(Backend):
    """The reference, with a fault to plant, and a count of its runs."""

    name = "double"
    device_types = ("cpu",)

    def __init__(self, fault=None):
        self.fault, self.runs = fault, 0

    def why_unavailable(self):
        return None

    def why_unsupported(self, problem):
        return None

    def run(self, problem, operands, span):
        self.runs += 1
        if self.fault == "compile":
            raise OutOfResources("out of resource: shared memory")
        if self.fault == "raise":
            raise RuntimeError("recurx._C: launch failed (cudaErrorInvalidValue)")
        if self.fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        carry = dict(zip(problem.schedule.states, operands.states, strict=True))
        nets = problem.bind(operands.weights)
        rope = None if self.fault == "rope" else operands.rope
        out = list(reference.run(problem.schedule, nets, operands.x, carry, rope, *span).values())
        if self.fault == "nan":
            out = [state * float("nan") for state in out]
        if self.fault == "swap":
            out = out[::-1]
        return out


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def inputs(request):
    """A problem on the CPU, and its tensors."""
    block = BlockSpec(ATTENTION, 64, 128, num_heads=2)
    problem = Problem(
        Schedule.trm(2, 2), (("L", NetSpec((block, block))),), 3, 17, 64, request.param, "cpu",
        rope=True,
    )  # fmt: skip
    weights = [torch.randn(shape) / shape[1] ** 0.5 for shape in block.weight_shapes * 2]
    x, *states = (torch.randn(3, 17, 64).to(request.param) for _ in range(3))
    return problem, Operands(x, tuple(states), tuple(weights), rope_tables(17, 32))


def use(monkeypatch, double):
    """`auto` knows this double and PyTorch; returns what `auto` takes for (problem, operands)."""
    eager = backends.get("eager")
    monkeypatch.setattr(backends, "ORDER", ("double", "eager"))
    monkeypatch.setattr(backends, "get", {"double": double, "eager": eager}.__getitem__)
    trials.forget()

    def choose(problem, operands):
        return backends.get(trials.settled(problem, Request(), operands).backend)

    return choose


@pytest.fixture(autouse=True)
def nothing_known():
    trials.forget()
    yield
    trials.forget()


def test_a_right_backend_is_compared_once_and_then_used(monkeypatch, inputs):
    double = Double()
    choose = use(monkeypatch, double)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(*inputs) is double
        assert choose(*inputs) is double
    assert double.runs == 1
    trials.forget()
    assert choose(*inputs) is double and double.runs == 2


@pytest.mark.parametrize("fault", ["rope", "nan", "raise", "compile", "swap"])
def test_a_wrong_backend_is_left_with_a_warning(monkeypatch, inputs, fault):
    double = Double(fault)
    choose = use(monkeypatch, double)
    with pytest.warns(UntrustedKernel, match=r"'double'.*`auto` goes on without it"):
        assert choose(*inputs).name == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(*inputs).name == "eager"  # remembered, and warned of once
    assert double.runs == 1


def test_too_little_memory_is_no_verdict(monkeypatch, inputs):
    double = Double("memory")
    choose = use(monkeypatch, double)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(*inputs).name == "eager"
        double.fault = None
        assert choose(*inputs) is double


def test_nothing_is_compared_nor_relied_on_inside_a_capture(monkeypatch, inputs):
    double = Double()
    choose = use(monkeypatch, double)
    monkeypatch.setattr(trials, "_capturing", lambda x: True)
    assert choose(*inputs).name == "eager"
    monkeypatch.setattr(trials, "_capturing", lambda x: False)
    assert choose(*inputs) is double
    monkeypatch.setattr(trials, "_capturing", lambda x: True)
    assert choose(*inputs) is double  # known by now


def test_the_order_follows_the_predicted_times_of_several_fused_backends(monkeypatch, inputs):
    problem = inputs[0]
    monkeypatch.setattr(backends, "ORDER", ("slow", "fast", "eager"))
    monkeypatch.setattr(backends, "auto_may_take", lambda name, device: True)
    monkeypatch.setattr(backends, "why_not", lambda name, problem: None)
    times = {"slow": 2.0, "fast": 1.0}
    monkeypatch.setattr(choices, "predicted", lambda name, p, device: times[name])
    assert choices.fused_for(problem, torch.device("cpu")) == ["fast", "slow"]
    monkeypatch.setattr(backends, "why_not", lambda name, p: "no" if name == "fast" else None)
    assert choices.fused_for(problem, torch.device("cpu")) == ["slow"]


# ---- the window's backward is compared too ------------------------------------------------------


class Windowed(Double):
    """A double with a window: autograd over the reference, with a fault to plant in a gradient."""

    def window(self, problem):
        return ReferenceWindow(self.fault)


class ReferenceWindow(Window):
    def __init__(self, fault=None, pause=0.0):
        self.fault, self.pause = fault, pause

    def kept(self, problem, span, save):
        return []

    def forward(self, problem, operands, span, save):
        return backends.get("eager").run(problem, operands, span), []

    def backward(self, problem, operands, span, save, outs, kept, d_outs, wants):
        flat = [torch.zeros_like(operands.x) if d is None else d for d in d_outs]
        grads = reference_backward.run(problem, operands, span, flat)
        if self.fault == "x":
            grads[0] = grads[0] * 1.1
        if self.fault == "weight":
            grads[-1] = grads[-1].flip(0)
        if self.fault == "raise backward":
            raise RuntimeError("an illegal instruction was encountered")
        time.sleep(self.pause)
        return [grad if want else None for grad, want in zip(grads, wants, strict=True)]


def settled(inputs, **request):
    return trials.settled(inputs[0], Request(grad=True, **request), inputs[1])


def test_a_right_backward_is_compared_once(monkeypatch, inputs):
    use(monkeypatch, Windowed())
    compared = []
    real = trials.right_window
    monkeypatch.setattr(trials, "right_window", lambda *given: compared.append(1) or real(*given))
    for _ in range(2):
        found = settled(inputs)
        assert (found.backend, found.forward, found.backward) == ("double", "double", "double")
    assert len(compared) == 1
    assert "window 3..5 on double, forward and backward" in str(found)


@pytest.mark.parametrize("fault", ["x", "weight", "raise backward"])
def test_a_wrong_backward_leaves_the_window_to_pytorch(monkeypatch, inputs, fault):
    use(monkeypatch, Windowed(fault))
    with pytest.warns(UntrustedKernel, match=r"'double'.*the gradients of one call"):
        found = settled(inputs)
    assert (found.backend, found.forward, found.backward) == ("double", "eager", "autograd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert settled(inputs).backward == "autograd"
    assert settled(inputs, save="block").backward == "recompute"
    states = settled(inputs, save="states")
    assert (states.forward, states.backward) == ("double", "reference")


def test_inputs_that_are_not_finite_are_no_verdict(monkeypatch, inputs):
    problem, operands = inputs
    choose = use(monkeypatch, Double())
    broken = operands._replace(x=operands.x * float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(problem, broken).name == "eager"
        assert choose(problem, operands).name == "double"


# ---- faster? -------------------------------------------------------------------------------------


class Slow(Windowed):
    """Takes so many seconds a call more."""

    def __init__(self, pause, backward=0.0):
        super().__init__()
        self.pause, self.slow_backward = pause, backward

    def run(self, problem, operands, span):
        time.sleep(self.pause * (span.stop - span.start))
        return super().run(problem, operands, span)

    def window(self, problem):
        return ReferenceWindow(pause=self.slow_backward)


@pytest.fixture
def measuring(monkeypatch, tmp_path):
    monkeypatch.setenv("RECURX_AUTOTUNE", "1")
    monkeypatch.setenv("RECURX_CACHE", str(tmp_path))
    trials.forget()
    return tmp_path / "verdicts-v1"


def test_a_fused_backend_that_is_slower_is_not_taken(monkeypatch, inputs, measuring):
    choose = use(monkeypatch, Slow(0.05))
    assert choose(*inputs).name == "eager"
    found = route(inputs[0])
    assert found.settled and "measured" in str(found) and "as fast as double" in found.calls.why
    times = {entry.backend: entry.measured for entry in found.considered}
    assert times["double"] > times["eager"] > 0
    assert "backend 'auto' -> eager" in str(found)
    monkeypatch.setenv("RECURX_AUTOTUNE", "0")
    routes.forget()
    assert choose(*inputs).name == "double"  # by the model alone, which has no plan for it


def test_within_the_margin_the_fused_backend_stays(monkeypatch, inputs, measuring):
    use(monkeypatch, Double())
    clock = {"double": 1.04e-3, "eager": 1e-3}
    named = {}

    def seconds(run, calls, device):
        return calls * clock[named[run]]

    real = trials._runs
    monkeypatch.setattr(trials, "_seconds", seconds)

    def runs(*given):
        made, most = real(*given)
        named.update({run: name for name, run in made.items()})
        return made, most

    monkeypatch.setattr(trials, "_runs", runs)
    assert trials.settled(inputs[0], Request(), inputs[1]).backend == "double"
    clock["double"] = 1.06e-3
    trials.forget()
    for file in measuring.iterdir():
        file.unlink()
    assert trials.settled(inputs[0], Request(), inputs[1]).backend == "eager"


def test_a_slow_backward_leaves_the_window_to_pytorch(monkeypatch, inputs, measuring):
    use(monkeypatch, Slow(0.0, backward=0.05))
    found = settled(inputs)
    assert (found.window.backend, found.backward) == ("eager", "autograd")
    assert "as fast as double" in found.window.why


def test_the_next_process_reads_the_verdict(monkeypatch, inputs, measuring):
    use(monkeypatch, Slow(0.05))
    assert trials.settled(inputs[0], Request(), inputs[1]).backend == "eager"
    assert len(list(measuring.iterdir())) == 1 == verdicts.count()
    timed = []
    monkeypatch.setattr(trials, "_race", lambda *given: timed.append(given))

    def next_process():
        trials.forget()
        return trials.settled(inputs[0], Request(), inputs[1]).backend

    assert next_process() == "eager" and not timed
    assert route(dataclasses.replace(inputs[0], batch=4)).backend == "eager"  # 3 counts as 4
    (file,) = measuring.iterdir()
    whole = file.read_text()
    for damaged in ("", "{", "[]", "null", whole[:-40], whole.replace("eager", "9"), "\0\xff"):
        file.write_text(damaged, encoding="latin-1")
        timed.clear()
        next_process()
        assert timed, damaged
    file.write_text(whole)
    for fact in ("torch", "recurx", "device", "triton"):
        machine = json.loads(verdicts.machine_of(torch.device("cpu"), torch.get_num_threads()))
        other = json.dumps({**machine, fact: "another"})
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(choices, "machine_of", lambda *_, other=other: other)
            timed.clear()
            next_process()
            assert timed, fact
    monkeypatch.setenv("RECURX_CACHE", "0")
    timed.clear()
    next_process()
    assert timed


def test_a_folder_that_cannot_be_written_harms_nobody(monkeypatch, inputs, measuring):
    measuring.write_text("a file where the folder should be")
    use(monkeypatch, Slow(0.05))
    assert trials.settled(inputs[0], Request(), inputs[1]).backend == "eager"
    assert verdicts.count() == 0


def test_one_of_two_threads_measures(monkeypatch, inputs, measuring):
    use(monkeypatch, Double())
    real, races = trials._race, []

    def race(*given):
        races.append(threading.get_ident())
        time.sleep(0.05)
        return real(*given)

    monkeypatch.setattr(trials, "_race", race)
    found = []

    def ask():
        found.append(trials.settled(inputs[0], Request(), inputs[1]).backend)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(races) == 1 and len(set(found)) == 1


def test_a_pinned_verdict_goes_before_all_others(monkeypatch, inputs, measuring):
    problem, operands = inputs
    use(monkeypatch, Slow(0.05))
    assert trials.settled(problem, Request(), operands).backend == "eager"
    stored = routes.stored(problem, torch.device("cpu"), Request())
    text = json.dumps(stored).replace('"chosen": "eager"', '"chosen": "double"')
    verdicts.VERDICTS.pin({**json.loads(text), "nonsense": 3, "more": {"chosen": 1}})
    assert trials.settled(problem, Request(), operands).backend == "double"
    assert json.loads(text) == routes.stored(problem, torch.device("cpu"), Request())


def test_where_files_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("RECURX_CACHE", "0")
    assert verdicts.folder() is None
    monkeypatch.delenv("RECURX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert verdicts.folder() == tmp_path / "recurx" / "verdicts-v1"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert verdicts.folder() == Path.home() / ".cache" / "recurx" / "verdicts-v1"


# ---- routes of devices that are not here --------------------------------------------------------


def test_a_device_that_is_not_here_is_taken_by_the_model():
    config = TRMConfig.sudoku_att(forward_dtype="bfloat16")
    problem = problem_of_config(config, 64, "cuda")
    found = route(problem, DEVICES["h100"], Request(grad=True))
    assert found.settled and found.backend == "cuda" and found.plan.backend == "cuda"
    assert (found.split, found.forward, found.backward) == (14, "triton", "triton")
    assert "calls 0..13 on cuda without gradient; window 14..20 on triton" in str(found)
    states = route(problem, DEVICES["h100"], Request(grad=True, save="states"))
    assert (states.forward, states.backward) == ("cuda", "triton")
    again = problem_of_config(config, 64, "cuda")
    assert again is not problem
    assert route(again, DEVICES["h100"], Request(grad=True)) is found
    old = route(problem_of_config(TRMConfig.sudoku_att(forward_dtype="float16"), 8, "cuda"),
                DEVICES["h100"])  # fmt: skip
    assert old.backend == "eager" and "float16" in str(old)
    with pytest.raises(BackendUnavailable, match="cpu"):
        route(problem, DEVICES["h100"], Request("cpu"))


def test_whoever_lacks_the_engine_is_told_once(monkeypatch, inputs):
    monkeypatch.setattr(trials, "_told_missing", False)
    monkeypatch.setattr(trials.importlib.util, "find_spec", lambda name: None)
    reason = no_compiled_module(ImportError("no such module"))
    monkeypatch.setattr(type(backends.get("cpu")), "why_unavailable", lambda self: reason)
    with pytest.warns(trials.MissingEngine, match=r"with a C\+\+ compiler on PATH run: \S+ "):
        assert trials.settled(inputs[0], Request(), inputs[1]).backend == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trials.settled(inputs[0], Request(), inputs[1])
