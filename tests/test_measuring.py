"""`auto` takes whatever is faster, measured once: here with doubles on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

from recurx import backends, choices, trials, verdicts
from recurx import route as routes
from recurx.bench.problems import problem_of_config
from recurx.comparing import UntrustedKernel
from recurx.errors import BackendUnavailable, no_compiled_module
from recurx.models import TRMConfig
from recurx.plan import DEVICES
from recurx.route import Request, route
from tests import doubles
from tests.doubles import Double, Slow, use

inputs, nothing_known = doubles.inputs, doubles.nothing_known


def settled(inputs, **request):
    return trials.settled(inputs[0], Request(grad=True, **request), inputs[1])


@pytest.fixture
def measuring(monkeypatch, tmp_path):
    monkeypatch.setenv("RECURX_AUTOTUNE", "1")
    monkeypatch.setenv("RECURX_CACHE", str(tmp_path))
    trials.forget()
    return tmp_path / "verdicts-v2"


def test_a_fused_backend_that_is_slower_is_not_taken(monkeypatch, inputs, measuring):
    choose = use(monkeypatch, Slow(0.05))
    assert choose(*inputs).name == "eager"
    found = route(inputs[0])
    assert found.settled and "measured" in str(found) and "as fast as double" in found.calls.why
    times = {entry.backend: entry.measured for entry in found.considered}
    assert times["double"] > times["eager"] > 0
    assert "backend 'auto' -> eager" in str(found)
    monkeypatch.setenv("RECURX_AUTOTUNE", "0")  # noticed at the next call
    assert choose(*inputs).name == "double"  # by the model alone, which has no plan for it


@pytest.mark.parametrize("fault", [RuntimeError("launch failed"), torch.OutOfMemoryError("CUDA")])
@pytest.mark.parametrize("run", range(9))
def test_an_engine_that_fails_in_any_round_is_left(monkeypatch, inputs, measuring, run, fault):
    """The first runs, the longer one before the rounds, or a round: `auto` goes on without it."""
    use(monkeypatch, Double())
    asked = []

    def seconds(run_calls, name, calls, device):
        asked.append(name)
        if name == "double" and asked.count(name) == run + 1:
            raise fault
        run_calls(name, 1)
        return calls * {"double": 1e-3, "eager": 1.5e-3}[name]

    monkeypatch.setattr(trials, "_seconds", seconds)
    monkeypatch.setattr(trials, "BUDGET", 0.03)
    told = isinstance(fault, torch.OutOfMemoryError)
    with contextlib.nullcontext() if told else pytest.warns(UntrustedKernel, match="launch failed"):
        found = trials.settled(inputs[0], Request(), inputs[1])
        if asked.count("double") <= run:  # there are fewer rounds than that
            pytest.fail("the fault never came")
    assert found.backend == "eager" and found.settled and "double" not in asked[-2:]
    assert not list(measuring.glob("*"))  # the next process tries again


def test_within_the_margin_the_fused_backend_stays(monkeypatch, inputs, measuring):
    use(monkeypatch, Double())
    clock = {"double": 1.04e-3, "eager": 1e-3}

    def seconds(run, name, calls, device):
        return calls * clock[name]

    monkeypatch.setattr(trials, "_seconds", seconds)
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
    assert verdicts.folder() == tmp_path / "recurx" / "verdicts-v2"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert verdicts.folder() == Path.home() / ".cache" / "recurx" / "verdicts-v2"


# ---- routes of devices that are not here --------------------------------------------------------


def test_a_device_that_is_not_here_is_taken_by_the_model():
    config = TRMConfig.sudoku_att(forward_dtype="bfloat16")
    problem = problem_of_config(config, 64, "cuda")
    found = route(problem, DEVICES["h100"], Request(grad=True))
    assert found.settled and found.backend == f"cuda/{found.plan.kind}" == "cuda/cluster"
    assert (found.split, found.forward, found.backward) == (14, "triton/tiled", "triton/tiled")
    on = "calls 0..13 on cuda/cluster without gradient; window 14..20 on triton/tiled, forward"
    assert on in str(found) and "cuda/cluster: chosen, predicted" in str(found)
    assert "triton/library: can run it, predicted" in str(found)
    states = route(problem, DEVICES["h100"], Request(grad=True, save="states"))
    assert (states.backend, states.forward) == ("cuda/cluster", "triton/tiled")
    assert states.backward == "triton/tiled"
    named = route(problem, DEVICES["h100"], Request("triton"))
    lines = [line for line in str(named).splitlines() if "triton/" in line]
    assert [("chosen" in line) for line in lines] == [True, False], "the model's, listed first"
    again = problem_of_config(config, 64, "cuda")
    assert again is not problem
    assert route(again, DEVICES["h100"], Request(grad=True)) is found
    old = route(problem_of_config(TRMConfig.sudoku_att(forward_dtype="float16"), 8, "cuda"),
                DEVICES["h100"])  # fmt: skip
    assert old.backend == "eager" and "float16" in str(old)
    with pytest.raises(BackendUnavailable, match="cpu"):
        route(problem, DEVICES["h100"], Request("cpu"))


def test_whoever_lacks_the_engine_is_told_once(monkeypatch, inputs):
    trials._tell_of_missing_engine.cache_clear()
    reason = no_compiled_module(ImportError("no such module"))
    monkeypatch.setattr(type(backends.get("cpu")), "why_unavailable", lambda self: reason)
    with pytest.warns(trials.MissingEngine, match=r"with a C\+\+ compiler on PATH run: \S+ "):
        assert trials.settled(inputs[0], Request(), inputs[1]).backend == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trials.settled(inputs[0], Request(), inputs[1])


@pytest.mark.parametrize("setting", ["RECURX_CPU_ISA", "RECURX_CPU_THREADS"])
def test_a_setting_that_is_none_is_told_once(monkeypatch, inputs, setting):
    if backends.get("cpu").why_unavailable() is not None:
        pytest.skip("backend cpu is not built")
    trials._tell_of_missing_engine.cache_clear()
    monkeypatch.setenv(setting, "foo")
    backends.changed()
    what = f"{setting}: expected .*, got 'foo'"
    try:
        with pytest.warns(trials.MissingEngine, match=f"PyTorch.*{what}"):
            assert trials.settled(inputs[0], Request(), inputs[1]).backend == "eager"
        with pytest.raises(BackendUnavailable, match=what):
            trials.settled(inputs[0], Request("cpu"), inputs[1])
    finally:
        monkeypatch.undo()
        backends.changed()
