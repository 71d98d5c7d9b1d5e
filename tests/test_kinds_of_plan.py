"""`auto` chooses among the kinds of plan of a backend as it does among backends."""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings

import pytest

from recurx import choices, trials, verdicts
from recurx.choices import CALLS
from recurx.comparing import UntrustedKernel
from recurx.plan import DEVICES
from recurx.route import Request, route
from tests import doubles
from tests.doubles import Double, Kinds, Windowed, use

inputs, nothing_known = doubles.inputs, doubles.nothing_known


@pytest.fixture
def measuring(monkeypatch, tmp_path):
    monkeypatch.setenv("RECURX_AUTOTUNE", "1")
    monkeypatch.setenv("RECURX_CACHE", str(tmp_path))
    trials.forget()
    return tmp_path / verdicts.FORMAT


@pytest.fixture
def clock(monkeypatch):
    """Seconds of a call by name, in the place of the real clock; and who was timed."""
    times = {"double/fused": 2e-3, "double/library": 1e-3, "eager": 1.5e-3}

    def seconds(run, name, calls, device):
        run(name, 1)
        timed.append(name)
        return calls * times[name]

    timed: list[str] = []
    monkeypatch.setattr(trials, "_seconds", seconds)
    return times, timed


def settled(inputs, **request):
    return trials.settled(inputs[0], Request(grad=True, **request), inputs[1])


@pytest.mark.parametrize("fault", ["rope", "nan", "raise", "compile"])
def test_of_a_wrong_plan_the_next_of_the_same_backend_is_taken(monkeypatch, inputs, fault):
    double = Kinds(fused=Double(fault), library=Double())
    choose = use(monkeypatch, double)
    with pytest.warns(UntrustedKernel, match=r"'double/fused'.*`auto` goes on without it"):
        assert choose(*inputs).name == "double/library"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(*inputs).name == "double/library"
    assert double.runs == 0 and double.ways["fused"].runs == double.ways["library"].runs == 1


def test_a_plan_with_a_wrong_backward_leaves_the_window_to_the_next(monkeypatch, inputs):
    use(monkeypatch, Kinds(fused=Windowed("weight"), library=Windowed()))
    with pytest.warns(UntrustedKernel, match=r"'double/fused'.*the gradients of one call"):
        found = settled(inputs)
    assert found.backend == "double/fused", "its calls without gradient are right"
    assert (found.forward, found.backward) == ("double/library", "double/library")


def test_the_fastest_plan_is_taken_and_stays_so_in_the_next_process(
    monkeypatch, inputs, measuring, clock
):
    use(monkeypatch, Kinds(fused=Windowed(), library=Windowed()))
    found = settled(inputs)
    assert found.backend == found.forward == found.backward == "double/library"
    assert "backend 'auto' -> double/library: measured, 1.50x as fast as eager" in str(found)
    assert "double/library: chosen, measured" in str(found)
    assert "double/fused: can run it, measured" in str(found)
    kept = [json.loads(file.read_text()) for file in measuring.iterdir()]
    assert [verdict["chosen"] for verdict in kept] == ["double/library"] * 2  # calls and window
    assert all(set(verdict["seconds"]) == set(clock[0]) for verdict in kept)
    clock[1].clear()
    trials.forget()  # as the next process finds it
    again = settled(inputs)
    assert again.settled and again.backend == again.backward == "double/library" and not clock[1]


def test_a_plan_that_was_best_goes_first_where_it_must_be_compared_again(
    monkeypatch, inputs, measuring, clock
):
    double = Kinds(fused=Windowed(), library=Windowed())
    choose = use(monkeypatch, double)
    choose(*inputs)
    for way in double.ways.values():
        way.runs = 0
    trials.forget()
    for _ in range(3):
        assert choose(*inputs).name == "double/library"
    assert (double.ways["library"].runs, double.ways["fused"].runs) == (1, 0)


def test_pytorch_still_wins_over_all_plans(monkeypatch, inputs, measuring, clock):
    clock[0]["eager"] = 0.9e-3
    choose = use(monkeypatch, Kinds(fused=Windowed(), library=Windowed()))
    assert choose(*inputs).name == "eager"
    found = route(inputs[0])
    assert found.calls.why == "measured, 1.11x as fast as double/library"


@pytest.mark.parametrize("stale", ["double/gone", "double", "nonsense/", "cuda/owner"])
def test_a_verdict_for_what_is_no_plan_today_is_ignored(
    monkeypatch, inputs, measuring, clock, stale
):
    choose = use(monkeypatch, Kinds(fused=Windowed(), library=Windowed()))
    assert choose(*inputs).name == "double/library"
    (file,) = measuring.iterdir()
    text = file.read_text()
    file.write_text(text.replace("double/library", stale))
    trials.forget()
    clock[1].clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(*inputs).name == "double/library"
    assert clock[1], "timed anew"
    assert json.loads(file.read_text())["chosen"] == "double/library"


def test_the_model_only_prunes_and_never_the_library(monkeypatch, inputs, measuring, clock):
    """However badly it is predicted."""
    times = {"double/slow": 9.0, "double/library": 99.0, "double/fused": 1.0, "eager": 2.0}
    monkeypatch.setattr(choices, "predicted", functools.cache(lambda name, *_: times[name]))
    monkeypatch.setattr(trials, "SAFE", "double/library")
    choose = use(monkeypatch, Kinds(slow=Windowed(), library=Windowed(), fused=Windowed()))
    assert choose(*inputs).name == "double/library"
    assert set(clock[1]) == {"double/fused", "double/library", "eager"}


def test_what_is_safe_is_a_plan_of_the_registry():
    problem = dataclasses.replace(doubles.a_problem(), device_type="cuda")
    names = [entry.backend for entry in route(problem, DEVICES["l4"]).considered]
    assert trials.SAFE in names, names


def test_a_backend_asked_for_by_name_takes_its_fastest_plan(monkeypatch, inputs, measuring, clock):
    double = Kinds(fused=Windowed(), library=Windowed())
    choose = use(monkeypatch, double)
    problem, device = inputs[0], inputs[1].x.device
    asked = [Request("double", grad=grad) for grad in (False, True)]
    assert [route(problem, device, one).backend for one in asked] == ["double", "double"]
    clock[0]["eager"] = 0.5e-3  # which `auto` then takes
    assert choose(*inputs).name == "eager" and settled(inputs).backward == "autograd"
    calls, training = (route(problem, device, one) for one in asked)
    assert calls.backend == "double/library" and calls.settled
    assert calls.calls.why == "measured, 0.50x as fast as eager"
    assert (training.forward, training.backward) == ("double/library", "double/library")
    fused = route(problem, device, Request("double/fused"))
    assert fused.backend == "double/fused" and fused.calls.why == "asked for"
    choices.COMPARED.keep(CALLS, "double/library", problem, device, False)
    assert route(problem, device, asked[0]).backend == "double/fused"


def test_a_plan_that_fails_while_it_is_timed_is_left(monkeypatch, inputs, measuring):
    use(monkeypatch, Kinds(fused=Windowed(), library=Windowed()))

    def seconds(run, name, calls, device):
        if name == "double/fused":
            raise RuntimeError("launch failed")
        return calls * {"double/library": 1e-3, "eager": 1.5e-3}[name]

    monkeypatch.setattr(trials, "_seconds", seconds)
    with pytest.warns(UntrustedKernel, match="'double/fused' failed"):
        found = trials.settled(inputs[0], Request(), inputs[1])
    assert found.backend == "double/library" and found.settled
